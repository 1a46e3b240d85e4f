"""Scales of rows that know of each other: the least squares that rounding ends with."""

from __future__ import annotations

import torch


def solve_for_rows(system: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor | None:
    """x of system x = wanted, by Cholesky, with a millionth of the mean diagonal added: rows of zeros decide nothing.

    Args:
        system: float32 (N, N), symmetric; changed.
        wanted: float32 (N,).

    Returns:
        float32 (N,); None where the system is zero, or float32 cannot tell it from a singular one.
    """
    mean = float(system.diagonal().mean())
    if not mean > 0:
        return None
    system.diagonal().add_(1e-6 * mean)
    lower, failed = torch.linalg.cholesky_ex(system)
    if int(failed):
        return None
    solved: torch.Tensor = torch.cholesky_solve(wanted[:, None], lower)[:, 0]
    return solved
