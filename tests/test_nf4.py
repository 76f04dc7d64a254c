"""Four bits: against bitsandbytes bit for bit, on shapes that fill no block, in three dtypes; bad input."""

import logging
from dataclasses import replace

import pytest
import torch
from tuning.nf4 import (
    LEVELS,
    NF4,
    SCALE_BLOCK,
    dequantize,
    dynamic_map,
    nearest,
    normal_levels,
    pack,
    quantize,
    quantize_scales,
    scale_up,
    scales_of,
    unpack,
)

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
