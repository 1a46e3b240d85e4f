"""A norm of features of which every process has some."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kbit.graph.backend import Group


def norm_of_parts(x: torch.Tensor, weight: torch.Tensor, eps: float, group: Group) -> torch.Tensor:
    """`reference.rms_norm` of features of which every process has some, perhaps more than others: (..., K) float32."""
    x = x.float()
    squares = x.square().sum(dim=-1, keepdim=True)
    total = group.sum(torch.cat([squares, torch.full_like(squares, x.shape[-1])], dim=-1))
    return x * torch.rsqrt(total[..., :1] / total[..., 1:] + eps) * weight.float()
