"""One training loop for every method of the book, and the head that fine-tuning puts on a pretrained body.

The loop: AdamW, warm-up and linear decay, early stop on dev, gradient accumulation, loss scaling in float16, resumable.
"""

from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint as recompute

from .models import context_length as _context_length
from .runs import Run, Settings, trainable

__all__ = [
    "Classifier",
    "batch_rows",
    "chunked_loss",
    "last_token",
    "mean_of_tokens",
    "optimizer_for",
    "rate_factor",
    "take_step",
    "train",
]


class Classifier(nn.Module):
    """A pretrained body with a new linear head: what fine-tuning trains.

    Args:
        body: a transformer without a head; classes: how many there are.
        pool: a function from states (batch, seq, hidden) and attention mask (batch, seq) to (batch, hidden).

    Texts longer than the body's context are cut. One without any token is read as the padding token.
    """

    def __init__(self, body, tokenizer, classes, pool):
        super().__init__()
        self.body, self.tokenizer, self.pool = body, tokenizer, pool
        self.head = nn.Linear(body.config.hidden_size, classes).to(body.device)
        self.cut = {"truncation": True, "max_length": _context_length(body, tokenizer)}

    def forward(self, texts):
        """Logits (len(texts), classes), in float32."""
        texts = _without_empty(texts, self.tokenizer, self.cut)
        batch = self.tokenizer(texts, padding=True, **self.cut, return_tensors="pt")
        batch = batch.to(self.body.device)
        states = self.body(**batch).last_hidden_state  # (batch, seq, hidden)
        return self.head(self.pool(states, batch["attention_mask"]).float())


