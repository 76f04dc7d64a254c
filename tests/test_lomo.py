"""LOMO: against torch's SGD, lomo-optim and float64; clipping, scaling, skipping; checkpointing; state; bad input."""

import copy
import gc
import math
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.checkpoint import checkpoint
from tuning.lomo import PATIENCE, AdaLomo, Lomo, LossScale

IDS = torch.tensor([[1, 2, 3, 4], [10, 4, 0, 7]])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3, bias=False))


def loss_of(model, step=0, scale=1.0):
    x = scale * torch.randn(5, 6, generator=torch.Generator().manual_seed(step), dtype=torch.double)
    return model(x.to(next(model.parameters()).dtype)).square().mean()


def lm_loss(model, step=0):
    return model(input_ids=(IDS + step) % 50, labels=(IDS + step) % 50, use_cache=False).loss


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("clip", [{}, {"clip_norm": 0.05}, {"clip_norm": 100.0}, {"clip_value": 0.01}])
def test_lomo_is_sgd_bit_for_bit(tiny_llama, clip):
    ours, theirs = tiny_llama[0].train(), copy.deepcopy(tiny_llama[0]).train()
    assert ours.lm_head.weight is ours.model.embed_tokens.weight  # tied
    lomo, sgd = Lomo(ours, lr=0.1, **clip), torch.optim.SGD(theirs.parameters(), lr=0.1, foreach=False)
    for step in range(8):
        norm = lomo.backward(lm_loss(ours, step))
        lm_loss(theirs, step).backward()
        if "clip_norm" in clip:
            assert torch.equal(norm, clip_grad_norm_(theirs.parameters(), clip["clip_norm"]))
        elif clip:
            clip_grad_value_(theirs.parameters(), clip["clip_value"])
        sgd.step()
        sgd.zero_grad()
    assert same(ours, theirs)
    assert all(weight.grad is None for weight in ours.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_lomo_under_checkpointing_is_sgd_without(tiny_llama, reentrant, clip_norm):
    ours, theirs = tiny_llama[0].train(), copy.deepcopy(tiny_llama[0]).train()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        ours.enable_input_require_grads()
    lomo, sgd = Lomo(ours, lr=0.1, clip_norm=clip_norm), torch.optim.SGD(theirs.parameters(), lr=0.1, foreach=False)
    for step in range(4):
        lomo.backward(lm_loss(ours, step))
        lm_loss(theirs, step).backward()
        if clip_norm:
            clip_grad_norm_(theirs.parameters(), clip_norm)
        sgd.step()
        sgd.zero_grad()
    assert same(ours, theirs)


def authors(name, monkeypatch):
    """The authors' class, with its states where the weights are."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(pytest.importorskip("lomo_optim"), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.05}, {"clip_grad_value": 0.01}, {"weight_decay": 0.1}])
def test_lomo_is_that_of_its_authors(tiny_llama, monkeypatch, dtype, options):
    ours = tiny_llama[0].to(dtype).train()
    theirs = copy.deepcopy(ours)
    reference = authors("Lomo", monkeypatch)(theirs, lr=0.1, **options)
    lomo = Lomo(ours, lr=0.1, **{name.replace("_grad", ""): value for name, value in options.items()})
    for step in range(5):
        lomo.backward(lm_loss(ours, step))
        if "clip_grad_norm" in options:
            reference.grad_norm(lm_loss(theirs, step))
        reference.fused_backward(lm_loss(theirs, step), 0.1)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"clip_grad_norm": 0.05}])
def test_adalomo_is_that_of_its_authors(tiny_llama, monkeypatch, dtype, options):
    ours = tiny_llama[0].to(dtype).train()
    theirs = copy.deepcopy(ours)
    reference = authors("AdaLomo", monkeypatch)(theirs, lr=0.02, loss_scale=None, **options)
    adalomo = AdaLomo(ours, lr=0.02, **{name.replace("_grad", ""): value for name, value in options.items()})
    for step in range(6):
        adalomo.backward(lm_loss(ours, step))
        if "clip_grad_norm" in options:
            reference.grad_norm(lm_loss(theirs, step))
        reference.fused_backward(lm_loss(theirs, step), 0.02)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def adalomo_in_float64(weights, gradients, states, t, lr, weight_decay):
    """One step from the paper's equations, in float64, on detached copies."""
    beta = 1 - t**-0.8
    for k, (weight, grad) in enumerate(zip(weights, gradients, strict=True)):
        g2 = grad**2 + 1e-30
        if weight.dim() > 1:
            r, c = states.get(k, (0, 0))
            r, c = beta * r + (1 - beta) * g2.mean(-1), beta * c + (1 - beta) * g2.mean(-2)
            states[k] = r, c
            v = r[..., :, None] * c[..., None, :] / r.mean(-1)[..., None, None]
        else:
            v = states[k] = beta * states.get(k, 0) + (1 - beta) * g2
        u = grad / v.sqrt()
        u = u / max(1, u.square().mean().sqrt().item())
        rate = lr * max(1e-3, weight.square().mean().sqrt().item())
        weight.mul_(1 - rate * weight_decay).sub_(rate * u)


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_adalomo_is_its_equations_in_float64(weight_decay):
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.cube = nn.Parameter(torch.randn(2, 4, 3))
            self.matrix = nn.Parameter(torch.randn(3, 5))
            self.vector = nn.Parameter(torch.zeros(5))  # its root mean square starts below 1e-3

        def forward(self, x):
            return torch.tanh(torch.einsum("bi,kio->bo", x, self.cube)) @ self.matrix + self.vector

    torch.manual_seed(0)
    ours = Three()
    exact = copy.deepcopy(ours).double()
    optimizer, states = AdaLomo(ours, lr=0.05, weight_decay=weight_decay), {}
    for t in range(1, 11):
        x = torch.randn(7, 4)
        optimizer.backward(ours(x).square().mean())
        grads = torch.autograd.grad(exact(x.double()).square().mean(), list(exact.parameters()))
        with torch.no_grad():
            adalomo_in_float64(list(exact.parameters()), grads, states, t, 0.05, weight_decay)
    for one, other in zip(ours.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
    assert sum(value.numel() for state in optimizer.state.values() for value in state.values()) == 2 * 7 + 8 + 5


def test_gradients_are_let_go_of_at_once(model):
    held, sizes = [], [weight.numel() for weight in model.parameters()]
    optimizer = Lomo(model, lr=0.1)
    update = optimizer.update

    def watching(weight, grad, group):
        held.append(sum(w.grad.numel() for w in model.parameters() if w.grad is not None) + grad.numel())
        update(weight, grad, group)

    optimizer.update = watching
    optimizer.backward(loss_of(model))
    assert len(held) == len(sizes) and max(held) <= max(sizes)


def test_a_step_that_is_not_finite_is_skipped(model):
    optimizer, before = Lomo(model, lr=0.1, clip_norm=1.0), copy.deepcopy(model)
    norm = optimizer.backward(loss_of(model) * float("inf"))
    assert not norm.isfinite() and same(model, before) and optimizer.skipped == 1
    optimizer.backward(loss_of(model))
    assert not same(model, before) and optimizer.skipped == 1 and optimizer.steps == 1
    with pytest.raises(FloatingPointError, match=f"{PATIENCE} steps in a row"):
        for _ in range(PATIENCE):
            optimizer.backward(loss_of(model) * float("nan"))


def test_in_one_pass_a_gradient_that_is_not_finite_stops_and_says_what_changed(model):
    optimizer = Lomo(model, lr=0.1)
    model[0].weight.register_hook(lambda grad: grad * float("nan"))
    before = copy.deepcopy(model)
    with pytest.raises(FloatingPointError, match=r"gradient of 0.weight is not finite; \d parameters were updated"):
        optimizer.backward(loss_of(model))
    assert torch.equal(model[0].weight, before[0].weight) and not torch.equal(model[3].weight, before[3].weight)
    assert all(weight.grad is None for weight in model.parameters())


def test_float16_needs_a_scale_which_finds_its_size():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).half()
    with pytest.raises(ValueError, match="loss_scale"):
        Lomo(model, lr=0.1)
    exact = copy.deepcopy(model).float()
    optimizer, sgd = Lomo(model, lr=0.1, loss_scale=2.0**24), torch.optim.SGD(exact.parameters(), lr=0.1)
    steps = 0
    while optimizer.steps < 5:
        optimizer.backward(loss_of(model, scale=1e-2))
        steps += 1
    assert optimizer.skipped == steps - 5 > 0 and optimizer.scale.value == 2.0 ** (24 - optimizer.skipped)
    for _ in range(5):
        loss_of(exact, scale=1e-2).backward()
        sgd.step()
        sgd.zero_grad()
    for one, other in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(one.float(), other, rtol=2e-3, atol=2e-4)


def test_the_scale_is_that_of_the_whole_step_and_grows():
    scale = LossScale(8.0, every=2)
    for finite, expected in ((True, 8), (True, 16), (False, 8), (True, 8), (True, 16), (False, 8), (False, 4)):
        scale.update(finite)
        assert scale.value == expected
    model = nn.Linear(3, 2)
    optimizer, exact = Lomo(model, lr=0.1, loss_scale=2.0), copy.deepcopy(model)
    optimizer.scale.every = 1  # would double between the passes of a step
    x = torch.randn(4, 3)
    optimizer.backward(model(x).square().mean())
    grads = torch.autograd.grad(exact(x).square().mean(), list(exact.parameters()))
    for weight, before, grad in zip(model.parameters(), exact.parameters(), grads, strict=True):
        torch.testing.assert_close(weight, before - 0.1 * grad)


@pytest.mark.parametrize("kind", [Lomo, AdaLomo])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_where_it_was(model, kind, dtype):
    model.to(dtype)
    whole, stopped = model, copy.deepcopy(model)
    one, other = (kind(m, lr=0.01, loss_scale=4.0) for m in (whole, stopped))
    for step in range(6):
        if step == 3:
            saved = copy.deepcopy(other.state_dict())
            other.detach()
            other = kind(stopped, lr=1.0, loss_scale=1.0)
            other.load_state_dict(saved)
        one.backward(loss_of(whole, step))
        other.backward(loss_of(stopped, step))
    assert same(whole, stopped) and other.steps == 6 and other.scale.value == 4 and other.scale.good == 6
    for state in other.state.values():
        assert all(value.dtype == torch.float32 for value in state.values())


def test_torchs_schedules_set_the_rate(model):
    other = copy.deepcopy(model)
    lomo, sgd = Lomo(model, lr=0.1), torch.optim.SGD(other.parameters(), lr=0.1, foreach=False)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)) for optimizer in (lomo, sgd)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            lomo.backward(loss_of(model, step))
            loss_of(other, step).backward()
            sgd.step()
            sgd.zero_grad()
            for schedule in schedules:
                schedule.step()
    assert same(model, other) and lomo.param_groups[0]["lr"] == sgd.param_groups[0]["lr"] < 0.03


