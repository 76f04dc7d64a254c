"""LOMO: training every weight without ever holding all gradients (Lv et al., arXiv 2306.09782), and AdaLomo.

A weight is updated inside backward, as soon as its gradient is complete, and the gradient is let go of:

    optimizer = Lomo(model, lr=0.01)
    optimizer.backward(loss)  # in place of loss.backward(), optimizer.step() and optimizer.zero_grad()

`Lomo` is plain SGD, `AdaLomo` (arXiv 2310.10195) is Adafactor's rule; both are `FusedOptimizer`s.
"""

import weakref

import torch

from .training import restore_states

__all__ = ["AdaLomo", "FusedOptimizer", "HookedOptimizer", "Lomo", "LossScale"]

PATIENCE = 40  # skipped steps in a row before it is an error


class LossScale:
    """Dynamic loss scaling for float16: halved after a gradient that overflowed, doubled after 1,000 that did not."""

    def __init__(self, value, every=1000):
        self.value, self.every, self.good = float(value), every, 0

    def update(self, finite):
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good % self.every == 0:
            self.value *= 2


class Hook:
    """What is called when a weight's gradient is complete. It keeps no optimizer alive, for a weight keeps its hook."""

    def __init__(self, optimizer):
        self.optimizer = weakref.ref(optimizer)

    def __call__(self, weight):
        optimizer = self.optimizer()
        if optimizer is not None:
            optimizer.take(weight)


class Bookkeeping(torch.optim.Optimizer):
    """What a fused optimizer keeps beside its updates: hooks, names, counters, saved state, wrong calls."""

    def __init__(self, model, lr, clip_norm=None, clip_value=None, loss_scale=None, weight_decay=0.0):
        numbers = {"lr": lr, "clip_norm": clip_norm, "clip_value": clip_value, "loss_scale": loss_scale}
        self.names = _trained(model, numbers, weight_decay)
        super().__init__(list(self.names), {"lr": lr, "weight_decay": weight_decay})
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.scale = LossScale(loss_scale) if loss_scale else None
        self.steps, self.skipped, self.skipped_in_a_row = 0, 0, 0
        self.use, self.seen, self.counted = None, {}, False
        hook = Hook(self)
        self.hooks = [weight.register_post_accumulate_grad_hook(hook) for weight in self.names]

    def begin(self, loss):
        """Check a step's loss; whether a first pass is needed: to clip, to scale, or to see if gradients come in parts.

        They may with reentrant checkpointing, so where the first loss's graph has that, they are counted, once. (If the
        model changes later, detach and begin anew.)
        """
        _check_loss(loss, self.names)
        self._opt_called = True  # torch's schedules ask
        in_parts = not self.counted and any("CheckpointFunction" in node.name() for node in _graph(loss))
        return bool(self.clip_norm or self.scale or in_parts)

    def add_param_group(self, group):
        if self.param_groups:
            raise ValueError(
                "a fused optimizer has one group of weights, with one rate; freeze what is not to be trained"
            )
        super().add_param_group(group)

    def skip(self):
        """Note that a step is left out, since its gradients are not finite."""
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.scale:
            self.scale.update(finite=False)
        if self.skipped_in_a_row >= PATIENCE:
            raise FloatingPointError(
                f"the gradients of {PATIENCE} steps in a row were not finite, and all were skipped"
                + (f"; the loss scale is down to {self.scale.value:g}" if self.scale else "")
                + ". Look for what is not finite in the model or the data, or lower the rate"
            )

    def finish(self):
        """Note that a step was taken."""
        self.skipped_in_a_row = 0
        if self.scale:
            self.scale.update(finite=True)

    def is_finite(self, grad):
        return bool(grad.sum().isfinite())

    def detach(self):
        """Take the hooks off; the model trains as before."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def step(self, closure=None):
        """Raises RuntimeError: the update is in `backward`."""
        raise RuntimeError("there is no step to take: call optimizer.backward(loss), which updates the weights itself")

    def state_dict(self):
        """As torch's, with the counters and the loss scale."""
        own = {"steps": self.steps, "skipped": self.skipped}
        if self.scale:
            own |= {"scale": self.scale.value, "good": self.scale.good}
        return super().state_dict() | {"fused": own}

    def load_state_dict(self, state_dict):
        """As torch's; tensors keep their dtype."""
        state_dict = dict(state_dict)
        own = state_dict.pop("fused")
        super().load_state_dict(state_dict | {"state": {}})
        restore_states(self, state_dict, lambda weight, value: value.to(weight.device, copy=True))
        self.steps, self.skipped = own["steps"], own["skipped"]
        if self.scale and "scale" in own:
            self.scale.value, self.scale.good = own["scale"], own["good"]


