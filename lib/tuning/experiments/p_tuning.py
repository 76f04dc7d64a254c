"""Chapter 4's recorded run: what P-tuning's encoder does, what words beside its vectors do, and deep prompts.

    python -m tuning.experiments.p_tuning

It goes with the ledger: its task, steps, dev set and rule for rates. What the ledger holds is not trained again. Each
kind has a sweep of its own on seed 0, in which every run is also scored on test; the best rate has two more seeds.

- `spread`: the BiLSTM's vectors at the start moved to mean zero and stretched to the length of words.
- `long`: BiLSTM and MLP trained four times as long, at the ledger's rate and at a third and three times of it.
- `wordings`: the four wordings of the paper's case study, by hand, and with vectors added while the words stay, at the
  ledger's rate. Scored over the vocabulary, among words (as the authors' code does, with their list of words that four
  vocabularies share, stop words left out) and among the relation's countries.
- `beside`: plain vectors and the MLP in place of the BiLSTM, beside the handcrafted prompt.
- `deep`: keys and values in front of every layer, before the handcrafted prompt: plain as in P-tuning v2, through
  prefix tuning's MLP, and plain again from where that MLP begins.
"""

from collections import Counter

import torch
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch import nn

from ..data import TEMPLATES
from ..evaluate import as_text, hits_at_1
from ..methods import Ready, fit, prepare, share_right
from ..models import load_lm
from ..p_tuning import Prefixed, PrefixEncoder, PromptEncoder, PromptVectors, prefix_shape, prompt_logits
from ..prompts import embeddings_of
from . import ledger
from .record import Recorder, load_results, option_parser

LENGTH = 6
BESIDE = "P-tuning beside the prompt"
LEDGER = {"BiLSTM": "P-tuning, BiLSTM", "MLP": "P-tuning, MLP", "BiLSTM, spread": "P-tuning, BiLSTM"}
RATES = {
    "BiLSTM, spread": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2),
    "vectors beside the prompt": (1e-4, 1e-1, 3e-1, 1.0, 3.0, 30.0),
    "MLP beside the prompt": (1e-6, 1e-3, 3e-3, 1e-2, 3e-1),
    "deep, plain": (1e-4, 1e-2, 3e-2, 1e-1, 1.0),
    "deep, MLP": (1e-6, 1e-4, 1e-3, 3e-3, 3e-2),
    "deep, plain from the MLP's start": (1e-4, 3e-3, 1e-2, 3e-2, 1.0),
}
PARTS = {
    "spread": ("BiLSTM, spread",),
    "long": ("BiLSTM",),
    "wordings": (),
    "deep": ("deep, plain", "deep, MLP"),
    "beside": ("vectors beside the prompt", "MLP beside the prompt"),
    "long MLP": ("MLP",),
    "deep control": ("deep, plain from the MLP's start",),
}
SEEDS = (0, 1, 2)
LONGER = 4
WORDINGS = TEMPLATES[ledger.TASK][:4]


class Spread(nn.Module):
    """An encoder whose vectors are moved and stretched: at the start their mean is zero, and they are as long as told.

    The move and the factor stay as they are; training changes the encoder.
    """

    def __init__(self, encoder, length):
        super().__init__()
        self.encoder = encoder
        with torch.no_grad():
            start = encoder()
        self.register_buffer("middle", start.mean(dim=0))
        self.factor = (length / (start - self.middle).norm(dim=1).mean()).item()

    def forward(self):
        return self.factor * (self.encoder() - self.middle)


def made(kind, model, tokenizer, template, seed):
    """What is trained, ready as the ledger's methods are."""
    model.requires_grad_(False).eval()
    if kind.startswith("deep"):
        torch.manual_seed(seed)
        shape = prefix_shape(model, LENGTH)
        encoder = None if kind == "deep, plain" else PrefixEncoder(shape)
        start = torch.randn(shape) if encoder is None else encoder()
        prefix = encoder if kind == "deep, MLP" else PromptVectors(start)
        return Ready(kind, Prefixed(model, prefix), tokenizer, template, None, prefix)
    ready = prepare(LEDGER.get(kind, BESIDE), model, tokenizer, template, seed)
    embeddings = embeddings_of(model).float()
    torch.manual_seed(seed)
    if kind == "BiLSTM, spread":
        ready.trained = Spread(ready.encoder, embeddings.norm(dim=1).mean())
    elif kind == "vectors beside the prompt":
        ready.trained = PromptVectors(embeddings[torch.randint(len(embeddings), (LENGTH,))])
    elif kind == "MLP beside the prompt":
        ready.trained = PromptEncoder(LENGTH, embeddings.shape[1], lstm_layers=0)
    ready.encoder = ready.trained
    return ready


def looks(vectors):
    """The mean length of vectors (n, size), and how far they lie from each other; of deep ones by keys and values."""
    if vectors.dim() == 2:
        return {"length": vectors.norm(dim=1).mean().item(), "apart": torch.pdist(vectors).mean().item()}
    keys, values = vectors.norm(dim=-1).mean(dim=(0, 1, 3)).tolist()
    return {"keys": keys, "values": values}


