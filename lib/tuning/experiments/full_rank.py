"""Chapter 6's run: when is a rank full? Random pairs to memorize, by adapters on one layer.

    python -m tuning.experiments.full_rank

A pair is a prompt of three random tokens and one of 64 words, 6 bits, that has nothing to do with it. Only the model's
last layer has adapters, beside all its linear layers; what enters that layer never changes and is computed once. Each
rank has its rate from a sweep of short trainings at one number of pairs. A training goes on until the bits that it
holds have grown by less than 2 % in 200 steps, so that what is full is the rank and not the time.

Bits held are 6 a pair, less those that the answers still cost: pairs × (6 + the mean of log2 p(answer)), at least 0.
"""

import math

import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ..lora import add_lora, unload
from ..models import load_lm
from .record import Recorder, option_parser

RANKS = (1, 4, 16, 64)
PAIRS = (256, 1024, 2048, 4096)
SWEPT_ON = 1024
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
WORDS, LENGTH = 64, 3
BATCH, BLOCK, BLOCKS = 512, 200, 12  # steps between two looks at the bits, and how many looks at most
SWEPT = 3  # looks of a training in the sweep
ENOUGH = 1.02


def last_position(layer, states, cos, sin):
    """A Llama layer's output at the last position alone, (n, hidden), from the states of all, (n, length, hidden).

    Only keys and values need the other positions, so this is 2.5 times as fast as the whole layer for three of them.
    """
    attention, inputs = layer.self_attn, layer.input_layernorm(states)

    def heads(found):
        return found.view(*found.shape[:2], -1, attention.head_dim).transpose(1, 2)  # (n, heads, positions, head_dim)

    q, k = heads(attention.q_proj(inputs[:, -1:])), heads(attention.k_proj(inputs))
    q, _ = apply_rotary_pos_emb(q, q, cos[:, -1:], sin[:, -1:])
    k, _ = apply_rotary_pos_emb(k, k, cos, sin)
    mixed = F.scaled_dot_product_attention(q, k, heads(attention.v_proj(inputs)), enable_gqa=True)
    found = states[:, -1] + attention.o_proj(mixed.flatten(1))
    return found + layer.mlp(layer.post_attention_layernorm(found))


class LastLayer:
    """A causal model's last layer, norm and head, on states that are computed once.

    Args:
        ids: (n, length) token ids; words: token ids that compete.
    """

    @torch.no_grad()
    def __init__(self, model, ids, words, batch_size=512):
        self.layer, self.norm = model.model.layers[-1], model.model.norm
        self.head = model.lm_head.weight[words]  # (words, hidden)
        states, caught = [], {}

        def catch(module, inputs, options):
            states.append(inputs[0] if inputs else options["hidden_states"])
            caught.update(options)

        hook = self.layer.register_forward_pre_hook(catch, with_kwargs=True)
        for part in ids.split(batch_size):
            model(input_ids=part, use_cache=False, logits_to_keep=1)
        hook.remove()
        self.states = torch.cat(states)  # (n, length, hidden)
        self.positions = tuple(part[:1] for part in caught["position_embeddings"])

    def logits(self, rows):
        """(len(rows), words), after the last token of each prompt."""
        return F.linear(self.norm(last_position(self.layer, self.states[rows], *self.positions)), self.head)


def pairs_of(model, tokenizer, count, seed):
    """`(ids, words, answers)`: prompts of random tokens, the words' token ids, and each prompt's place among them."""
    generator = torch.Generator().manual_seed(seed)
    plain = [token for token in range(len(tokenizer)) if token not in set(tokenizer.all_special_ids)]
    plain = torch.tensor(plain)
    ids = plain[torch.randint(len(plain), (count, LENGTH), generator=generator)]
    words = plain[torch.randperm(len(plain), generator=generator)[:WORDS]]
    answers = torch.randint(WORDS, (count,), generator=generator)
    return ids.to(model.device), words.to(model.device), answers.to(model.device)


@torch.no_grad()
def held(last, answers):
    """`(bits, share right)` of the pairs."""
    logits = torch.cat([last.logits(rows) for rows in torch.arange(len(answers)).split(BATCH)])
    left = F.cross_entropy(logits, answers).item() / math.log(2)
    bits = len(answers) * max(0.0, math.log2(WORDS) - left)
    return bits, (logits.argmax(1) == answers).double().mean().item()


def memorize(name, rank, count, lr, seed, blocks):
    """Train adapters of one rank on so many pairs until they take up no more, and say what they hold."""
    model, tokenizer = load_lm(name, dtype=torch.float32)
    model.requires_grad_(False)
    ids, words, answers = pairs_of(model, tokenizer, count, seed)
    last = LastLayer(model, ids, words)
    torch.manual_seed(seed)
    add_lora(last.layer, "all-linear", rank=rank, alpha=2 * rank)
    weights = [weight for weight in last.layer.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(seed)
    curve = []
    for _ in range(blocks):
        for _ in range(BLOCK):
            rows = torch.randint(count, (min(BATCH, count),), generator=generator)
            loss = F.cross_entropy(last.logits(rows), answers[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        curve.append(held(last, answers))
        best = max(bits for bits, _ in curve[:-1]) if curve[:-1] else 0.0
        if not math.isfinite(curve[-1][0]) or curve[-1][0] < ENOUGH * best:
            break
    unload(last.layer)
    bits, share = max(curve)
    trained = sum(weight.numel() for weight in weights)
    return {
        "rank": rank,
        "pairs": count,
        "lr": lr,
        "seed": seed,
        "bits": bits,
        "right": share,
        "trained": trained,
        "bits a number": bits / trained,
        "steps": BLOCK * len(curve),
        "curve": curve,
    }


def main(arguments=None):
    parser = option_parser(__doc__, BLOCKS)
    options = parser.parse_args(arguments)
    name, blocks = options.model, options.steps
    settings = {"model": name, "blocks": blocks}
    total = len(RANKS) * (len(RATES) + len(PAIRS))
    recorder = Recorder("full_rank", options.out, torch.device("cpu"), total, save=options.save, **settings)
    for rank in RANKS:
        swept = {
            lr: recorder.piece(f"sweep/{rank}/{lr:g}", memorize, name, rank, SWEPT_ON, lr, 0, min(SWEPT, blocks))
            for lr in RATES
        }
        best = max(swept, key=lambda lr: swept[lr]["bits"])
        for count in PAIRS:
            recorder.piece(f"run/{rank}/{count}", memorize, name, rank, count, best, 1, blocks)
    recorder.finish()


if __name__ == "__main__":
    main()