class HookedOptimizer(Bookkeeping):
    """A backward pass in which each gradient is used once it is complete, and let go of."""

    def run(self, loss, use, retain_graph=False):
        """One pass in which `use(weight, grad)` is called with each gradient, in float32."""
        self.use, self.seen = use, {}  # in the order in which they come
        try:
            scaled = loss * self.scale.value if self.scale else loss
            scaled.backward(retain_graph=retain_graph)
        finally:
            self.use = None
            for weight in self.names:
                weight.grad = None

    def take(self, weight):
        """The hook: weight.grad is complete."""
        grad, weight.grad = weight.grad, None
        _check_take(self, weight, grad)
        self.seen[weight] = True
        grad = exact(grad)
        self.use(weight, grad.div_(self.scale.value) if self.scale else grad)


class FusedOptimizer(HookedOptimizer):
    """What `Lomo` and `AdaLomo` share: one backward pass that updates, or two where something must be known before.

    With `clip_norm` or `loss_scale` there are two: the first only measures the norm, the second updates. A norm that
    is not finite skips the step (`skipped` counts them). In one pass a gradient that is not finite is an error, for
    weights before it are updated already.

    Args:
        model: its parameters that require gradients are trained.
        lr: the learning rate, also as `param_groups[0]["lr"]`, where torch's schedules set it.
        clip_norm: the largest norm of all gradients together; clip_value: the largest magnitude of a gradient's number.
            With both, the norm is that before clipping by value, as in lomo-optim.
        loss_scale: where dynamic loss scaling starts, e.g. 2.0**16; needed in float16. Compute the loss in float32,
            for a loss in float16 cannot be scaled by more than 2**15.
        weight_decay: decoupled: in each step weights shrink by this times the rate.

    Raises:
        ValueError: nothing to train, a sparse embedding, float16 without a loss scale, numbers that make no sense, or
            weights that a fused optimizer has already (`detach` it first).
    """

    def backward(self, loss):
        """One step: gradients of `loss`, a scalar, and the update.

        Returns:
            The norm of all gradients before clipping, a tensor, if there were two passes; else None.

        Raises:
            ValueError: a loss that is no scalar or has no graph; FloatingPointError: see above, or `PATIENCE` skipped
            steps in a row; RuntimeError: a weight inside two segments of reentrant checkpointing.
        """
        norm, factor = None, None
        if self.begin(loss):
            norms = {}
            self.run(loss, lambda w, grad: norms.update({w: grad.norm()}), retain_graph=True)
            if not norms:
                raise ValueError("this loss depends on no weight that is trained")
            norm = torch.stack([norms[w] for w in self.names if w in norms]).norm()
            if not norm.isfinite():
                self.skip()
                return norm
            if self.clip_norm:
                factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        self.steps, self.counted = self.steps + 1, True
        self.run(loss, lambda w, grad: self.clip_and_update(w, grad, factor, norm is not None))
        self.finish()
        return norm

    @torch.no_grad()
    def clip_and_update(self, weight, grad, factor, checked):
        if not checked and not self.is_finite(grad):
            raise FloatingPointError(_already_changed(self, weight))
        if self.clip_value:
            grad.clamp_(-self.clip_value, self.clip_value)
        if factor is not None:
            grad.mul_(factor)
        self.update(weight, grad, self.param_groups[0])


class Lomo(FusedOptimizer):
    """SGD fused into backward: no gradient is kept, and there is no state. Arguments as in `FusedOptimizer`."""

    def update(self, weight, grad, group):
        new = exact(weight)
        if group["weight_decay"]:
            new.mul_(1 - group["lr"] * group["weight_decay"])
        weight.copy_(new.add_(grad, alpha=-group["lr"]))


