"""Chapter 8's recorded run: a place in a question or a sentence -> a strict JSON record, and what else changes.

    python -m tuning.experiments.instruction

LoRA (rank 8 beside all linear layers), full fine-tuning and P-tuning (a trained prompt in front of the conversation)
learn from the same conversations, each with its own sweep of rates on one seed; LoRA also with general replies mixed
in, which are the untrained model's own. Test cities are never trained on, and four wordings neither. Measured are the
record (valid, each field right) and everything that should not have changed: unrelated questions, capitals asked in
plain words, and perplexity on other text.
"""

import copy
import random

import torch

from ..chat import encode_chat, pad_chats, reply, reply_loss
from ..data import load_facts, load_wic
from ..evaluate import perplexity
from ..lora import add_lora, unload
from ..models import load_lm
from ..p_tuning import PromptEncoder
from ..prompts import embeddings_of
from ..records import (
    GENERAL,
    SHOWN,
    UNRELATED,
    UNSEEN,
    WORDINGS,
    answered,
    ask_for,
    conversation,
    place_records,
    score_records,
    to_json,
)
from ..training import train
from .record import Recorder, option_parser

RATES = {
    "LoRA": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "full": (3e-6, 1e-5, 3e-5, 1e-4, 3e-4),
    "P-tuning": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
}
INSTRUCTION = "Answer with a JSON record of the place, its country and its continent. "  # where P-tuning starts
MIXED = "LoRA, general replies mixed in"
SEEDS = (0, 1, 2)
STEPS, BATCH, CITIES, MIX = 60, 4, 100, 0.25


def ask_and_score(model, tokenizer, asked, vectors=None):
    """`score_records` of the model's own replies to (question, record) pairs."""
    return score_records(reply(model, tokenizer, [question for question, _ in asked], 48, vectors), asked)


def score_elsewhere(model, tokenizer, data, vectors=None):
    """What should not have changed: unrelated questions, capitals asked in words, perplexity without a prompt."""
    replies = reply(model, tokenizer, list(UNRELATED), 24, vectors)
    asked = [f"Which country is {city} the capital of?" for city, _ in data["capitals"]]
    answers = [text for text, _ in reply(model, tokenizer, asked, 24, vectors)]
    earlier = pad_chats(tokenizer, [encode_chat(tokenizer, chat) for chat in data["unrelated"]])
    named = [country in text for text, (_, country) in zip(answers, data["capitals"], strict=True)]
    return {
        "unrelated answered with a record": sum(text.lstrip().startswith("{") for text, _ in replies) / len(replies),
        "loss of its earlier replies": no_grad_loss(model, earlier, vectors),
        "capitals answered": sum(named) / len(named),
        "capitals answered with a record": sum(text.lstrip().startswith("{") for text in answers) / len(answers),
        "perplexity": perplexity(model, tokenizer, data["sentences"]),
    }


