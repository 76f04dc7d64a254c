"""Every method of the book by its name, for one kind of task: after a prompt, give the answer.

The book's ledger is recorded with it, and a reader's own examples are trained by it:

    ready = prepare("LoRA", model, tokenizer, "The city of [X] is in the country of [Y].")
    tuned = fit(ready, rows["train"], rows["dev"], lr=1e-3, steps=150)
    right(ready, rows["test"])

A row is (subject, answer's token ids). An answer of several tokens is right if the model, decoding greedily, begins
with all of them.
"""

import difflib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from .lomo import AdaLomo, FusedOptimizer, Lomo
from .lora import add_lora
from .p_tuning import PromptEncoder, PromptVectors, encode_pseudo, soften
from .prompts import check_prompts, embeddings_of, encode, evaluating, forward_at_end
from .qlora import quantize_model
from .training import batch_rows, rate_factor, take_step

__all__ = ["METHODS", "fit", "prepare", "right", "says"]

BARE = "[P][P][P] [X][P][P][P] [Y]."  # the paper's (3,3,0): nothing but the subject and pseudo tokens
BATCH, EVERY = 16, 30


@dataclass(frozen=True)
class Method:
    """A method that trains: the chapter that builds it, and the rates that its sweep on dev begins with."""

    chapter: int
    rates: tuple


