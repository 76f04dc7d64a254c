"""Four bits: against bitsandbytes bit for bit, on shapes that fill no block, in three dtypes; bad input."""

import logging
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tuning.nf4 import (
    LEVELS,
    NF4,
    SCALE_BLOCK,
    dequantize,
    dynamic_map,
    dynamic_map_on,
    nearest,
    normal_levels,
    pack,
    pairs_on,
    quantize,
    quantize_scales,
    scale_up,
    scales_of,
    unpack,
)
from tuning.qlora import Linear4bit

logging.disable(logging.WARNING)  # bitsandbytes warns about a package that is not needed
import bitsandbytes.functional as reference  # noqa: E402

logging.disable(logging.NOTSET)

SHAPES = [(64,), (3, 50), (7, 64), (33, 65), (1, 1), (5,), (128, 256), (2, 3, 40), (3, 96)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def numbers(shape, dtype=torch.float32):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight.flatten()[:3] = torch.tensor([0.0, 5.0, -5.0])[: weight.numel()].to(dtype)
    return weight


def theirs(weight, block_size=64, **options):
    return reference.quantize_4bit(weight, blocksize=block_size, quant_type="nf4", **options)


def unpacked(codes, state, shape):
    """What bitsandbytes' codes stand for, by way of one long row.

    Its kernel for AVX-512 (0.50.2) unpacks some shapes wrongly whose blocks run on from one row to the next: (3, 96).
    """
    state.shape = torch.Size([torch.Size(shape).numel()])
    return reference.dequantize_4bit(codes, state).view(shape)


def on_the_kernels_grid(scales):
    """What bitsandbytes' CPU kernel looks the codes of the scales up from: numbers on a grid of 65,536 steps."""
    padded = torch.nn.functional.pad(scales, (0, -len(scales) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    largest = padded.abs().amax(dim=1, keepdim=True)
    steps = ((padded / largest + 1) / 2 * 65535).round()
    return ((steps / 65535 * 2 - 1) * largest).flatten()[: len(scales)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [64, 128])
def test_codes_scales_and_weights_are_those_of_bitsandbytes(shape, dtype, block_size):
    weight = numbers(shape, dtype)
    ours, (codes, state) = quantize(weight, "nf4", block_size), theirs(weight, block_size)
    assert torch.equal(ours.codes, codes.flatten()) and torch.equal(ours.scales, state.absmax)
    back = dequantize(ours)
    assert torch.equal(back, unpacked(codes, state, shape))
    assert back.dtype == dtype and back.shape == weight.shape


def test_every_linear_weight_of_smollm2_in_three_dtypes(smollm2):
    for dtype in DTYPES:
        for name, layer in smollm2[0].named_modules():
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                weight = layer.weight.detach().to(dtype)
                ours, (codes, state) = quantize(weight), theirs(weight)
                assert torch.equal(ours.codes, codes.flatten()) and torch.equal(ours.scales, state.absmax), name


@pytest.mark.parametrize("shape", [(128, 256), (3, 5000), (700, 91)])
def test_double_quantization(shape):
    weight = numbers(shape)
    ours = quantize_scales(quantize(weight))
    codes, state = theirs(weight, compress_statistics=True)
    largest, mean = ours.second
    assert torch.equal(largest, state.state2.absmax) and torch.equal(mean, state.offset)
    taken = dynamic_map()
    differences = quantize(weight).scales - mean
    wanted = (taken * 1.0)[ours.scales.int()]
    scaled = differences / scale_up(torch.ones(len(differences)), largest, SCALE_BLOCK)
    gaps = (scaled.unsqueeze(1) - taken).abs()
    assert torch.allclose((scaled - wanted).abs(), gaps.min(dim=1).values, atol=1e-6)  # the nearest
    gridded, _ = nearest(on_the_kernels_grid(differences), taken, SCALE_BLOCK)
    assert torch.equal(gridded.to(torch.uint8), state.absmax)  # the kernel's, where its grid is applied first
    buffers = replace(ours, codes=codes.flatten(), scales=state.absmax, second=(state.state2.absmax, state.offset))
    assert torch.equal(dequantize(buffers), unpacked(codes, state, shape))
    assert (scales_of(ours) - quantize(weight).scales).abs().max() < 0.02 * quantize(weight).scales.max()


def test_bits_are_counted_from_the_tensors():
    weight = numbers((4096, 512))
    assert quantize(weight).bits() == 4.5 and quantize(weight, block_size=32).bits() == 5
    assert quantize_scales(quantize(weight)).bits() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)


def test_levels():
    assert torch.equal(torch.tensor(NF4), reference.get_4bit_type("nf4", device="cpu"))
    torch.testing.assert_close(normal_levels(), torch.tensor(NF4, dtype=torch.double), rtol=0, atol=5e-7)
    assert torch.equal(dynamic_map(), reference.create_dynamic_map())
    for levels in LEVELS.values():
        assert list(levels) == sorted(levels) and 0.0 in levels and max(levels) == 1 and levels[7] == 0


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_packing(n):
    codes = torch.randint(16, (n,), generator=torch.Generator().manual_seed(n))
    packed = pack(codes)
    assert packed.dtype == torch.uint8 and len(packed) == (n + 1) // 2
    assert packed[0] // 16 == codes[0] and torch.equal(unpack(packed, n).long(), codes)


@pytest.mark.parametrize("kind", LEVELS)
def test_each_number_gets_the_nearest_level(kind):
    weight = numbers((40, 64))
    back = dequantize(quantize(weight, kind))
    choices = torch.tensor(LEVELS[kind]) * weight.abs().amax(dim=1, keepdim=True).unsqueeze(2)
    nearest_gap = (weight.unsqueeze(2) - choices).abs().min(dim=2).values
    torch.testing.assert_close((weight - back).abs(), nearest_gap, rtol=0, atol=1e-6)
    assert torch.equal(dequantize(quantize(back, kind)), back)  # once more changes nothing


def test_zeros_come_back():
    weight = torch.zeros(3, 64)
    weight[1, 5] = 2
    for found in (quantize(weight), quantize_scales(quantize(weight))):
        assert torch.equal(dequantize(found)[weight == 0], weight[weight == 0])


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-39, 9e-39, 1.1e-38, 1.2e-38, 1e-37])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (5,), (2, 67), (300, 65)])
def test_tiny_numbers_are_those_of_bitsandbytes(shape, largest):
    weight = numbers(shape) / 5 * largest
    ours, (codes, state) = quantize(weight), theirs(weight)
    assert torch.equal(ours.codes, codes.flatten()) and torch.equal(ours.scales, state.absmax)
    assert dequantize(ours).isfinite().all()


