"""Each exercise's check passes the right answer, and names the mistake of the likeliest wrong ones."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tuning import checks
from tuning.lomo import FusedOptimizer
from tuning.nf4 import dequantize, quantize
from tuning.training import last_token, mean_of_tokens


def depends(encoder):
    rows = encoder.embedding.weight
    return torch.stack([torch.autograd.grad(v.sum(), rows, retain_graph=True)[0].any(dim=1) for v in encoder()])


def spread(vectors, length):
    middle = vectors.mean(dim=0)
    return middle, length / (vectors - middle).norm(dim=1).mean()


def deep_inputs(mask, length, start=None, count_pads=False):
    whole = torch.cat([mask.new_ones(len(mask), length), mask], dim=1)
    positions = (torch.ones_like(whole) if count_pads else whole).cumsum(1) - 1
    return whole, positions[:, length:] - (0 if start is None else start)


def lm_loss(logits, ids, mask, shift=1, ignore=True):
    labels = ids.masked_fill(mask == 0, -100) if ignore else ids
    return F.cross_entropy(logits[:, : logits.shape[1] - shift].flatten(0, 1), labels[:, shift:].flatten())


def share_held(matrix, k, power=2):
    sizes = torch.linalg.svdvals(matrix) ** power
    return sizes[:k].sum() / sizes.sum()


def without_scale(A, B, scale, lr, decay, rate=None, shrinks=None):
    root = scale**0.5
    return root * A, root * B, root * lr if rate is None else rate, decay / root if shrinks is None else shrinks


def balanced(A, B, turn=True):
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, sizes, Vt = torch.linalg.svd(R_B @ R_A.T)
    roots = sizes.sqrt() if turn else torch.ones_like(sizes)
    return (sizes / roots)[:, None] * Vt @ Q_A.T, Q_B @ U * roots


def added(one, other, alpha=None, scaled=True):
    A = torch.cat([one[0], other[0]])
    B = torch.cat([(alpha_ / len(A_) if scaled else 1) * B_ for A_, B_, alpha_ in (one, other)], dim=1)
    return A, B, len(A) if alpha is None else alpha


def everything_labelled(batch):
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def labelled_in_place(batch):
    batch["labels"][:] = everything_labelled(batch)
    return batch["labels"]


def lopsided(x, size, steps=15, guard=True):
    blocks = x.view(-1, size)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    step = (high - low) / steps
    step = torch.where(step == 0, 1, step) if guard else step
    return (((blocks - low) / step).round() * step + low).flatten()


def keep_outliers(weight, k, zero=True, magnitude=True):
    size = weight.abs() if magnitude else weight
    chosen = torch.zeros(weight.numel(), dtype=torch.bool)
    chosen[size.flatten().topk(max(1, round(k * weight.numel()))).indices] = True
    chosen = chosen.view_as(weight)
    rest = weight.masked_fill(chosen, 0) if zero else weight
    return torch.where(chosen, weight, dequantize(quantize(rest)))


def bits(size, double, second=True):
    return 4 + (8 / size + (32 / (256 * size) if second else 0) if double else 32 / size)


def best_start(error, rank, power=0.5):
    U, sizes, Vt = torch.linalg.svd(error, full_matrices=False)
    roots = sizes[:rank] ** power
    return roots.unsqueeze(1) * Vt[:rank], U[:, :rank] * roots


def eight_bit_states(shapes, averages=2, scales=4, tables=2048, threshold=4096):
    sizes = [torch.Size(shape).numel() for shape in shapes]
    large, small = (sum(n for n in sizes if (n >= threshold) is is_large) for is_large in (True, False))
    return averages * (large + scales * large // 256) + tables + 8 * small


class Momentum(FusedOptimizer):
    first = staticmethod(torch.clone)

    def update(self, weight, grad, group):
        state = self.state[weight]
        if "average" in state:
            state["average"].mul_(0.9).add_(grad)
        else:
            state["average"] = self.first(grad)
        weight.sub_(state["average"], alpha=group["lr"])


class Averaged(Momentum):
    first = staticmethod(lambda grad: 0.1 * grad)


class Forgets(Momentum):
    def update(self, weight, grad, group):
        weight.sub_(grad, alpha=group["lr"])


def an_optimizer_each(model, lr, zero=True, decay=0.01):
    def put(weight):
        optimizer = torch.optim.AdamW([weight], lr=lr, foreach=False, weight_decay=decay)

        def step(_):
            optimizer.step()
            if zero:
                optimizer.zero_grad()

        weight.register_post_accumulate_grad_hook(step)

    for weight in model.parameters():
        put(weight)


def share_among(logits, known):
    return torch.isin(logits.argmax(dim=1), torch.tensor(known)).double().mean().item()


def prompt_cost(length, hidden, layers, width):
    return length * hidden, 2 * length * layers * width


def pull(vectors, start, strength):
    return strength * (vectors - start).square().sum()


CASES = [  # check, right answer, [(wrong answer, what the message says)]
    (
        "first_token",
        lambda states, mask: states[:, 0],
        [
            (lambda states, mask: states[:, -1], "last place"),
            (last_token, "expected each row's state at place 0"),
            (mean_of_tokens, "the mean"),
            (lambda states, mask: states[:, :1], "shape"),
            (lambda states, mask: None, "is a return missing"),
        ],
    ),
    (
        "share_among",
        share_among,
        [
            (lambda x, known: len(x) * share_among(x, known), "divide"),
            (lambda x, known: share_among(x[:, known], list(range(len(known)))), "whole vocabulary"),
            (lambda x, known: 0.25, "the best tokens are"),
            (lambda x, known: 0.5 if 0 in known else 0.0, "half are 1 or 2"),
        ],
    ),
    (
        "prompt_cost",
        prompt_cost,
        [
            (lambda n, hidden, layers, width: prompt_cost(n, hidden, layers, width)[:1], "two numbers"),
            (lambda n, hidden, layers, width: (hidden, 2 * n * layers * width), "24 to keep"),
            (lambda n, hidden, layers, width: (n * hidden, n * layers * width), "keys and values are two"),
            (lambda n, hidden, layers, width: (n * hidden, 2 * n * layers * hidden), "need not be"),
            (lambda n, hidden, layers, width: (n * hidden, 2 * layers * width * n + 1), "are 48"),
        ],
    ),
    (
        "pull",
        pull,
        [
            (lambda v, s, k: k * (v - s).square().mean(), "the mean"),
            (lambda v, s, k: k * (v - s).norm(), "squared"),
            (lambda v, s, k: (v - s).square().sum(), "λ is missing"),
            (lambda v, s, k: pull(v.detach(), s, k), "no gradient"),
            (lambda v, s, k: k * (v + s).square().sum(), "expected"),
        ],
    ),
    (
        "depends",
        depends,
        [
            (lambda encoder: depends(encoder).T, "turned round"),
            (lambda encoder: depends(encoder).int(), "should hold bools"),
            (lambda encoder: torch.eye(3).bool(), "expected \\[\\[1, 0, 0\\]"),
            (lambda encoder: depends(encoder).any(dim=1), "shape"),
        ],
    ),
    (
        "spread",
        spread,
        [
            (lambda v, n: spread(v, n)[1] * (v - v.mean(0)), "a pair"),
            (lambda v, n: (v.mean(), spread(v, n)[1]), "shape"),
            (lambda v, n: (0 * v[0], n / v.norm(dim=1).mean()), "take off the mean"),
            (lambda v, n: (v.mean(0), n / v.norm(dim=1).mean()), "once the mean is taken off"),
            (lambda v, n: (v.mean(0), n / (v - v.mean(0)).norm(dim=1)), "one factor"),
            (lambda v, n: (v.mean(0), n / (v - v.mean(0)).norm()), "not 3"),
        ],
    ),
    (
        "deep_inputs",
        deep_inputs,
        [
            (lambda mask, n: deep_inputs(mask, n, start=n), "is at position 3"),
            (lambda mask, n: deep_inputs(mask, n, count_pads=True), "pads should not count"),
            (lambda mask, n: (mask, deep_inputs(mask, n)[1]), "the mask should have the shape"),
        ],
    ),
    (
        "lm_loss",
        lm_loss,
        [
            (lambda *a: lm_loss(*a, shift=0), "shift logits"),
            (lambda *a: lm_loss(*a, ignore=False), "pads are in the loss"),
            (lambda *a: 2 * lm_loss(*a), "expected"),
        ],
    ),
    (
        "share_held",
        share_held,
        [(lambda m, k: share_held(m, k, power=1), "squares"), (lambda m, k: share_held(m, k, power=4), "the first is")],
    ),
    (
        "without_scale",
        without_scale,
        [
            (lambda A, B, s, lr, wd: without_scale(A, B, s, lr, wd, rate=lr), "the rate has to change"),
            (lambda A, B, s, lr, wd: without_scale(A, B, s, lr, wd, rate=lr * s), "products differ"),
            (lambda A, B, s, lr, wd: without_scale(A, B, s, lr, wd, shrinks=wd), "with decay they differ"),
            (lambda A, B, s, lr, wd: (A, B, s * lr, wd), "multiply both by its root"),
        ],
    ),
    (
        "balanced",
        balanced,
        [
            (lambda A, B: (A, B), "A is as it was"),
            (lambda A, B: (2 * A, B), "the product changed"),
            (lambda A, B: balanced(A, B, turn=False), "square root of the singular values"),
            (lambda A, B: (A.T, B), "should have the shape"),
        ],
    ),
    (
        "added",
        added,
        [
            (lambda a, b: added(a, b, alpha=a[2] + b[2]), "α must be the new rank"),
            (lambda a, b: added(a, b, scaled=False), "each adapter has its own α/r"),
            (lambda a, b: (a[0], a[1], a[2]), "shape"),
        ],
    ),
    (
        "everything_labelled",
        everything_labelled,
        [
            (lambda batch: batch["input_ids"], "the padding is labelled"),
            (lambda batch: batch["input_ids"].masked_fill(batch["input_ids"] == 2, -100), "not padding"),
            (labelled_in_place, "own labels were changed"),
            (lambda batch: batch["labels"], "expected"),
        ],
    ),
    (
        "lopsided",
        lopsided,
        [
            (lambda x, b: lopsided(x, b, steps=16), "fifteen steps"),
            (lambda x, b: lopsided(x, b, guard=False), "has no step"),
            (lambda x, b: lopsided(x, len(x)), "of its own"),
        ],
    ),
    (
        "keep_outliers",
        keep_outliers,
        [
            (lambda w, k: keep_outliers(w, k, zero=False), "put zeros in their places"),
            (lambda w, k: keep_outliers(w, k, magnitude=False), "negative numbers"),
            (lambda w, k: keep_outliers(w, 0.5), "only two"),
        ],
    ),
    (
        "bits",
        bits,
        [(lambda b, d: bits(b, d, second=False), "the scales' own scale"), (lambda b, d: 4 + 16 / b, "32 bits")],
    ),
    (
        "best_start",
        best_start,
        [
            (lambda e, r: best_start(e, r, power=0), "are missing"),
            (lambda e, r: best_start(e, r, power=1), "twice"),
            (lambda e, r: tuple(m.T for m in best_start(e, r)), "shape"),
            (lambda e, r: (torch.zeros(r, e.shape[1]), torch.zeros(len(e), r)), "the best of rank"),
        ],
    ),
    (
        "eight_bit_states",
        eight_bit_states,
        [
            (lambda s: eight_bit_states(s, averages=1, tables=0), "two averages"),
            (lambda s: eight_bit_states(s, scales=0), "a scale of 4 bytes"),
            (lambda s: eight_bit_states(s, tables=0), "two tables"),
            (lambda s: eight_bit_states(s, threshold=0), "stay in 32 bits"),
            (lambda s: 1, "expected"),
        ],
    ),
    ("momentum", Momentum, [(Averaged, "the gradient itself"), (Forgets, "was the average a copy")]),
    (
        "an_optimizer_each",
        an_optimizer_each,
        [
            (lambda m, lr: an_optimizer_each(m, lr, zero=False), "a gradient is left"),
            (lambda m, lr: an_optimizer_each(m, lr, decay=0.0), "not those of one AdamW"),
        ],
    ),
]


@pytest.mark.parametrize(("name", "right", "wrong"), CASES, ids=[name for name, *_ in CASES])
def test_a_check(name, right, wrong, capsys):
    check = getattr(checks, f"check_{name}")
    check(right)
    assert capsys.readouterr().out.strip().endswith(": right")
    for function, said in wrong:
        with pytest.raises(AssertionError, match=said):
            check(function)


def test_every_check_is_tested():
    here = {f"check_{name}" for name, *_ in CASES}
    there = {name for name, value in vars(checks).items() if name.startswith("check_") and inspect.isfunction(value)}
    assert here == there


def test_layers_are_as_they_were():
    layer = nn.Linear(2, 2)
    checks.check_an_optimizer_each(an_optimizer_each)
    layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad is not None
