"""One training loop for every method of the book, and the head that fine-tuning puts on a pretrained body.

The loop: AdamW, warm-up and linear decay, early stop on dev, resumable.
"""

import math
import os
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm  # the plain one: a widget would be an output of the cell

__all__ = [
    "Classifier",
    "batch_rows",
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
    """

    def __init__(self, body, tokenizer, classes, pool):
        super().__init__()
        self.body, self.tokenizer, self.pool = body, tokenizer, pool
        self.head = nn.Linear(body.config.hidden_size, classes).to(body.device)

    def forward(self, texts):
        """Logits (len(texts), classes), in float32. Texts longer than the body's context are cut."""
        batch = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        batch = batch.to(self.body.device)
        states = self.body(**batch).last_hidden_state  # (batch, seq, hidden)
        return self.head(self.pool(states, batch["attention_mask"]).float())


def mean_of_tokens(states, mask):
    """The mean state of the real tokens, for a body that reads both ways: (batch, hidden)."""
    mask = mask.unsqueeze(-1).to(states.dtype)  # (batch, seq, 1)
    return (states * mask).sum(dim=1) / mask.sum(dim=1)


def last_token(states, mask):
    """The state of the last real token, the one that has read everything in a causal body: (batch, hidden)."""
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
    """One update of `weights`, and of nothing else, with the gradient's norm clipped to 1."""
    optimizer.zero_grad()
    loss.backward(inputs=weights)
    clip_grad_norm_(weights, 1.0)
    optimizer.step()
    schedule.step()


def train(
    trained, loss_on, rows, lr, steps, score=None, batch_size=16, seed=0, every=25, patience=None, checkpoint=None
):
    """Train a module's parameters that require gradients, and leave them in the state that scored best.

    The state before the first step competes too, so a run never ends worse on dev than it began.

    Args:
        trained: the `nn.Module` to train; what has `requires_grad` false is left alone.
        loss_on: a function from a list of rows to their loss, a scalar tensor.
        rows: the training set, a list.
        lr: the highest learning rate; steps: the number of updates.
        score: a function without arguments that measures the present state on dev, higher is better. With None the
            last state is kept.
        every: steps between two scores; patience: this many scores without a new best end the run (None: never).
        checkpoint: a file to go on from if the run is killed, written with each score and removed at the end.

    Returns:
        A `Training`. A loss that is not finite ends the run with a warning; the best state so far is kept.

    Raises:
        ValueError: fewer rows than a batch, nothing to train, or the checkpoint of another run.
    """
    weights = _trainable(trained, rows, batch_size)
    optimizer, schedule = optimizer_for(weights, lr, steps)
    run = _Run(weights, optimizer, schedule, checkpoint, (lr, steps, batch_size, seed, every, len(rows)))
    with run.started(seed, steps) as bar:
        while True:
            if score and (run.step % every == 0 or run.step == steps):
                trained.eval()
                run.keep_if_best(score())
            if run.step == steps or run.is_out_of(patience, every):
                break
            trained.train()
            chosen = batch_rows(run.step, len(rows), batch_size, seed)
            loss = loss_on([rows[index] for index in chosen])
            if run.has_diverged(loss.item(), lr):
                break
            take_step(weights, optimizer, schedule, loss)
            run.note(loss.item(), bar)
    trained.eval()
    return run.finish()


@dataclass
class Training:
    """What a run of `train` did.

    `losses` has a number for each step, `scores` a `[step, score]` for each time dev was scored. `best_step` and
    `best_score` name the state that was kept; `stopped` says why the run ended before its last step, or is None.
    """

    losses: list = field(default_factory=list)
    scores: list = field(default_factory=list)
    best_step: int = 0
    best_score: float | None = None
    seconds: float = 0.0
    stopped: str | None = None


class _Run:
    """The books of one run: its history, its best state, and the checkpoint it goes on from."""

    def __init__(self, weights, optimizer, schedule, checkpoint, settings):
        self.weights, self.optimizer, self.schedule = weights, optimizer, schedule
        self.settings = repr((settings, [weight.shape for weight in weights]))
        self.checkpoint = Path(checkpoint) if checkpoint else None
        self.step, self.history, self.best, self.randomness = 0, Training(), None, None
        if self.checkpoint and self.checkpoint.is_file():
            self._resume()
        self.begun = time.perf_counter() - self.history.seconds

    @contextmanager
    def started(self, seed, steps):
        """A progress bar, and randomness (dropout) that depends on the seed alone and leaves the caller's as it was."""
        with torch.random.fork_rng(), tqdm(initial=self.step, total=steps, unit="step") as bar:
            if self.randomness is None:
                torch.manual_seed(seed)
            else:
                torch.set_rng_state(self.randomness)
            yield bar

    def keep_if_best(self, score):
        if [self.step] != [step for step, _ in self.history.scores[-1:]]:  # else resumed where this was noted
            self.history.scores.append([self.step, float(score)])
            if self.best is None or score > self.history.best_score:
                self.history.best_step, self.history.best_score = self.step, float(score)
                self.best = [weight.detach().clone() for weight in self.weights]
        if self.checkpoint:
            self._save()

    def is_out_of(self, patience, every):
        waited = (self.step - self.history.best_step) // every
        if patience is None or waited < patience:
            return False
        self.history.stopped = f"no better score in {waited} scores"
        return True

    def note(self, loss, bar):
        self.history.losses.append(loss)
        self.step += 1
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", best=self.history.best_score)

    def has_diverged(self, loss, lr):
        """Whether the loss is no finite number, which is noted and said."""
        if math.isfinite(loss):
            return False
        self.history.stopped = f"the loss was {loss} at step {self.step + 1}; lower the rate of {lr:g}"
        warnings.warn(f"training stopped: {self.history.stopped}. The best state so far is kept.", stacklevel=3)
        return True

    def finish(self):
        if self.best is None:
            self.history.best_step = self.step
        else:
            with torch.no_grad():
                for weight, best in zip(self.weights, self.best, strict=True):
                    weight.copy_(best)
        if self.checkpoint:
            self.checkpoint.unlink(missing_ok=True)
        self.history.seconds = time.perf_counter() - self.begun
        return self.history

    def _save(self):
        self.history.seconds = time.perf_counter() - self.begun
        state = {
            "settings": self.settings,
            "step": self.step,
            "history": asdict(self.history),
            "best": self.best,
            "weights": [weight.detach() for weight in self.weights],
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "randomness": torch.get_rng_state(),
        }
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.checkpoint.with_name(f".{self.checkpoint.name}.{os.getpid()}")
        torch.save(state, temporary)
        temporary.replace(self.checkpoint)

    def _resume(self):
        state = torch.load(self.checkpoint, weights_only=True)
        if state["settings"] != self.settings:
            raise ValueError(f"{self.checkpoint} is of a run with other settings; delete it or name another file")
        with torch.no_grad():
            for weight, saved in zip(self.weights, state["weights"], strict=True):
                weight.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.best, self.randomness = state["step"], state["best"], state["randomness"]
        self.history = Training(**state["history"])


def _trainable(trained, rows, batch_size):
    if len(rows) < batch_size:
        raise ValueError(
            f"the training set has {len(rows)} rows, fewer than one batch of {batch_size}; pass a smaller batch_size"
        )
    weights = [weight for weight in trained.parameters() if weight.requires_grad]
    if not weights:
        raise ValueError("there is nothing to train: no parameter of this module requires gradients")
    return weights


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