class AdaLomo(FusedOptimizer):
    """Adafactor's rule fused into backward (arXiv 2310.10195): of a matrix's squared gradients only means are kept.

    The mean of each row and of each column, so m + n numbers for an (m, n) weight; of a vector all. The update is
    divided by its root mean square where that is above 1, and multiplied by that of the weight, at least 1e-3.
    Arguments as in `FusedOptimizer`; the paper's rates are near 5e-4 to 1e-3.
    """

    def update(self, weight, grad, group):
        state, beta = self.state[weight], 1 - self.steps**-0.8
        square = grad.square().add_(1e-30)
        if weight.dim() > 1:
            row = _average(state, "row", square.mean(dim=-1), beta)  # (..., m)
            column = _average(state, "column", square.mean(dim=-2), beta)  # (..., n)
            scale = (row / row.mean(dim=-1, keepdim=True)).rsqrt().unsqueeze(-1) * column.rsqrt().unsqueeze(-2)
        else:
            scale = _average(state, "square", square, beta).rsqrt()
        change = scale.mul_(grad)
        change.div_(_rms(change).clamp(min=1.0))
        new = exact(weight)
        lr = group["lr"] * _rms(new).clamp(min=1e-3)
        if group["weight_decay"]:
            new.mul_(1 - lr * group["weight_decay"])
        weight.copy_(new.sub_(change.mul_(lr)))


def exact(x):
    """A copy in float32 if x is in 16 bits, else x itself."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _average(state, name, new, beta):
    """The moving average of `new`, kept in `state`."""
    state[name] = new if name not in state else state[name].mul_(beta).add_(new, alpha=1 - beta)
    return state[name]


def _rms(x):
    return x.norm() / x.numel() ** 0.5


def _trained(model, numbers, weight_decay):
    """{weight: name} of what is to be trained; raises ValueError where it cannot be."""
    for name, value in numbers.items():
        if value is not None and not (0 < value < float("inf")):
            raise ValueError(f"{name} is {value}; it must be a positive number" + (" or None" if name != "lr" else ""))
    if weight_decay < 0:
        raise ValueError(f"weight_decay is {weight_decay}; it must not be negative")
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise ValueError(
            "under DistributedDataParallel each process would update by its own gradient; train on one device"
        )
    names = {weight: name for name, weight in model.named_parameters() if weight.requires_grad}
    if not names:
        raise ValueError("there is nothing to train: no parameter of this model requires gradients")
    for path, module in model.named_modules():
        if getattr(module, "sparse", False) and any(weight in names for weight in module.parameters()):
            raise ValueError(f"{path} has sparse gradients, which this cannot use; build it with sparse=False")
    for weight, name in names.items():
        hooks = (getattr(weight, "_post_accumulate_grad_hooks", None) or {}).values()
        if any(isinstance(hook, Hook) and hook.optimizer() is not None for hook in hooks):
            raise ValueError(f"{name} is trained by a fused optimizer already; call that one's detach() first")
        if weight.dtype == torch.float16 and numbers["loss_scale"] is None:
            raise ValueError(f"{name} is in float16, where small gradients become zero; pass loss_scale=2.0**16")
    return names


def _check_loss(loss, names):
    if loss.dim() or not loss.requires_grad:
        raise ValueError(
            f"expected a loss that is a scalar with a graph; this one has shape {tuple(loss.shape)} "
            f"and requires_grad={loss.requires_grad}"
        )
    kept = [name for weight, name in names.items() if weight.grad is not None]
    if kept:
        raise ValueError(f"{kept[0]} has a gradient from before; gradients cannot be accumulated here. Set it to None")


def _check_take(optimizer, weight, grad):
    if optimizer.use is None:
        raise RuntimeError(
            "this model's weights are updated inside backward: call optimizer.backward(loss), not loss.backward(). "
            "Gradients cannot be accumulated over batches, for none is kept: take larger batches, or optimizer.detach()"
        )
    if weight in optimizer.seen:
        raise RuntimeError(
            f"the gradient of {optimizer.names[weight]} came in parts: it is used inside two segments of reentrant "
            "checkpointing, or inside one and outside. Use checkpointing with use_reentrant=False"
        )
    if grad.is_sparse:
        name = optimizer.names[weight]
        raise ValueError(f"the gradient of {name} is sparse, which this cannot use; build the layer with sparse=False")


def _already_changed(optimizer, weight):
    done = [optimizer.names[seen] for seen in optimizer.seen if seen is not weight]
    tail = ", ".join(done[:3]) + (" and so on" if len(done) > 3 else "")
    said = f"{len(done)} parameters were updated before it ({tail})" if done else "no parameter was updated before it"
    return (
        f"the gradient of {optimizer.names[weight]} is not finite; {said}. Go back to saved weights if any were; "
        "with clip_norm a first pass would have found it, and the step been skipped"
    )


def _graph(loss):
    """All nodes of a loss's graph."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    return seen
