"""What keeps the books of a training run: its history, best state, loss scale, random numbers and checkpoint.

`tuning.training` is the loop itself; this is its plumbing.
"""

import hashlib
import json
import math
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm  # the plain one: a widget would be an output of the cell

from .files import replace

__all__ = ["TRIES", "Run", "Settings", "Training", "trainable"]

START = "weights at the start"
TRIES = 40  # of one step in float16, each with half the loss scale of the one before


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


class Settings(NamedTuple):
    """What a run is told, and a checkpoint must have been told too."""

    lr: float
    steps: int
    batch_size: int
    seed: int
    every: int
    accumulate: int
    autocast: torch.dtype | None


class Run:
    """The books of one run: its history, its best state, its loss scale, and the checkpoint it goes on from.

    `scale` is what the loss is multiplied by before backward; hooks divide each gradient by it again. It is 1 until the
    first loss has shown that float16 takes part.
    """

    def __init__(self, trained, optimizer, schedule, rows, settings, checkpoint):
        if settings.steps < 0 or settings.every < 1:
            raise ValueError(f"steps is {settings.steps} and every {settings.every}; take 0 or more, and 1 or more")
        self.trained, self.optimizer, self.schedule, self.settings = trained, optimizer, schedule, settings
        self.weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        self.buffers = [tensor for tensor in _changing(trained).values() if not tensor.requires_grad]
        self.checkpoint = Path(checkpoint) if checkpoint else None
        self.step, self.history, self.best, self.randomness = 0, Training(), None, None
        self.float16, self.scale, self.good, self.failed = None, 1.0, 0, 0
        if self.checkpoint:
            self.identity = _identity(trained, rows, settings)
            if self.checkpoint.is_file():
                self._resume()
        self.begun = time.perf_counter() - self.history.seconds

    @contextmanager
    def started(self):
        """A progress bar, and randomness (dropout) that depends on the seed alone and leaves the caller's as it was."""
        devices = _accelerators(self.weights)
        kind = devices[0].type if devices else "cpu"
        self.optimizer.zero_grad()
        with (
            ExitStack() as hooks,
            torch.random.fork_rng(devices, device_type=kind),
            tqdm(initial=self.step, total=self.settings.steps, unit="step") as self.bar,
        ):
            for weight in self.weights:
                hooks.callback(weight.register_hook(self._unscale).remove)
            _set_randomness(self.weights, self.randomness or _seeded(self.weights, self.settings.seed))
            try:
                yield
            except BaseException:  # the same call again, with the same module, then goes on from there
                if self.checkpoint and self.checkpoint.is_file():
                    self._restore(_load(self.checkpoint)["present"])
                raise

    def is_due(self):
        """Whether it is time for a score, and this step has none yet."""
        scored = bool(self.history.scores) and self.history.scores[-1][0] == self.step
        return not scored and (self.step % self.settings.every == 0 or self.step == self.settings.steps)

    def keep_if_best(self, score):
        score, best = float(score), self.history.best_score
        self.history.scores.append([self.step, score])
        if score > (-math.inf if best is None else best):  # NaN is not above anything
            self.history.best_step, self.history.best_score = self.step, score
            self.best = {name: tensor.detach().clone() for name, tensor in _changing(self.trained).items()}
        if self.checkpoint:
            self._save()

    def is_over(self, patience):
        """Whether all steps are taken, the run has diverged, or it has waited long enough for a better score."""
        if self.step == self.settings.steps or self.history.stopped:
            return True
        waited = (self.step - self.history.best_step) // self.settings.every
        if patience is not None and waited >= patience:
            self.history.stopped = f"no better score in {waited} scores"
        return self.history.stopped is not None

    def loss(self, loss_on, rows):
        """The mean loss of a step's batches. All but the last have left their gradient in the weights, and no graph."""
        total, size = torch.zeros(()), self.settings.batch_size
        self.before = [buffer.clone() for buffer in self.buffers]
        for start in range(0, len(rows), size):
            if total.requires_grad:
                (total * self.scale).backward(inputs=self.weights)
            with self._arithmetic():
                loss = loss_on(rows[start : start + size])
            if self.float16 is None:
                self.float16 = _has_float16(loss)
                self.scale = 2.0**16 if self.float16 else 1.0
            total = total.detach() + loss / self.settings.accumulate  # zeros() make it float32 at least
        return total

    def note(self, loss, norm):
        """Note a step. If it was left out, halve the loss scale to try again, or end the run."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.step, self.good, self.failed = self.step + 1, self.good + 1, 0
            if self.float16 and self.good % 2000 == 0:  # as often as torch's GradScaler
                self.scale *= 2
            self.history.losses.append(loss)
            self.bar.update()
            self.bar.set_postfix(loss=f"{loss:.3f}", best=self.history.best_score)
            return
        for buffer, before in zip(self.buffers, self.before, strict=True):  # the averages of batch norm saw the batch
            buffer.copy_(before)
        if self.float16 and math.isfinite(loss) and self.failed + 1 < TRIES:
            self.scale, self.good, self.failed = self.scale / 2, 0, self.failed + 1
        else:
            fault = f"gradient's norm was {norm}" if math.isfinite(loss) else f"loss was {loss}"
            self.history.stopped = f"the {fault} at step {self.step + 1}; lower the rate of {self.settings.lr:g}"
            kept = "best state so far is" if self.best else "weights before that step are"
            warnings.warn(f"training stopped: {self.history.stopped}. The {kept} kept.", stacklevel=3)

    def finish(self):
        if self.best is None:
            self.history.best_step = self.step
            if self.history.scores:
                warnings.warn("no score was a finite number; the last state is kept", stacklevel=3)
        else:
            self._restore(self.best)
        if self.checkpoint:
            self.checkpoint.unlink(missing_ok=True)
        self.history.seconds = time.perf_counter() - self.begun
        return self.history

    def _unscale(self, grad):
        return grad / self.scale if self.float16 else None  # None leaves it as it is

    def _arithmetic(self):
        dtype = self.settings.autocast
        return torch.autocast(self.weights[0].device.type, dtype) if dtype else nullcontext()

    @torch.no_grad()
    def _restore(self, state):
        for name, tensor in _changing(self.trained).items():
            tensor.copy_(state[name])

    def _save(self):
        self.history.seconds = time.perf_counter() - self.begun
        state = {
            "identity": self.identity,
            "weights now": _weights(self.trained),
            "step": self.step,
            "history": asdict(self.history),
            "best": self.best,
            "present": {name: tensor.detach() for name, tensor in _changing(self.trained).items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scale": [self.float16, self.scale, self.good],
            "randomness": _randomness(self.weights),
        }
        replace(self.checkpoint, lambda temporary: torch.save(state, temporary))

    def _resume(self):
        state = _load(self.checkpoint)
        saved = state.get("identity", {})
        differ = [name for name, value in self.identity.items() if saved.get(name) != value]
        interrupted = differ == [START] and self.identity[START] == state.get("weights now")
        if differ and not interrupted:
            raise ValueError(
                f"{self.checkpoint} is of a run with other {', '.join(differ)}; delete it or name another "
                "file, or begin as that run began"
            )
        self.identity = saved
        self._restore(state["present"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.best, self.randomness = state["step"], state["best"], state["randomness"]
        self.float16, self.scale, self.good = state["scale"]
        self.history = Training(**state["history"])


def trainable(trained, rows, batch_size, score, patience):
    """The weights to train; raises ValueError where they, or what `train` was told, do not allow it."""
    if batch_size < 1:
        raise ValueError("batch_size and accumulate must be 1 at least")
    if len(rows) < batch_size:
        raise ValueError(
            f"the training set has {len(rows)} rows, fewer than one batch of {batch_size}; pass a smaller batch_size "
            "or accumulate"
        )
    if patience is not None and score is None:
        raise ValueError("patience needs a score: pass score=..., a function that measures dev, or leave patience out")
    weights = {name: weight for name, weight in trained.named_parameters() if weight.requires_grad}
    if not weights:
        raise ValueError("there is nothing to train: no parameter of this module requires gradients")
    for name, weight in weights.items():
        if weight.dtype == torch.float16:
            raise ValueError(
                f"{name} would be trained in float16, in which small updates are lost; load the model in float32 "
                "(load_lm(dtype=torch.float32), then perhaps train(..., autocast=torch.float16)) or in bfloat16, or "
                "freeze it and train adapters (add_lora)"
            )
    return list(weights.values())


def _changing(trained):
    """{name: tensor} of what training may change: trained weights, and buffers such as the averages of batch norm.

    Batch norm's change also where its weights are frozen. A layer that holds whole numbers is quantized: its buffers
    are constants, and many.
    """
    found = {name: weight for name, weight in trained.named_parameters() if weight.requires_grad}
    saved = trained.state_dict().keys()  # without those that a module says need not be kept
    for path, module in trained.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if all(tensor.is_floating_point() or tensor.numel() == 1 for tensor in own):
            found |= {n: b for n, b in module.named_buffers(path, recurse=False) if n in saved}
    return found


def _has_float16(loss):
    """Whether a tensor of float16 is on the way from the weights to the loss."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if any(made.dtype == torch.float16 for made in node._input_metadata):
            return True
        seen.add(node)
        todo += [before for before, _ in node.next_functions]
    return False


