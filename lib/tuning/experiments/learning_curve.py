"""Chapter 1's recorded run: movie reviews, a fine-tuned encoder against a language model that is asked.

    python -m tuning.experiments.learning_curve

The encoder (MiniLM with a new head) is fine-tuned on 8 to all training sentences; the language model (SmolLM2) is
prompted with none to 8 of them. The rate is swept once, on 128 sentences and one seed. Every choice (rate, step)
is made on as many dev sentences as there are training sentences, 32 at least, and calibration reads 200 of them
without their labels; figures are on the test set.
"""

import torch

from ..data import labelled_reviews
from ..evaluate import accuracy, balanced, predictions
from ..models import load_encoder, load_lm
from ..prompts import answer_id, answer_logits, calibrate, class_log_probs, encode, few_shot
from ..training import Classifier, mean_of_tokens, train
from .record import Recorder, option_parser

SIZES = (8, 32, 128, 512, None)  # training sentences; None: all
STEPS = {8: 40, 32: 80, 128: 120, 512: 200, None: 450}
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
DEV = 32  # sentences at least that choose the step; with 8 of them the untrained start wins by luck
SHOTS = (0, 1, 2, 4, 8)
SEEDS = (0, 1, 2)
TEMPLATE = "Review: [X]\nSentiment: [Y]."
WORDS = ("negative", "positive")  # of class 0 and class 1


def fine_tune(data, count, seed, lr, steps, device):
    """Fine-tune the encoder on `count` sentences; returns its accuracy on test with an interval, and the run."""
    return train_classifier(new_classifier(seed, device), data, count, seed, lr, steps)


def new_classifier(seed, device):
    """MiniLM with a new head for two classes, which `seed` draws."""
    torch.manual_seed(seed)
    return Classifier(*load_encoder(device=device, dtype=torch.float32), classes=2, pool=mean_of_tokens)


def train_classifier(classifier, data, count, seed, lr, steps, dev_count=None, scores=8):
    """Train what requires gradients on `count` sentences; the accuracy on test with an interval, and the run.

    The step is chosen on `dev_count` sentences; if None on as many as there are to train on, `DEV` at least. They are
    scored before the first step and `scores` times after.
    """
    rows = balanced(data["train"], count, seed)
    dev = balanced(data["dev"], dev_count or (count and max(DEV, count)), seed)
    history = train(
        classifier,
        lambda batch: torch.nn.functional.cross_entropy(
            classifier([text for text, _ in batch]),
            torch.tensor([label for _, label in batch], device=classifier.body.device),
        ),
        rows,
        lr,
        steps,
        score=lambda: predictions(classifier, dev).double().mean().item(),
        batch_size=min(16, len(rows)),
        seed=seed,
        every=max(1, steps // scores),
    )
    kept = {"dev": history.best_score, "step": history.best_step, "seconds": history.seconds}
    return {"n": len(rows), "seed": seed, "lr": lr, **accuracy(predictions(classifier, data["test"])), **kept}


def ask(data, model, tokenizer, shots, seed, template=TEMPLATE, words=WORDS):
    """Accuracy of the prompted language model as it answers, and with its preference for a word taken out."""
    examples = [(text, words[label]) for text, label in balanced(data["train"], max(shots, 2), seed)[:shots]]
    shown = few_shot(template, examples, separator="\n\n")
    ids = [[answer_id(tokenizer, word)] for word in words]
    found = {}
    for split in ("dev", "test"):
        rows = data[split][:200] if split == "dev" else data[split]
        prompts = [encode(tokenizer, shown, text) for text, _ in rows]
        found[split] = class_log_probs(answer_logits(model, tokenizer, prompts), ids)
    labels = torch.tensor([label for _, label in data["test"]])
    asked, calibrated = found["test"], calibrate(found["test"], found["dev"])
    return {
        "shots": shots,
        "seed": seed,
        "template": template,
        "words": list(words),
        "as asked": accuracy(asked.argmax(dim=1) == labels),
        "called positive": asked.argmax(dim=1).double().mean().item(),
        "calibrated": accuracy(calibrated.argmax(dim=1) == labels),
    }


def main(arguments=None):
    options = option_parser(__doc__, model=None).parse_args(arguments)
    data = labelled_reviews(options.limit)
    sizes = [size for size in SIZES if size is None or size <= len(data["train"]) // 4]
    model, tokenizer = load_lm(device=options.device)
    total = len(RATES) + len(sizes) * len(SEEDS) + 1 + (len(SHOTS) - 1) * len(SEEDS)
    recorder = Recorder(
        "learning_curve", options.out, model.device, total, save=options.save, limit=options.limit, steps=options.steps
    )
    sweep_size = 128 if 128 in sizes else sizes[-2]

    def tune(size, seed, lr):
        return fine_tune(data, size, seed, lr, options.steps or STEPS[size], options.device)

    for lr in RATES:
        recorder.piece(f"sweep/{lr:g}", lambda lr=lr: tune(sweep_size, 0, lr))
    best = max(RATES, key=lambda lr: recorder.pieces[f"sweep/{lr:g}"]["dev"])
    for size in sizes:
        for seed in SEEDS:
            recorder.piece(f"fine_tuned/{size or 'all'}/{seed}", lambda size=size, seed=seed: tune(size, seed, best))
    for shots in SHOTS:
        for seed in SEEDS if shots else SEEDS[:1]:
            run = (data, model, tokenizer, shots, seed)
            recorder.piece(f"asked/{shots}/{seed}", lambda run=run: ask(*run))
    recorder.finish()


if __name__ == "__main__":
    main()
