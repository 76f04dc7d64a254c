"""Chapter 1's recorded run: movie reviews, learned from labels or asked.

    python -m tuning.experiments.learning_curve

Learned, on 8 to all training sentences: all weights of an encoder (MiniLM) with a new head; and logistic regression on
the vectors that MiniLM or the language model (SmolLM2) gives when nothing in it is changed. Asked: SmolLM2, with none
to 8 examples, with eight pairs of label words, and in its chat format.

Every choice (rate, step, how to make a vector, regularization) is made on as many dev sentences as there are training
sentences, 32 at least; the rates are swept at three sizes on seed 0, and the two sizes without a sweep take their
neighbour's rate. Calibration reads 200 dev sentences, drawn at random, without their labels. Figures are on the test
set.
"""

import random

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ..data import labelled_reviews
from ..evaluate import accuracy, as_text, balanced, predictions
from ..models import load_encoder, load_lm
from ..prompts import answer_id, answer_logits, calibrate, class_log_probs, encode, few_shot
from ..training import Classifier, last_token, mean_of_tokens, train
from .record import Recorder, option_parser

SIZES = (8, 32, 128, 512, None)  # training sentences; None: all
STEPS = {8: 40, 32: 80, 128: 120, 512: 200, None: 450}
SWEPT = {32: 32, 128: 128, 512: 512, 8: 32, None: 512}  # whose sweep chooses the rate
RATES = (1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
DEV = 32  # sentences at least that choose; with 8 of them the untrained start wins by luck
SHOTS = (0, 1, 2, 4, 8)
SEEDS = (0, 1, 2)
TEMPLATE = "Review: [X]\nSentiment: [Y]."
WORDS = ("negative", "positive")  # of class 0 and class 1
PAIRS = (
    WORDS,
    ("bad", "good"),
    ("terrible", "great"),
    ("awful", "excellent"),
    ("worst", "best"),
    ("boring", "exciting"),
    ("hate", "love"),
    ("no", "yes"),
)
CHOOSING, DRAWS = (8, 32, 128), 20  # labelled dev sentences that choose a pair, and how often they are drawn
REFERENCE = 200  # dev sentences that calibration reads
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C: the larger, the less regularized
POOLS = {"mean of tokens": mean_of_tokens, "last token": last_token}
CHAT = "Is this sentence from a movie review positive or negative? Answer with one word.\n\n[X]"
CHAT_WORDS = (("Negative", "negative"), ("Positive", "positive"))


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
    rows, dev = drawn(data, count, seed, dev_count)
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
    return {"n": len(rows), "seed": seed, "lr": lr, **counted(predictions(classifier, data["test"])), **kept}


def counted(right):
    """`accuracy`, and which test sentences are right as a text "0101…"."""
    return accuracy(right) | {"hits": as_text(right)}


def drawn(data, count, seed, dev_count=None):
    """The sentences to train on, and those of dev that choose: as many, `DEV` at least."""
    return balanced(data["train"], count, seed), balanced(data["dev"], dev_count or (count and max(DEV, count)), seed)


def tuned(count, seed, lr, steps, device, limit=None):
    return fine_tune(labelled_reviews(limit), count, seed, lr, steps, device)


@torch.no_grad()
def vectors_of(body, tokenizer, texts, batch_size=64):
    """{how: (texts, hidden)}: what a model that is left as it is makes of each text, in each of the ways of `POOLS`."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found = {how: torch.empty(len(texts), body.config.hidden_size) for how in POOLS}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer(
            [texts[index] for index in chosen], padding=True, padding_side="right", truncation=True,
            max_length=256, return_tensors="pt",
        ).to(body.device)  # fmt: skip
        states = body(**batch).last_hidden_state
        for how, pool in POOLS.items():
            found[how][chosen] = pool(states, batch["attention_mask"]).float().cpu()
    return found


def frozen(which, sizes, seeds, device, limit=None):
    """Logistic regression on a frozen model's vectors, for each size and seed: {"size/seed": a row}."""
    data = labelled_reviews(limit)
    if which == "MiniLM":
        body, tokenizer = load_encoder(device=device, dtype=torch.float32)
    else:
        model, tokenizer = load_lm(device=device)
        body = model.get_decoder()
    texts = {text: index for index, text in enumerate(sorted({text for rows in data.values() for text, _ in rows}))}
    vectors = vectors_of(body.eval(), tokenizer, list(texts))

    def as_arrays(rows, how):
        return vectors[how][[texts[text] for text, _ in rows]].numpy(), [label for _, label in rows]

    found = {}
    for size in sizes:
        for seed in seeds:
            rows, dev = drawn(data, size, seed)
            tried = []
            for how in POOLS:
                for strength in STRENGTHS:
                    learner = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
                    learner.fit(*as_arrays(rows, how))
                    tried.append((learner.score(*as_arrays(dev, how)), how, strength, learner))
            score, how, strength, learner = max(tried, key=lambda one: one[0])  # of equals the first
            inputs, labels = as_arrays(data["test"], how)
            right = torch.as_tensor(learner.predict(inputs) == labels)
            found[f"{size or 'all'}/{seed}"] = {
                "n": len(rows), "seed": seed, "vector": how, "C": strength, "dev": float(score), **counted(right),
            }  # fmt: skip
    return found


def reference_rows(data):
    """The dev sentences that calibration reads: drawn at random, so balanced only as far as chance makes them."""
    return random.Random(0).sample(data["dev"], min(REFERENCE, len(data["dev"])))


def answers(log_probs, reference, rows):
    """Accuracy as asked and calibrated, and the share that is called positive."""
    labels = torch.tensor([label for _, label in rows])
    calibrated = calibrate(log_probs, reference)
    return {
        "as asked": counted(log_probs.argmax(dim=1) == labels),
        "called positive": log_probs.argmax(dim=1).double().mean().item(),
        "calibrated": counted(calibrated.argmax(dim=1) == labels),
    }


def ask(shots, seed, device, limit=None):
    """The prompted language model as it answers, and with its preference for a word taken out."""
    data = labelled_reviews(limit)
    model, tokenizer = load_lm(device=device)
    examples = balanced(data["train"], max(shots, 2), seed)[:shots]
    shown = few_shot(TEMPLATE, [(text, WORDS[label]) for text, label in examples], separator="\n\n")
    ids = [[answer_id(tokenizer, word)] for word in WORDS]
    reference = reference_rows(data)
    prompts = [encode(tokenizer, shown, text) for text, _ in [*reference, *data["test"]]]
    found = class_log_probs(answer_logits(model, tokenizer, prompts), ids)
    positive = sum(label for _, label in reference) / len(reference)
    last = WORDS[examples[-1][1]] if examples else None
    asked = answers(found[len(reference) :], found[: len(reference)], data["test"])
    return {"shots": shots, "seed": seed, "last": last, "positive in reference": positive, **asked}


def label_words(device, limit=None):
    """Eight pairs of label words, with no example: each one's figures, and what choosing by dev labels would give."""
    data = labelled_reviews(limit)
    model, tokenizer = load_lm(device=device)
    both = {split: data[split] for split in ("dev", "test")}
    logits = {
        split: answer_logits(model, tokenizer, [encode(tokenizer, TEMPLATE, text) for text, _ in rows])
        for split, rows in both.items()
    }
    reference = torch.tensor([data["dev"].index(row) for row in reference_rows(data)])
    pairs, right = {}, {}
    for pair in PAIRS:
        ids = [[answer_id(tokenizer, word)] for word in pair]
        found = {split: class_log_probs(logits[split], ids) for split in both}
        key = "/".join(pair)
        pairs[key] = answers(found["test"], found["dev"][reference], data["test"])
        right[key] = found["dev"].argmax(dim=1) == torch.tensor([label for _, label in data["dev"]])
        pairs[key]["dev"] = right[key].double().mean().item()
    chosen = {}
    for count in CHOOSING:
        picks = []
        for seed in range(DRAWS):
            some = [data["dev"].index(row) for row in balanced(data["dev"], min(count, len(data["dev"])), seed)]
            picks.append(max(pairs, key=lambda key: right[key][some].double().mean().item()))
        chosen[str(count)] = [{"pair": pick, "test": pairs[pick]["as asked"]["accuracy"]} for pick in picks]
    return {"pairs": pairs, "chosen": chosen}


def ask_in_chat(device, limit=None):
    """The question in the model's own chat format; a class has its word with and without a capital."""
    data = labelled_reviews(limit)
    model, tokenizer = load_lm(device=device)

    def prompt(text):
        turn = [{"role": "user", "content": CHAT.replace("[X]", text)}]
        return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]

    ids = [[tokenizer(word).input_ids[0] for word in words] for words in CHAT_WORDS]
    reference = reference_rows(data)
    prompts = [prompt(text) for text, _ in [*reference, *data["test"]]]
    logits = answer_logits(model, tokenizer, prompts)
    found = class_log_probs(logits, ids)
    asked = answers(found[len(reference) :], found[: len(reference)], data["test"])
    first = logits[len(reference) :].argmax(dim=1)
    either = torch.isin(first, torch.tensor([token for words in ids for token in words]))
    return asked | {"first choice is a label": either.double().mean().item()}


