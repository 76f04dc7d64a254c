"""Four bits a weight: quantization in blocks, NF4, and double quantization (Dettmers et al., arXiv 2305.14314).

`quantize` and `dequantize` are the whole of it: each block of a weight is scaled by its largest magnitude, each number
becomes the index of the nearest of sixteen levels, and two indices share a byte. Codes, scales and dequantized weights
are those of bitsandbytes, bit for bit.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch

__all__ = [
    "dequantize",
    "dynamic_map",
    "nearest",
    "normal_levels",
    "pack",
    "quantize",
    "quantize_scales",
    "unpack",
]

# The levels in use. `normal_levels` derives them; rounding in their derivation differs, so these constants are kept.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1, over 6
INT4 = tuple(range(-7, 8))  # over 7
LEVELS = {"nf4": NF4, "fp4": tuple(x / 6 for x in FP4), "int4": tuple(x / 7 for x in INT4)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights that can be quantized
SCALE_BLOCK = 256  # block size of the second quantization


def normal_levels(positive=8, negative=7, offset=0.5 * ((1 - 1 / 32) + (1 - 1 / 30))):
    """NF4's levels from the normal distribution: quantiles at equal steps of probability, over the largest.

    Args:
        positive, negative: how many levels above and below zero.
        offset: the probability of the outermost quantile; that of 1 is infinite.

    Returns:
        (positive + 1 + negative,) float64, ascending, from -1 to 1, with an exact zero.
    """
    above = torch.special.ndtri(torch.linspace(offset, 0.5, positive + 1, dtype=torch.double))[:-1]
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, negative + 1, dtype=torch.double))[:-1]
    levels = torch.cat([below, torch.zeros(1, dtype=torch.double), above]).sort().values
    return levels / levels.max()


def dynamic_map():
    """The 256 values of the 8-bit dynamic type (Dettmers, arXiv 1511.04561), ascending float32 from about -1 to 1.

    A value is a sign, a power of ten and a fraction; the smaller the power, the fewer bits are left for the fraction.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        for middle in (10 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2).tolist():
            values += [middle, -middle]
    return torch.tensor(sorted(values), dtype=torch.float32)


def pack(codes):
    """(n,) codes below 16 -> (ceil(n / 2),) uint8: the first of two in the upper half of its byte, as in bitsandbytes.

    Where n is odd, a code of zero, 7, fills the last byte.
    """
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, len(codes) % 2), value=7)
    return codes[::2] << 4 | codes[1::2]


def unpack(packed, n):
    """The reverse of `pack`: (n,) uint8."""
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:n]


def nearest(x, levels, block_size):
    """Scale each block of x to [-1, 1] and take the nearest levels.

    Args:
        x: (n,) float32; levels: ascending. The last block may be shorter.

    Returns:
        (n,) indices and (blocks,) float32 scales, the largest magnitude of each block.
    """
    full = len(x) - len(x) % block_size
    blocks, rest = x[:full].view(-1, block_size), x[full:]
    scales = blocks.abs().amax(dim=1)
    scaled = (blocks * (1 / scales.clamp(min=1e-38)).unsqueeze(1)).flatten()
    if len(rest):
        last = rest.abs().amax().clamp(min=1e-38)
        scales, scaled = torch.cat([scales, last.view(1)]), torch.cat([scaled, rest / last])
    scaled.nan_to_num_()  # 0 · (1 / 0), where subnormal numbers count as zero
    middles = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(scaled, middles, out_int32=True), scales


