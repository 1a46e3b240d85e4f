"""Attention of many new tokens: to each other, or to a paged cache that holds them and what came before.

Shapes: N query tokens of B sequences packed one after another, q (N, H, D), with bounds int32 (B + 1,): sequence b
has tokens bounds[b] .. bounds[b + 1] (cu_seqlens). Keys and values are either

    packed   k and v (N', H_kv, D) with bounds of their own (the same where nothing came before); causal by place, or
             not causal at all (encoders)
    paged    pages as kv_layout has them, with a block table and the lengths of the rows, the new tokens included:
             the new tokens are the last of their row (chunked prefill)

Program (row tile, key/value head and part, sequence): a tile of query tokens times the G heads that share a key/value
head, over all the tokens they see (flash attention, Dao 2023), the tiles with the most tokens first. Tiles beyond a
sequence's end return at once, since the grid is made for max_queries, which the host knows; nothing waits for the GPU.

Bound: the tensor cores, 4 D multiply-adds of a query, token and head (2 D of each of the two products); with k-bit
pages also the decoding of each tile of keys and values, once per row tile. Heads of more than 256 features are cut into
parts (kv_layout): a program has the values of one, and finds all scores, two parts cost half as many operations more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kbit.kernels.triton.attention.configs import PrefillConfig, prefill_config
from kbit.kernels.triton.attention.core import LOG2_E, attend_tile, query_factor, sink_share, sums_factor
from kbit.kernels.triton.attention.decode import check_queries
from kbit.kernels.triton.attention.kv_codes import (
    chunk_count,
    chunk_size,
    chunk_start,
    hadamard_columns,
    page_bytes,
    part_size,
    scale_group,
)
from kbit.kernels.triton.attention.kv_layout import KVFormat, check_pages, part_of
from kbit.kernels.triton.attention.queries import load_queries, prepared_queries
from kbit.kernels.triton.target import current_arch


@triton.jit
def turned_slab(sums, D: tl.constexpr, SLAB: tl.constexpr):
    """A slab of the group-wise Hadamard transform of the sums, not normalised: float32 (M, 16)."""
    signs = hadamard_columns(16, 0, 16)
    if scale_group(D) == 16:
        x = sums[SLAB]
    elif SLAB % 2 == 0:
        x = sums[SLAB] + sums[SLAB + 1]
    else:
        x = sums[SLAB - 1] - sums[SLAB]
    return tl.dot(x, signs, input_precision="ieee")


@triton.jit(do_not_specialize=["stride_table"])  # it follows the cache's capacity
def attention_prefill_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, bounds_ptr, lengths_ptr, slope_ptr, sink_ptr, out_ptr,
    scale, cap, window, stride_q, stride_k, stride_v, stride_table,
    H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_DTYPE: tl.constexpr, V_DTYPE: tl.constexpr,
    PAGED: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, CHUNKED: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr, HAS_SINKS: tl.constexpr, SCALE_TILES: tl.constexpr, P_LOG2: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One row tile; see the module. Packed: lengths_ptr holds the bounds of the keys."""
    G: tl.constexpr = H // H_KV
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    PART: tl.constexpr = part_size(D)
    PARTS: tl.constexpr = D // PART
    kv_head, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    sequence = tl.program_id(2)
    start = tl.load(bounds_ptr + sequence).to(tl.int64)
    queries = (tl.load(bounds_ptr + sequence + 1) - start).to(tl.int32)
    if tile * M < queries * G:
        row = tile * M + tl.arange(0, M)
        exists = row < queries * G
        query = tl.minimum(row // G, queries - 1)
        head = kv_head * G + row % G
        if PAGED:
            end = tl.load(lengths_ptr + sequence).to(tl.int32)
            k_base, v_base = k_ptr + kv_head * page_bytes(D, K_BITS), v_ptr + kv_head * page_bytes(D, V_BITS)
        else:
            key = tl.load(lengths_ptr + sequence).to(tl.int64)
            end = (tl.load(lengths_ptr + sequence + 1) - key).to(tl.int32)
            k_base, v_base = k_ptr + key * stride_k + kv_head * D, v_ptr + key * stride_v + kv_head * D
        position = end - queries + query
        lowest, highest = tl.min(position, 0), tl.max(position, 0)
        if CAUSAL:
            last, clear = tl.maximum(tl.minimum(highest + 1, end), 0), tl.minimum(lowest + 1, end)
        else:
            last, clear = end, end
        first = last * 0
        if HAS_WINDOW:
            low = tl.maximum(lowest, 0) // window * window if CHUNKED else tl.maximum(lowest - window + 1, 0)
            first = tl.minimum(low // BN * BN, last)
        slope = scale  # a placeholder of no effect without slopes
        if HAS_SLOPES:
            slope = tl.load(slope_ptr + head, mask=exists, other=0.0) * LOG2_E
        factor = scale * query_factor(K_BITS)
        if not HAS_CAP:
            factor = factor * LOG2_E
        rows = q_ptr + (start + query) * stride_q + head * D
        q = load_queries(rows, exists, factor, D, K_BITS, K_DTYPE) if PARTS == 1 else (rows, exists)
        sums, largest, total = attend_tile(
            q, part, position, slope, table_ptr + sequence.to(tl.int64) * stride_table, k_base, v_base, stride_k,
            stride_v, first, last, clear, end, 1.0 / cap, cap * LOG2_E, window, D, M, BN, K_BITS, V_BITS, K_DTYPE,
            V_DTYPE, PAGED, CAUSAL, HAS_WINDOW, CHUNKED, HAS_CAP, HAS_SLOPES, SCALE_TILES, P_LOG2, False, STAGES,
        )  # fmt: skip
        if HAS_SINKS:
            total += sink_share(tl.load(sink_ptr + head, mask=exists, other=float("-inf")), largest, P_LOG2)
        final = sums_factor(V_BITS) / tl.where(total > 0.0, total, 1.0)
        to = out_ptr + ((start + query) * H + head)[:, None] * D + part * PART
        if V_BITS == 16:
            for chunk in tl.static_range(chunk_count(PART, 2)):
                at = chunk_start(PART, 2, chunk) + tl.arange(0, chunk_size(PART, 2, chunk_start(PART, 2, chunk)))
                x = sums[chunk] * final[:, None]
                tl.store(to + at[None, :], x.to(out_ptr.dtype.element_ty), mask=exists[:, None])
        else:
            norm = final * scale_group(D) ** -0.5
            for slab in tl.static_range(PART // 16):
                x = turned_slab(sums, PART, slab) * norm[:, None]
                at = slab * 16 + tl.arange(0, 16)
                tl.store(to + at[None, :], x.to(out_ptr.dtype.element_ty), mask=exists[:, None])


def attention_prefill(
    q: torch.Tensor,
    bounds: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    max_queries: int,
    key_bounds: torch.Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    chunked: bool = False,
    out_dtype: torch.dtype | None = None,
    config: PrefillConfig | None = None,
) -> torch.Tensor:
    """Attention of packed sequences to packed keys and values.

    Args:
        q: (N, H, D) fp16, bf16 or fp32, rotated; a token's heads contiguous.
        bounds: int32 or int64 (B + 1,): sequence b has the queries bounds[b] .. bounds[b + 1]; bounds[B] <= N.
        k: (N', H_kv, D) fp16 or bf16, rotated.
        v: (N', H_kv, D), k's type.
        scale: multiplies the dot products.
        max_queries: no sequence has more; what the grid is made for.
        key_bounds: int32 or int64 (B + 1,), of the keys; a sequence's queries are its last tokens. None: `bounds`.
        causal: a query sees tokens up to itself, else all of its sequence.
        window: tokens a query sees at most, itself included (causal only).
        soft_cap: c in c tanh(score / c), or None.
        slopes: float32 (H,), ALiBi: slope * (token - position) is added to a score (causal only).
        sinks: float32 (H,), a score of each head that counts in the softmax's sum and has no value.
        chunked: the window does not slide: a query sees tokens of its own stretch of `window`.
        out_dtype: q's unless given.
        config: tile sizes; chosen if None.

    Returns:
        (N, H, D); rows that belong to no sequence are left unset.

    Raises:
        ValueError: shapes, types or strides that do not fit.
        UnsupportedError: a head size.
    """
    if k.dtype not in (torch.float16, torch.bfloat16) or v.dtype != k.dtype or k.shape != v.shape:
        raise ValueError(f"k and v: fp16 or bf16 of one shape wanted, not {k.dtype} {k.shape} and {v.dtype} {v.shape}")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"keys of {k.shape[2]} features for queries of {q.shape[2]}")
    for name, x in (("k", k), ("v", v)):
        if x.stride(2) != 1 or (x.shape[1] > 1 and x.stride(1) != x.shape[2]):
            raise ValueError(f"{name}: the heads of a token must be contiguous, not strides {x.stride()}")
    if not causal and (window is not None or slopes is not None):
        raise ValueError("a window or slopes without a causal mask")
    kind = "fp16" if k.dtype == torch.float16 else "bf16"
    format = KVFormat(kind, q.shape[2])
    check_queries(q, k.shape[1], v, None, slopes, sinks, window, soft_cap, chunked)
    lengths = bounds if key_bounds is None else key_bounds
    if lengths.shape != bounds.shape:
        raise ValueError(f"bounds {tuple(bounds.shape)} and key_bounds {tuple(lengths.shape)}")
    return _launch(
        q, bounds, k, v, None, lengths, (format, format), k.shape[1], scale, max_queries, causal, window, soft_cap,
        slopes, sinks, chunked, out_dtype, config,
    )  # fmt: skip


def attention_prefill_paged(
    q: torch.Tensor,
    bounds: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    *,
    k_kind: str,
    v_kind: str,
    max_queries: int,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    chunked: bool = False,
    out_dtype: torch.dtype | None = None,
    config: PrefillConfig | None = None,
) -> torch.Tensor:
    """Attention of packed new tokens to a paged cache that already holds them (`reference.attend`).

    Args:
        q, bounds, scale, max_queries, window, soft_cap, slopes, sinks, chunked, out_dtype, config: as for
            attention_prefill.
        k_pages: uint8 (P, H_kv, page_bytes).
        v_pages: uint8 (P, H_kv, page_bytes).
        block_table: int32 (B, pages of a row).
        lengths: int32 or int64 (B,), tokens in each row, the new ones included: these are a row's last.
        causal: a query sees tokens up to itself; else all of its row, which need not hold the queries' own then.
        k_kind: one of kv_layout.KINDS.
        v_kind: likewise.

    Returns:
        (N, H, D); rows that belong to no sequence are left unset.

    Raises:
        ValueError: shapes, types or strides that do not fit.
        UnsupportedError: a kind or a head size.
    """
    if not causal and (window is not None or slopes is not None):
        raise ValueError("a window or slopes without a causal mask")
    k_format, v_format = KVFormat(k_kind, q.shape[2]), KVFormat(v_kind, q.shape[2])
    check_pages(k_pages, k_format, "k_pages")
    check_pages(v_pages, v_format, "v_pages")
    check_queries(q, k_pages.shape[1], v_pages, block_table, slopes, sinks, window, soft_cap, chunked)
    if lengths.shape != (bounds.shape[0] - 1,):
        raise ValueError(f"bounds {tuple(bounds.shape)} and lengths {tuple(lengths.shape)}")
    return _launch(
        q, bounds, k_pages, v_pages, block_table, lengths, (k_format, v_format), k_pages.shape[1], scale, max_queries,
        causal, window, soft_cap, slopes, sinks, chunked, out_dtype, config,
    )  # fmt: skip


def _launch(
    q: torch.Tensor,
    bounds: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor | None,
    lengths: torch.Tensor,
    formats: tuple[KVFormat, KVFormat],
    kv_heads: int,
    scale: float,
    max_queries: int,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    chunked: bool,
    out_dtype: torch.dtype | None,
    config: PrefillConfig | None,
) -> torch.Tensor:
    tokens, heads, dim = q.shape
    batch = bounds.shape[0] - 1
    if not (bounds.is_contiguous() and lengths.is_contiguous()):
        raise ValueError("bounds and lengths must be contiguous")
    k_format, v_format = formats
    out = torch.empty((tokens, heads, dim), dtype=out_dtype or q.dtype, device=q.device)
    if batch == 0 or max_queries < 1:
        return out
    config = config or prefill_config(current_arch(), dim, k_format.bits, v_format.bits)
    parts = dim // part_of(dim)
    if parts > 1:
        factor = scale * query_factor(k_format.bits) * (1.0 if soft_cap else LOG2_E.value)
        q = prepared_queries(q, factor, k_format.bits, k_format.dtype or torch.float16)
    grid = (triton.cdiv(max_queries * (heads // kv_heads), config.rows), kv_heads * parts, batch)
    attention_prefill_kernel[grid](
        q,
        k,
        v,
        lengths if block_table is None else block_table,
        bounds,
        lengths,
        lengths if slopes is None else slopes,
        lengths if sinks is None else sinks,
        out,
        scale,
        soft_cap or 1.0,
        window or 0,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        0 if block_table is None else block_table.stride(0),
        H=heads,
        H_KV=kv_heads,
        D=dim,
        M=config.rows,
        BN=config.block,
        K_BITS=k_format.bits,
        V_BITS=v_format.bits,
        K_DTYPE=tl.bfloat16 if k_format.kind == "bf16" else tl.float16,
        V_DTYPE=tl.bfloat16 if v_format.kind == "bf16" else tl.float16,
        PAGED=block_table is not None,
        CAUSAL=causal,
        HAS_WINDOW=window is not None,
        CHUNKED=chunked,
        HAS_CAP=soft_cap is not None,
        HAS_SLOPES=slopes is not None,
        HAS_SINKS=sinks is not None,
        SCALE_TILES=config.scale_tiles,
        P_LOG2=0 if config.scale_tiles else config.p_log2,
        STAGES=config.stages,
        num_warps=config.warps,
        **config.options,
    )
    return out
