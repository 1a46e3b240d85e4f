"""What rotations and attention mean, in plain torch and float32; dimension names as in `kbit.kernels.reference`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kbit.kernels.reference_kv import dequantize_kv, quantize_kv, quantize_kv_4

# Upper bound, in bytes, on the scores of one piece. A piece is never smaller than one query token of one batch row
# (4 H S bytes).
SCRATCH_BYTES = 64 << 20


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021) in the rotate-half order of Hugging Face checkpoints.

    Feature i of the first R/2 and feature i + R/2 form a pair that turns by the angle whose cosine and sine are given;
    features R.. of a head (partial rotary) pass unchanged.

    Args:
        x: (B, T, H, D).
        cos: (B, T, R/2), R <= D; already multiplied by the attention factor where the scaling has one.
        sin: as cos.

    Returns:
        (B, T, H, D) float32.
    """
    x = x.float()
    half = cos.shape[-1]
    cos, sin = cos[:, :, None].float(), sin[:, :, None].float()  # (B, T, 1, R/2)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """cap tanh(x / cap) (Gemma 2): magnitudes stay below `cap`. Any shape; float32."""
    return cap * torch.tanh(x.float() / cap)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    kv_lengths: torch.Tensor,
    scale: float,
    window: int | None = None,
    causal: bool = True,
    prefix: int = 0,
    cap: float | None = None,
    sinks: torch.Tensor | None = None,
    by_distance: torch.Tensor | None = None,
    chunked: bool = False,
) -> torch.Tensor:
    """softmax(soft_cap(scale * Q K^T) + by_distance + mask) V with grouped heads and a mask by position.

    Cache slot j of a row holds the token at position j. The query at position p of row b sees slot j when
    j < kv_lengths[b] and, if causal, j <= p (or j < prefix) and, with a sliding window, j > p - window (the window
    counts the query's own position) and j < p + window. Query head h reads key/value head h // (H / H_kv). A query that
    sees nothing (padding) yields zeros.

    Scores are formed for a few queries at a time, so scratch stays near SCRATCH_BYTES for any length; slots that no
    query of a piece can see are never touched, so what lies in a row's cache beyond its length does not matter.

    Args:
        q: (B, T, H, D).
        k: (B, H_kv, S, D); H is a multiple of H_kv.
        v: (B, H_kv, S, D).
        positions: int64 (B, T), position of each query.
        kv_lengths: int64 (B,), filled slots of each row, at most S.
        scale: multiplies the dot products, usually D^-0.5.
        window: slots a query sees at most before it, and after it, or None.
        causal: whether a query sees nothing after itself.
        prefix: slots that every query sees, also those before it; without a window.
        cap: of `soft_cap`, or None: scores stay.
        sinks: (H,), a score of each head that is in the softmax's sum beside those of slots and has no value (Xiao et
            al., arXiv 2309.17453; gpt-oss); not capped.
        by_distance: (H, 2 R + 1), added to scores: column R + j - p, the first and last also beyond; or None.
        chunked: the window does not slide: a query sees the slots j of its own stretch, j // window = p // window.

    Returns:
        (B, T, H, D) float32.
    """
    q = q.float()
    out = torch.zeros_like(q)
    budget = SCRATCH_BYTES // (4 * q.shape[2])  # scores per head
    for rows in _rows_alike(positions, kv_lengths, budget):
        length = int(kv_lengths[rows.start])
        step = max(1, budget // max(1, length * (rows.stop - rows.start)))
        for start in range(0, q.shape[1], step):
            queries = slice(start, start + step)
            where = positions[rows.start, queries]  # (T',)
            last = min(max(int(where.max()) + 1, prefix), length) if causal else length
            if window is not None:
                last = min(last, max(int(where.max()) + window, prefix))
            first = 0 if window is None else max(0, int(where.min()) - window + 1)
            if window is not None and chunked:
                first = int(where.min().clamp(min=0)) // window * window
            if first < last:
                seen = slice(first, last)
                slots = torch.arange(first, last, device=q.device)
                hidden = _hidden(where, slots, window, causal, chunked) & (slots >= prefix)
                out[rows, queries] = _softmax_weighted(
                    q[rows, queries],
                    k[rows, :, seen].float(),
                    v[rows, :, seen].float(),
                    hidden,
                    scale,
                    cap,
                    None if by_distance is None else of_distances(by_distance.float(), slots - where[:, None]),
                    sinks,
                )
    return out


def _rows_alike(positions: torch.Tensor, kv_lengths: torch.Tensor, budget: int) -> Iterator[slice]:
    """Batch rows that can be computed together: all with the same positions and lengths, else one by one."""
    batch = positions.shape[0]
    alike = bool((positions == positions[:1]).all()) and bool((kv_lengths == kv_lengths[:1]).all())
    step = max(1, budget // max(1, int(kv_lengths.max()))) if alike else 1
    for start in range(0, batch, step):
        yield slice(start, min(start + step, batch))


def _hidden(
    positions: torch.Tensor, slots: torch.Tensor, window: int | None, causal: bool, chunked: bool
) -> torch.Tensor:
    """True where a query must not look: positions (T',), slots (S',) -> bool (T', S')."""
    hidden = (slots > positions[:, None]) & causal
    if window is not None and chunked:
        hidden |= slots // window != positions[:, None] // window
    elif window is not None:
        hidden |= (slots - positions[:, None]).abs() >= window
    return hidden


def of_distances(table: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
    """Columns of a table (H, 2 R + 1) by distances (T', S') -> (H, T', S')."""
    reach = table.shape[1] // 2
    return table[:, distances.clamp(-reach, reach) + reach]


def _softmax_weighted(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor,
    scale: float,
    cap: float | None,
    added: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One piece: q (B, T', H, D), k and v (B, H_kv, S', D), hidden (T', S'), added (H, T', S') -> (B, T', H, D)."""
    batch, queries, heads, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    # (B, T', H_kv, G, D) -> (B, H_kv, G T', D): the heads of a group share one product with their K
    grouped = q.view(batch, queries, kv_heads, group, dim).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)
    scores = (grouped @ k.transpose(-1, -2)).mul_(scale)
    if cap is not None:
        scores.div_(cap).tanh_().mul_(cap)
    by_query = scores.view(batch, kv_heads, group, queries, -1)
    if added is not None:
        by_query.add_(added.view(kv_heads, group, queries, -1))
    by_query.masked_fill_(hidden, -torch.inf)
    peak = scores.amax(-1, keepdim=True)
    peak.masked_fill_(peak == -torch.inf, 0.0)  # a query that sees nothing: exp(-inf - 0) = 0 everywhere
    weights = scores.sub_(peak).exp_()
    # The largest score contributes exp(0) = 1, so the sum is at least 1 unless nothing is seen: then 0 / 1 = 0.
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        # A sink far above all scores makes the sum infinite and the result zero, which is what it is then.
        of_rows = sinks.float().view(kv_heads, group, 1, 1).expand(-1, -1, queries, 1).reshape(1, kv_heads, -1, 1)
        total += (of_rows - peak).exp()
    total.clamp_(min=1.0)
    out = (weights @ v).div_(total)
    return out.view(batch, kv_heads, group, queries, dim).permute(0, 3, 1, 2, 4).reshape(batch, queries, heads, dim)


def cached_keys(
    k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, bits: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The rotated keys that queries see in a quantized KV cache of the CPU.

    A bias is the same in every key, so only what is left without it needs codes: a bias that is much larger than that
    would take all levels. What it adds after rotation is known exactly at every position.

    Args:
        k: (B, T, H_kv, D), not rotated, bias included.
        cos, sin: as for `rope`.
        bits: see quantize_kv.
        bias: (H_kv, D) or None.

    Returns:
        (B, T, H_kv, D) float32.
    """
    rest = rope(k if bias is None else k - bias.float(), cos, sin)
    kept = dequantize_kv(*(quantize_kv_4(rest) if bits == 4 else quantize_kv(rest, bits)))
    return kept if bias is None else kept + rope(bias.float().expand(k.shape), cos, sin)
