"""The training loop: against torch's own pieces, killed and resumed, stopped early, and on bad input."""

import copy
import math
import os
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from small_models import tiny_llama
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from tuning import runs
from tuning.memory import LiveBytes
from tuning.training import (
    Classifier,
    batch_rows,
    checkpoint_activations,
    chunked_loss,
    last_token,
    mean_of_tokens,
    rate_factor,
    train,
)

ROWS = [(torch.randn(4, generator=torch.Generator().manual_seed(i)), i % 3) for i in range(20)]


class Killed(Exception):
    """In place of a machine that goes away."""


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))


def loss_of(net):
    def loss_on(rows):
        return F.cross_entropy(net(torch.stack([x for x, _ in rows])), torch.tensor([y for _, y in rows]))

    return loss_on


def state(net):
    return torch.cat([weight.detach().flatten() for weight in net.parameters()])


def smallness(net):
    return -state(net).norm().item()


@pytest.mark.parametrize(("steps", "batch_size"), [(7, 5), (23, 3)])
def test_it_is_adamw_with_warmup_decay_and_clipping(steps, batch_size):
    """The reference: the same steps written out, with the rate of each worked out by hand."""
    ours, reference = network(), network()
    history = train(ours, loss_of(ours), ROWS, 0.05, steps, batch_size=batch_size, seed=3)
    optimizer = torch.optim.AdamW(reference.parameters(), weight_decay=0.0)
    warmup = {7: 1, 23: 2}[steps]
    losses = []
    torch.manual_seed(3)
    for step in range(steps):
        up, down = (step + 1) / warmup, 1 - (step - warmup) / (steps - warmup)
        optimizer.param_groups[0]["lr"] = 0.05 * (up if step + 1 < warmup else min(1.0, down))
        loss = loss_of(reference)([ROWS[i] for i in batch_rows(step, len(ROWS), batch_size, 3)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert history.losses == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(state(ours), state(reference))
    assert history.best_step == steps and history.stopped is None and history.seconds > 0


def test_the_rate_climbs_and_falls_to_zero():
    factors = [rate_factor(step, 100) for step in range(101)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1 and factors[55] == pytest.approx(0.5) and factors[100] == 0
    assert rate_factor(0, 1) == 1


@pytest.mark.parametrize(("n", "batch_size"), [(20, 4), (11, 3), (5, 5)])
def test_an_epoch_takes_each_row_once_at_most_and_seeds_differ(n, batch_size):
    per_epoch = n // batch_size
    epochs = [[batch_rows(e * per_epoch + i, n, batch_size, 0) for i in range(per_epoch)] for e in range(3)]
    for epoch in epochs:
        rows = [row for batch in epoch for row in batch]
        assert len(set(rows)) == len(rows) == per_epoch * batch_size and set(rows) <= set(range(n))
    assert epochs[0] != epochs[1]
    assert [batch_rows(0, n, batch_size, seed) for seed in range(9)] != [batch_rows(0, n, batch_size, 0)] * 9


def test_only_what_requires_gradients_is_trained():
    net = network()
    net[0].requires_grad_(False)
    before = net[0].weight.clone()
    train(net, loss_of(net), ROWS, 0.05, 3)
    assert torch.equal(net[0].weight, before) and net[0].weight.grad is None
    assert not torch.equal(net[3].weight, network()[3].weight)


def test_the_best_state_is_kept_and_the_start_competes():
    scores, states = [0.5, 0.2, 0.9, 0.9, 0.1], []
    net = network()

    def score():
        assert not net.training
        states.append(state(net))
        return scores[len(states) - 1]

    history = train(net, loss_of(net), ROWS, 0.05, 8, score=score, every=2, batch_size=4)
    assert history.scores == [[0, 0.5], [2, 0.2], [4, 0.9], [6, 0.9], [8, 0.1]]
    assert (history.best_step, history.best_score) == (4, 0.9)
    assert torch.equal(state(net), states[2]) and not torch.equal(states[2], states[3])
    assert not net.training
    untrained = network()
    falling = iter([3, 2, 1])
    assert train(untrained, loss_of(untrained), ROWS, 0.05, 4, score=lambda: next(falling), every=2).best_step == 0
    assert torch.equal(state(untrained), state(network()))


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("scores", [["bad", 1.0, 3.0, "bad", 2.0], ["bad", "bad", -1e9, "bad", -2e9]])
def test_a_score_that_is_no_number_never_wins(bad, scores):
    net, states = network(), []
    scores = [bad if score == "bad" else score for score in scores]

    def score():
        states.append(state(net))
        return scores[len(states) - 1]

    history = train(net, loss_of(net), ROWS, 0.05, 8, score=score, every=2, batch_size=4)
    best = scores[2]
    assert (history.best_step, history.best_score) == (4, best) and torch.equal(state(net), states[2])


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_where_no_score_is_a_number_the_last_state_is_kept_and_said(bad):
    net, last = network(), network()
    with pytest.warns(UserWarning, match="no score was a finite number; the last state is kept"):
        history = train(net, loss_of(net), ROWS, 0.05, 5, score=lambda: bad, every=2)
    train(last, loss_of(last), ROWS, 0.05, 5)
    assert torch.equal(state(net), state(last)) and (history.best_step, history.best_score) == (5, None)


def test_a_run_killed_after_a_score_of_nan_still_takes_the_first_number(tmp_path):
    def score(net):  # NaN at the start
        start = network()
        return math.nan if torch.equal(state(net), state(start)) else smallness(net)

    options = {"lr": 0.05, "steps": 6, "every": 3, "batch_size": 4}
    whole, resumed = killed_and_resumed(tmp_path / "run.pt", network, loss_of, 2, score=score, **options)
    for _, history in (whole, resumed):
        assert math.isnan(history.scores.pop(0)[1])
    same_run(whole, resumed)
    assert resumed[1].best_step > 0


def test_the_last_step_is_scored_even_between_two_scores():
    net = network()
    history = train(net, loss_of(net), ROWS, 0.05, 5, score=lambda: 1.0, every=3)
    assert [step for step, _ in history.scores] == [0, 3, 5]


def test_patience_ends_a_run_that_gets_no_better():
    net = network()
    history = train(net, loss_of(net), ROWS, 0.05, 50, score=lambda: 0.0, every=2, patience=3)
    assert len(history.losses) == 6 and history.stopped == "no better score in 3 scores"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_best(bad):
    net, calls, states = network(), [], []

    def loss_on(rows):
        calls.append(len(rows))
        return loss_of(net)(rows) * (bad if len(calls) == 4 else 1)

    def score():
        states.append(state(net))
        return len(states)

    with pytest.warns(UserWarning, match=rf"the loss was {bad} at step 4; lower the rate of 0\.05"):
        history = train(net, loss_on, ROWS, 0.05, 9, score=score, every=2)
    assert len(history.losses) == 3 and "at step 4" in history.stopped
    assert torch.equal(state(net), states[1]) and history.best_step == 2


def root_at_zero(weight):
    """Zero, with an infinite slope; times zero the slope is NaN."""
    return (weight - weight.detach()).sqrt().sum()


@pytest.mark.parametrize(("bad", "factor"), [("inf", 1.0), ("nan", 0.0)])
@pytest.mark.parametrize("scored", [False, True])
def test_a_gradient_that_is_not_finite_ends_the_run_before_its_step(bad, factor, scored):
    net, good, calls, states = network(), network(), [], []

    def loss_on(rows):
        calls.append(rows)
        return loss_of(net)(rows) + (root_at_zero(net[3].weight) * factor if len(calls) == 4 else 0)

    def score():
        states.append(state(net))
        return len(states)

    kept = "best state so far is" if scored else "weights before that step are"
    with pytest.warns(UserWarning, match=rf"the gradient's norm was {bad} at step 4; lower .*0\.05\. The {kept} kept"):
        history = train(net, loss_on, ROWS, 0.05, 9, score=score if scored else None, every=2)
    assert len(history.losses) == 3 and history.stopped.startswith(f"the gradient's norm was {bad} at step 4")
    assert history.best_step == (2 if scored else 3)
    with pytest.warns(UserWarning, match="at step 4"):  # the same three steps
        again = iter([1, 1, 1, math.nan])
        train(good, lambda rows: loss_of(good)(rows) * next(again), ROWS, 0.05, 9)
    assert state(net).isfinite().all() and torch.equal(state(net), states[1] if scored else state(good))
    assert all(weight.grad is None for weight in net.parameters())


def test_an_infinite_loss_with_a_finite_gradient_changes_nothing_either():
    net, start = network(), state(network())
    with pytest.warns(UserWarning, match="the loss was inf at step 1.*The weights before that step are kept"):
        train(net, lambda rows: loss_of(net)(rows) + math.inf, ROWS, 0.05, 9)
    assert torch.equal(state(net), start)


def test_patience_without_a_score_is_refused():
    net = network()
    with pytest.raises(ValueError, match="patience needs a score: pass score="):
        train(net, loss_of(net), ROWS, 0.05, 50, patience=3)


def killed_and_resumed(path, make, loss_of, at, score, **options):
    """`(net, history)` of a run left alone, and of one killed at the `at`-th call of its loss and gone on with."""
    whole = make()
    expected = train(whole, loss_of(whole), ROWS, score=lambda: score(whole), **options)

    killed, calls = make(), []
    loss_on = loss_of(killed)

    def dies(rows):
        calls.append(rows)
        if len(calls) == at:
            raise Killed
        return loss_on(rows)

    with pytest.raises(Killed):
        train(killed, dies, ROWS, score=lambda: score(killed), checkpoint=path, **options)
    assert path.is_file() and len(list(path.parent.iterdir())) == 1
    resumed = make()
    history = train(resumed, loss_of(resumed), ROWS, score=lambda: score(resumed), checkpoint=path, **options)
    assert not path.exists()
    return (whole, expected), (resumed, history)


def same_run(one, other):
    """Equal to the bit: weights, buffers and history."""
    (net, history), (other_net, other_history) = one, other
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, other_net.state_dict()[name]), name
    assert (history.losses, history.scores) == (other_history.losses, other_history.scores)
    assert (history.best_step, history.best_score) == (other_history.best_step, other_history.best_score)


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """Dropout, moments, schedule and batches included: the result is that of the run that was left alone."""
    options = {"lr": 0.05, "steps": 12, "every": 4, "batch_size": 4}
    same_run(*killed_and_resumed(tmp_path / "run.pt", network, loss_of, 11, score=smallness, **options))


def test_a_score_that_draws_random_numbers_is_not_taken_twice(tmp_path):
    options = {"lr": 0.05, "steps": 12, "every": 4, "batch_size": 4}
    same_run(
        *killed_and_resumed(tmp_path / "run.pt", network, loss_of, 11, lambda net: torch.rand(()).item(), **options)
    )


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    net, path = network(), tmp_path / "run.pt"

    def dies(rows):
        raise Killed

    with pytest.raises(Killed):
        train(net, dies, ROWS, 0.05, 8, score=lambda: 0.0, checkpoint=path)
    with pytest.raises(ValueError, match="is of a run with other lr, every; delete it or name another file"):
        train(net, dies, ROWS, 0.01, 8, score=lambda: 0.0, every=2, checkpoint=path)


def renamed(net):
    return nn.ModuleDict({"body": net[0], "tanh": net[1], "dropout": net[2], "head": net[3]})


@pytest.mark.parametrize(
    ("rows", "change", "differs"),
    [
        ([(x, (y + 1) % 3) for x, y in ROWS], None, "rows"),
        ([*ROWS[:7], (ROWS[7][0] + 1e-6, ROWS[7][1]), *ROWS[8:]], None, "rows"),
        (ROWS, lambda net: net[0].weight.data.add_(0.01), "weights at the start"),  # frozen
        (ROWS, lambda net: net[3].bias.data.neg_(), "weights at the start"),  # trained
        (ROWS, renamed, "weights at the start"),
        (ROWS, lambda net: net[0].requires_grad_(True), "weights at the start"),
    ],
)
def test_a_checkpoint_of_another_task_with_equal_shapes_is_refused(tmp_path, rows, change, differs):
    path = tmp_path / "run.pt"

    def dies(rows):
        raise Killed

    def begin(rows, change):
        net = network()
        net[0].requires_grad_(False)
        other = change and change(net)
        train(other if isinstance(other, nn.ModuleDict) else net, dies, rows, 0.05, 8, score=float, checkpoint=path)

    with pytest.raises(Killed):
        begin(ROWS, None)
    with pytest.raises(Killed):  # the same run goes on
        begin(list(ROWS), None)
    with pytest.raises(ValueError, match=f"of a run with other {differs}; delete it or name another file"):
        begin(rows, change)


def test_what_tells_rows_apart_is_the_same_in_every_process():
    """Texts, tuples, dicts, tensors in 16 bits and on views, arrays, and what nothing is known of."""
    code = (
        "import numpy, torch; from tuning.runs import _digest; x = torch.arange(8.0)\n"
        "rows = ['Süd', ('a', 1), {'ids': [1, 2], 3: None}, x[2:5].bfloat16(), numpy.arange(3), {'b', 'a'}, object()]\n"
        "print(_digest(rows))"
    )
    found = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True
        )
        found.add(done.stdout or done.stderr)
    assert len(found) == 1 and len(found.pop().strip()) == 64
    plain = [["a", 1], {"ids": [1, 2]}, torch.arange(3.0)]
    for other in (
        [["a", 2], *plain[1:]],
        [plain[0], {"ids": [2, 1]}, plain[2]],
        [*plain[:2], torch.arange(3.0).half()],
        [*plain[:2], torch.arange(3.0).unsqueeze(0)],
    ):
        assert runs._digest(other) != runs._digest(plain)
    assert runs._digest(copy.deepcopy(plain)) == runs._digest(plain)


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    net = network()
    torch.manual_seed(5)
    train(net, loss_of(net), ROWS, 0.05, 2)
    assert torch.equal(torch.rand(1), expected)


def test_other_gpus_are_not_seeded(monkeypatch):
    net, seeds = network(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    train(net, loss_of(net), ROWS, 0.05, 2)
    assert not seeds


def test_fewer_rows_than_a_batch_are_refused():
    net = network()
    with pytest.raises(ValueError, match="5 rows, fewer than one batch of 16; pass a smaller batch_size"):
        train(net, loss_of(net), ROWS[:5], 0.05, 2)


def test_a_frozen_module_is_refused():
    net = network().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of this module requires gradients"):
        train(net, loss_of(net), ROWS, 0.05, 2)


@pytest.mark.parametrize("options", [{"accumulate": 0}, {"batch_size": 0}])
def test_a_step_without_rows_is_refused(options):
    net = network()
    with pytest.raises(ValueError, match="batch_size and accumulate must be 1 at least"):
        train(net, loss_of(net), ROWS, 0.05, 2, **options)


def test_fewer_rows_than_a_step_takes_are_refused():
    net = network()
    with pytest.raises(
        ValueError, match="20 rows, fewer than one batch of 24; pass a smaller batch_size or accumulate"
    ):
        train(net, loss_of(net), ROWS, 0.05, 2, batch_size=8, accumulate=3)


# --- what training changes beside the weights


def with_norms(seed=0):
    """Batch norm with trained weights, and with frozen ones: its averages move in both."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 3))
    net[3].requires_grad_(False)
    return net


def test_the_best_state_has_its_own_averages_of_batch_norm():
    net, states, scores = with_norms(), [], iter([1, 3, 2])

    def score():
        states.append(copy.deepcopy(net.state_dict()))
        return next(scores)

    train(net, loss_of(net), ROWS, 0.05, 8, score=score, every=4, batch_size=4)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, states[1][name]), name
        assert "1." not in name or not torch.equal(tensor, states[2][name])


def test_a_killed_run_goes_on_with_its_averages_of_batch_norm(tmp_path):
    options = {"lr": 0.05, "steps": 12, "every": 4, "batch_size": 4}
    same_run(
        *killed_and_resumed(
            tmp_path / "run.pt",
            with_norms,
            loss_of,
            11,
            score=lambda net: net(torch.ones(1, 4))[0, 0].item(),
            **options,
        )
    )


def test_buffers_that_cannot_change_are_not_copied(tiny_llama):
    from tuning.lora import add_lora
    from tuning.qlora import quantize_model

    model = quantize_model(tiny_llama[0])
    add_lora(model, "all-linear", rank=2, alpha=6)
    assert runs._changing(model).keys() == {n for n, weight in model.named_parameters() if weight.requires_grad}
    assert runs._changing(with_norms()).keys() >= {"1.running_mean", "3.running_var", "3.num_batches_tracked"}


def test_the_random_numbers_of_a_gpu_go_on_too_and_are_left_alone(tmp_path, monkeypatch):
    """A generator stands in for the GPU's."""
    gpu, generator = torch.Generator(), torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    monkeypatch.setattr(runs, "_accelerators", lambda weights: [torch.device("cuda", 0)])
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device=None: gpu.get_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device=None: gpu.set_state(state))

    def noisy(net):
        return lambda rows: loss_of(net)(rows) * (1 + torch.rand((), generator=gpu))

    options = {"lr": 0.05, "steps": 12, "every": 4, "batch_size": 4, "score": smallness}
    same_run(*killed_and_resumed(tmp_path / "run.pt", network, noisy, 11, **options))
    net, before = network(), gpu.get_state()
    train(net, noisy(net), ROWS, 0.05, 3)
    assert torch.equal(gpu.get_state(), before)


# --- accumulation, autocast, float16


def without_dropout(seed=0):
    net = network(seed)
    net[2].p = 0.0
    return net


@pytest.mark.parametrize(("accumulate", "batch_size"), [(4, 3), (2, 5)])
def test_batches_of_one_size_add_up_to_the_large_one(accumulate, batch_size):
    found = []
    for batch, parts in ((batch_size, accumulate), (accumulate * batch_size, 1)):
        net, sizes, gradients = without_dropout().double(), [], []

        def loss_on(rows, net=net, sizes=sizes):
            sizes.append(len(rows))
            x, y = torch.stack([x for x, _ in rows]).double(), torch.tensor([y for _, y in rows])
            return F.cross_entropy(net(x), y)

        def note(*_, net=net, gradients=gradients):
            gradients.append(torch.cat([weight.grad.flatten() for weight in net.parameters()]))

        hook = register_optimizer_step_pre_hook(note)
        history = train(net, loss_on, ROWS, 0.05, 7, batch_size=batch, accumulate=parts)
        hook.remove()
        assert sizes == [batch] * 7 * parts
        found.append((torch.stack(gradients), torch.tensor(history.losses, dtype=torch.float64), state(net)))
    for ours, large in zip(*found, strict=True):
        torch.testing.assert_close(ours, large, rtol=1e-10, atol=1e-13)


def test_accumulation_keeps_one_graph_at_a_time():
    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor

    alive, most = weakref.WeakSet(), {}

    def pack(tensor):
        alive.add(kept := Kept(tensor))
        most[accumulate] = max(most.get(accumulate, 0), len(alive))
        return kept

    for accumulate in (1, 4):
        net = network()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            train(net, loss_of(net), ROWS, 0.05, 2, batch_size=4, accumulate=accumulate)
    assert most[4] == most[1] > 2


def test_a_killed_run_goes_on_in_the_midst_of_accumulation(tmp_path):
    options = {"lr": 0.05, "steps": 8, "every": 2, "batch_size": 4, "accumulate": 3}
    whole, resumed = killed_and_resumed(tmp_path / "run.pt", with_norms, loss_of, 17, score=smallness, **options)
    same_run(whole, resumed)
    assert len(whole[1].losses) == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_products_in_16_bits_and_weights_stay_in_32(dtype):
    net, reference, seen = without_dropout(), without_dropout(), set()
    net[0].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    history = train(net, loss_of(net), ROWS, 0.01, 3, autocast=dtype)
    assert seen == {dtype} and {weight.dtype for weight in net.parameters()} == {torch.float32}
    exact = train(reference, loss_of(reference), ROWS, 0.01, 3)
    assert history.losses == pytest.approx(exact.losses, rel=0.02) and history.losses != exact.losses


def test_autocast_around_the_run_stays_on():
    net, seen = without_dropout(), set()
    net[0].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        train(net, loss_of(net), ROWS, 0.01, 2)
    assert seen == {torch.bfloat16}


def half_body(factor, size=8):
    """A frozen model in float16 that is no part of what is trained, as in P-tuning; `factor` sizes its gradients."""
    torch.manual_seed(1)
    body = nn.Sequential(nn.Linear(size, size), nn.Tanh(), nn.Linear(size, 3)).requires_grad_(False).half()

    def loss_of(prompt, body=body):
        def loss_on(rows):
            x = prompt(torch.stack([x for x, _ in rows]).to(prompt.weight.dtype))
            logits = body(x.to(body[0].weight.dtype)).to(x.dtype)
            return F.cross_entropy(factor * logits, torch.tensor([y for _, y in rows]))

        return loss_on

    return loss_of, body


def prompt(size=8):
    torch.manual_seed(2)
    return nn.Linear(4, size)


@pytest.mark.parametrize("size", [8, 13])
def test_gradients_that_float16_loses_are_found(size):
    """Adam's first step moves each number against its gradient's sign, as in float64; unscaled all are zero."""
    loss_of, body = half_body(factor=1e-7, size=size)
    ours, exact = prompt(size), prompt(size).double()
    loss_of(ours)(ROWS).backward()
    assert not any(weight.grad.any() for weight in ours.parameters())
    start = state(ours)
    train(ours, loss_of(ours), ROWS, 0.01, 1)
    loss_of(exact, copy.deepcopy(body).double())([ROWS[i] for i in batch_rows(0, len(ROWS), 16, 0)]).backward()
    gradient = torch.cat([weight.grad.flatten() for weight in exact.parameters()])
    assert ((state(ours) - start).sign() == -gradient.sign()).double().mean() > 0.95


@pytest.mark.parametrize(("factor", "size"), [(1.0, 8), (30.0, 8), (200.0, 13)])
def test_the_loss_is_scaled_as_by_torchs_gradscaler(factor, size):
    """With the larger factors the first gradients overflow: those steps are tried again with half the scale."""
    loss_of, _ = half_body(factor, size)
    ours, reference, calls = prompt(size), prompt(size), []
    loss_on = loss_of(ours)
    history = train(ours, lambda rows: calls.append(rows) or loss_on(rows), ROWS, 0.05, 6, batch_size=8)
    scaler, skipped = torch.amp.GradScaler("cpu"), 0
    optimizer = torch.optim.AdamW(reference.parameters(), weight_decay=0.0)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.05 * rate_factor(step, 6)
        taken = False
        while not taken:
            optimizer.zero_grad()
            loss = loss_of(reference)([ROWS[i] for i in batch_rows(step, len(ROWS), 8, 0)])
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
            scaler.step(optimizer)
            before = scaler.get_scale()
            scaler.update()
            taken = scaler.get_scale() == before
            skipped += not taken
    assert torch.equal(state(ours), state(reference)) and len(history.losses) == 6
    assert len(calls) == 6 + skipped and (skipped > 0) == (factor > 1)


def test_a_loss_in_float16_can_be_scaled():
    loss_of, _ = half_body(factor=1.0)
    net = prompt()
    loss_on = loss_of(net)
    history = train(net, lambda rows: loss_on(rows).half(), ROWS, 0.05, 12)
    assert history.stopped is None and history.losses[-1] < history.losses[0]


def test_a_killed_run_goes_on_with_its_loss_scale(tmp_path):
    """The gradients overflow at first, and also with accumulation."""
    loss_of, _ = half_body(factor=100.0)
    options = {"lr": 0.05, "steps": 6, "every": 2, "batch_size": 4, "accumulate": 2}
    scales = []

    def scaled(net):
        loss_on = loss_of(net)

        def noted(rows):
            loss = loss_on(rows)
            loss.register_hook(lambda grad: scales.append(grad.item()))
            return loss

        return noted

    same_run(*killed_and_resumed(tmp_path / "run.pt", prompt, scaled, 18, score=smallness, **options))
    assert scales[0] > scales[-1] and scales.count(scales[0]) == 4  # one step of two, in both; not in the resumed one


def test_the_loss_scale_grows_after_2000_good_steps():
    net = prompt()
    settings = runs.Settings(0.1, 5000, 4, 0, 25, 1, None)
    optimizer = torch.optim.SGD(net.parameters())
    run = runs.Run(net, optimizer, None, ROWS, settings, None)
    with run.started():
        run.float16, run.scale = True, 8.0
        for _ in range(1999):
            run.note(1.0, 1.0)
        assert run.scale == 8.0
        run.note(1.0, 1.0)
        assert run.scale == 16.0


def test_a_step_that_overflows_again_and_again_ends_the_run():
    loss_of, _ = half_body(factor=1.0)
    net, calls = prompt(), []
    loss_on = loss_of(net)

    def overflows(rows):
        calls.append(rows)
        return loss_on(rows) + (root_at_zero(net.weight) if len(calls) > 3 else 0)

    with pytest.warns(
        UserWarning, match="the gradient's norm was inf at step 4.*The weights before that step are kept"
    ):
        history = train(net, overflows, ROWS, 0.05, 9)
    assert len(calls) == 3 + runs.TRIES and len(history.losses) == 3 and state(net).isfinite().all()


def test_a_loss_that_is_not_finite_is_no_overflow():
    loss_of, _ = half_body(factor=1.0)
    net, calls = prompt(), []

    def loss_on(rows):
        calls.append(rows)
        return loss_of(net)(rows) * math.nan

    with pytest.warns(UserWarning, match="the loss was nan at step 1"):
        train(net, loss_on, ROWS, 0.05, 9)
    assert len(calls) == 1


def test_a_model_in_float16_with_adapters_learns(tiny_llama):
    from tuning.lora import add_lora

    model = tiny_llama[0].half()
    add_lora(model, "all-linear", rank=2, alpha=6)
    rows = [torch.arange(i, i + 12) for i in range(20)]

    def loss_on(rows):
        ids = torch.stack(rows)
        return model(input_ids=ids, labels=ids).loss

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        history = train(model, loss_on, rows, 0.01, 12, batch_size=4)
    assert history.stopped is None and sum(history.losses[-3:]) < 0.8 * sum(history.losses[:3])


def test_training_in_float16_is_refused(tiny_llama):
    model = tiny_llama[0].half()
    with pytest.raises(ValueError, match=r"embed_tokens.weight would be trained in float16.*load the model in float32"):
        train(model, lambda rows: 0, ROWS, 0.05, 2)


# --- the head


def test_the_pools_read_real_tokens_only():
    states = torch.arange(24.0).view(2, 3, 4)
    right, left = torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert torch.equal(mean_of_tokens(states, right), torch.stack([states[0, :2].mean(0), states[1].mean(0)]))
    assert torch.equal(last_token(states, right), torch.stack([states[0, 1], states[1, 2]]))
    assert torch.equal(last_token(states, left), states[:, 2])


def test_a_row_without_tokens_gives_numbers():
    states, mask = torch.arange(24.0).view(2, 3, 4), torch.tensor([[0, 0, 0], [1, 1, 0]])
    assert torch.equal(mean_of_tokens(states, mask)[0], torch.zeros(4))
    assert torch.equal(last_token(states, mask), torch.stack([states[0, 0], states[1, 1]]))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 40_000.0), (torch.bfloat16, 3e38), (torch.float32, 2.0)])
