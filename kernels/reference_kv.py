"""What a quantized KV cache holds, in plain torch and float32: levels and scales of rotated keys and values.

Everything here is reached through `kbit.kernels.reference`.
"""

from __future__ import annotations

import torch

from kbit.host.errors import UnsupportedError


def hadamard(x: torch.Tensor, group: int) -> torch.Tensor:
    """The Walsh-Hadamard transform of every `group` features, natural order, normalised: its own inverse.

    The roundings are part of the meaning, since `quantize_kv` rounds its results: in each 16 features the terms of a
    sum are added in ascending order, then come butterflies between blocks of 16, then the product with group^-1/2.

    Args:
        x: (..., D), D a multiple of group.
        group: a power of two, at least 16.

    Returns:
        (..., D) float32.
    """
    index = torch.arange(16, device=x.device)
    signs = torch.tensor([1.0 - 2.0 * (bits.bit_count() % 2) for bits in range(16)], device=x.device)
    matrix = signs[index[:, None] & index]  # (16, 16)
    blocks = x.float().reshape(-1, group // 16, 16)
    out = torch.zeros_like(blocks)
    for i in range(16):
        out = out + blocks[..., i : i + 1] * matrix[i]
    distance = 1
    while distance < group // 16:
        pairs = out.view(-1, group // (32 * distance), 2, distance, 16)
        out = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], dim=2)
        distance *= 2
    norm: float = group**-0.5
    return (out * norm).reshape(x.shape)


def kv_group(head_dim: int) -> int:
    """Features of a head that share a scale in a quantized KV cache.

    Raises:
        UnsupportedError: head_dim is not a multiple of 16.
    """
    if head_dim % 16:
        raise UnsupportedError(f"a quantized KV cache needs heads of a multiple of 16 features, not {head_dim}")
    return 32 if head_dim % 32 == 0 else 16


def quantize_kv(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (rotated by `rope`) or values as a quantized KV cache stores them.

    Each group of 32 features (16 where 32 does not divide D) goes through `hadamard`, which spreads a channel that is
    always large over its group. A group's scale is its largest magnitude over 2^bits (over 127 at 8 bits), rounded to
    half precision; its values become the nearest of 2^bits levels: -2^bits + 1, -2^bits + 3, ..., 2^bits - 1 times the
    scale (at 8 bits: -127, ..., 127), the midpoints of equal cells.

    Args:
        x: (..., D).
        bits: 2, 3, 4 or 8.

    Returns:
        levels int8 (..., D), scales float16 (..., D / group).

    Raises:
        UnsupportedError: D is not a multiple of 16.
    """
    group = kv_group(x.shape[-1])
    rotated = hadamard(x, group).view(*x.shape[:-1], -1, group)
    steps = 127.0 if bits == 8 else 2.0**bits
    largest_half = torch.finfo(torch.float16).max
    scales = (rotated.abs().amax(-1) / steps).clamp_(max=largest_half).half()
    divisor = torch.where(scales == 0, 1.0, scales.float())  # a scale of zero makes every level zero
    units = rotated / divisor[..., None]
    if bits == 8:
        levels = units.round().clamp_(-127, 127)
    else:
        top = 2**bits - 1
        levels = (units * 0.5 + 0.5 * top).clamp_(0, top).round() * 2 - top
    return levels.flatten(-2).to(torch.int8), scales


# The levels of `quantize_kv_4`: those of least mean squared error for groups of 32 normal numbers, scales chosen as it
# chooses them, as int8 (Lloyd 1982). Not symmetric: in most groups the largest magnitude meets the outermost level.
LEVELS_4 = (-127, -100, -79, -62, -48, -34, -22, -9, 3, 15, 28, 42, 56, 73, 93, 122)
SHRINKS_4 = (1.0, 0.93, 0.86, 0.79)
_LEVELS_PER_LARGEST = 111.43


def quantize_kv_4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys or values as the CPU stores them in 4 bits, with a quarter less of squared error than equal steps.

    Groups and rotation are those of `quantize_kv`. For its value of largest magnitude, sign included, a group tries the
    scales largest * -f / 111.43 and largest * f / 111.43 for f in SHRINKS_4, rounded to half precision, in this order;
    the first with the least sum of squared errors stays. A value becomes the level of LEVELS_4 nearest to x / scale
    rounded to a whole number, the lower of two.

    The sum's order is part of the meaning: squares of features i and i + 16 first, then halves onto halves.

    Args:
        x: (..., D).

    Returns:
        levels int8 (..., D), scales float16 (..., D / group).

    Raises:
        UnsupportedError: D is not a multiple of 16.
    """
    group = kv_group(x.shape[-1])
    rotated = hadamard(x, group).view(*x.shape[:-1], -1, group)
    high, low = rotated.amax(-1, keepdim=True), rotated.amin(-1, keepdim=True)
    largest = torch.where(high >= -low, high, low)
    levels = torch.tensor(LEVELS_4, dtype=torch.float32, device=x.device)
    borders = (levels[1:] + levels[:-1]) / 2
    best, best_scale, least = rotated, largest, largest
    for index in range(2 * len(SHRINKS_4)):
        shrink = torch.tensor(SHRINKS_4[index % len(SHRINKS_4)]) / torch.tensor(_LEVELS_PER_LARGEST)
        exact = largest * (-shrink if index < len(SHRINKS_4) else shrink)
        scale = exact.clamp(-torch.finfo(torch.float16).max, torch.finfo(torch.float16).max).half().float()
        units = (rotated / torch.where(scale == 0, 1.0, scale)).clamp(-127, 127).round()
        chosen = levels[torch.bucketize(units, borders)]
        squares = (chosen * scale - rotated).square().view(*rotated.shape[:-1], -1, 16)
        error = squares[..., 0, :] if group == 16 else squares[..., 0, :] + squares[..., 1, :]
        while error.shape[-1] > 1:
            error = error[..., : error.shape[-1] // 2] + error[..., error.shape[-1] // 2 :]
        better = error < least if index else torch.ones_like(error, dtype=torch.bool)
        best = torch.where(better, chosen, best)
        best_scale, least = torch.where(better, scale, best_scale), torch.where(better, error, least)
    return best.flatten(-2).to(torch.int8), best_scale[..., 0].half()


def dequantize_kv(levels: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What levels and scales stand for, (..., D) float32: what a quantized cache attends over."""
    group = levels.shape[-1] // scales.shape[-1]
    values = levels.float().view(*scales.shape, group) * scales.float()[..., None]
    return hadamard(values.flatten(-2), group)
