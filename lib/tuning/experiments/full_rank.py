"""Chapter 6's run: when is a rank full? Random pairs to memorize, by one adapter.

    python -m tuning.experiments.full_rank

A pair is a prompt of two random tokens and one of 64 words, 6 bits, that has nothing to do with it. One linear layer
has an adapter, the last of the last block. What enters it and what it adds to never change, and are computed once.

Each rank has its rate from a sweep at the largest number of pairs. Every training has as many steps of 512 pairs, and
the rate falls to zero. Whether the rank is full or the time was short is asked by trainings of four times the steps.

Bits held are 6 a pair, less those that the answers still cost: pairs × (6 + the mean of log2 p(answer)), at least 0.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F

from ..lora import LoRA
from ..models import load_lm
from .record import Recorder, option_parser

RANKS = (1, 4, 16, 64)
PAIRS = (256, 1024, 4096, 16384)
RATES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 1.0)
SEEDS = (1, 2)  # the sweep has another
WORDS, LENGTH = 64, 2
BATCH, STEPS, LONGER = 512, 3000, 4


class LastLayer:
    """A causal model's last linear layer before norm and head, on inputs that are computed once.

    Args:
        ids: (n, length) token ids; words: token ids that compete; answers: (n,) places among them.
    """

    @torch.no_grad()
    def __init__(self, model, ids, words, answers, batch_size=512):
        layer, self.norm = model.model.layers[-1].mlp.down_proj, model.model.norm
        self.head, self.answers = model.lm_head.weight[words], answers  # (words, hidden)
        caught = {layer: [], self.norm: []}

        def catch(module, inputs):
            caught[module].append(inputs[0][:, -1])

        hooks = [module.register_forward_pre_hook(catch) for module in caught]
        for part in ids.split(batch_size):
            model(input_ids=part, use_cache=False, logits_to_keep=1)
        for hook in hooks:
            hook.remove()
        self.inputs, self.states = torch.cat(caught[layer]), torch.cat(caught[self.norm])  # (n, in), (n, hidden)

    def logits(self, adapter, rows):
        """(len(rows), words), with an adapter beside the layer."""
        return F.linear(self.norm(self.states[rows] + adapter(self.inputs[rows])), self.head)

    @torch.no_grad()
    def held(self, adapter, count):
        """`(bits, share right)` of the first `count` pairs."""
        parts = torch.arange(count, device=self.answers.device).split(BATCH)
        logits, answers = torch.cat([self.logits(adapter, rows) for rows in parts]), self.answers[:count]
        left = F.cross_entropy(logits, answers).item() / math.log(2)
        right = (logits.argmax(1) == answers).double().mean().item()
        return count * max(0.0, math.log2(len(self.head)) - left), right


def pairs_of(model, tokenizer, count, seed):
    """`(ids, words, answers)`: prompts of random tokens, the words' token ids, and each prompt's place among them."""
    generator = torch.Generator().manual_seed(seed)
    special = set(tokenizer.all_special_ids)
    plain = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    ids = plain[torch.randint(len(plain), (count, LENGTH), generator=generator)]
    words = plain[torch.randperm(len(plain), generator=generator)[:WORDS]]
    answers = torch.randint(WORDS, (count,), generator=generator)
    return ids.to(model.device), words.to(model.device), answers.to(model.device)


@lru_cache(maxsize=1)
def last_layer(name, count, seed):
    """The last layer with `count` pairs; the same for all trainings of a seed."""
    model, tokenizer = load_lm(name, dtype=torch.float32)
    return LastLayer(model.requires_grad_(False), *pairs_of(model, tokenizer, count, seed))


def memorize(name, rank, count, most, lr, seed, steps):
    """Train one adapter on the first `count` of `most` pairs, and say what it holds of them."""
    last = last_layer(name, most, seed)
    torch.manual_seed(seed)
    adapter = LoRA(last.inputs.shape[1], last.states.shape[1], rank, 2 * rank).to(last.inputs.device)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    generator, curve = torch.Generator().manual_seed(seed), []
    for step in range(1, steps + 1):
        rows = torch.randint(count, (min(BATCH, count),), generator=generator).to(last.inputs.device)
        loss = F.cross_entropy(last.logits(adapter, rows), last.answers[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 6) == 0:
            curve.append(last.held(adapter, count)[0])
    bits, share = last.held(adapter, count)
    trained = sum(weight.numel() for weight in adapter.parameters())
    found = {"rank": rank, "pairs": count, "lr": lr, "seed": seed, "steps": steps, "bits": bits, "right": share}
    return found | {"trained": trained, "bits a number": bits / trained, "curve": curve}


def main(arguments=None):
    options = option_parser(__doc__, STEPS).parse_args(arguments)
    name, steps = options.model, options.steps
    pairs = [min(count, options.limit or count) for count in PAIRS]
    most = pairs[-1]
    settings = {"model": name, "steps": steps, "limit": options.limit}
    total = len(RANKS) * (len(RATES) + len(SEEDS) * len(PAIRS) + 1)
    recorder = Recorder("full_rank", options.out, torch.device("cpu"), total, save=options.save, **settings)
    best = {}
    for rank in RANKS:
        swept = {
            lr: recorder.piece(f"sweep/{rank}/{lr:g}", memorize, name, rank, most, most, lr, 0, steps) for lr in RATES
        }
        best[rank] = max(swept, key=lambda lr: swept[lr]["bits"])
    for seed in SEEDS:
        for rank in RANKS:
            for count, asked in zip(PAIRS, pairs, strict=True):
                key = f"run/{rank}/{count}/{seed}"
                recorder.piece(key, memorize, name, rank, asked, most, best[rank], seed, steps)
    for rank in RANKS:
        key = f"longer/{rank}"
        recorder.piece(key, memorize, name, rank, most, most, best[rank], SEEDS[-1], LONGER * steps)
    recorder.finish()


if __name__ == "__main__":
    main()
