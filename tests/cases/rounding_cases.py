"""Matrices with factors as activations and gradients make them."""

from __future__ import annotations

import torch

from kbit.calibration.factors import Factors


def factor(size: int, generator: torch.Generator) -> torch.Tensor:
    """A covariance with directions of very different weight, as activations have."""
    mix = torch.randn(size, 3 * size, generator=generator) * torch.linspace(0.1, 2.0, size)[:, None]
    shared = torch.randn(size, 2, generator=generator)
    return mix @ mix.T / (3 * size) + shared @ shared.T


def problem(rows: int = 40, columns: int = 96, seed: int = 0) -> tuple[torch.Tensor, Factors]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    inputs, outputs = factor(columns, generator), factor(rows, generator)
    return weight, Factors(inputs, outputs * (inputs.trace() / outputs.trace()))