def mean_of_tokens(states, mask):
    """The mean state of the real tokens, for a body that reads both ways: (batch, hidden).

    It is in float32 also where the states have 16 bits, whose sum could overflow. A row without tokens has mean zero.
    """
    mask = mask.unsqueeze(-1).float()  # (batch, seq, 1)
    return (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def last_token(states, mask):
    """The state of the last real token, the one that has read everything in a causal body: (batch, hidden).

    A row without tokens has the state of its first place.
    """
    places = torch.arange(mask.shape[1], device=mask.device)
    return states[torch.arange(len(states), device=mask.device), (places * mask).argmax(dim=1)]


def rate_factor(step, steps):
    """What the learning rate is multiplied by: up over the first tenth of the steps, then straight down to zero."""
    warmup = max(1, steps // 10)
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def batch_rows(step, n, batch_size, seed):
    """The row numbers of a step's batch: each epoch is a new shuffle of the n rows, without its incomplete last batch.

    It depends on nothing but its arguments, so a run that was killed goes on with the batches it would have had.
    """
    epoch, place = divmod(step, n // batch_size)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
    return order[place * batch_size : (place + 1) * batch_size].tolist()


def optimizer_for(weights, lr, steps):
    """AdamW without weight decay, and the schedule that sets its rate by `rate_factor`."""
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))


def take_step(weights, optimizer, schedule, loss):
    """One update of `weights`, and of nothing else, with the gradient's norm clipped to 1.

    Gradients that the weights have already are added to it, and none is left. If it or the loss is not finite, nothing
    is updated.

    Returns:
        The gradient's norm before clipping, a tensor.
    """
    loss.backward(inputs=weights)
    norm = clip_grad_norm_(weights, 1.0)
    if loss.isfinite() and norm.isfinite():  # else every weight would become NaN
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    return norm


def train(
    trained,
    loss_on,
    rows,
    lr,
    steps,
    score=None,
    batch_size=16,
    seed=0,
    every=25,
    patience=None,
    checkpoint=None,
    accumulate=1,
    autocast=None,
):
    """Train a module's parameters that require gradients, and leave them in the state that scored best.

    The state before the first step competes too, so a run never ends worse on dev than it began. A score that is NaN
    or minus infinity never wins.

    Where float16 takes part, say in a frozen model, the loss is scaled. A step whose gradient overflows is tried again
    with half the scale, 40 times at most.

    Args:
        trained: the `nn.Module` to train; what has `requires_grad` false is left alone.
        loss_on: a function from a list of rows to their mean loss, a scalar tensor.
        rows: the training set, a list.
        lr: the highest learning rate; steps: the number of updates.
        score: a function without arguments that measures the present state on dev, higher is better. With None the
            last state is kept.
        every: steps between two scores; patience: this many scores without a new best end the run (None: never).
        checkpoint: a file to go on from if the run is killed, written with each score and removed at the end.
        accumulate: batches a step. Their losses are averaged, one after the other, in the memory of one. It is the
            step of one large batch if `loss_on` is a mean over rows; with a mean over tokens, only if all batches have
            as many tokens.
        autocast: a dtype that the products of `loss_on` are computed in, say torch.bfloat16, while the weights stay in
            float32; None leaves all as it is.

    Returns:
        A `Training`. A loss or a gradient that is not finite ends the run before its step, with a warning that says
        which state is kept.

    Raises:
        ValueError: fewer rows than a step takes, nothing to train, weights to train in float16, patience without a
            score, or the checkpoint of another run.
    """
    weights = trainable(trained, rows, accumulate * batch_size, score, patience)
    optimizer, schedule = optimizer_for(weights, lr, steps)
    settings = Settings(lr, steps, batch_size, seed, every, accumulate, autocast)
    run = Run(trained, optimizer, schedule, rows, settings, checkpoint)
    with run.started():
        while True:
            if score and run.is_due():
                trained.eval()
                run.keep_if_best(score())
            if run.is_over(patience):
                break
            trained.train()
            chosen = batch_rows(run.step, len(rows), accumulate * batch_size, seed)
            loss = run.loss(loss_on, [rows[index] for index in chosen])
            norm = take_step(weights, optimizer, schedule, loss * run.scale)
            run.note(loss.item(), norm.item())
    trained.eval()
    return run.finish()


def chunked_loss(states, weight, labels, size=1024):
    """The mean cross-entropy of next tokens, with the logits of `size` tokens at a time; backward makes them again.

    Args:
        states: (batch, seq, hidden), the last hidden states; weight: (vocabulary, hidden), of the output layer.
        labels: (batch, seq), the tokens themselves; what follows is predicted from each. -100 is left out.

    Returns:
        A scalar, in float32 at least; NaN if all labels are left out, as torch's mean over nothing.

    Raises:
        ValueError: a size that is not positive, or labels of another shape than the states.
    """
    _check_chunks(states, labels, size)
    labels = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()  # the last token of a row has no next

    def summed(states, labels):
        logits = F.linear(states, weight)  # (size, vocabulary)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, labels, reduction="sum")

    chunks = zip(states.flatten(0, 1).split(size), labels.split(size), strict=True)
    losses = [recompute(summed, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack(losses).sum() / (labels != -100).sum()


def _check_chunks(states, labels, size):
    if size < 1 or labels.shape != states.shape[:-1]:
        raise ValueError(
            f"expected a positive size and a label for each state, got {size}, "
            f"labels {tuple(labels.shape)} and states {tuple(states.shape)}"
        )


def restore_states(optimizer, state_dict, place):
    """Give an optimizer the saved tensors as they are; torch's `load_state_dict` gives them their weights' dtype.

    Args:
        place: a function from a weight and a tensor of its state to the tensor to keep.
    """
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, weight in zip(numbers, weights, strict=True):
        for name, value in state_dict["state"].get(number, {}).items():
            optimizer.state[weight][name] = place(weight, value) if torch.is_tensor(value) else value


def checkpoint_activations(model, on=True):
    """Have a transformers model keep only each layer's input for backward, by torch's newer kind, or all again.

    The method that does it has had two names.
    """
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{name}_checkpointing_disable")()
        with suppress(AttributeError):  # where switching it on has put no such hook
            model.disable_input_require_grads()


def _without_empty(texts, tokenizer, cut):
    """The texts, with the padding token for each that has no token at all: a mean over nothing is no number."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise ValueError("there are no texts to classify; is the list empty?")
    found = tokenizer(texts, **cut).input_ids
    return [text if ids else tokenizer.pad_token for text, ids in zip(texts, found, strict=True)]
