"""Attention of a few new tokens per sequence to a long paged cache: split over the cached tokens, then combined.

Shapes: q (B, T, H, D), T = 1 .. 8 (more are correct, but prefill is the faster kernel); pages as kv_layout has them, K
and V of any kinds; block table int32 (B, pages of a row); positions (B, T) and lengths (B,) on the device, read by the
kernel: nothing waits for the GPU, and a launch depends on no length, so it can be captured in a CUDA graph.

Program (split and part, head and row tile, sequence): a tile of the T x G queries that share a key/value head, over one
of `splits` equal shares of the tokens that these queries see. Every program writes its unnormalised sums, maximum and
total; a second kernel combines them, one program per query and head, and undoes the Hadamard transform of the values.
Heads of more than 256 features are cut into parts (kv_layout): a program has the values of one, and reads all keys,
as do the others of its split, one right after another.

Bound: memory. A cached token costs D (K bits + V bits) / 8 + scales bytes per key/value head, 144 bytes at 4 bits and
D = 128; the roofline is that over the memory's bandwidth. One warp per program keeps the softmax and the probabilities
within a warp's registers: no barriers and no shared memory between scores and values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kbit.kernels.triton.attention.configs import DecodeConfig, decode_config
from kbit.kernels.triton.attention.core import (
    LOG2_E,
    NOTHING,
    attend_tile,
    query_factor,
    sink_share,
    sums_factor,
)
from kbit.kernels.triton.attention.kv_codes import (
    chunk_count,
    chunk_size,
    chunk_start,
    hadamard_columns,
    page_bytes,
    part_size,
    scale_group,
)
from kbit.kernels.triton.attention.kv_layout import PAGE, KVFormat, check_pages, part_of
from kbit.kernels.triton.attention.queries import load_queries, prepared_queries
from kbit.kernels.triton.target import current_arch

MAX_ROWS = 64  # of a tile


# `splits` and the table's width follow the lengths: their being 1 or a multiple of 16 is worth no kernel of its own.
@triton.jit(do_not_specialize=["splits", "stride_table"])
def attention_decode_kernel(
    q_ptr, k_pages, v_pages, table_ptr, position_ptr, length_ptr, slope_ptr, sums_ptr, stats_ptr,
    scale, cap, window, splits, stride_q_row, stride_q_token, stride_table, stride_k_page, stride_v_page,
    T: tl.constexpr, H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_DTYPE: tl.constexpr, V_DTYPE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, CHUNKED: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr,
    P_LOG2: tl.constexpr, SCALE_TILES: tl.constexpr, ONE_LOOP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One split of one tile; see the module."""
    G: tl.constexpr = H // H_KV
    ROWS: tl.constexpr = T * G
    TILES: tl.constexpr = (ROWS + M - 1) // M
    PART: tl.constexpr = part_size(D)
    PARTS: tl.constexpr = D // PART
    split, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    kv_head = tl.program_id(1) // TILES
    sequence = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) % TILES * M + tl.arange(0, M)
    exists = row < ROWS
    query = tl.minimum(row // G, T - 1)
    head = kv_head * G + row % G
    end = tl.load(length_ptr + sequence).to(tl.int32)
    position = tl.load(position_ptr + sequence * T + query).to(tl.int32)
    lowest, highest = tl.min(position, 0), tl.max(position, 0)
    last = tl.maximum(tl.minimum(highest + 1, end), 0)
    first = 0
    if HAS_WINDOW:
        low = tl.maximum(lowest, 0) // window * window if CHUNKED else tl.maximum(lowest - window + 1, 0)
        first = tl.minimum(low // BN * BN, last)
    share = tl.cdiv(tl.cdiv(last - first, BN), splits) * BN
    first = tl.minimum(first + split * share, last)
    last = tl.minimum(first + share, last)
    slope = scale  # a placeholder of no effect without slopes
    if HAS_SLOPES:
        slope = tl.load(slope_ptr + head, mask=exists, other=0.0) * LOG2_E
    factor = scale * query_factor(K_BITS)
    if not HAS_CAP:
        factor = factor * LOG2_E
    rows = q_ptr + sequence * stride_q_row + query * stride_q_token + head * D
    out = ((sequence * T + query) * H + head) * splits + split
    largest = tl.full((M,), NOTHING, tl.float32)
    total = tl.zeros((M,), tl.float32)
    if first < last:
        q = load_queries(rows, exists, factor, D, K_BITS, K_DTYPE) if PARTS == 1 else (rows, exists)
        sums, largest, total = attend_tile(
            q, part, position, slope, table_ptr + sequence * stride_table,
            k_pages + kv_head * page_bytes(D, K_BITS), v_pages + kv_head * page_bytes(D, V_BITS),
            stride_k_page, stride_v_page, first, last, tl.minimum(lowest + 1, end), end, 1.0 / cap, cap * LOG2_E,
            window, D, M, BN, K_BITS, V_BITS, K_DTYPE, V_DTYPE, True, True, HAS_WINDOW, CHUNKED, HAS_CAP, HAS_SLOPES,
            SCALE_TILES, P_LOG2, ONE_LOOP, STAGES,
        )  # fmt: skip
        to = (sums_ptr + out * D + part * PART)[:, None]
        if V_BITS == 16:
            for chunk in tl.static_range(chunk_count(PART, 2)):
                at = chunk_start(PART, 2, chunk) + tl.arange(0, chunk_size(PART, 2, chunk_start(PART, 2, chunk)))
                tl.store(to + at[None, :], sums[chunk], mask=exists[:, None])
        else:
            for slab in tl.static_range(PART // 16):
                at = slab * 16 + tl.arange(0, 16)
                tl.store(to + at[None, :], sums[slab], mask=exists[:, None])
    once = exists & (part == 0)  # the parts' are the same
    tl.store(stats_ptr + out * 2, largest, mask=once)
    tl.store(stats_ptr + out * 2 + 1, total, mask=once)


@triton.jit(do_not_specialize=["splits"])
def attention_combine_kernel(
    sums_ptr, stats_ptr, sink_ptr, out_ptr, splits, factor,
    H: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, V_BITS: tl.constexpr,
    HAS_SINKS: tl.constexpr, P_LOG2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One query and head: the splits' sums, weighted by their maxima. GROUPS is a power of two, GROUPS * GROUP >= D."""
    out = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, GROUPS * GROUP)
    largest = NOTHING
    for start in range(0, splits, BLOCK):
        split = start + tl.arange(0, BLOCK)
        some = tl.load(stats_ptr + (out * splits + split) * 2, mask=split < splits, other=NOTHING)
        largest = tl.maximum(largest, tl.max(some, 0))
    sums = tl.zeros((GROUPS * GROUP,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, splits, BLOCK):
        split = start + tl.arange(0, BLOCK)
        there = split < splits
        some = tl.load(stats_ptr + (out * splits + split) * 2, mask=there, other=NOTHING)
        part = tl.load(stats_ptr + (out * splits + split) * 2 + 1, mask=there, other=0.0)
        weight = tl.exp2(some - largest)
        total += part * weight
        # a split that saw nothing wrote no sums
        mask = (part > 0.0)[:, None] & (at < D)[None, :]
        x = tl.load(sums_ptr + (out * splits + split)[:, None] * D + at[None, :], mask=mask, other=0.0)
        sums += tl.sum(x * weight[:, None], 0)
    seen = tl.sum(total, 0)
    if HAS_SINKS:
        seen += sink_share(tl.load(sink_ptr + out % H), largest, P_LOG2)
    sums = sums * (factor / tl.where(seen > 0.0, seen, 1.0))
    if V_BITS != 16:
        groups = tl.reshape(sums, (GROUPS, GROUP))
        signs = hadamard_columns(GROUP, 0, GROUP) * (GROUP**-0.5)
        sums = tl.reshape(tl.sum(groups[:, :, None] * signs[None, :, :], 1), (GROUPS * GROUP,))
    tl.store(out_ptr + out * D + at, sums.to(out_ptr.dtype.element_ty), mask=at < D)


def splits_for(config: DecodeConfig, batch: int, tiles: int, tokens: int) -> int:
    """How many shares to cut the cached tokens into: enough programs, none with less than four steps.

    Args:
        batch: B.
        tiles: key/value heads times row tiles.
        tokens: that a row may have.
    """
    wanted = max(1, config.programs // (batch * tiles))
    return max(1, min(wanted, -(-tokens // (4 * config.block))))


def attention_decode(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    *,
    k_kind: str,
    v_kind: str,
    window: int | None = None,
    soft_cap: float | None = None,
    slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    chunked: bool = False,
    max_length: int | None = None,
    splits: int | None = None,
    out_dtype: torch.dtype | None = None,
    config: DecodeConfig | None = None,
) -> torch.Tensor:
    """softmax(cap(scale Q K^T) + slopes + mask) V over a paged cache (`reference.attend`).

    Args:
        q: (B, T, H, D) fp16, bf16 or fp32, rotated; a token's heads contiguous.
        k_pages: uint8 (P, H_kv, page_bytes).
        v_pages: uint8 (P, H_kv, page_bytes).
        block_table: int32 (B, pages of a row), contiguous rows.
        positions: int32 or int64 (B, T), contiguous; a query that sees nothing (negative: padding) yields zeros.
        lengths: int32 or int64 (B,), tokens in each row, those of the queries included.
        scale: multiplies the dot products.
        k_kind: one of kv_layout.KINDS.
        v_kind: likewise.
        window: tokens a query sees at most, itself included.
        soft_cap: c in c tanh(score / c), or None.
        slopes: float32 (H,), ALiBi: slope * (token - position) is added to a score.
        sinks: float32 (H,), a score of each head that counts in the softmax's sum and has no value.
        chunked: the window does not slide: a query sees tokens of its own stretch of `window`.
        max_length: a bound on lengths that the host knows, to choose the splits by; the block table's room otherwise.
        splits: shares of the tokens; chosen if None.
        out_dtype: q's unless given.
        config: tile sizes; chosen if None.

    Returns:
        (B, T, H, D).

    Raises:
        ValueError: shapes, types or strides that do not fit.
        UnsupportedError: a kind or a head size.
    """
    batch, tokens, heads, dim = q.shape
    k_format, v_format = KVFormat(k_kind, dim), KVFormat(v_kind, dim)
    check_pages(k_pages, k_format, "k_pages")
    check_pages(v_pages, v_format, "v_pages")
    kv_heads = k_pages.shape[1]
    check_queries(q, kv_heads, v_pages, block_table, slopes, sinks, window, soft_cap, chunked)
    if positions.shape != (batch, tokens) or lengths.shape != (batch,):
        raise ValueError(f"positions {tuple(positions.shape)}, lengths {tuple(lengths.shape)} for q {tuple(q.shape)}")
    if not (positions.is_contiguous() and lengths.is_contiguous()):
        raise ValueError("positions and lengths must be contiguous")
    out = torch.empty((batch, tokens, heads, dim), dtype=out_dtype or q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    rows = tokens * (heads // kv_heads)
    tile = min(MAX_ROWS, max(16, triton.next_power_of_2(rows)))
    config = config or decode_config(current_arch(), dim, k_format.bits, v_format.bits, tile)
    tiles = kv_heads * triton.cdiv(rows, tile)
    parts = dim // part_of(dim)
    if parts > 1:
        factor = scale * query_factor(k_format.bits) * (1.0 if soft_cap else LOG2_E.value)
        ready = prepared_queries(q.reshape(-1, heads, dim), factor, k_format.bits, k_format.dtype or torch.float16)
        q = ready.view(batch, tokens, heads, dim)
    room = block_table.shape[1] * PAGE
    if splits is None:
        splits = splits_for(config, batch, tiles * parts, min(room, max_length or room, window or room))
    sums = torch.empty((batch, tokens, heads, splits, dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((batch, tokens, heads, splits, 2), dtype=torch.float32, device=q.device)
    attention_decode_kernel[(splits * parts, tiles, batch)](
        q,
        k_pages,
        v_pages,
        block_table,
        positions,
        lengths,
        lengths if slopes is None else slopes,
        sums,
        stats,
        scale,
        soft_cap or 1.0,
        window or 0,
        splits,
        q.stride(0),
        q.stride(1),
        block_table.stride(0),
        k_pages.stride(0),
        v_pages.stride(0),
        T=tokens,
        H=heads,
        H_KV=kv_heads,
        D=dim,
        M=tile,
        BN=config.block,
        K_BITS=k_format.bits,
        V_BITS=v_format.bits,
        K_DTYPE=tl.bfloat16 if k_kind == "bf16" else tl.float16,
        V_DTYPE=tl.bfloat16 if v_kind == "bf16" else tl.float16,
        HAS_WINDOW=window is not None,
        CHUNKED=chunked,
        HAS_CAP=soft_cap is not None,
        HAS_SLOPES=slopes is not None,
        P_LOG2=config.p_log2,
        SCALE_TILES=config.scale_tiles,
        ONE_LOOP=config.one_loop,
        STAGES=config.stages,
        num_warps=config.warps,
        **config.options,
    )
    group = scale_group(dim)
    attention_combine_kernel[(batch * tokens * heads,)](
        sums,
        stats,
        lengths if sinks is None else sinks,
        out,
        splits,
        sums_factor(v_format.bits),
        H=heads,
        D=dim,
        GROUPS=triton.next_power_of_2(dim // group),
        GROUP=group,
        V_BITS=v_format.bits,
        HAS_SINKS=sinks is not None,
        P_LOG2=config.p_log2,
        BLOCK=16,
        num_warps=2 if parts == 1 else 4,
    )
    return out


def check_queries(
    q: torch.Tensor,
    kv_heads: int,
    v: torch.Tensor,
    block_table: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    window: int | None,
    soft_cap: float | None,
    chunked: bool,
) -> None:
    """What both attention kernels ask of their arguments.

    Raises:
        ValueError: something does not fit.
    """
    heads, dim = q.shape[-2:]
    if heads % kv_heads or v.shape[1] != kv_heads:
        raise ValueError(f"{heads} query heads on {kv_heads} key heads and {v.shape[1]} value heads")
    if q.stride(-1) != 1 or (heads > 1 and q.stride(-2) != dim):
        raise ValueError(f"q: the heads of a token must be contiguous, not strides {q.stride()}")
    if block_table is not None and (
        block_table.dtype != torch.int32 or block_table.ndim != 2 or block_table.stride(1) != 1
    ):
        raise ValueError("block_table: int32 (B, pages of a row) with contiguous rows wanted")
    for name, of_heads in (("slopes", slopes), ("sinks", sinks)):
        if of_heads is not None and (of_heads.shape != (heads,) or of_heads.dtype != torch.float32):
            raise ValueError(f"{name}: float32 ({heads},) wanted, not {of_heads.dtype} {tuple(of_heads.shape)}")
    if (window is not None and window < 1) or (window is None and chunked):
        raise ValueError(f"a window of {window} tokens")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"a soft cap of {soft_cap}")
