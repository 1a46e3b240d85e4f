"""What tests of the reference have in common: random tensors, and attention in float64 with the bound that follows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

EPS = 2.0**-24  # unit roundoff of float32


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1000 * len(shape)))


def assert_within(ours: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor | float) -> None:
    assert ours.dtype == torch.float32
    assert ours.shape == exact.shape
    assert bool(((ours.double() - exact.double()).abs() <= bound).all())


def sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    kv_lengths: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """The same in float64 through torch.nn.functional.scaled_dot_product_attention with an explicit mask."""
    slots = torch.arange(k.shape[2])
    seen = (slots <= positions[..., None]) & (slots < kv_lengths[:, None, None])  # (B, T, S)
    if window is not None:
        seen &= slots > positions[..., None] - window
    out = F.scaled_dot_product_attention(
        q.double().transpose(1, 2), k.double(), v.double(), attn_mask=seen[:, None], scale=scale, enable_gqa=True
    )
    return torch.where(seen.any(-1)[..., None, None], out.transpose(1, 2), 0.0)


def attention_bound(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> float:
    """Scores are off by D eps |q||k| scale, which moves softmax weights relatively by twice that; then S terms sum."""
    score = (q.shape[-1] + 1) * EPS * float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) * scale
    return (2 * score + (2 * k.shape[2] + 10) * EPS) * float(v.abs().max())
