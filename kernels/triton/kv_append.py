"""Rotate queries and keys to their positions and put keys and values, quantized, into the pages of the cache.

Shapes: N new tokens of any sequences; q (N, H, D), k and v (N, H_kv, D) in fp16, bf16 or fp32; pages as kv_layout has
them; cosines and sines (rows, R/2) in fp32.

One program handles one token and a few heads of one of q, k, v, so that a decode step of one sequence still gives a GPU
(H + 2 H_kv) / HEADS programs. Bound: launch latency at decode; at prefill the bytes read and written, since
quantizing costs about 16 multiply-adds per value.

The result is what `reference.rope` followed by `reference.quantize_kv` gives, bit for bit: the Hadamard sums add their
16 terms in the same order, divisions are correctly rounded, and contraction into fused multiply-adds is off, since it
would round the rotation once less than the reference does. (A code on the edge between two levels would differ.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kbit.kernels.triton.kv_codes import (
    PAGE,
    chunk_count,
    chunk_size,
    chunk_start,
    low_width,
    page_bytes,
    scale_group,
)
from kbit.kernels.triton.kv_layout import KVFormat, check_pages

HEADS = 2  # heads of a program, of one warp; with 4, keys of 8 bits beside float values spill on sm_90 and gfx1100


@triton.jit
def rotated(row, head, feature, cos, sin, HALF: tl.constexpr):
    """reference.rope of some features of some heads, float32.

    Args:
        row: pointer to a token's heads.
        head: offsets of the heads' first features, any shape.
        feature: features, broadcastable against head.
        cos: pointer to the token's cosines; as is sin. Not read where HALF is 0.
        HALF: R / 2.
    """
    keep = head >= 0
    x = tl.load(row + head + feature, mask=keep, other=0.0).to(tl.float32)
    if HALF > 0:
        first = feature < HALF
        turns = feature < 2 * HALF
        other = tl.where(first, feature + HALF, feature - HALF)
        angle = tl.where(first, feature, feature - HALF)
        pair = tl.load(row + head + other, mask=keep & turns, other=0.0).to(tl.float32)
        c = tl.load(cos + angle, mask=turns, other=1.0)
        s = tl.load(sin + angle, mask=turns, other=0.0)
        x = tl.where(first, x * c - pair * s, x * c + pair * s)
    return x


@triton.jit
def store_plane(
    page, heads, keep, place, codes, D: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr
):
    """Pack codes int32 (HEADS, slabs, 16), each below 2^WIDTH, into one chunk of a plane."""
    SLABS: tl.constexpr = chunk_size(D, WIDTH, START) // 16
    LANE_BITS: tl.constexpr = SLABS * WIDTH
    shift = (tl.arange(0, SLABS) * WIDTH)[None, :, None]
    words = tl.sum(codes << shift, 1)  # (HEADS, 16): the fields do not overlap, so the sum is an OR
    byte = page + place * (D * WIDTH // 8) + START * WIDTH // 8
    at = heads[:, None] * page_bytes(D, BITS)
    if LANE_BITS == 32:
        to = (byte + at).to(tl.pointer_type(tl.int32), bitcast=True) + tl.arange(0, 16)[None, :]
        tl.store(to, words, mask=keep[:, None])
    elif LANE_BITS == 16:
        to = (byte + at).to(tl.pointer_type(tl.int16), bitcast=True) + tl.arange(0, 16)[None, :]
        tl.store(to, words.to(tl.int16), mask=keep[:, None])
    elif LANE_BITS == 8:
        tl.store(byte + at + tl.arange(0, 16)[None, :], words.to(tl.uint8), mask=keep[:, None])
    else:
        SHARE: tl.constexpr = 8 // LANE_BITS
        lanes = tl.reshape(words, (words.shape[0], 16 // SHARE, SHARE))
        packed = tl.sum(lanes << (tl.arange(0, SHARE) * LANE_BITS)[None, None, :], 2)
        tl.store(byte + at + tl.arange(0, 16 // SHARE)[None, :], packed.to(tl.uint8), mask=keep[:, None])


@triton.jit
def store_quantized(
    row,
    cos,
    sin,
    page,
    place,
    heads,
    keep,
    D: tl.constexpr,
    BITS: tl.constexpr,
    START: tl.constexpr,
    HALF: tl.constexpr,
):
    """One chunk of features of a token's heads: rotate, transform, quantize (reference.quantize_kv), store.

    Args:
        row: pointer to the token's heads (H_kv, D).
        page: pointer to the token's page.
        place: its place within the page.
        heads: (HEADS,) heads; keep: which of them exist.
        START: first feature of the chunk of the low plane.
        HALF: pairs of features that turn; 0 for values.
    """
    WIDTH: tl.constexpr = low_width(BITS)
    GROUP: tl.constexpr = scale_group(D)
    C: tl.constexpr = chunk_size(D, WIDTH, START)
    SLABS: tl.constexpr = C // 16
    R: tl.constexpr = heads.shape[0]
    lane = tl.arange(0, 16)
    head = tl.where(keep, heads * D, -1)[:, None]
    x = tl.zeros((R, SLABS, 16), tl.float32)
    for i in tl.static_range(16):
        feature = (START + tl.arange(0, SLABS) * 16 + i)[None, :]
        parity = lane & i
        parity = parity ^ (parity >> 2)
        parity = parity ^ (parity >> 1)
        sign = 1.0 - 2.0 * (parity & 1).to(tl.float32)
        x += rotated(row, head, feature, cos, sin, HALF)[:, :, None] * sign[None, None, :]
    if GROUP == 32:
        pairs = tl.permute(tl.reshape(x, (R, SLABS // 2, 2, 16)), (0, 1, 3, 2))
        a, b = tl.split(pairs)
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (R, SLABS, 16))
    x = tl.reshape(x * (GROUP**-0.5), (R, C // GROUP, GROUP))
    largest = tl.max(tl.abs(x), 2)
    STEPS: tl.constexpr = 127.0 if BITS == 8 else 2.0**BITS
    scale = tl.minimum(tl.div_rn(largest, tl.full(largest.shape, STEPS, tl.float32)), 65504.0).to(tl.float16)
    divisor = tl.where(scale == 0.0, 1.0, scale.to(tl.float32))
    units = tl.div_rn(x, tl.broadcast_to(divisor[:, :, None], x.shape))
    # adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even
    if BITS == 8:
        rounded = (tl.minimum(tl.maximum(units, -127.0), 127.0) + 12582912.0) - 12582912.0
        codes = (rounded + 128.0).to(tl.int32)
    else:
        TOP: tl.constexpr = (1 << BITS) - 1
        clamped = tl.minimum(tl.maximum(units * 0.5 + 0.5 * TOP, 0.0), TOP * 1.0)
        codes = ((clamped + 12582912.0) - 12582912.0).to(tl.int32)
    codes = tl.reshape(codes, (R, SLABS, 16))
    store_plane(page, heads, keep, place, codes & ((1 << WIDTH) - 1), D, BITS, WIDTH, START)
    if BITS == 3:  # the chunks of planes of 2 and of 1 bits are the same
        store_plane(page + PAGE * (D * 2 // 8), heads, keep, place, codes >> 2, D, BITS, 1, START)
    scales = (page + PAGE * (D * BITS // 8)).to(tl.pointer_type(tl.float16), bitcast=True)
    half_page: tl.constexpr = page_bytes(D, BITS) // 2
    group = START // GROUP + tl.arange(0, C // GROUP)
    tl.store(scales + heads[:, None] * half_page + group[None, :] * PAGE + place, scale, mask=keep[:, None])


@triton.jit
def append_heads(
    row, cos, sin, pages, slot, stride_page, heads, keep,
    D: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Keys or values of one token and some heads; `keep`: which of them there are."""
    slot = tl.maximum(slot, 0)
    place = (slot % PAGE).to(tl.int32)
    page = pages + (slot // PAGE).to(tl.int64) * stride_page
    if BITS == 16:
        to = page.to(tl.pointer_type(DTYPE), bitcast=True) + place * D
        head = tl.where(keep, heads * D, -1)[:, None]
        for chunk in tl.static_range(chunk_count(D, 2)):
            feature = chunk_start(D, 2, chunk) + tl.arange(0, chunk_size(D, 2, chunk_start(D, 2, chunk)))[None, :]
            x = rotated(row, head, feature, cos, sin, HALF)
            tl.store(to + heads[:, None] * (PAGE * D) + feature, x.to(DTYPE), mask=keep[:, None])
    else:
        for chunk in tl.static_range(chunk_count(D, low_width(BITS))):
            store_quantized(
                row, cos, sin, page, place, heads, keep, D, BITS, chunk_start(D, low_width(BITS), chunk), HALF
            )


@triton.jit
def kv_append_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, rope_row_ptr, slot_ptr, out_ptr, k_pages, v_pages,
    stride_q, stride_k, stride_v, stride_cos, stride_k_page, stride_v_page,
    H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_DTYPE: tl.constexpr, V_DTYPE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """Program (token, part): the parts are blocks of HEADS key heads, then value heads, then query heads."""
    token = tl.program_id(0).to(tl.int64)  # the first axis alone takes more than 65535
    part = tl.program_id(1)
    angle = token
    if HAS_ROWS:
        angle = tl.load(rope_row_ptr + token).to(tl.int64)
    cos, sin = cos_ptr + angle * stride_cos, sin_ptr + angle * stride_cos
    slot = tl.load(slot_ptr + token)
    present = tl.where(slot >= 0, H_KV, 0)  # a negative slot stores nothing
    KV_PARTS: tl.constexpr = (H_KV + HEADS - 1) // HEADS
    local = tl.arange(0, HEADS)
    if part < KV_PARTS:
        heads = part * HEADS + local
        append_heads(
            k_ptr + token * stride_k, cos, sin, k_pages, slot, stride_k_page, heads, heads < present,
            D, K_BITS, HALF, K_DTYPE,
        )  # fmt: skip
    elif part < 2 * KV_PARTS:
        heads = (part - KV_PARTS) * HEADS + local
        append_heads(
            v_ptr + token * stride_v, cos, sin, v_pages, slot, stride_v_page, heads, heads < present,
            D, V_BITS, 0, V_DTYPE,
        )  # fmt: skip
    else:
        heads = (part - 2 * KV_PARTS) * HEADS + local
        head = tl.where(heads < H, heads * D, -1)[:, None]
        for chunk in tl.static_range(chunk_count(D, 2)):
            feature = chunk_start(D, 2, chunk) + tl.arange(0, chunk_size(D, 2, chunk_start(D, 2, chunk)))[None, :]
            x = rotated(q_ptr + token * stride_q, head, feature, cos, sin, HALF)
            to = out_ptr + token * (H * D) + heads[:, None] * D + feature
            tl.store(to, x.to(out_ptr.dtype.element_ty), mask=(heads < H)[:, None])


def kv_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    slots: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    *,
    k_kind: str,
    v_kind: str,
    rope_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate q and k, write k and v into the pages.

    Args:
        q: (N, H, D) fp16, bf16 or fp32. The heads of a token must be contiguous; tokens may be apart (slices of one
            fused projection).
        k: (N, H_kv, D), likewise.
        v: (N, H_kv, D), likewise.
        cos: float32 (rows, R/2), R <= D, or None for a model without rotary positions.
        sin: as cos.
        slots: int32 or int64 (N,), page * 64 + place in the page (kv_layout.slots_of); negative: nothing is stored.
        k_pages: uint8 (P, H_kv, page_bytes), changed.
        v_pages: uint8 (P, H_kv, page_bytes), changed.
        k_kind: one of kv_layout.KINDS.
        v_kind: likewise.
        rope_rows: int32 or int64 (N,), the row of cos and sin of each token (its position, for a table by position);
            None where token n has row n.

    Returns:
        The rotated q: (N, H, D) in q's type.

    Raises:
        ValueError: shapes, types or strides that do not fit.
        UnsupportedError: a kind or a head size.
    """
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    k_format, v_format = KVFormat(k_kind, dim), KVFormat(v_kind, dim)
    check_pages(k_pages, k_format, "k_pages")
    check_pages(v_pages, v_format, "v_pages")
    if k.shape != (tokens, kv_heads, dim) or v.shape != k.shape:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not belong together")
    if k_pages.shape[1] != kv_heads or v_pages.shape[1] != kv_heads or heads % kv_heads:
        raise ValueError(
            f"{heads} query heads, {kv_heads} key heads, pages of {k_pages.shape[1]} and {v_pages.shape[1]}"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(2) != 1 or (x.shape[1] > 1 and x.stride(1) != dim):
            raise ValueError(f"{name}: the heads of a token must be contiguous, not strides {x.stride()}")
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin: both or none")
    half = 0
    if cos is not None and sin is not None:
        half = cos.shape[1]
        if cos.dtype != torch.float32 or sin.dtype != torch.float32 or cos.shape != sin.shape or 2 * half > dim:
            raise ValueError(f"cos and sin: float32 (rows, at most {dim // 2}) wanted, not {cos.dtype} {cos.shape}")
        if cos.stride() != (half, 1) or sin.stride() != (half, 1):
            raise ValueError("cos and sin must be contiguous")
        if rope_rows is None and cos.shape[0] < tokens:
            raise ValueError(f"{cos.shape[0]} rows of cosines for {tokens} tokens, and no rope_rows")
    for entries in (slots, slots if rope_rows is None else rope_rows):
        if entries.shape != (tokens,) or not entries.is_contiguous():
            raise ValueError(f"slots and rope_rows: one entry for each of {tokens} tokens wanted, contiguous")
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    parts = 2 * triton.cdiv(kv_heads, HEADS) + triton.cdiv(heads, HEADS)
    kv_append_kernel[(tokens, parts)](
        q,
        k,
        v,
        q if cos is None else cos,
        q if sin is None else sin,
        slots if rope_rows is None else rope_rows,
        slots,
        out,
        k_pages,
        v_pages,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        half,
        k_pages.stride(0),
        v_pages.stride(0),
        H=heads,
        H_KV=kv_heads,
        D=dim,
        HALF=half,
        HEADS=HEADS,
        K_BITS=k_format.bits,
        V_BITS=v_format.bits,
        K_DTYPE=tl.bfloat16 if k_kind == "bf16" else tl.float16,
        V_DTYPE=tl.bfloat16 if v_kind == "bf16" else tl.float16,
        HAS_ROWS=rope_rows is not None,
        num_warps=1,
        enable_fp_fusion=False,
    )
    return out
