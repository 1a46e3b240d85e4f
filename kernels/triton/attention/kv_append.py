"""Rotate queries and keys to their positions and put keys and values, quantized, into the pages of the cache.

Shapes: N new tokens of any sequences; q (N, H, D), k and v (N, H_kv, D) in fp16, bf16 or fp32; pages as kv_layout has
them; cosines and sines (rows, R/2) in fp32.

A program takes a few tokens of one key/value head and of the query heads that read it. A thread has one scale group of
one token: its 32 (or 16) features come in 128-bit loads, and transform, scale and codes are found without another
thread. Then the threads of a token put their bits of each word together, since a word has codes of several groups.
There are as many tokens as give every thread of one warp a group: 8 at D = 128. Bound: launch latency at decode; at
prefill the bytes read and written.

The result is what `reference.rope` followed by `reference.quantize_kv` gives, to rounding: a value that lies between
two levels may have the code of either, and a scale be the next number of half precision.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kbit.kernels.triton.attention.kv_codes import (
    PAGE,
    exponent,
    low_width,
    page_bytes,
    part_size,
    power_above,
    power_below,
    scale_group,
)
from kbit.kernels.triton.attention.kv_layout import KVFormat, check_pages, part_of
from kbit.kernels.triton.attention.kv_pack import columns, store_plane
from kbit.kernels.triton.target import current_arch

# With more query heads than this for one key/value head, programs of their own take SEVERAL of them each.
MOST_HEADS = 8
SEVERAL = 4


@triton.jit
def rotated(row, keep, cos, sin, first, DIM: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr):
    """reference.rope of features [first, first + WIDTH) of some tokens' heads, float32 (R, WIDTH).

    Args:
        row: (R,) pointers to heads; keep: which may be read.
        cos: (R,) pointers to the tokens' cosines; as is sin. Not read where HALF is 0.
        first: int32 (R,), multiples of WIDTH.
        HALF: R / 2.
    """
    feature = first[:, None] + tl.arange(0, WIDTH)[None, :]
    there = keep[:, None]
    x = tl.load(row[:, None] + feature, mask=there, other=0.0).to(tl.float32)
    if HALF > 0:
        # Where the halves hold whole runs of WIDTH, a comparison by run keeps the loads wide.
        position = first[:, None] if HALF % WIDTH == 0 else feature
        lower = position < HALF
        if 2 * HALF < DIM:
            there = there & (position < 2 * HALF)
        angle = feature - tl.where(lower, 0, HALF)
        pair = tl.load(row[:, None] + (feature + tl.where(lower, HALF, -HALF)), mask=there, other=0.0).to(tl.float32)
        c = tl.load(cos[:, None] + angle, mask=there, other=1.0)
        s = tl.load(sin[:, None] + angle, mask=there, other=0.0)
        turned = pair * s
        x = x * c + tl.where(lower, -turned, turned)
    return x


@triton.jit
def transformed(x, GROUP: tl.constexpr):
    """reference.hadamard of a group, before the norm, by butterflies: a tuple of GROUP tensors."""
    sums = x
    for bit in tl.static_range(exponent(GROUP)):
        turned = ()
        for i in tl.static_range(GROUP):
            if i & (1 << bit):
                turned = turned + (sums[i - (1 << bit)] - sums[i],)
            else:
                turned = turned + (sums[i] + sums[i + (1 << bit)],)
        sums = turned
    return sums


@triton.jit
def code_of(units, BITS: tl.constexpr):
    """The code of a value over its scale in the low bits of an int32; what lies above them is to be cleared."""
    # adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits
    if BITS == 8:
        whole = tl.minimum(tl.maximum(units, -127.0), 127.0) + (12582912.0 + 128.0)
    else:
        TOP: tl.constexpr = (1 << BITS) - 1
        whole = tl.minimum(tl.maximum(units * 0.5 + 0.5 * TOP, 0.0), TOP * 1.0) + 12582912.0
    return whole.to(tl.int32, bitcast=True)


@triton.jit
def page_of(pages, slot, stride_page):
    """Pointers to the pages of slots, and the places within them; a negative slot counts as 0."""
    slot = tl.maximum(slot, 0)
    return pages + (slot // PAGE).to(tl.int64) * stride_page, (slot % PAGE).to(tl.int32)


@triton.jit
def store_run(
    x_ptr, cos_ptr, sin_ptr, rope_row_ptr, slot_ptr, pages, first, tokens, stride, stride_cos, stride_page,
    START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, T: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """Features [START, START + SIZE) of one head of T tokens: rotate, quantize (reference.quantize_kv), store.

    Args:
        x_ptr: pointer to the head of token 0.
        pages: pointer to the head's part of page 0.
        first: int32, the first token.
        SIZE: a power of two: a run of equal chunks.
        HALF: pairs of features that turn; 0 for values.
    """
    WIDTH: tl.constexpr = low_width(BITS)
    GROUP: tl.constexpr = scale_group(D)
    RUN: tl.constexpr = SIZE // GROUP  # groups of a token here
    CHUNK: tl.constexpr = min(512 // WIDTH, 256, SIZE)
    CHUNKS: tl.constexpr = SIZE // CHUNK
    VECTOR: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    local = tl.arange(0, T * RUN)
    group = local % RUN
    token = first + local // RUN
    keep = token < tokens
    row = x_ptr + token.to(tl.int64) * stride
    angle = token.to(tl.int64)
    if HAS_ROWS and HALF > 0:
        angle = tl.load(rope_row_ptr + token, mask=keep, other=0).to(tl.int64)
    x = ()
    for piece in tl.static_range(GROUP // VECTOR):
        feature = START + group * GROUP + piece * VECTOR
        cos, sin = cos_ptr + angle * stride_cos, sin_ptr + angle * stride_cos
        x = x + columns(rotated(row, keep, cos, sin, feature, D, HALF, VECTOR))
    x = transformed(x, GROUP)
    largest = tl.abs(x[0])
    for i in tl.static_range(1, GROUP):
        largest = tl.maximum(largest, tl.abs(x[i]))
    NORM: tl.constexpr = GROUP**-0.5
    STEPS: tl.constexpr = 127.0 if BITS == 8 else 2.0**BITS
    scale = tl.minimum(largest * (NORM / STEPS), 65504.0).to(tl.float16)
    factor = NORM / tl.where(scale == 0.0, 1.0, scale.to(tl.float32))  # a scale of zero: the codes of zero
    codes = ()
    for i in tl.static_range(GROUP):
        codes = codes + (code_of(x[i] * factor, BITS),)
    slot = tl.load(slot_ptr + token, mask=keep, other=-1)
    page, place = page_of(pages, slot, stride_page)
    scales = (page + PAGE * (D * BITS // 8)).to(tl.pointer_type(tl.float16), bitcast=True)
    tl.store(scales + (START // GROUP + group) * PAGE + place, scale, mask=slot >= 0)
    token = first + tl.arange(0, T * CHUNKS) // CHUNKS
    slot = tl.load(slot_ptr + token, mask=token < tokens, other=-1)
    page, place = page_of(pages, slot, stride_page)
    store_plane(codes, page, place, slot >= 0, group, START, D, GROUP, 0, WIDTH, CHUNK // GROUP, CHUNKS)
    if BITS == 3:  # the chunks of planes of 2 and of 1 bits are the same
        top = page + PAGE * (D * 2 // 8)
        store_plane(codes, top, place, slot >= 0, group, START, D, GROUP, 2, 1, CHUNK // GROUP, CHUNKS)


@triton.jit
def load_angles(table, row, keep, HALF: tl.constexpr):
    """Cosines or sines of some tokens, float32 (T, a power of two of at least HALF)."""
    at = tl.arange(0, power_above(HALF - 1))[None, :]
    return tl.load(table + row[:, None] + at, mask=keep[:, None] & (at < HALF), other=0.0)


@triton.jit
def store_rotated(row, keep, c, s, to, store, D: tl.constexpr, HALF: tl.constexpr):
    """reference.rope of a head of some tokens, in the type of `to`.

    Args:
        row: (T,) pointers to the heads; keep: (T,) which there are.
        c, s: load_angles (HALF > 0).
        to: (T,) pointers to the results; store: (T,) which to write.
    """
    if HALF > 0:
        at = tl.arange(0, power_above(HALF - 1))[None, :]
        there = keep[:, None] & (at < HALF)
        x = tl.load(row[:, None] + at, mask=there, other=0.0).to(tl.float32)
        y = tl.load(row[:, None] + (at + HALF), mask=there, other=0.0).to(tl.float32)
        there = store[:, None] & (at < HALF)
        tl.store(to[:, None] + at, (x * c - y * s).to(to.dtype.element_ty), mask=there)
        tl.store(to[:, None] + (at + HALF), (y * c + x * s).to(to.dtype.element_ty), mask=there)
    REST: tl.constexpr = D - 2 * HALF
    if REST > 0:
        at = tl.arange(0, power_above(REST - 1))[None, :]
        x = tl.load(row[:, None] + (at + 2 * HALF), mask=keep[:, None] & (at < REST), other=0.0).to(tl.float32)
        tl.store(to[:, None] + (at + 2 * HALF), x.to(to.dtype.element_ty), mask=store[:, None] & (at < REST))


@triton.jit
def append_head(
    x_ptr, cos_ptr, sin_ptr, rope_row_ptr, slot_ptr, pages, c, s, first, tokens, stride, stride_cos, stride_page,
    D: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, HALF: tl.constexpr, T: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """Keys or values of one head of T tokens into its pages; arguments as for store_run and store_rotated."""
    if BITS == 16:
        token = first + tl.arange(0, T)
        keep = token < tokens
        slot = tl.load(slot_ptr + token, mask=keep, other=-1)
        page, place = page_of(pages, slot, stride_page)
        to = page.to(tl.pointer_type(DTYPE), bitcast=True) + place * D
        store_rotated(x_ptr + token.to(tl.int64) * stride, keep, c, s, to, slot >= 0, D, HALF)
    else:
        PART: tl.constexpr = part_size(D)
        for part in tl.static_range(D // PART):
            for bit in tl.static_range(8, 3, -1):  # the runs: the powers of two that it is the sum of, largest first
                if PART & (1 << bit):
                    store_run(
                        x_ptr, cos_ptr, sin_ptr, rope_row_ptr, slot_ptr, pages, first, tokens, stride, stride_cos,
                        stride_page, part * PART + (PART >> (bit + 1) << (bit + 1)), 1 << bit, D, BITS, HALF, T,
                        HAS_ROWS,
                    )  # fmt: skip


@triton.jit
def kv_append_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, rope_row_ptr, slot_ptr, out_ptr, k_pages, v_pages, tokens,
    stride_q, stride_k, stride_v, stride_cos, stride_k_page, stride_v_page,
    H: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_DTYPE: tl.constexpr, V_DTYPE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """Program (token tile, part): T tokens of HEADS query heads from HEADS part on, and of key/value head part."""
    first = tl.program_id(0) * T  # the first axis alone takes more than 65535
    part = tl.program_id(1)
    token = first + tl.arange(0, T)
    keep = token < tokens
    c, s = 0.0, 0.0  # placeholders
    if HALF > 0:
        row = token.to(tl.int64)
        if HAS_ROWS:
            row = tl.load(rope_row_ptr + token, mask=keep, other=0).to(tl.int64)
        c = load_angles(cos_ptr, row * stride_cos, keep, HALF)
        s = load_angles(sin_ptr, row * stride_cos, keep, HALF)
    row = q_ptr + token.to(tl.int64) * stride_q
    to = out_ptr + token.to(tl.int64) * (H * D)
    for i in tl.static_range(HEADS):
        head = part * HEADS + i
        there = keep & (head < H)
        store_rotated(row + head * D, there, c, s, to + head * D, there, D, HALF)
    if part < H_KV:
        append_head(
            k_ptr + part * D, cos_ptr, sin_ptr, rope_row_ptr, slot_ptr, k_pages + part * page_bytes(D, K_BITS), c, s,
            first, tokens, stride_k, stride_cos, stride_k_page, D, K_BITS, K_DTYPE, HALF, T, HAS_ROWS,
        )  # fmt: skip
        append_head(
            v_ptr + part * D, cos_ptr, sin_ptr, rope_row_ptr, slot_ptr, v_pages + part * page_bytes(D, V_BITS), c, s,
            first, tokens, stride_v, stride_cos, stride_v_page, D, V_BITS, V_DTYPE, 0, T, HAS_ROWS,
        )  # fmt: skip


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
        cos: float32 (rows, R/2), R <= D, perhaps columns of a wider table; None for a model without rotary positions.
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
        if cos.stride(1) != 1 or cos.stride() != sin.stride():
            raise ValueError("the columns of cos and sin must be contiguous, and their rows equally far apart")
        if rope_rows is None and cos.shape[0] < tokens:
            raise ValueError(f"{cos.shape[0]} rows of cosines for {tokens} tokens, and no rope_rows")
    for entries in (slots, slots if rope_rows is None else rope_rows):
        if entries.shape != (tokens,) or not entries.is_contiguous():
            raise ValueError(f"slots and rope_rows: one entry for each of {tokens} tokens wanted, contiguous")
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    group = heads // kv_heads
    several = group if group <= MOST_HEADS else SEVERAL
    threads = 64 if current_arch().startswith("gfx9") else 32
    tile = threads // (power_below(part_of(dim)) // scale_group(dim))
    kv_append_kernel[(triton.cdiv(tokens, tile), max(kv_heads, triton.cdiv(heads, several)))](
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
        tokens,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        0 if cos is None else cos.stride(0),
        k_pages.stride(0),
        v_pages.stride(0),
        H=heads,
        H_KV=kv_heads,
        D=dim,
        HALF=half,
        T=tile,
        HEADS=several,
        K_BITS=k_format.bits,
        V_BITS=v_format.bits,
        K_DTYPE=tl.bfloat16 if k_kind == "bf16" else tl.float16,
        V_DTYPE=tl.bfloat16 if v_kind == "bf16" else tl.float16,
        HAS_ROWS=rope_rows is not None,
        num_warps=1,
    )
    return out