def test_the_mean_of_states_in_16_bits_is_taken_in_32(dtype, size):
    states = (torch.rand(3, 300, 4, generator=torch.Generator().manual_seed(0)) * size / 300).to(dtype)
    states[0] *= 0.5 if dtype == torch.bfloat16 else 300
    mask = torch.ones(3, 300).long()
    mask[1, 7:] = 0
    found = mean_of_tokens(states, mask)
    exact = (states.double() * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    assert found.dtype == torch.float32 and exact.isfinite().all()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("pool", [mean_of_tokens, last_token])
def test_a_classifier_says_the_same_in_any_batch(pool, smollm2):
    """SmolLM2's body with its last token, MiniLM with its mean, in batches of unlike length and one by one."""
    from tuning.models import load_encoder

    body, tokenizer = load_encoder(device="cpu") if pool is mean_of_tokens else (smollm2[0].model, smollm2[1])
    torch.manual_seed(0)
    classifier = Classifier(body, tokenizer, 3, pool).eval()
    texts = ["good", "a much longer sentence than the other one", "so so"]
    with torch.no_grad():
        together, alone = classifier(texts), torch.cat([classifier([text]) for text in texts])
        ids = tokenizer(texts[1], return_tensors="pt").input_ids
        states = body(ids).last_hidden_state[0]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    pooled = states.mean(dim=0) if pool is mean_of_tokens else states[-1]
    torch.testing.assert_close(together[1], classifier.head(pooled), atol=1e-4, rtol=1e-4)
    assert together.shape == (3, 3)


def test_a_text_longer_than_the_context_is_cut(bert):
    model, tokenizer = bert
    tokenizer.model_max_length = 40
    classifier = Classifier(model.bert, tokenizer, 2, mean_of_tokens).eval()
    assert classifier(["the capital " * 60]).shape == (1, 2)


def unlimited(tokenizer):
    """A tokenizer that names no longest text: transformers then say 1e30."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def bodies(bert):
    """Bodies without a head, and the number of tokens each can take: learned positions, RoBERTa's, relative ones."""
    from transformers import RobertaConfig, RobertaModel, T5Config, T5EncoderModel

    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    roberta = RobertaConfig(**sizes, intermediate_size=32, max_position_embeddings=42, pad_token_id=1)
    t5 = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return {"bert": (bert[0].bert, 40), "roberta": (RobertaModel(roberta).eval(), 40), "t5": (T5EncoderModel(t5), 602)}


@pytest.mark.parametrize("kind", ["bert", "roberta", "t5"])
def test_a_text_is_cut_to_the_bodys_positions_where_the_tokenizer_names_no_limit(kind, bert):
    body, longest = bodies(bert)[kind]
    body.eval()
    classifier = Classifier(body, unlimited(bert[1]), 2, mean_of_tokens).eval()
    text = "the capital of is . " * 120
    ids = bert[1](text.strip(), add_special_tokens=False).input_ids
    assert len(ids) == 600
    ids = torch.tensor([[bert[1].cls_token_id, *ids[: longest - 2], bert[1].sep_token_id]])
    with torch.no_grad():
        expected = classifier.head(body(ids).last_hidden_state.mean(dim=1))
        torch.testing.assert_close(classifier([text]), expected)
        assert classifier([text, "london"]).isfinite().all()


@pytest.mark.parametrize("pool", [mean_of_tokens, last_token])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_text_gives_a_number_in_any_batch(pool, dtype, gpt2):
    """GPT-2's tokenizer puts nothing around a text, so an empty one has no token."""
    model, tokenizer = gpt2
    classifier = Classifier(copy.deepcopy(model.transformer).to(dtype), unlimited(tokenizer), 3, pool).eval()
    with torch.no_grad():
        alone, pair, mixed = (classifier(texts) for texts in ([""], ["", ""], ["good and long", ""]))
        whole = classifier(["good and long"])
    assert alone.dtype == torch.float32 and alone.isfinite().all()
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1}
    torch.testing.assert_close(pair, alone.expand(2, 3), **near)
    torch.testing.assert_close(mixed, torch.cat([whole, alone]), **near)