@dataclass
class Quantized:
    """A weight in four bits.

    `codes`: (ceil(n / 2),) uint8, two codes a byte. `scales`: (blocks,) float32; or with double quantization their
    uint8 codes, with `second` the pair (scales of blocks of 256 of them, the mean that was taken off), float32 both.
    `shape` and `dtype` are the weight's, `kind` a key of LEVELS.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    second: tuple | None
    shape: torch.Size
    dtype: torch.dtype
    kind: str
    block_size: int

    def bits(self):
        """Bits a parameter, counted from the bytes of the tensors."""
        tensors = [self.codes, self.scales, *(self.second or ())]
        return 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors) / self.shape.numel()


def quantize(weight, kind="nf4", block_size=64):
    """Quantize a weight in blocks along its rows, one after the other.

    Args:
        weight: float32, bfloat16 or float16, any shape.
        kind: "nf4"; or "fp4" (E2M1) or "int4", to compare with.
        block_size: numbers that share a scale, a power of two.

    Raises:
        ValueError: an empty or non-finite weight, another dtype, kind or block size.
    """
    check_weight(weight, kind, block_size)
    levels = torch.tensor(LEVELS[kind], dtype=torch.float32, device=weight.device)
    codes, scales = nearest(weight.detach().flatten().float(), levels, block_size)
    return Quantized(pack(codes), scales, None, weight.shape, weight.dtype, kind, block_size)


def quantize_scales(quantized):
    """Double quantization (section 3): the scales, less their mean, in 8 bits of the dynamic type, in blocks of 256."""
    if quantized.second is not None:
        raise ValueError("the scales are in 8 bits already")
    mean = quantized.scales.mean()
    codes, largest = nearest(quantized.scales - mean, dynamic_map_on(mean.device), SCALE_BLOCK)
    return replace(quantized, scales=codes.to(torch.uint8), second=(largest, mean))


def dequantize(quantized):
    """The weight that the codes stand for, in the dtype and shape of the one that was quantized."""
    check_quantized(quantized)
    q, device = quantized, quantized.codes.device
    pairs = pairs_on(device, q.kind)
    # two float32 as one item of eight bytes: found faster, but in the way of a compiler
    if not torch.compiler.is_compiling():
        pairs = pairs.view(torch.int64).flatten()
    numbers = pairs.index_select(0, q.codes.int()).view(torch.float32).flatten()[: q.shape.numel()]
    return scale_up(numbers, scales_of(q), q.block_size).to(q.dtype).view(q.shape)


DYNAMIC_MAP = dynamic_map()  # made once: a compiler cannot follow how


@cache
def dynamic_map_on(device):
    return DYNAMIC_MAP.to(device)


@cache
def pairs_on(device, kind):
    """(256, 2) float32: the two levels that each byte stands for."""
    levels = torch.tensor(LEVELS[kind], dtype=torch.float32)
    both = unpack(torch.arange(256, dtype=torch.uint8), 512).int()
    return levels[both.clamp(max=len(levels) - 1)].view(256, 2).to(device)


def scales_of(quantized):
    """(blocks,) float32: the scales, taken out of their 8-bit codes if need be."""
    if quantized.second is None:
        return quantized.scales
    largest, mean = quantized.second
    numbers = dynamic_map_on(mean.device)[quantized.scales.int()]
    return scale_up(numbers, largest, SCALE_BLOCK) + mean


def scale_up(numbers, scales, block_size):
    """(n,) numbers times the scale of their block, in place."""
    full = len(numbers) - len(numbers) % block_size
    # in one piece where it fits, so that a compiler can join it with the look-up
    if full == len(numbers):
        return numbers.view(-1, block_size).mul_(scales.unsqueeze(1)).flatten()
    numbers[:full].view(-1, block_size).mul_(scales[: full // block_size].unsqueeze(1))
    numbers[full:].mul_(scales[-1])
    return numbers


def check_quantized(quantized, path="the weight"):
    """Raise ValueError where `quantize` would not give such settings, or where tensors do not fit a weight's shape."""
    q, n = quantized, quantized.shape.numel()
    if q.kind not in LEVELS:
        raise ValueError(f"{path}: unknown kind {q.kind!r}; expected one of {', '.join(LEVELS)}")
    if q.dtype not in DTYPES:
        raise ValueError(f"{path}: dtype is {q.dtype}; expected float32, bfloat16 or float16")
    if not is_block_size(q.block_size):
        raise ValueError(f"{path}: block_size is {q.block_size!r}; expected a power of two, e.g. 64")
    blocks = -(-n // q.block_size)
    expected = {"codes": (q.codes, -(-n // 2)), "scales": (q.scales, blocks)}
    if q.second is not None:
        expected["scales of the scales"] = (q.second[0], -(-blocks // SCALE_BLOCK))
    for what, (tensor, length) in expected.items():
        if tensor is None or tensor.shape != (length,):
            found = "none" if tensor is None else tuple(tensor.shape)
            raise ValueError(f"{path}: {what} have shape {found}; a weight of {tuple(q.shape)} needs ({length},)")


def is_block_size(n):
    """Whether it is a power of two, and more than 1."""
    return isinstance(n, int) and n > 1 and n & (n - 1) == 0


def check_weight(weight, kind, block_size, path="the weight"):
    if isinstance(weight, Quantized):
        raise ValueError(f"{path} is quantized already; dequantize it first")
    if weight.dtype not in DTYPES:
        raise ValueError(f"{path} has dtype {weight.dtype}; to quantize, it must be float32, bfloat16 or float16")
    if kind not in LEVELS:
        raise ValueError(f"unknown kind {kind!r}; choose one of {', '.join(LEVELS)}")
    if not is_block_size(block_size):
        raise ValueError(f"block_size is {block_size!r}; choose a power of two, e.g. 64")
    if not weight.numel():
        raise ValueError(f"{path} has shape {tuple(weight.shape)} and holds nothing to quantize")
    if not torch.isfinite(weight).all():
        raise ValueError(f"{path} has numbers that are not finite; mend them before quantizing")