@pytest.fixture
def flushed():
    """Subnormal numbers, below 1.18e-38, count as zero, as on many accelerators."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor keeps subnormal numbers")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("largest", [0.0, 1e-39, 1.1e-38])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (5,), (2, 67)])
def test_zeros_stay_zeros_where_subnormal_numbers_are_flushed(flushed, shape, largest):
    weight = torch.zeros(shape)
    weight.flatten()[0] = largest
    for found in (quantize(weight), quantize_scales(quantize(weight))):
        assert (unpack(found.codes, weight.numel()) == 7).all() and not dequantize(found).any()


def test_equal_scales_come_back_where_subnormal_numbers_are_flushed(flushed):
    twice = quantize_scales(quantize(torch.ones(300, 64)))
    assert (twice.scales == nearest(torch.zeros(1), dynamic_map(), SCALE_BLOCK)[0].item()).all()
    assert (dynamic_map()[twice.scales.int()] == 0).all() and torch.equal(dequantize(twice), torch.ones(300, 64))


class NoFloat64(TorchDispatchMode):
    """Refuses what a Mac's GPU does not have."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves((args, kwargs, found)):
            assert not isinstance(value, torch.Tensor) or value.dtype != torch.float64, func
            assert value is not torch.float64, func
        return found


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(40, 64), (7, 33), (300, 65)])
def test_nothing_is_computed_in_64_bits(shape, double):
    for table in (pairs_on, dynamic_map_on):
        table.cache_clear()
    weight, x = numbers(shape), torch.randn(2, shape[1], requires_grad=True)
    with NoFloat64():
        packed = quantize(weight)
        packed = quantize_scales(packed) if double else packed
        assert dequantize(packed).shape == shape and dynamic_map().shape == (256,)
        Linear4bit(packed, torch.zeros(shape[0]))(x).sum().backward()
    torch.testing.assert_close(x.grad, dequantize(packed).sum(dim=0).expand(2, -1))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(40, 64), (7, 33), (300, 65)])