def test_an_empty_text_between_special_tokens_stays_as_it_is(bert):
    model, tokenizer = bert
    classifier = Classifier(model.bert, unlimited(tokenizer), 2, mean_of_tokens).eval()
    ids = torch.tensor([[tokenizer.cls_token_id, tokenizer.sep_token_id]])
    with torch.no_grad():
        expected = classifier.head(model.bert(ids).last_hidden_state.mean(dim=1))
        torch.testing.assert_close(classifier([""]), expected)


def test_checkpointing_on_and_off(tiny_llama):
    model, _ = tiny_llama
    ids = torch.arange(24).view(2, 12)

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [weight.grad.clone() for weight in model.parameters()]

    def kept():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            model(input_ids=ids, labels=ids)
        return sum(sizes)

    model.train()
    before, all_kept = gradients(), kept()
    checkpoint_activations(model)
    assert kept() < 0.7 * all_kept
    for one, other in zip(before, gradients(), strict=True):
        torch.testing.assert_close(one, other)
    checkpoint_activations(model, on=False)
    assert kept() == all_kept
    model.requires_grad_(False)
    assert not model.get_input_embeddings()(ids).requires_grad


def test_a_run_of_all_its_steps_was_not_stopped():
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    rows = torch.randn(16, 3).tolist()
    loss_on = lambda batch: net(torch.tensor(batch)).square().mean()  # noqa: E731
    history = train(net, loss_on, rows, 1e-3, 50, score=lambda: 1.0, patience=2, every=25)
    assert len(history.losses) == 50 and history.stopped is None