def run(name, model, tokenizer, data, lr, seed, steps, test=True):
    """Train one method on a copy of what it changes, score it, and leave the model as it was."""
    encoder, before = None, None
    torch.manual_seed(seed)
    model.requires_grad_(name == "full")
    if name == "full":
        before = copy.deepcopy(model.state_dict())
    elif name == "P-tuning":
        ids = tokenizer(INSTRUCTION).input_ids
        start = embeddings_of(model, ids)
        encoder = PromptEncoder(len(ids), start.shape[1], start).to(model.device)
    else:
        add_lora(model, "all-linear", rank=8, alpha=16)
    vectors = encoder if encoder is not None else lambda: None
    rows = [encode_chat(tokenizer, chat) for chat in data["train"]]
    if name == MIXED:
        general = [encode_chat(tokenizer, chat) for chat in data["general"]]
        rows += random.Random(seed).choices(general, k=round(MIX / (1 - MIX) * len(rows)))
    dev = pad_chats(tokenizer, [encode_chat(tokenizer, chat) for chat in data["dev"]])
    try:
        history = train(
            model if encoder is None else encoder,
            lambda batch: reply_loss(model, pad_chats(tokenizer, batch), vectors()),
            rows,
            lr,
            steps,
            score=lambda: -no_grad_loss(model, dev, vectors()),
            batch_size=min(BATCH, len(rows)),
            seed=seed,
            every=max(1, steps // 4),
        )
        found = {"method": name, "lr": lr, "seed": seed, "dev": history.best_score, "step": history.best_step}
        found |= {"scores": history.scores, "stopped": history.stopped, "seconds": history.seconds}
        if test:
            with torch.no_grad():
                prompt = vectors()
            found |= {
                "seen wordings": ask_and_score(model, tokenizer, data["seen"], prompt),
                "unseen wordings": ask_and_score(model, tokenizer, data["unseen"], prompt),
                "elsewhere": score_elsewhere(model, tokenizer, data, prompt),
                "replies": [text for text, _ in reply(model, tokenizer, list(SHOWN), 48, prompt)],
            }
    finally:
        if before is not None:
            model.load_state_dict(before)
        elif encoder is None:
            unload(model)
        model.requires_grad_(False).eval()
    return found


@torch.no_grad()
def no_grad_loss(model, batch, vectors):
    return reply_loss(model, batch, vectors).item()


def load_data(model, tokenizer, limit=None):
    """Conversations to train on, dev, records to test on, general replies, and what is asked elsewhere."""

    def own(questions):
        return answered(questions, reply(model, tokenizer, list(questions)))

    records = {split: rows[:limit] for split, rows in place_records().items()}
    shuffled = random.Random(0).sample(records["test"], min(CITIES, len(records["test"])))
    talks = {
        split: [conversation(question, to_json(record)) for question, record in ask_for(records[split], WORDINGS, 0)]
        for split in ("train", "dev")
    }
    return {
        "train": talks["train"],
        "dev": talks["dev"][:24],
        "seen": ask_for(shuffled, WORDINGS, 1),
        "unseen": ask_for(shuffled, UNSEEN, 1),
        "general": own(GENERAL[:limit]),
        "unrelated": own(UNRELATED[:limit]),
        "capitals": [(row["sub_label"], row["obj_label"]) for row in load_facts("P1376")["test"]][:limit],
        "sentences": [row["sentence1"] for row in load_wic()["test"]][: min(100, limit or 100)],
    }


def main(arguments=None):
    options = option_parser(__doc__, STEPS).parse_args(arguments)  # the model needs a chat template
    model, tokenizer = load_lm(options.model, options.device)
    model.requires_grad_(False)
    data = load_data(model, tokenizer, options.limit)
    total = 1 + sum(len(rates) for rates in RATES.values()) + (len(RATES) + 1) * len(SEEDS)
    settings = {"model": options.model, "steps": options.steps, "limit": options.limit}
    recorder = Recorder("instruction", options.out, model.device, total, save=options.save, **settings)
    recorder.piece(
        "untrained",
        lambda: {
            "seen wordings": ask_and_score(model, tokenizer, data["seen"]),
            "unseen wordings": ask_and_score(model, tokenizer, data["unseen"]),
            "elsewhere": score_elsewhere(model, tokenizer, data),
            "replies": [text for text, _ in reply(model, tokenizer, list(SHOWN), 48)],
        },
    )
    best = {}
    for name, rates in RATES.items():
        keys = {lr: f"sweep/{name}/{lr:g}" for lr in rates}
        for lr, key in keys.items():
            recorder.piece(key, lambda n=name, lr=lr: run(n, model, tokenizer, data, lr, 0, options.steps, test=False))
        best[name] = max(keys, key=lambda lr, keys=keys: recorder.pieces[keys[lr]]["dev"])
    best[MIXED] = best["LoRA"]
    for name, lr in best.items():
        for seed in SEEDS:
            recorder.piece(
                f"run/{name}/{seed}",
                lambda n=name, lr=lr, s=seed: run(n, model, tokenizer, data, lr, s, options.steps),
            )
    recorder.finish()


if __name__ == "__main__":
    main()
