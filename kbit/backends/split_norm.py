"""A norm of features of which every process has some."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kbit.graph.backend import Group


def norm_of_parts(x: torch.Tensor, weight: torch.Tensor, eps: float, group: Group) -> torch.Tensor:
    """`reference.rms_norm` of features of which every process has as many: (..., K) float32."""
    x = x.float()
    squares = group.sum(x.square().sum(dim=-1, keepdim=True))
    return x * torch.rsqrt(squares / (x.shape[-1] * group.size) + eps) * weight.float()