def test_the_same_call_after_an_interrupt_goes_on(tmp_path):
    """As when a reader stops a cell and runs it again: the module is the one that was being trained."""
    rows = torch.randn(32, 3, generator=torch.Generator().manual_seed(0)).tolist()

    def start():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def run(net, stop=None, checkpoint=None):
        calls = []

        def loss_on(batch):
            calls.append(1)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return net(torch.tensor(batch)).square().mean()

        def score():
            return -net(torch.tensor(rows)).square().mean().item()

        history = train(net, loss_on, rows, 1e-2, 30, score, batch_size=8, every=10, checkpoint=checkpoint)
        return history.losses, len(calls)

    whole, interrupted = start(), start()
    expected, _ = run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(interrupted, stop=18, checkpoint=tmp_path / "c.pt")
    losses, calls = run(interrupted, checkpoint=tmp_path / "c.pt")
    assert losses == expected and calls == 20  # from step 10 on
    for one, other in zip(interrupted.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_averages_do_not_keep_what_a_step_that_is_left_out_saw():
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    rows = [[float("nan")] * 3 if row == 5 else [1.0 * row, 2.0, 3.0] for row in range(16)]
    loss_on = lambda batch: net(torch.tensor(batch)).square().mean()  # noqa: E731
    with pytest.warns(UserWarning, match="The weights before that step are kept"):
        train(net, loss_on, rows, 1e-3, 20, batch_size=4)
    assert all(tensor.isfinite().all() for tensor in net.state_dict().values())


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"every": 0}])
def test_steps_that_make_no_sense_are_refused(wrong):
    net = nn.Linear(3, 1)
    options = {"lr": 1e-3, "steps": 3, "every": 1} | wrong
    with pytest.raises(ValueError, match=r"steps is .* and every"):
        train(net, lambda batch: net(torch.tensor(batch)).mean(), [[1.0, 2, 3]] * 16, score=lambda: 0.0, **options)