def test_a_compiler_takes_it_in_one_graph(shape, double):
    torch._dynamo.reset()
    for dtype in (torch.float32, torch.bfloat16):
        packed = quantize(numbers(shape, dtype))
        packed = quantize_scales(packed) if double else packed
        compiled = torch.compile(dequantize, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(packed), dequantize(packed))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("double", [True, False])
def test_a_layer_is_compiled_in_one_graph(double):
    torch._dynamo.reset()
    packed = quantize(numbers((40, 50)))
    layer = Linear4bit(quantize_scales(packed) if double else packed, torch.randn(40))
    x = torch.randn(3, 50, requires_grad=True)
    g = torch.randn(3, 40)
    found, expected = torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x)
    assert torch.equal(found, expected)
    one, other = (torch.autograd.grad(y, x, g)[0] for y in (found, expected))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.tensor([1.0, float("nan")]), {}, "not finite"),
        (torch.tensor([1.0, float("inf")]), {}, "not finite"),
        (torch.empty(0, 4), {}, "nothing to quantize"),
        (torch.ones(4, dtype=torch.int32), {}, "torch.int32"),
        (torch.ones(4, dtype=torch.float64), {}, "torch.float64"),
        (torch.ones(4), {"block_size": 48}, "power of two"),
        (torch.ones(4), {"block_size": 0}, "power of two"),
        (torch.ones(4), {"kind": "nf3"}, "choose one of nf4"),
    ],
)
def test_bad_input(weight, options, message):
    with pytest.raises(ValueError, match=message):
        quantize(weight, **options)


def test_quantizing_twice_and_wrong_buffers():
    quantized = quantize(numbers((4, 64)))
    with pytest.raises(ValueError, match="quantized already"):
        quantize(quantized)
    with pytest.raises(ValueError, match="8 bits already"):
        quantize_scales(quantize_scales(quantized))
    with pytest.raises(ValueError, match=r"codes have shape \(127,\).*needs \(128,\)"):
        dequantize(replace(quantized, codes=quantized.codes[:-1]))
    with pytest.raises(ValueError, match="scales have shape"):
        dequantize(replace(quantized, scales=quantized.scales[:-1]))
    with pytest.raises(ValueError, match="unknown kind 'nf3'"):
        dequantize(replace(quantized, kind="nf3"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        *(({"dtype": dtype}, "expected float32, bfloat16") for dtype in (torch.int32, torch.float64, torch.load, None)),
        *(({"block_size": size}, "power of two") for size in (0, -64, 1, 48, 64.0, True, None, "64")),
    ],
)
@pytest.mark.parametrize("shape", [(4, 64), (7, 33)])
def test_settings_that_quantize_would_not_give_are_refused(shape, changed, message):
    for packed in (quantize(numbers(shape)), quantize_scales(quantize(numbers(shape)))):
        with pytest.raises(ValueError, match=message):
            dequantize(replace(packed, **changed))
