"""The functions that the assignment *Three bits* asks for."""

import torch
from torch.special import ndtri


def normal_float(bits):
    n = 2**bits
    offset = ((1 - 1 / (2 * n)) + (1 - 1 / (2 * (n - 1)))) / 2
    above = ndtri(torch.linspace(offset, 0.5, n // 2 + 1, dtype=torch.double))[:-1]
    below = -ndtri(torch.linspace(offset, 0.5, n // 2, dtype=torch.double))[:-1]
    levels = torch.cat([below, torch.zeros(1, dtype=torch.double), above]).sort().values
    return (levels / levels.max()).float()


def pack3(codes):
    eights = torch.nn.functional.pad(codes.long(), (0, -len(codes) % 8), value=3).view(-1, 8)
    whole = (eights << torch.arange(21, -1, -3)).sum(dim=1, keepdim=True)  # 24 bits
    return (whole >> torch.tensor([16, 8, 0]) & 255).to(torch.uint8).flatten()


def unpack3(packed, n):
    whole = (packed.view(-1, 3).long() << torch.tensor([16, 8, 0])).sum(dim=1, keepdim=True)
    return (whole >> torch.arange(21, -1, -3) & 7).flatten()[:n]


def in_blocks(numbers, block_size):
    flat = numbers.flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)


def codes_for(blocks, scales):
    levels = normal_float(3)
    divisors = torch.where(scales == 0, 1, scales).unsqueeze(1)
    return torch.bucketize(blocks / divisors, (levels[1:] + levels[:-1]) / 2)


def quantize3(weight, block_size):
    blocks = in_blocks(weight, block_size)
    scales = blocks.abs().amax(dim=1)
    return pack3(codes_for(blocks, scales).flatten()[: weight.numel()]), scales


def dequantize3(packed, scales, shape, block_size):
    n = shape.numel()
    numbers = in_blocks(normal_float(3)[unpack3(packed, n)], block_size) * scales.unsqueeze(1)
    return numbers.flatten()[:n].view(shape)


def error_curve(weight, block_sizes):
    rows = []
    for size in block_sizes:
        packed, scales = quantize3(weight, size)
        back = dequantize3(packed, scales.half().float(), weight.shape, size)
        rows.append((3 + 16 / size, ((back - weight).norm() / weight.norm()).item()))
    return rows


def best_scales(weight, block_size, shares):
    blocks, levels = in_blocks(weight, block_size), normal_float(3)
    tried = blocks.abs().amax(dim=1) * shares.unsqueeze(1)  # (shares, blocks)
    errors = torch.stack([(levels[codes_for(blocks, s)] * s.unsqueeze(1) - blocks).square().sum(dim=1) for s in tried])
    return tried.gather(0, errors.argmin(dim=0, keepdim=True)).squeeze(0)
