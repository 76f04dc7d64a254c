"""Checks for exercises: each calls what the reader wrote, and its failure names the likely mistake.

from tuning.checks import check_first_token

check_first_token(first_token)  # prints "first_token: right", or raises an AssertionError that says what is wrong
"""

import copy
import math
import os

import torch
import torch.nn.functional as F
from torch import nn


def sized(full, quick):
    """`full`; or `quick` where TUNING_QUICK is set, as in the book's tests, which see that solutions run."""
    return quick if os.environ.get("TUNING_QUICK") else full


def _right(name):
    print(f"{name}: right")


def _tensor(found, shape, what):
    assert isinstance(found, torch.Tensor), (
        f"{what} should be a tensor, not {type(found).__name__}: is a return missing?"
    )
    assert found.shape == shape, f"{what} should have the shape {tuple(shape)}, not {tuple(found.shape)}"


def _close(one, other, tolerance=1e-5):
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=tolerance, atol=tolerance)


def check_first_token(first_token):
    """Chapter 1, exercise 2: `first_token(states, mask)`, (batch, seq, hidden) → (batch, hidden)."""
    states = torch.arange(24.0).view(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    found = first_token(states, mask)
    _tensor(found, (2, 4), "the result")
    assert not _close(found, states[:, -1]), "this is the last place, [CLS] is the first"
    assert not _close(found, (states * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)), "this is the mean"
    assert _close(found, states[:, 0]), "expected each row's state at place 0"
    _right("first_token")


def check_share_among(share_among):
    """Chapter 3, exercise 1: `share_among(logits, known)`, the share of rows whose best token is one of `known`."""
    logits = torch.tensor([[0.0, 9, 1, 2], [5, 0, 1, 4], [0, 1, 9, 3], [7, 1, 2, 0]])  # best: 1, 0, 2, 0
    found = float(share_among(logits, [0, 3]))
    assert not math.isclose(found, 2.0), "this counts the rows; divide by how many there are"
    assert not math.isclose(found, 1.0), "only `known` competes here; the best token of the whole vocabulary counts"
    assert math.isclose(found, 0.5), f"the best tokens are 1, 0, 2 and 0, so 0.5 of them are 0 or 3, not {found:.2f}"
    assert math.isclose(float(share_among(logits, [2, 1])), 0.5), "of the best tokens 1, 0, 2 and 0, half are 1 or 2"
    _right("share_among")


def check_prompt_cost(prompt_cost):
    """Chapter 3, exercise 2: `prompt_cost(length, hidden, layers, width)` → numbers kept a task, numbers cached."""
    found = tuple(prompt_cost(4, 6, 3, 2))
    assert len(found) == 2, f"expected two numbers, what is kept and what is cached, not {len(found)}"
    kept, cached = found
    assert kept == 24, f"4 vectors of 6 numbers are 24 to keep, not {kept}"
    assert cached not in (24, 12), "keys and values are two, and each layer has its own: 4 places × 3 layers × 2 × 2"
    assert cached != 144, "keys and values are `width` numbers wide, which need not be `hidden`"
    assert cached == 48, f"4 places in 3 layers, with a key and a value of 2 numbers each, are 48, not {cached}"
    _right("prompt_cost")


def check_pull(pull):
    """Chapter 3, exercise 4: `pull(vectors, start, strength)` = λ ‖H - H₀‖²."""
    vectors, start = torch.arange(6.0).view(2, 3).requires_grad_(), torch.ones(2, 3)
    found, squares = pull(vectors, start, 0.5), (vectors.detach() - start).square()
    _tensor(found, (), "the result")
    value = found.item()
    assert not math.isclose(value, 0.5 * squares.mean().item()), "this is the mean; the norm's square is the sum"
    assert not math.isclose(value, 0.5 * squares.sum().sqrt().item()), "this is the norm; it should be squared"
    assert not math.isclose(value, squares.sum().item()), "λ is missing"
    assert math.isclose(value, 0.5 * squares.sum().item(), rel_tol=1e-5), (
        f"expected {0.5 * squares.sum():.2f}: {value:.2f}"
    )
    assert found.requires_grad, "the result has no gradient: do not detach the vectors, nor call .item()"
    _right("pull")


class _Chain(nn.Module):
    """Three vectors of which each depends on its own row and on those before it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 4)

    def forward(self):
        return self.embedding.weight.cumsum(dim=0)


def check_depends(depends):
    """Chapter 4, exercise 1: `depends(encoder)`, (length, length) bool: does vector j depend on row k?"""
    found = depends(_Chain())
    _tensor(found, (3, 3), "the table")
    assert found.dtype == torch.bool, f"the table should hold bools, not {found.dtype}: is there any number but zero?"
    expected = torch.ones(3, 3).tril().bool()
    assert not torch.equal(found, expected.T), "this is turned round: a line is a vector, a column a row that it reads"
    assert torch.equal(found, expected), (
        f"where each vector is the sum of the rows up to its own, expected {expected.int().tolist()}, "
        f"got {found.int().tolist()}"
    )
    _right("depends")


def check_spread(spread):
    """Chapter 4, exercise 2: `spread(vectors, length)` → what to take off, and the factor."""
    vectors = 5 + torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    found = spread(vectors, 3.0)
    assert isinstance(found, tuple) and len(found) == 2, "expected a pair: what to take off, and the factor"
    middle, factor = found
    _tensor(middle, (8,), "what to take off")
    assert _close(middle, vectors.mean(dim=0)), "take off the mean of the vectors: then their mean is zero"
    away = (vectors - middle).norm(dim=1)
    factor = torch.as_tensor(factor).double()
    assert factor.dim() == 0, "one factor for all vectors: else their lengths would all be the same"
    assert not math.isclose(factor.item(), 3 / vectors.norm(dim=1).mean().item(), rel_tol=1e-4), (
        "stretch what is left once the mean is taken off, and not the vectors as they were"
    )
    assert math.isclose(factor.item(), 3 / away.mean().item(), rel_tol=1e-4), (
        f"with this factor the mean length is {factor.item() * away.mean():.2f}, not 3"
    )
    _right("spread")


def check_deep_inputs(deep_inputs):
    """Chapter 4, exercise 4: `deep_inputs(mask, length)` → the whole mask, and the position ids of the tokens."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    whole, positions = deep_inputs(mask, 3)
    _tensor(whole, (2, 7), "the mask")
    _tensor(positions, (2, 4), "the position ids (of the tokens only, not of the prompt)")
    assert (whole[:, :3] == 1).all(), "the prompt's places stand in front, with ones"
    assert (whole[:, 3:] == mask).all(), "behind the prompt the mask is as it was"
    assert positions[1].tolist() != [0, 1, 2, 3], "the first token behind three places of prompt is at position 3"
    assert positions[1].tolist() == [3, 4, 5, 6], f"expected the positions 3 to 6, got {positions[1].tolist()}"
    assert positions[0, 2:].tolist() == [3, 4], (
        f"pads should not count: the padded row's tokens are at 3 and 4, not {positions[0, 2:].tolist()}"
    )
    _right("deep_inputs")


def check_lm_loss(lm_loss):
    """Chapter 5, exercise 4: `lm_loss(logits, input_ids, mask)`, the mean over all tokens but the first and pads."""
    generator = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(2, 5, 7, generator=generator), torch.randint(7, (2, 5), generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    found = lm_loss(logits, ids, mask)
    _tensor(found, (), "the loss")
    labels = ids.masked_fill(mask == 0, -100)
    unshifted = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    padded = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert not _close(found, unshifted), (
        "each token is predicted from those before it: shift logits against labels by one"
    )
    assert not _close(found, padded), "the pads are in the loss: set their labels to -100"
    assert _close(found, expected), f"expected {expected:.4f}, got {found:.4f}"
    _right("lm_loss")


def check_share_held(share_held):
    """Chapter 6, exercise 3: `share_held(matrix, k)`, of the squared length in the first k singular values."""
    U, _ = torch.linalg.qr(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))
    matrix = U @ torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    value = float(share_held(matrix, 1))
    assert not math.isclose(value, 0.5, rel_tol=1e-3), (
        "this adds the singular values; their squares are the squared length"
    )
    assert math.isclose(value, 9 / 14, rel_tol=1e-4), f"of 9 + 4 + 1 the first is {9 / 14:.3f}, not {value:.3f}"
    assert math.isclose(float(share_held(matrix, 3)), 1, rel_tol=1e-4), "all of them hold everything"
    _right("share_held")


def check_without_scale(without_scale):
    """Chapter 6, exercise 4: `without_scale(A, B, scale, lr, decay)` → A, B, rate and decay that act alike at a scale
    of 1, for AdamW."""
    generator = torch.Generator().manual_seed(0)
    A, B, wanted = (torch.randn(shape, generator=generator).double() for shape in ((2, 5), (4, 2), (4, 5)))
    scale, lr, decay, own = 4.0, 0.01, 0.3, []
    start, other_B, rate, other_decay = without_scale(A.clone(), B.clone(), scale, lr, decay)
    assert _close(other_B @ start, scale * B @ A), (
        "B A at a scale of 1 should be scale · B A: multiply both by its root"
    )
    assert not math.isclose(rate, lr), "the rate has to change too"
    for weights, s, eta, shrinks in (((A, B), scale, lr, 0.0), ((start, other_B), 1.0, rate, 0.0)):
        own.append(_adamw_product(weights, s, eta, shrinks, wanted))
    assert _close(*own), f"without decay the products differ after three steps: which rate gives √s times {lr}?"
    own = [
        _adamw_product((A, B), scale, lr, decay, wanted),
        _adamw_product((start, other_B), 1.0, rate, other_decay, wanted),
    ]
    assert _close(*own), (
        "with decay they differ: a step shrinks a weight by rate times decay, which must stay as it was"
    )
    _right("without_scale")


def _adamw_product(weights, scale, lr, decay, wanted, steps=3):
    """scale · B A after some steps of AdamW towards a matrix."""
    A, B = (nn.Parameter(weight.clone()) for weight in weights)
    optimizer = torch.optim.AdamW([A, B], lr=lr, weight_decay=decay, eps=1e-30)
    for _ in range(steps):
        optimizer.zero_grad()
        (scale * B @ A - wanted).square().sum().backward()
        optimizer.step()
    return (scale * B @ A).detach()


def check_balanced(balanced):
    """Chapter 6, exercise 5: `balanced(A, B)`: factors with the same product, and A Aᵀ = Bᵀ B."""
    generator = torch.Generator().manual_seed(0)
    for out, rank, size in ((7, 2, 5), (4, 3, 9)):
        A = torch.randn(rank, size, generator=generator).double()
        B = 100 * torch.randn(out, rank, generator=generator).double()
        new_A, new_B = balanced(A.clone(), B.clone())
        _tensor(new_A, A.shape, "A")
        _tensor(new_B, B.shape, "B")
        assert _close(new_B @ new_A, B @ A), "the product changed; it must stay B A"
        assert not _close(new_A, A), "A is as it was"
        assert _close(new_A @ new_A.T, new_B.T @ new_B), (
            "A Aᵀ and Bᵀ B differ: give each factor the square root of the singular values"
        )
    _right("balanced")


def check_added(added):
    """Chapter 7, exercise 2: `added(one, other)` for adapters (A, B, alpha): one with the sum of their changes."""
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator), 8.0
    other = torch.randn(3, 6, generator=generator), torch.randn(5, 3, generator=generator), 3.0
    A, B, alpha = added(one, other)
    _tensor(A, (5, 6), "A (both one above the other)")
    _tensor(B, (5, 5), "B (both side by side)")
    expected = 4 * one[1] @ one[0] + other[1] @ other[0]
    found = alpha / len(A) * B @ A
    unscaled = one[1] @ one[0] + other[1] @ other[0]
    assert not _close(B @ A, expected) or math.isclose(alpha, len(A)), (
        "the product is right: then α must be the new rank"
    )
    assert not _close(found, unscaled), "each adapter has its own α/r: multiply each B by its own"
    ratio = (found.norm() / expected.norm()).item()
    assert _close(found, expected), f"α/r · B A has {ratio:.2f} of the length that it should have"
    _right("added")