def main(arguments=None):
    options = option_parser(__doc__, model=None).parse_args(arguments)
    limit, device = options.limit, options.device
    rows = len(labelled_reviews(limit)["train"])
    sizes = [size for size in SIZES if size is None or size <= rows // 4]
    swept = [size for size in sizes if size and SWEPT[size] == size] or [sizes[0]]
    total = len(swept) * len(RATES) + len(sizes) * len(SEEDS) + 1 + (len(SHOTS) - 1) * len(SEEDS) + 4
    recorder = Recorder(
        "learning_curve", options.out, torch.device(device or "cpu"), total, save=options.save, limit=limit,
        steps=options.steps,
    )  # fmt: skip
    for which in ("MiniLM", "SmolLM2"):
        recorder.piece(f"frozen/{which}", frozen, which, sizes, SEEDS, device, limit)
    recorder.piece("words", label_words, device, limit)
    recorder.piece("chat", ask_in_chat, device, limit)
    best = {}
    for size in swept:
        tried = {}
        for lr in RATES:
            steps = options.steps or STEPS[size]
            tried[lr] = recorder.piece(f"sweep/{size}/{lr:g}", tuned, size, 0, lr, steps, device, limit)["dev"]
        best[size] = max(tried, key=tried.get)
    for size in sizes:
        lr = best[SWEPT[size] if SWEPT[size] in best else swept[-1]]
        for seed in SEEDS:
            key = f"fine_tuned/{size or 'all'}/{seed}"
            recorder.piece(key, tuned, size, seed, lr, options.steps or STEPS[size], device, limit)
    for shots in SHOTS:
        for seed in SEEDS if shots else SEEDS[:1]:
            recorder.piece(f"asked/{shots}/{seed}", ask, shots, seed, device, limit)
    recorder.finish()


if __name__ == "__main__":
    main()