def test_a_text_alone_is_one_text_and_none_are_an_error(bert):
    classifier = Classifier(bert[0].bert, bert[1], 2, mean_of_tokens).eval()
    with torch.no_grad():
        assert torch.equal(classifier("A good film."), classifier(["A good film."]))
    with pytest.raises(ValueError, match="no texts to classify"):
        classifier([])


def states_and_labels(dtype):
    torch.manual_seed(0)
    states = torch.randn(3, 7, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(50, 16, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 50, (3, 7))
    labels[0, :4] = labels[2, 5] = -100
    return states, weight, labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1, 5, 7, 21, 100])  # of 21 tokens
def test_the_loss_in_chunks_is_the_loss(dtype, size):
    states, weight, labels = states_and_labels(dtype)
    found = chunked_loss(states, weight, labels, size)
    logits = F.linear(states, weight)[:, :-1]  # of which each predicts the next
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(found, expected)
    grads, others = (torch.autograd.grad(loss, (states, weight)) for loss in (found, expected))
    assert found.dtype == dtype
    for one, other in zip(grads, others, strict=True):
        torch.testing.assert_close(one, other)


def test_the_loss_in_chunks_is_that_of_transformers_in_sixteen_bits():
    model = tiny_llama(tie=False).to(torch.bfloat16).train()
    ids = torch.randint(0, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state
    found = chunked_loss(states, model.lm_head.weight, ids, 4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [4, 100])
def test_the_loss_of_nothing_in_chunks_is_that_of_torch(size):
    states, weight, labels = states_and_labels(torch.float32)
    labels[:] = -100
    found = chunked_loss(states, weight, labels, size)
    expected = F.cross_entropy(F.linear(states, weight).flatten(0, 1), labels.flatten())
    assert found.isnan() and expected.isnan()


def test_never_more_logits_than_those_of_a_chunk_are_alive():
    weight = states_and_labels(torch.float32)[1]
    states, labels = torch.randn(2, 200, 16, requires_grad=True), torch.randint(0, 50, (2, 200))
    peaks = {}
    for size in (400, 40):
        with LiveBytes(nn.Module()) as live:
            chunked_loss(states, weight, labels, size).backward()
        peaks[size] = sum(live.peak.values())
        states.grad = weight.grad = None
    logits = 4 * 400 * 50
    assert peaks[400] > 2.9 * logits and peaks[40] < 1.1 * logits


def test_a_loss_in_chunks_that_cannot_be():
    states, weight, labels = states_and_labels(torch.float32)
    for bad in ((states, weight, labels, 0), (states, weight, labels[:, 1:], 4)):
        with pytest.raises(ValueError, match="a positive size and a label for each state"):
            chunked_loss(*bad)