def check_everything_labelled(everything_labelled):
    """Chapter 8, exercise 3: `everything_labelled(batch)` → labels: the ids, but -100 on padding."""
    batch = {
        "input_ids": torch.tensor([[5, 6, 2, 2], [7, 8, 9, 2]]),  # 2 ends a reply, and pads
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        "labels": torch.tensor([[-100, -100, 2, -100], [-100, 8, 9, 2]]),
    }
    found = everything_labelled(batch)
    _tensor(found, (2, 4), "the labels")
    expected = [[5, 6, 2, -100], [7, 8, 9, 2]]
    assert found[0].tolist() != [5, 6, 2, 2], "the padding is labelled; the attention mask tells where it is"
    assert found[0].tolist() != [5, 6, -100, -100], (
        "the end token is not padding, though it has the same id: use the mask"
    )
    assert found.tolist() == expected, f"expected {expected}, got {found.tolist()}"
    assert batch["labels"][0].tolist() == [-100, -100, 2, -100], "the batch's own labels were changed"
    _right("everything_labelled")


def check_lopsided(lopsided):
    """Chapter 9, exercise 2: `lopsided(x, block_size)`, what sixteen equal steps from least to largest stand for."""
    block = torch.tensor([0.0, 1.5, 3.0, 15.0, 7.4])
    found = lopsided(block, 5)
    _tensor(found, (5,), "the result")
    assert found[0] == 0 and found[3] == 15, "the least and the largest number of a block come back exactly"
    assert not _close(found[4], torch.tensor(7.5), 1e-3), "sixteen values have fifteen steps between them, here of 1"
    assert found[4] == 7 and found[1] in (1, 2), f"with steps of 1 expected 7.4 → 7, got {found[4]:.3f}"
    same = lopsided(torch.full((4,), 2.5), 4)
    assert same.isfinite().all(), "a block of equal numbers has no step; give it one"
    assert (same == 2.5).all(), "a block of equal numbers should come back as it is"
    two = lopsided(torch.tensor([0.0, 15.0, 100.0, 115.0]), 2)
    assert two.tolist() == [0, 15, 100, 115], "each block has a minimum and a step of its own"
    _right("lopsided")