def words_of(tokenizer, answers):
    """Token ids of whole words that are no stop words, and of the answers."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    words = {
        token
        for token, text in enumerate(texts)
        if text[:1] == " " and text[1:].isalpha() and text[1:].lower() not in ENGLISH_STOP_WORDS
    }
    return words | answers


@torch.no_grad()
def scored(ready, rows, among=False):
    """Which test cities are right over the vocabulary; also among words and among the relation's countries."""
    facts = [(city, token) for city, (token,) in rows["test"]]
    logits = prompt_logits(ready.model, ready.tokenizer, ready.template, facts, ready.vectors())
    answers = [token for _, token in facts]
    found = {"hits": as_text(hits_at_1(logits, answers))}
    if among:
        countries = {token for split in rows.values() for _, (token,) in split}
        for name, tokens in (("words", words_of(ready.tokenizer, countries)), ("countries", countries)):
            found[f"among {name}"] = as_text(hits_at_1(logits, answers, tokens))
        said = Counter(logits.argmax(dim=1).tolist()).most_common(5)
        found["said"] = [[ready.tokenizer.decode(token), count] for token, count in said]
    return found


def trained(name, task, template, kind, lr, seed, steps, among=False, limit=None):
    """One training, what it scored, and how its vectors looked at the start and after each fifth of the steps."""
    model, tokenizer = load_lm(name)
    rows = ledger.rows_of(tokenizer, task, limit)
    ready = made(kind, model, tokenizer, template, seed)
    looked = []

    def score(ready, dev):
        with torch.no_grad():
            looked.append(looks(ready.trained()))
        return share_right(ready, dev)

    history = fit(ready, rows["train"], rows["dev"], lr, steps, seed, every=max(1, steps // 5), score=score)
    found = {"lr": lr, "seed": seed, "steps": steps, "template": ready.template, "dev": history.dev}
    found |= {"step": history.step, "scores": history.scores, "stopped": history.stopped, "looks": looked}
    found |= {"losses": [round(loss, 4) for loss in history.losses], "seconds": history.seconds}
    with torch.no_grad():
        found |= {"trained": sum(weight.numel() for weight in ready.weights()), "kept": ready.trained().numel()}
    return found | scored(ready, rows, among)


def by_hand(name, task, template, limit=None):
    """A wording alone, scored in the three ways."""
    model, tokenizer = load_lm(name)
    return scored(Ready("asked", model, tokenizer, template), ledger.rows_of(tokenizer, task, limit), among=True)


def own(name, template, subject):
    """How words look: their embeddings, and in every layer the keys and values of a prompt."""
    model, tokenizer = load_lm(name)
    embeddings = embeddings_of(model).float()
    found = looks(embeddings[torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(0))[:2000]])
    ids = tokenizer(template.partition(" [Y]")[0].replace("[X]", subject), return_tensors="pt").input_ids
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    layers = torch.stack([torch.cat([keys, values]) for keys, values, *_ in cache])  # (layers, 2, heads, tokens, size)
    return found | looks(layers.permute(3, 0, 1, 2, 4))


def main(arguments=None):
    parser = option_parser(__doc__, ledger.STEPS)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="all, if not told")
    options = parser.parse_args(arguments)
    name, limit, steps, task = options.model, options.limit, options.steps, ledger.TASK
    pieces = load_results("ledger")["results"]
    template = pieces["asked"]["template"]
    rates = {method: pieces[f"run/{method}/0"]["lr"] for method in (*LEDGER.values(), BESIDE)}
    settings = {"model": name, "task": task, "steps": steps, "limit": limit, "template": template, "rates": rates}
    kinds = [kind for part in options.parts for kind in PARTS[part]]
    total = 1 + sum(len(RATES.get(kind, (1, 2, 3))) + len(SEEDS) - 1 for kind in kinds)
    total += len(WORDINGS) * (1 + len(SEEDS)) * ("wordings" in options.parts)
    recorder = Recorder("p_tuning", options.out, torch.device("cpu"), total, save=options.save, **settings)
    recorder.piece("words", own, name, template, "Osaka")
    for part in options.parts:
        if part == "wordings":
            for number, wording in enumerate(WORDINGS):
                recorder.piece(f"wording/{number}/by hand", by_hand, name, task, wording, limit)
                for seed in SEEDS:
                    told = (name, task, wording, "BiLSTM beside the prompt", rates[BESIDE], seed, steps, True, limit)
                    recorder.piece(f"wording/{number}/{seed}", trained, *told)
        for kind in PARTS[part]:
            longer = LONGER if part.startswith("long") else 1

            def run(lr, seed=0, kind=kind, longer=longer):
                key = f"{kind}, long" if longer > 1 else kind
                told = (name, task, template, kind, lr, seed, longer * steps, False, limit)
                return recorder.piece(f"{key}/{lr:g}/{seed}", trained, *told)

            if longer > 1:
                lr = rates[LEDGER[kind]]
                best = max((lr / 3, lr, 3 * lr), key=lambda lr: run(lr)["dev"])
            else:
                best = ledger.sweep(RATES[kind], run, more=1)
            for seed in SEEDS[1:]:
                run(best, seed)
    recorder.finish()


if __name__ == "__main__":
    main()
