"""Paged caches for the tests of attention kernels, what attention over them means, and how far a kernel may be off."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from triton_cases import FP32_UNIT, unit

from kbit.kernels import reference
from kbit.kernels.triton.attention.kv_layout import (
    KVFormat,
    gather_row,
    new_pages,
    shuffled_block_table,
    slots_of,
    write_tokens,
)

SPARE = 3  # pages that no row owns


@dataclass
class Cache:
    """A paged cache with rows of some lengths, its pages in a random order, and leftovers in every unused byte."""

    kinds: tuple[str, str]
    kv_heads: int
    head_dim: int
    lengths: list[int]
    room: int = 0
    seed: int = 0
    k_pages: torch.Tensor = field(init=False)
    v_pages: torch.Tensor = field(init=False)
    table: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.table = shuffled_block_table(len(self.lengths), max(*self.lengths, self.room, 1), self.seed)
        pages = [
            new_pages(self.table.numel() + SPARE, self.kv_heads, KVFormat(kind, self.head_dim)) for kind in self.kinds
        ]
        for format, store in zip(self.formats, pages, strict=True):
            store.random_(0, 256, generator=generator)  # leftovers: NaN and infinite scales and floats among them
            for row, length in enumerate(self.lengths):
                x = torch.randn(length, self.kv_heads, self.head_dim, generator=generator)
                write_tokens(store, format, self.slots(row, length), x)
        self.k_pages, self.v_pages = pages

    @property
    def formats(self) -> tuple[KVFormat, KVFormat]:
        return KVFormat(self.kinds[0], self.head_dim), KVFormat(self.kinds[1], self.head_dim)

    def slots(self, row: int, length: int) -> torch.Tensor:
        positions = torch.arange(length)
        return slots_of(self.table, torch.full_like(positions, row), positions)

    def row(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a row as attention understands them: (H_kv, length, D) each."""
        k, v = (
            gather_row(pages, format, self.table, row, self.lengths[row]).transpose(0, 1)
            for format, pages in zip(self.formats, (self.k_pages, self.v_pages), strict=True)
        )
        return k, v


@dataclass(frozen=True)
class Mask:
    """What differs between kinds of attention."""

    window: int | None = None
    soft_cap: float | None = None
    slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    causal: bool = True

    def options(self, device: str) -> dict[str, object]:
        """As the launchers take them."""
        slopes, sinks = (None if x is None else x.to(device) for x in (self.slopes, self.sinks))
        return {"window": self.window, "soft_cap": self.soft_cap, "slopes": slopes, "sinks": sinks}


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, scale: float, mask: Mask
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One sequence in float64: what `reference.attend` means, with a soft cap, slopes and sinks.

    Args:
        q: (T, H, D).
        k: (H_kv, S, D), as is v.
        positions: (T,).

    Returns:
        The result (T, H, D); the probabilities (H, T, S); and the scores' sums of magnitudes, scale |q| |k| (H, T, S).
    """
    group = q.shape[1] // k.shape[0]
    k, v = k.double().repeat_interleave(group, 0), v.double().repeat_interleave(group, 0)
    q = q.double().transpose(0, 1)  # (H, T, D)
    scores = scale * q @ k.transpose(1, 2)
    magnitudes = scale * q.norm(dim=-1)[:, :, None] * k.norm(dim=-1)[:, None, :]
    if mask.soft_cap is not None:
        scores = mask.soft_cap * torch.tanh(scores / mask.soft_cap)
    distance = (positions[:, None] - torch.arange(k.shape[1])).double()
    if mask.slopes is not None:
        scores = scores - mask.slopes[:, None, None].double() * distance
    hidden = distance < 0 if mask.causal else torch.zeros_like(distance, dtype=torch.bool)
    if mask.window is not None:
        hidden = hidden | (distance >= mask.window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if mask.sinks is not None:
        beside = mask.sinks.double()[:, None, None].expand(-1, len(positions), 1)
        scores = torch.cat([scores, beside], -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)[..., : k.shape[1]]
    return (weights @ v).transpose(0, 1), weights, magnitudes


def attention_bound(
    v: torch.Tensor,
    weights: torch.Tensor,
    magnitudes: torch.Tensor,
    kinds: tuple[str, str],
    out: torch.dtype,
    mask: Mask,
    *,
    rounds_values: bool,
) -> torch.Tensor:
    """How far a kernel may be from `attend`: (T, H, D) from that function's results and v (H_kv, S, D).

    q is rounded once to the type of the product, u = 2^-11 in fp16 (2^-8 in bf16); a kernel that rounds decoded keys
    (`rounds_values`) adds another u. A rounding error e of q, |e_i| <= u |q_i|, moves a score by at most u |q| |k|,
    whatever transform q and k went through. Sums of D products and the softmax cost fp32 roundings. Scores off by d
    change every probability by a factor within e^(2 d); probabilities and decoded values are then rounded to the
    type of the second product. Where values are undone by a transform, the error of a feature is within the norm of its
    group's. Last, fp16 has no numbers below 2^-25: probability times scale is carried times 16, and a level is at
    most 127.
    """
    dim = v.shape[-1]
    group = magnitudes.shape[0] // v.shape[0]
    unit_k = unit(torch.bfloat16 if kinds[0] == "bf16" else torch.float16)
    unit_v = unit(torch.bfloat16 if kinds[1] == "bf16" else torch.float16)
    coded_k, coded_v = (kind not in ("fp16", "bf16") for kind in kinds)
    relative = unit_k * (2 if coded_k and rounds_values else 1) + (2 * dim + 8) * FP32_UNIT
    drift = relative * magnitudes.amax(-1, keepdim=True)  # (H, T, 1)
    size = magnitudes.amax(-1, keepdim=True)
    if mask.slopes is not None:
        size = size + mask.slopes.abs().amax() * weights.shape[-1]
    if mask.sinks is not None:
        size = torch.maximum(size, mask.sinks.double().abs()[:, None, None])
    drift = drift + 8 * FP32_UNIT * size
    tokens = weights.shape[-1]
    each = torch.expm1(2 * drift) + unit_v * (2 if coded_v and rounds_values else 1) + (2 * tokens + 32) * FP32_UNIT
    values = v.double().abs().repeat_interleave(group, 0)
    if coded_v:
        width = reference.kv_group(dim)
        norms = values.unflatten(-1, (-1, width)).norm(dim=-1, keepdim=True)
        values = norms.expand(*norms.shape[:-1], width).flatten(-2)
    typical = weights @ values
    tiny = tokens * 2.0**-25 * (127 * 6 if coded_v else values.amax())  # 6 > sqrt(32), the norm of a group
    expected = each * typical + tiny
    return (expected + unit(out) * typical).transpose(0, 1) + torch.finfo(out).smallest_normal
