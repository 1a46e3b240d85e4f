"""Rotations of a matrix's columns: random signs, then Hadamard matrices over blocks of columns.

A block B of a power of two columns is multiplied with H / sqrt(B), H of ones and minus ones (Sylvester's), which is its
own inverse. Weights are then sums of many others, and nearly normal, whatever they were; y = W x = (W R)(R' x), so the
same is done to x. (QuIP#, Tseng et al., arXiv 2402.04396, section 3.)
"""

from __future__ import annotations

import math

import numpy as np
import torch

TILE = 16
_SEED = 20260  # of the signs; they are stored, so another one changes no file


def new_signs(columns: int) -> torch.Tensor:
    """Signs for rows of so many columns, the same at each call.

    Returns:
        uint8 (bytes,): a bit for each column of whole tiles.
    """
    count = -(-columns // TILE) * TILE // 8
    raw = np.random.Philox(key=_SEED).random_raw(-(-count // 8))
    return torch.from_numpy(raw.astype("<u8").view(np.uint8)[:count].copy())


def sign_values(signs: torch.Tensor) -> torch.Tensor:
    """Signs as numbers: uint8 (bytes,) -> float32 (8 bytes,) of 1 and -1."""
    bits = (signs[:, None] >> torch.arange(8, dtype=torch.uint8, device=signs.device)) & 1
    return 1 - 2 * bits.flatten().float()


def rotate(rows: torch.Tensor, signs: torch.Tensor, block: int) -> torch.Tensor:
    """Rows in rotated columns.

    Args:
        rows: float32 (..., K); filled up with zeros to whole tiles.
        signs: of the columns, uint8.
        block: columns that one Hadamard matrix mixes.

    Returns:
        float32 (..., K in whole tiles).
    """
    full = torch.nn.functional.pad(rows, (0, 8 * len(signs) - rows.shape[-1]))
    return _hadamard(full * sign_values(signs), block)


def unrotate(rows: torch.Tensor, signs: torch.Tensor, block: int) -> torch.Tensor:
    """The inverse of `rotate`, but for what was filled up: float32 (..., K in whole tiles)."""
    return _hadamard(rows, block) * sign_values(signs)


def rotate_factor(factor: torch.Tensor, signs: torch.Tensor, block: int) -> torch.Tensor:
    """R' H R for the factor H (K, K) of a matrix's inputs: that of rotated inputs."""
    return rotate(rotate(factor, signs, block).T.contiguous(), signs, block).T.contiguous()


def _hadamard(rows: torch.Tensor, block: int) -> torch.Tensor:
    """The fast transform: sums and differences of halves, log2(block) times; then one factor."""
    shape = rows.shape
    half = 1
    while half < block:
        pairs = rows.reshape(-1, 2, half)
        rows = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], dim=1)
        half *= 2
    return rows.reshape(shape) * (1 / math.sqrt(block))