def check_keep_outliers(keep_outliers):
    """Chapter 9, exercise 4: `keep_outliers(weight, share)`, NF4 in blocks of 64 but for the share that is largest."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight[3, 5], weight[3, 6] = -40.0, -50.0
    found = keep_outliers(weight, 2 / 512)
    _tensor(found, (8, 64), "the result")
    assert found[3, 5] == -40, "the largest in magnitude are kept as they are: negative numbers count too"
    others = [place for place in range(64) if place not in (5, 6)]
    kept = (found == weight).sum().item()
    assert kept < 60, f"{kept} of 512 numbers are unchanged; only two, and the largest of each block, should be"
    error = ((found - weight)[3, others].norm() / weight[3, others].norm()).item()
    assert error < 0.3, (
        f"the rest of the outliers' block has an error of {error:.2f}: put zeros in their places before you quantize"
    )
    _right("keep_outliers")


def check_bits(bits):
    """Chapter 10, exercise 1: `bits(block_size, double)`, bits a number with scales in 32 bits or quantized again."""
    assert math.isclose(bits(64, False), 4.5), f"64 numbers share a scale of 32 bits: 4.5 bits, not {bits(64, False)}"
    assert not math.isclose(bits(64, True), 4.125), "the scales' own scale is missing: 32 bits for 256 blocks"
    assert math.isclose(bits(64, True), 4.126953125), f"expected 4.127, got {bits(64, True):.4f}"
    assert math.isclose(bits(128, True), 4.0634765625), f"with blocks of 128 expected 4.0635, got {bits(128, True):.4f}"
    _right("bits")


def check_best_start(best_start):
    """Chapter 10, exercise 4: `best_start(error, rank)` → A (rank, in), B (out, rank), B A nearest to the error."""
    error = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))
    A, B = best_start(error, 3)
    _tensor(A, (3, 12), "A")
    _tensor(B, (9, 3), "B")
    U, sizes, Vt = torch.linalg.svd(error, full_matrices=False)
    best = U[:, :3] * sizes[:3] @ Vt[:3]
    assert not _close(B @ A, U[:, :3] @ Vt[:3], 1e-3), "the singular values are missing"
    assert not _close(B @ A, U[:, :3] * sizes[:3].square() @ Vt[:3], 1e-3), (
        "the singular values are in it twice: use roots"
    )
    left, least = (error - B @ A).norm().item(), (error - best).norm().item()
    assert left < 1.001 * least, f"what is left has the length {left:.3f}; the best of rank 3 leaves {least:.3f}"
    _right("best_start")


def check_eight_bit_states(eight_bit_states):
    """Chapter 11, exercise 5: `eight_bit_states(shapes)`, bytes of AdamW's averages in 8 bits, blocks of 256."""
    large, small = (256, 512), (30, 20)
    found, expected = eight_bit_states([large]), 2 * (256 * 512 + 4 * 512) + 2 * 4 * 256
    assert found not in (256 * 512, 256 * 512 + 4 * 512), "AdamW has two averages"
    assert found not in (2 * 256 * 512, 2 * 256 * 512 + 2048), "a scale of 4 bytes for each 256 numbers is missing"
    assert found != expected - 2048, "the two tables of 256 numbers are missing"
    assert found == expected, f"expected {expected:,} bytes for one matrix of 256 × 512, got {found:,}"
    both = eight_bit_states([large, small])
    assert both == expected + 8 * 600, (
        "below 4,096 numbers the averages stay in 32 bits (and the tables are there once)"
    )
    _right("eight_bit_states")