class Shared(nn.Module):
    """One layer in two checkpoint segments."""

    def __init__(self, reentrant):
        super().__init__()
        self.layer, self.reentrant = nn.Linear(6, 6), reentrant

    def forward(self, x):
        for _ in range(2):
            x = checkpoint(lambda h: torch.tanh(self.layer(h)), x.requires_grad_(), use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_weight_in_two_reentrant_segments_is_refused_before_anything_changes(clip_norm):
    model = Shared(reentrant=True)
    before, optimizer = copy.deepcopy(model), Lomo(model, lr=0.1, clip_norm=clip_norm)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        optimizer.backward(loss_of(model))
    assert same(model, before)
    optimizer.detach()
    model.reentrant = False
    Lomo(model, lr=0.1, clip_norm=clip_norm).backward(loss_of(model))
    assert not same(model, before)


def test_data_parallel_is_refused(model, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="one device"):
            Lomo(nn.parallel.DistributedDataParallel(model), lr=0.1)
    finally:
        torch.distributed.destroy_process_group()


def test_float64_stays_so(model):
    model.double()
    other = copy.deepcopy(model)
    lomo, sgd = Lomo(model, lr=0.1), torch.optim.SGD(other.parameters(), lr=0.1, foreach=False)
    lomo.backward(loss_of(model))
    loss_of(other).backward()
    sgd.step()
    assert same(model, other)


def test_a_compiled_model_trains_as_before(model):
    other = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    lomo, sgd = Lomo(compiled, lr=0.1), torch.optim.SGD(other.parameters(), lr=0.1, foreach=False)
    for step in range(3):
        lomo.backward(loss_of(compiled, step))
        loss_of(other, step).backward()
        sgd.step()
        sgd.zero_grad()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_detached_a_model_trains_as_any(model):
    optimizer = Lomo(model, lr=0.1)
    optimizer.detach()
    loss_of(model).backward()
    assert all(weight.grad is not None for weight in model.parameters())
    assert not any(weight._post_accumulate_grad_hooks for weight in model.parameters())
    model.zero_grad()
    AdaLomo(model, lr=0.1).backward(loss_of(model))


@pytest.mark.parametrize("kind", [Lomo, AdaLomo])
def test_model_and_optimizer_are_freed(kind):
    model = nn.Linear(3, 2)
    optimizer, seen = kind(model, lr=0.1), weakref.ref(model.weight)
    optimizer.backward(model(torch.ones(1, 3)).sum())
    del model, optimizer
    gc.collect()
    assert seen() is None


def test_without_its_optimizer_a_model_trains_as_any(model):
    Lomo(model, lr=0.1).backward(loss_of(model))
    gc.collect()
    loss_of(model).backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_wrong_calls_say_what_to_call(model):
    optimizer, before = Lomo(model, lr=0.1), copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"optimizer.backward\(loss\), not loss.backward"):
        loss_of(model).backward()
    assert same(model, before)
    for call in (optimizer.step, lambda: optimizer.step(lambda: loss_of(model))):
        with pytest.raises(RuntimeError, match=r"optimizer.backward\(loss\)"):
            call()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with pytest.raises(ValueError, match="cannot be accumulated"):
        optimizer.backward(loss_of(model))
    model[0].weight.grad = None
    for loss in (torch.ones(2, requires_grad=True) * 2, torch.tensor(1.0)):
        with pytest.raises(ValueError, match="scalar with a graph"):
            optimizer.backward(loss)
    assert same(model, before)