def _accelerators(weights):
    """The devices of the weights that have random numbers of their own."""
    return sorted({weight.device for weight in weights if weight.device.type in ("cuda", "mps")}, key=str)


def _randomness(weights):
    """The states of the generators of random numbers: the CPU's, and those of the weights' devices."""
    others = [torch.get_device_module(device).get_rng_state(device) for device in _accelerators(weights)]
    return [torch.get_rng_state(), *others]


def _seeded(weights, seed):
    """The states that `torch.manual_seed` gives them; it would do so on all devices."""
    return [torch.Generator(device).manual_seed(seed).get_state() for device in ("cpu", *_accelerators(weights))]


def _set_randomness(weights, states):
    torch.set_rng_state(states[0])
    for device, state in zip(_accelerators(weights), states[1:], strict=False):  # a resumed run may have others
        torch.get_device_module(device).set_rng_state(state, device)


def _identity(trained, rows, settings):
    """What tells a run from others, as a dict of texts that are the same in every process."""
    told = {name: repr(value) for name, value in settings._asdict().items()}
    return told | {"rows": _digest(list(rows)), START: _weights(trained)}


def _weights(trained):
    """A checksum of the trained weights, and of a few numbers of each frozen one."""
    return _digest(
        [
            (name, weight.requires_grad, weight if weight.requires_grad else _some(weight))
            for name, weight in trained.named_parameters()
        ]
    )


def _load(checkpoint):
    return torch.load(checkpoint, map_location="cpu", weights_only=True)


def _some(weight):
    """Sixteen of a weight's numbers: there are too many frozen ones to read all."""
    flat = weight.detach().flatten()
    return flat[:: max(1, len(flat) // 16)]


def _digest(value):
    """A checksum of nested lists and dicts of tensors, arrays and plain values."""
    return hashlib.sha256(json.dumps(value, default=_plain, skipkeys=True).encode()).hexdigest()


def _plain(value):
    """What JSON writes for a value that it does not know; of an unknown kind only the name."""
    if torch.is_tensor(value):
        numbers = value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy()
        return [str(value.dtype), list(value.shape), hashlib.sha256(numbers).hexdigest()]
    if isinstance(value, Mapping):
        return dict(value)
    return value.tolist() if hasattr(value, "tolist") else type(value).__name__