def check_momentum(Momentum):
    """Chapter 12, exercise 2: a `FusedOptimizer` equal to torch's SGD with a momentum of 0.9, bit for bit."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    theirs, batch = copy.deepcopy(ours), torch.randn(6, 5)
    optimizer, sgd = Momentum(ours, lr=0.1), torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, foreach=False)
    for step in range(1, 4):
        optimizer.backward(ours(batch).square().mean())
        sgd.zero_grad()
        theirs(batch).square().mean().backward()
        sgd.step()
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            hint = {
                1: "in the first step the average is the gradient itself, not a tenth of it",
                2: "was the average a copy?",
            }
            near = "nearly, but not " if _close(one, other) else "not "
            said = hint.get(step, "multiply by 0.9, then add the gradient")
            assert torch.equal(one, other), f"after step {step} the weights are {near}those of SGD: {said}"
    optimizer.detach()
    _right(Momentum.__name__)


def check_an_optimizer_each(an_optimizer_each):
    """Chapter 12, exercise 4: `an_optimizer_each(model, lr)` puts an AdamW for each weight into backward."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    theirs, batch = copy.deepcopy(ours), torch.randn(6, 5)
    an_optimizer_each(ours, 0.01)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=0.01, foreach=False)
    for _ in range(2):
        ours(batch).square().mean().backward()
        assert all(weight.grad is None for weight in ours.parameters()), "a gradient is left: zero it inside the hook"
        adamw.zero_grad()
        theirs(batch).square().mean().backward()
        adamw.step()
    moved = [torch.equal(one, other) for one, other in zip(ours.parameters(), theirs.parameters(), strict=True)]
    assert all(moved), f"{moved.count(False)} of {len(moved)} weights are not those of one AdamW after two steps"
    _right("an_optimizer_each")