@pytest.mark.parametrize("kind", [Lomo, AdaLomo])
def test_bad_input(model, kind):
    for name, value in (("lr", 0), ("lr", math.nan), ("clip_norm", -1), ("clip_value", 0), ("loss_scale", math.inf)):
        with pytest.raises(ValueError, match=name):
            kind(model, **({"lr": 0.1} | {name: value}))
    with pytest.raises(ValueError, match="weight_decay"):
        kind(model, lr=0.1, weight_decay=-1)
    kept = kind(model, lr=0.1)
    with pytest.raises(ValueError, match="detach"):
        Lomo(model, lr=0.1)
    with pytest.raises(ValueError, match="one group"):
        kept.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    other = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="no weight that is trained"):
        kind(other, lr=0.1, clip_norm=1.0).backward(
            loss_of(model.requires_grad_(False)) * torch.ones((), requires_grad=True)
        )
    with pytest.raises(ValueError, match="nothing to train"):
        kind(nn.Linear(2, 2).requires_grad_(False), lr=0.1)
    with pytest.raises(ValueError, match="sparse=False"):
        kind(nn.Sequential(nn.Embedding(5, 2, sparse=True)), lr=0.1)
    odd = nn.Linear(3, 2)
    odd.forward = lambda ids: torch.nn.functional.embedding(ids, odd.weight, sparse=True).sum()
    with pytest.raises(ValueError, match="sparse"):
        kind(odd, lr=0.1).backward(odd(torch.tensor([1])))
