"""The attention kernels and the cache against the reference: paged caches, what attention over them means, how far a
kernel may be off, and the comparison of one launch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from kbit.gpu_check.bounds import FP32_UNIT, assert_equal, assert_within, rounded, unit
from kbit.kernels import reference
from kbit.kernels.triton.attention.kv_layout import (
    KVFormat,
    gather_row,
    new_pages,
    read_tokens,
    shuffled_block_table,
    slots_of,
    write_tokens,
)

if TYPE_CHECKING:
    from kbit.kernels.triton.attention.configs import DecodeConfig, PrefillConfig

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
    chunked: bool = False

    def options(self, device: str) -> dict[str, Any]:
        """As the launchers take them."""
        slopes, sinks = (None if x is None else x.to(device) for x in (self.slopes, self.sinks))
        mask = {"window": self.window, "soft_cap": self.soft_cap, "slopes": slopes, "sinks": sinks}
        return {**mask, "chunked": self.chunked}


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
    if mask.window is not None and mask.chunked:
        stretch = positions.clamp(min=0) // mask.window * mask.window
        hidden = hidden | (torch.arange(k.shape[1]) < stretch[:, None])
    elif mask.window is not None:
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
        norms = values.view(*values.shape[:-1], -1, width).norm(dim=-1, keepdim=True)
        values = norms.expand(*norms.shape[:-1], width).flatten(-2)
    typical = weights @ values
    tiny = tokens * 2.0**-25 * (127 * 6 if coded_v else values.amax())  # 6 > sqrt(32), the norm of a group
    expected = each * typical + tiny
    return (expected + unit(out) * typical).transpose(0, 1) + torch.finfo(out).smallest_normal


def check_decode(
    device: str,
    cache: Cache,
    heads: int,
    tokens: int,
    mask: Mask | None = None,
    *,
    dtype: torch.dtype = torch.float16,
    out: torch.dtype = torch.float32,
    positions: torch.Tensor | None = None,
    **options: Any,
) -> float:
    """The last `tokens` tokens of every row, or those at `positions` (B, T), in one launch against `attend`.

    Raises:
        TooFarError: beyond the bound; else the worst error in units of it is returned, as by all checks here.
    """
    from kbit.kernels.triton.attention.decode import attention_decode

    mask = mask or Mask()
    dim = cache.head_dim
    config: DecodeConfig | None = options.get("config")
    lengths = torch.tensor(cache.lengths)
    if positions is None:
        positions = lengths[:, None] - tokens + torch.arange(tokens)
    q = torch.randn(len(cache.lengths), tokens, heads, dim, generator=torch.Generator().manual_seed(7)).to(dtype)
    got = attention_decode(
        q.to(device),
        cache.k_pages.to(device),
        cache.v_pages.to(device),
        cache.table.to(device),
        positions.to(device),
        lengths.to(device),
        dim**-0.5,
        k_kind=cache.kinds[0],
        v_kind=cache.kinds[1],
        out_dtype=out,
        **mask.options(device),
        **options,
    )
    worst = 0.0
    assert got.dtype == out
    for row in range(len(cache.lengths)):
        k, v = cache.row(row)
        expected, weights, magnitudes = attend(q[row], k, v, positions[row], dim**-0.5, mask)
        rounds = config.scale_tiles if config else device != "cpu" and dim > 192  # decode_config of NVIDIA's
        bound = attention_bound(v, weights, magnitudes, cache.kinds, out, mask, rounds_values=rounds)
        worst = max(worst, assert_within(got[row], expected, bound))
    return worst


def bounds_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def check_paged(
    device: str,
    cache: Cache,
    heads: int,
    new: list[int],
    mask: Mask | None = None,
    *,
    dtype: torch.dtype = torch.float16,
    out: torch.dtype = torch.float32,
    config: PrefillConfig | None = None,
) -> float:
    """The last new[b] tokens of row b."""
    from kbit.kernels.triton.attention.prefill import attention_prefill_paged

    mask, dim, bounds = mask or Mask(), cache.head_dim, bounds_of(new)
    q = torch.randn(sum(new), heads, dim, generator=torch.Generator().manual_seed(5)).to(dtype)
    got = attention_prefill_paged(
        q.to(device),
        bounds.to(device),
        cache.k_pages.to(device),
        cache.v_pages.to(device),
        cache.table.to(device),
        torch.tensor(cache.lengths, device=device),
        dim**-0.5,
        k_kind=cache.kinds[0],
        v_kind=cache.kinds[1],
        max_queries=max(new),
        out_dtype=out,
        config=config,
        **mask.options(device),
    )
    assert got.dtype == out
    worst = 0.0
    for row, (length, count) in enumerate(zip(cache.lengths, new, strict=True)):
        if count:
            part = slice(int(bounds[row]), int(bounds[row + 1]))
            k, v = cache.row(row)
            expected, weights, magnitudes = attend(q[part], k, v, torch.arange(length - count, length), dim**-0.5, mask)
            bound = attention_bound(v, weights, magnitudes, cache.kinds, out, mask, rounds_values=True)
            worst = max(worst, assert_within(got[part], expected, bound))
    return worst


def check_packed(
    device: str,
    heads: tuple[int, int, int],
    queries: list[int],
    keys: list[int] | None = None,
    mask: Mask | None = None,
    *,
    dtype: torch.dtype = torch.float16,
    config: PrefillConfig | None = None,
) -> float:
    """Sequences whose keys and values (`keys` of them, or as many as queries) lie in a row.

    Args:
        heads: (query heads, key heads, features).
    """
    from kbit.kernels.triton.attention.prefill import attention_prefill

    mask, (count, kv_heads, dim) = mask or Mask(), heads
    bounds, key_bounds = bounds_of(queries), bounds_of(keys or queries)
    generator = torch.Generator().manual_seed(6)
    q = torch.randn(sum(queries), count, dim, generator=generator).to(dtype)
    kv = torch.randn(int(key_bounds[-1]), 2 * kv_heads, dim, generator=generator).to(dtype)
    k, v = kv[:, :kv_heads], kv[:, kv_heads:]  # slices: tokens lie apart
    got = attention_prefill(
        q.to(device),
        bounds.to(device),
        kv.to(device)[:, :kv_heads],
        kv.to(device)[:, kv_heads:],
        dim**-0.5,
        max_queries=max(queries) + 3,
        key_bounds=None if keys is None else key_bounds.to(device),
        causal=mask.causal,
        out_dtype=torch.float32,
        config=config,
        **mask.options(device),
    )
    kind = "fp16" if dtype == torch.float16 else "bf16"
    worst = 0.0
    for row in range(len(queries)):
        mine, theirs = (slice(int(x[row]), int(x[row + 1])) for x in (bounds, key_bounds))
        length = theirs.stop - theirs.start
        positions = torch.arange(length - queries[row], length)
        values = v[theirs].transpose(0, 1)
        expected, weights, magnitudes = attend(q[mine], k[theirs].transpose(0, 1), values, positions, dim**-0.5, mask)
        bound = attention_bound(values, weights, magnitudes, (kind, kind), torch.float32, mask, rounds_values=True)
        worst = max(worst, assert_within(got[mine], expected, bound))
    return worst


def assert_stored(found: torch.Tensor, format: KVFormat, x: torch.Tensor) -> float:
    """What a cache holds of x (N, H_kv, D), rotated, is x to the nearest float or level.

    Rotation is good to 4 u max|x|, u = 2^-24, fused or not. A group's sums, in any order, are good to 32 u sum|x|, here
    and where levels are turned back. Its scale is s = largest / steps, or the number of half precision next to it: so
    s 2^-10 off, which moves the outermost level by 2^bits times that. Within these, no level is nearer than the code's:
    half a cell is s (at 8 bits s / 2).
    """
    turning = 4 * 2.0**-24 * float(x.abs().max())
    if format.dtype:
        return assert_within(found, x, rounded(x, format.dtype) + turning)
    group = reference.kv_group(x.shape[-1])
    values, levels = (reference.hadamard(part, group).view(*part.shape[:-1], -1, group) for part in (x, found))
    steps = 127.0 if format.bits == 8 else 2.0**format.bits
    scale = values.abs().amax(-1, keepdim=True) / steps
    sums = x.abs().reshape(*x.shape[:-1], -1, group).sum(-1, keepdim=True)
    half_cell = scale * (0.5 if format.bits == 8 else 1.0)
    return assert_within(levels, values, half_cell + steps * scale * 2.0**-10 + 64 * 2.0**-24 * sums + 6 * turning)


def check_append(
    device: str,
    kinds: tuple[str, str],
    heads: tuple[int, int, int],
    dtype: torch.dtype = torch.float16,
    *,
    half: int | None = None,
    by_position: bool = True,
) -> float:
    """Append three tokens, one of them padding: what is read back of the others, and every byte that is not theirs."""
    from kbit.kernels.triton.attention.kv_append import kv_append

    count, kv_heads, dim = heads
    half = dim // 2 if half is None else half
    generator = torch.Generator().manual_seed(dim)
    formats = [KVFormat(kind, dim) for kind in kinds]
    qkv = torch.randn(3, count + 2 * kv_heads, dim, generator=generator)
    qkv[2, -1] = 0.0  # a value of zeros: its scales are 0
    qkv = qkv.to(dtype)
    q, k, v = qkv.split_with_sizes([count, kv_heads, kv_heads], dim=1)  # slices: tokens lie apart
    angles = 6 * torch.rand(200, half, generator=generator)
    positions = torch.tensor([5, 70, 129])
    table = shuffled_block_table(1, 200)
    slots = slots_of(table, torch.zeros(3, dtype=torch.int64), positions)
    slots[1] = -1
    pages = [new_pages(5, kv_heads, format) for format in formats]
    for store in pages:
        store.random_(0, 256, generator=generator)
    cos, sin = angles.cos(), angles.sin()
    rotated = [reference.rope(x[None], cos[positions][None], sin[positions][None])[0] for x in (q, k)]
    real = slots >= 0
    if not by_position:
        cos, sin = cos[positions], sin[positions]
    got = [store.to(device) for store in pages]
    parts: Any = qkv.to(device).split_with_sizes([count, kv_heads, kv_heads], dim=1)
    out = kv_append(
        parts[0],
        parts[1],
        parts[2],
        cos.to(device) if half else None,
        sin.to(device) if half else None,
        slots.to(device),
        got[0],
        got[1],
        k_kind=kinds[0],
        v_kind=kinds[1],
        rope_rows=positions.to(device) if by_position and half else None,
    )
    assert out.dtype == dtype
    worst = assert_within(out.float(), rotated[0], rounded(rotated[0], dtype))
    for found, store, format, x in zip(got, pages, formats, (rotated[1], v.float()), strict=True):
        after = found.cpu()
        worst = max(worst, assert_stored(read_tokens(after, format, slots[real]), format, x[real]))
        for written in (after, store):
            write_tokens(written, format, slots[real], torch.zeros_like(x[real]))
        assert_equal(after, store)
    return worst
