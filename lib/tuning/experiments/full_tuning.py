"""Chapter 12's and 10's run: a model tuned on movie reviews, all its weights (AdamW, LOMO, AdaLomo) or adapters.

    python -m tuning.experiments.full_tuning

256 sentences, 48 steps of eight, the rate up over a tenth of the steps and then straight down. Every method has a
sweep of rates on dev, longer where the best is at an edge, and three seeds at the best. LOMO is there in one pass and
with its norm clipped, in two; AdamW clips too; LoRA beside weights in 32 bits, and beside four (QLoRA). Beside
accuracy: time, the most bytes of each category at once, and what it cost elsewhere.
"""

import copy
import time
from contextlib import contextmanager

import torch

from ..data import labelled_reviews, load_wic
from ..evaluate import balanced, bootstrap_interval, perplexity
from ..lomo import AdaLomo, FusedOptimizer, Lomo
from ..lora import add_lora
from ..memory import LiveBytes
from ..models import load_lm
from ..p_tuning import answer_loss, prompt_logits
from ..prompts import answer_id
from ..qlora import quantize_model
from ..training import batch_rows, optimizer_for, rate_factor, take_step
from .record import Recorder, option_parser

TEMPLATE, WORDS = "Review: [X]\nSentiment: [Y].", ("negative", "positive")
RATES = {
    "AdamW": (1e-6, 3e-6, 1e-5, 3e-5, 1e-4),
    "LOMO": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "LOMO, norm clipped": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "AdaLomo": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
    "LoRA": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "QLoRA": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
}
SEEDS = (0, 1, 2)
STEPS, BATCH, TRAIN, DEV, TEST = 48, 8, 256, 200, 400


def optimizer_and_step(name, model, lr, steps):
    """What the method trains with, and a function from a loss to one update."""
    if name == "AdamW" or "LoRA" in name:
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer, schedule = optimizer_for(weights, lr, steps)

        def checked_step(loss):
            norm = take_step(weights, optimizer, schedule, loss)
            if not norm.isfinite():
                raise FloatingPointError(f"the gradient's norm is {norm:g}")

        return optimizer, checked_step
    kind = AdaLomo if name == "AdaLomo" else Lomo
    optimizer = kind(model, lr, clip_norm=1.0 if "clipped" in name else None)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))

    def step(loss):
        optimizer.backward(loss)
        schedule.step()

    return optimizer, step


@torch.no_grad()
def hits(model, tokenizer, rows, words):
    """(n,) bool: which sentences get the right word."""
    logits = prompt_logits(model, tokenizer, TEMPLATE, [text for text, _ in rows])[:, words]
    return logits.argmax(dim=1).cpu() == torch.tensor([label for _, label in rows])


@contextmanager
def prepared(name, model, lr, seed, steps):
    """A copy of the model ready for a method, as `(copy, optimizer, step)`."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model).requires_grad_("LoRA" not in name)
    if name == "QLoRA":
        quantize_model(model)
    if "LoRA" in name:
        add_lora(model, "all-linear", rank=8, alpha=16)
    optimizer, step = optimizer_and_step(name, model, lr, steps)
    try:
        yield model, optimizer, step
    finally:
        if isinstance(optimizer, FusedOptimizer):
            optimizer.detach()


def run(name, model, tokenizer, data, lr, seed, steps, test=True):
    """Train a copy of the model by one method and score it. Gradients that are not finite end the training."""
    words = [answer_id(tokenizer, word) for word in WORDS]
    rows, losses = balanced(data["train"], TRAIN, seed), []
    found = {"method": name, "lr": lr, "seed": seed, "stopped": None, "dev": 0.0}
    with prepared(name, model, lr, seed, steps) as (lm, _, step):
        try:
            start = time.perf_counter()
            for index in range(steps):
                batch = [rows[row] for row in batch_rows(index, len(rows), min(BATCH, len(rows)), seed)]
                loss = answer_loss(lm, tokenizer, TEMPLATE, batch, words=words)
                step(loss)
                losses.append(loss.item())
            found |= {"seconds": time.perf_counter() - start, "losses": losses}
        except FloatingPointError as error:
            return found | {"stopped": str(error)}
        found["dev"] = hits(lm, tokenizer, data["dev"], words).double().mean().item()
        if test:
            right = hits(lm, tokenizer, data["test"], words)
            low, high = bootstrap_interval(right)
            found |= {"test": right.double().mean().item(), "low": low, "high": high, "n": len(right)}
            found |= {"hits": "".join(str(int(hit)) for hit in right)}
            found["perplexity elsewhere"] = perplexity(lm, tokenizer, data["sentences"])
    return found


def live_bytes(name, model, tokenizer, data):
    """The most bytes of each category at once in a step, the second; those at the peak of all; what is trained."""
    words = [answer_id(tokenizer, word) for word in WORDS]
    batch = balanced(data["train"], BATCH, 0)
    with prepared(name, model, 1e-6, 0, 10) as (lm, optimizer, step):
        step(answer_loss(lm, tokenizer, TEMPLATE, batch, words=words))
        with LiveBytes(lm, optimizer) as live:
            step(answer_loss(lm, tokenizer, TEMPLATE, batch, words=words))
    trained = sum(weight.numel() for weight in lm.parameters() if weight.requires_grad)
    return {"trained": trained, "largest": live.largest, "peak": live.peak}


def sweep(rates, score, more=3):
    """The rate with the highest score. With the best at an edge the sweep goes on beyond it, `more` times at most."""
    swept = {lr: score(lr) for lr in rates}
    for _ in range(more):
        best, low, high = max(swept, key=swept.get), min(swept), max(swept)
        if low < best < high:
            break
        lr = float(f"{low / 3 if best == low else high * 3:.0e}")
        swept[lr] = score(lr)
    return max(swept, key=swept.get)


def main(arguments=None):
    options = option_parser(__doc__, STEPS).parse_args(arguments)
    model, tokenizer = load_lm(options.model, options.device, torch.float32)
    rows = labelled_reviews()
    data = {
        "train": rows["train"],
        "dev": balanced(rows["dev"], options.limit or DEV, 0),
        "test": rows["test"][: options.limit or TEST],
        "sentences": [row["sentence1"] for row in load_wic()["test"]][: min(100, options.limit or 100)],
    }
    total = sum(len(rates) for rates in RATES.values()) + len(RATES) * (len(SEEDS) + 1) + 1
    settings = {"model": options.model, "steps": options.steps, "limit": options.limit}
    recorder = Recorder("full_tuning", options.out, model.device, total, save=options.save, **settings)
    words = [answer_id(tokenizer, word) for word in WORDS]
    recorder.piece(
        "untrained",
        lambda: {
            "test": hits(model, tokenizer, data["test"], words).double().mean().item(),
            "perplexity elsewhere": perplexity(model, tokenizer, data["sentences"]),
        },
    )
    for name, rates in RATES.items():
        recorder.piece(f"live/{name}", lambda n=name: live_bytes(n, model, tokenizer, data))
        best = sweep(
            rates,
            lambda lr, n=name: recorder.piece(
                f"sweep/{n}/{lr:g}", lambda: run(n, model, tokenizer, data, lr, 0, options.steps, test=False)
            )["dev"],
        )
        for seed in SEEDS:
            recorder.piece(
                f"run/{name}/{seed}",
                lambda n=name, lr=best, s=seed: run(n, model, tokenizer, data, lr, s, options.steps),
            )
    recorder.finish()


if __name__ == "__main__":
    main()