METHODS = {
    "prompt tuning": Method(3, (1e-4, 1e-2, 1e-1, 3e-1, 1.0, 3.0, 30.0)),
    "prompt tuning, from the prompt": Method(3, (1e-4, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)),
    "P-tuning, BiLSTM": Method(4, (1e-6, 1e-4, 3e-4, 1e-3, 3e-3, 3e-2)),
    "P-tuning, MLP": Method(4, (1e-6, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "P-tuning beside the prompt": Method(4, (1e-6, 1e-4, 3e-4, 1e-3, 3e-3, 3e-2)),
    "P-tuning, from the prompt": Method(4, (1e-6, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "all weights": Method(5, (1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)),
    "LoRA": Method(6, (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
    "QLoRA": Method(10, (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
    "LOMO": Method(12, (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "AdaLomo": Method(12, (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
}
FUSED = {"LOMO": Lomo, "AdaLomo": AdaLomo}


@dataclass
class Ready:
    """A model that a method has made ready, in place.

    Attributes:
        template: what is asked. Where there is an encoder, its vectors stand at the `[P]` slots, or without such slots
            in front of all, as peft has them.
        encoder: a function without arguments that makes the vectors; None where a method has none.
        trained: the module whose parameters are trained.
    """

    method: str
    model: nn.Module
    tokenizer: object
    template: str
    encoder: Callable | None = None
    trained: nn.Module = field(default=None, repr=False)

    def vectors(self):
        """(length, hidden), or None."""
        return None if self.encoder is None else self.encoder()

    def weights(self):
        """What is trained, a list of parameters."""
        return [weight for weight in self.trained.parameters() if weight.requires_grad]

    def groups(self, lr):
        """What is trained as an optimizer's parameter groups; here there is one."""
        return [{"params": self.weights(), "lr": lr}]

    def kept(self):
        """How many numbers are kept for the task: of a prompt its vectors alone, not the networks that made them."""
        with torch.no_grad():
            tensors = self.weights() if self.encoder is None else [self.vectors()]
        return sum(tensor.numel() for tensor in tensors)


def prepare(method, model, tokenizer, template, seed=0, rank=8, alpha=16):
    """Make a causal model ready for a method of `METHODS`, in place.

    Args:
        template: a handcrafted prompt. "prompt tuning" and "P-tuning, BiLSTM" and "MLP" do without its words; "beside
            the prompt" keeps them and puts three vectors in front of it and three before the answer; "from the prompt"
            begins at them; the others use it as it is.
        seed: of what is drawn at the beginning.
        rank, alpha: of adapters, beside all linear layers.

    Raises:
        ValueError: an unknown method, a masked model, or a template whose slots are wrong.
    """
    check_method(method)
    if tokenizer.mask_token is not None:
        raise ValueError("a masked model cannot write an answer of several tokens; load a causal one, as load_lm does")
    encode(tokenizer, template, "a")  # refuses wrong slots
    torch.manual_seed(seed)
    model.requires_grad_(method == "all weights" or method in FUSED).eval()
    if "tuning" in method:
        template, encoder = prompt_encoder(method, model, tokenizer, template)
        return Ready(method, model, tokenizer, template, encoder.to(model.device), encoder)
    if method == "QLoRA":
        quantize_model(model)
    if "LoRA" in method:
        add_lora(model, "all-linear", rank=rank, alpha=alpha)
    return Ready(method, model, tokenizer, template, trained=model)


def check_method(method):
    """Refuse a method that is not one of `METHODS`, and name the one that was perhaps meant."""
    if method not in METHODS:
        near = nearest(method, METHODS)
        meant = f"; did you mean {near!r}?" if near else "."
        raise ValueError(f"unknown method {method!r}{meant} There are {', '.join(map(repr, METHODS))}")


def nearest(name, known):
    """The known name that was perhaps meant, whatever its case; None where none is near."""
    near = difflib.get_close_matches(str(name).lower(), [one.lower() for one in known], 1)
    return next((one for one in known if [one.lower()] == near), None)


def prompt_encoder(method, model, tokenizer, template):
    """A template with `[P]` slots, and the module that makes their vectors."""
    embeddings = embeddings_of(model).float()
    size = embeddings.shape[1]
    if method == "prompt tuning":
        return BARE, PromptVectors(embeddings[torch.randint(len(embeddings), (6,))])
    if method == "P-tuning beside the prompt":
        before, after = template.split(" [Y]")
        return f"[P][P][P] {before}[P][P][P] [Y]{after}", PromptEncoder(6, size)
    if "from the prompt" in method:
        template, start = soften(model, tokenizer, template)
        vectors = method.startswith("prompt")
        return template, PromptVectors(start) if vectors else PromptEncoder(*start.shape, start)
    return BARE, PromptEncoder(6, size, lstm_layers=2 if "BiLSTM" in method else 0)


def prompts_of(ready, subjects, vectors=None):
    """The token ids of what is asked of each subject; -1 - i stands for the i-th of the vectors (length, hidden)."""
    slots = "[P]" in ready.template
    front = [] if vectors is None or slots else [-1 - index for index in range(len(vectors))]
    encode_row = encode_pseudo if slots else encode
    return [front + encode_row(ready.tokenizer, ready.template, subject) for subject in subjects]


def answer_logits_and_labels(ready, rows):
    """Logits at the answers' tokens (rows, longest answer, vocab), and these tokens; -100 in front of short answers."""
    subjects, answers = zip(*rows, strict=True)
    vectors = ready.vectors()
    asked = prompts_of(ready, subjects, vectors)
    prompts = [ids + answer[:-1] for ids, answer in zip(asked, answers, strict=True)]
    check_prompts(ready.model, ready.tokenizer, prompts, vectors)
    places = max(map(len, answers))
    logits = forward_at_end(ready.model, ready.tokenizer, prompts, places, vectors=vectors).float()
    labels = torch.tensor([[-100] * (places - len(answer)) + answer for answer in answers])
    return logits, labels.to(logits.device)


def loss_of(ready, rows):
    """The mean over answers' tokens of -log p."""
    logits, labels = answer_logits_and_labels(ready, rows)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@torch.no_grad()
def right(ready, rows, batch_size=32):
    """(len(rows),) bool: would greedy decoding begin with the answer?"""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))  # like lengths waste little on padding
    found = torch.empty(len(rows), dtype=torch.bool)
    with evaluating(ready.model), evaluating(ready.trained):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            logits, labels = answer_logits_and_labels(ready, [rows[index] for index in chosen])
            found[chosen] = ((logits.argmax(-1) == labels) | (labels < 0)).all(dim=1).cpu()
    return found


def says(ready, subjects, length, batch_size=32):
    """What greedy decoding writes for each subject: a list of texts of `length` tokens, or less where they end."""
    batches = (subjects[start : start + batch_size] for start in range(0, len(subjects), batch_size))
    return [text for batch in batches for text in _says(ready, batch, length)]


@torch.no_grad()
def _says(ready, subjects, length):
    written, end = [[] for _ in subjects], ready.tokenizer.eos_token_id
    with evaluating(ready.model), evaluating(ready.trained):
        vectors = ready.vectors()
        asked = prompts_of(ready, subjects, vectors)
        for _ in range(length):
            if all(end in new for new in written):
                break
            prompts = [ids + new for ids, new in zip(asked, written, strict=True)]
            check_prompts(ready.model, ready.tokenizer, prompts, vectors)
            logits = forward_at_end(ready.model, ready.tokenizer, prompts, 1, vectors=vectors)[:, -1]
            for new, token in zip(written, logits.argmax(-1).tolist(), strict=True):
                new.append(token)
    return [ready.tokenizer.decode(new[: new.index(end)] if end in new else new).strip() for new in written]


@dataclass
class Fit:
    """How a training went: losses of its steps, (step, share of dev right) pairs, the best of them, why it stopped."""

    losses: list = field(default_factory=list)
    scores: list = field(default_factory=list)
    step: int = 0
    dev: float | None = None
    stopped: str | None = None
    seconds: float = 0.0


def share_right(ready, rows):
    return right(ready, rows).double().mean().item()


def fit(
    ready,
    train,
    dev,
    lr,
    steps,
    seed=0,
    batch_size=BATCH,
    every=EVERY,
    score=share_right,
    progress=False,
    loss=loss_of,
):
    """Train what is ready, and leave it in the state that scored best on dev.

    AdamW (fused, without decay) with the gradient's norm clipped to 1, but LOMO and AdaLomo, which update inside
    backward and do not clip. The rate goes up over a tenth of the steps and then straight down. The state before the
    first step competes too. A gradient that is not finite ends the training.

    Args:
        train, dev: lists of (subject, answer's token ids); with dev None the last state is kept.
        lr: the highest rate, in the form that `ready.groups` takes; every: steps between two looks at dev.
        score: a function from what is ready and dev to what is to be large: the share that is right.
        progress: show a bar.
        loss: a function from what is ready and a batch of rows to what is to be small, a scalar tensor.
    """
    if len(train) < batch_size:
        raise ValueError(f"{len(train)} rows are fewer than one batch of {batch_size}; give more, or a smaller batch")
    found, best = Fit(), None
    weights = ready.weights()
    optimizer, take = stepper(ready, lr, steps)
    start = time.perf_counter()
    bar = tqdm(total=steps, desc=f"{ready.method} at {lr}", unit="step", disable=not progress)
    try:
        for step in range(steps + 1):
            if dev and (step % every == 0 or step == steps):
                ready.trained.eval()
                now = score(ready, dev)
                found.scores.append([step, now])
                if found.dev is None or now > found.dev:
                    found.step, found.dev = step, now
                    best = [weight.detach().clone() for weight in weights]
            if step == steps:
                break
            chosen = batch_rows(step, len(train), batch_size, seed)
            ready.trained.train()
            present = loss(ready, [train[index] for index in chosen])
            take(present)
            found.losses.append(present.item())
            bar.update()
    except FloatingPointError as error:
        found.stopped = str(error)
    finally:
        bar.close()
        ready.trained.eval()
        if isinstance(optimizer, FusedOptimizer):
            optimizer.detach()
        if best is not None:
            with torch.no_grad():
                for weight, value in zip(weights, best, strict=True):
                    weight.copy_(value)
    found.seconds = time.perf_counter() - start
    return found


def stepper(ready, lr, steps):
    """The optimizer, and a function from a loss to one update."""
    if ready.method in FUSED:
        optimizer = FUSED[ready.method](ready.model, lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))

        def take(loss):
            optimizer.backward(loss)
            schedule.step()

        return optimizer, take
    weights = ready.weights()
    optimizer = torch.optim.AdamW(ready.groups(lr), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))

    def take_checked(loss):
        norm = take_step(weights, optimizer, schedule, loss)
        if not (math.isfinite(loss.item()) and norm.isfinite()):
            raise FloatingPointError(f"the loss is {loss.item():g} and the gradient's norm {norm:g}; lower the rate")

    return optimizer, take_checked
