"""The inner loop that prefill and decode share: a tile of queries over a range of tokens, softmax on line.

A tile has M rows: query tokens times the G = H / H_kv query heads that read one key/value head, so that keys and values
are fetched and decoded once for all of them. Softmax is in base 2; scores and sums are fp32.

Keys and values of k bits (kv_codes) never become full tensors: a slab of 16 features is decoded right before the tensor
core instruction that takes it (k = 16 for scores, n = 16 for values). Their scales are applied in fp32 where that is
cheaper, which depends on M (SCALE_TILES):

    False   to the scores of a group (x scale) and to the probabilities (p x scale): 2.5 operations per row, token and
            group, exact codes in the tensor cores. For decode, and for prefill on RDNA, where a warp has 16 rows.
    True    to the decoded values, which rounds them to fp16 once more. For prefill with larger tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kbit.kernels.triton.attention.kv_codes import (
    PAGE,
    chunk_count,
    chunk_size,
    chunk_start,
    group_at,
    half_levels,
    load_words,
    part_size,
    place_of,
    scale_group,
    scales_of,
)
from kbit.kernels.triton.attention.queries import load_prepared

# The largest score so far before there is one. Finite, so that a tile with nothing in sight gives exp2(-inf + 1e30) = 0
# and not exp2(-inf + inf).
NOTHING = tl.constexpr(-1.0e30)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def empty_sums(M: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """Sums of values, zero: float32 tiles per chunk (float values) or per slab."""
    tiles = ()
    if BITS == 16:
        for chunk in tl.static_range(chunk_count(D, 2)):
            tiles = tiles + (tl.zeros((M, chunk_size(D, 2, chunk_start(D, 2, chunk))), tl.float32),)
    else:
        for _ in tl.static_range(D // 16):
            tiles = tiles + (tl.zeros((M, 16), tl.float32),)
    return tiles


@triton.jit
def add_scores(
    scores, q, base, part, token, stride, valid, D: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
    SCALE_TILES: tl.constexpr,
):  # fmt: skip
    """scores + q . k of a part of the features; arguments as for scores_of.

    Args:
        scores: float32 (M, BN).
        q: tiles of load_queries, the part's.
        part: which of the parts of kv_layout.part_of.
    """
    PART: tl.constexpr = part_size(D)
    if BITS == 16:
        data = base.to(tl.pointer_type(DTYPE), bitcast=True) + part * PART
        for chunk in tl.static_range(chunk_count(PART, 2)):
            at = chunk_start(PART, 2, chunk) + tl.arange(0, chunk_size(PART, 2, chunk_start(PART, 2, chunk)))
            k = tl.load(data + token[None, :] * stride + at[:, None], mask=valid[None, :], other=0.0)
            scores = tl.dot(q[chunk], k, scores)
    else:
        GROUP: tl.constexpr = scale_group(PART)
        SLABS: tl.constexpr = GROUP // 16
        words = load_words(base, part, token, D, BITS, True)
        scales = scales_of(base, part, token, D, BITS)
        for place in tl.static_range(PART // GROUP):
            scale = tl.load(scales + group_at(PART, BITS, place) * PAGE)
            if SCALE_TILES:
                for i in tl.static_range(SLABS):
                    k = half_levels(words, PART, BITS, group_at(PART, BITS, place) * SLABS + i) * scale[None, :]
                    scores = tl.dot(q[group_at(PART, BITS, place) * SLABS + i], k, scores)
            else:
                some = tl.zeros((scores.shape[0], scores.shape[1]), tl.float32)
                for i in tl.static_range(SLABS):
                    k = half_levels(words, PART, BITS, group_at(PART, BITS, place) * SLABS + i)
                    some = tl.dot(q[group_at(PART, BITS, place) * SLABS + i], k, some)
                scores += some * scale.to(tl.float32)[None, :]
    return scores


@triton.jit
def scores_of(
    q, base, token, stride, valid, D: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, M: tl.constexpr,
    SCALE_TILES: tl.constexpr,
):  # fmt: skip
    """q . k of a tile: float32 (M, BN). Levels are half levels here; the caller's scale makes up for it.

    Args:
        q: tiles of load_queries; of heads of several parts, (M,) pointers to prepared queries and which exist.
        base: pointer to bytes, the head's page (or the head's first key, float keys).
        token: (BN,) places within the page (or tokens).
        stride: features from a token to the next (float keys).
        valid: (BN,) tokens that may be read (float keys).
    """
    BN: tl.constexpr = token.shape[0]
    PART: tl.constexpr = part_size(D)
    scores = tl.zeros((M, BN), tl.float32)
    if PART == D:
        scores = add_scores(scores, q, base, 0, token, stride, valid, D, BITS, DTYPE, SCALE_TILES)
    else:  # a loop, not unrolled: else the queries of all parts would wait in registers
        for part in tl.range(0, D // PART, num_stages=1):
            tiles = load_prepared(q[0] + part * PART, q[1], PART, BITS)
            scores = add_scores(scores, tiles, base, part, token, stride, valid, D, BITS, DTYPE, SCALE_TILES)
    return scores


@triton.jit
def add_values(
    sums, p, shrink, base, part, token, stride, valid, D: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
    SCALE_TILES: tl.constexpr,
):  # fmt: skip
    """sums x shrink + p . v, of a part of the features. Arguments as for scores_of.

    Args:
        sums: tiles of empty_sums.
        p: float32 (M, BN).
        shrink: (M,) what the largest score having grown does to the sums.
        part: which of the parts of kv_layout.part_of.
    """
    PART: tl.constexpr = part_size(D)
    new = ()
    if BITS == 16:
        data = base.to(tl.pointer_type(DTYPE), bitcast=True) + part * PART
        weights = p.to(DTYPE)
        for chunk in tl.static_range(chunk_count(PART, 2)):
            at = chunk_start(PART, 2, chunk) + tl.arange(0, chunk_size(PART, 2, chunk_start(PART, 2, chunk)))
            v = tl.load(data + token[:, None] * stride + at[None, :], mask=valid[:, None], other=0.0)
            new = new + (tl.dot(weights, v, sums[chunk] * shrink[:, None]),)
    else:
        GROUP: tl.constexpr = scale_group(PART)
        SLABS: tl.constexpr = GROUP // 16
        words = load_words(base, part, token, D, BITS, False)
        scales = scales_of(base, part, token, D, BITS)
        done = ()
        for place in tl.static_range(PART // GROUP):
            # beyond the last token a page holds leftovers: any bits make a finite level, but not a finite scale
            scale = tl.load(scales + group_at(PART, BITS, place) * PAGE, mask=valid, other=0.0)
            weights = (p if SCALE_TILES else p * scale.to(tl.float32)[None, :]).to(tl.float16)
            for i in tl.static_range(SLABS):
                v = half_levels(words, PART, BITS, group_at(PART, BITS, place) * SLABS + i)
                if SCALE_TILES:
                    v = v * scale[:, None]
                sum = sums[group_at(PART, BITS, place) * SLABS + i] * shrink[:, None]
                done = done + (tl.dot(weights, v, sum),)
        for slab in tl.static_range(PART // 16):
            new = new + (done[place_of(PART, BITS, slab // SLABS) * SLABS + slab % SLABS],)
    return new


@triton.jit
def attend_range(
    q, part, sums, largest, total, first, last, position, slope, table, k_base, v_base, stride_k, stride_v, end,
    score_scale, cap, window,
    D: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_DTYPE: tl.constexpr, V_DTYPE: tl.constexpr,
    PAGED: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, CHUNKED: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr, SCALE_TILES: tl.constexpr, P_LOG2: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Tokens [first, last) of one sequence and head into the running sums of a tile; first a multiple of BN.

    Args:
        q: as for scores_of; part: of the values, which of the parts of kv_layout.part_of.
        sums: tiles of that part; largest, total: (M,) running maximum and sum.
        position: (M,) of the queries.
        slope: (M,) ALiBi slopes, in base 2 (HAS_SLOPES).
        table: pointer to the sequence's row of the block table (PAGED).
        k_base, v_base: pointers to the head's part of page 0, or to the sequence's first key and value of the head.
        stride_k, stride_v: bytes from a page to the next (PAGED), or features from a token to the next.
        end: tokens of the sequence.
        score_scale: multiplies the scores: 1, or with a soft cap 1 / cap.
        cap: the soft cap times log2(e).
        P_LOG2: probabilities and their total carry a factor of 2^P_LOG2, which cancels in the end, against underflow
            where p times scale is rounded to fp16.
        CHUNKED: the window does not slide: a query sees its own stretch of as many tokens.
        MASKED: whether some query does not see some token of the range.

    Returns:
        (sums, largest, total).
    """
    local = tl.arange(0, BN)
    for step in tl.range(0, tl.cdiv(last - first, BN), num_stages=STAGES):
        start = first + step * BN
        token = start + local
        valid = token < end
        if PAGED:
            page = tl.load(table + start // PAGE).to(tl.int64)
            place = start % PAGE + local
            k_part, v_part = k_base + page * stride_k, v_base + page * stride_v
            scores = scores_of(q, k_part, place, D, valid, D, K_BITS, K_DTYPE, M, SCALE_TILES)
        else:  # 64 bits: tokens times stride may pass 2^31
            k_part, v_part = k_base + start.to(tl.int64) * stride_k, v_base + start.to(tl.int64) * stride_v
            scores = scores_of(q, k_part, local, stride_k, valid, D, K_BITS, K_DTYPE, M, SCALE_TILES)
        if HAS_CAP:  # tanh(x) = 1 - 2 / (1 + e^2x)
            scores = cap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (score_scale * 2.0 * LOG2_E))))
        distance = position[:, None] - token[None, :]
        if HAS_SLOPES:
            scores -= slope[:, None] * distance.to(tl.float32)
        if MASKED:
            seen = valid[None, :]
            if CAUSAL:
                seen = seen & (distance >= 0)
            if CHUNKED:
                seen = seen & (distance <= position[:, None] % window)
            elif HAS_WINDOW:
                seen = seen & (distance < window)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1))
        p = tl.exp2(scores - (higher - P_LOG2)[:, None])
        shrink = tl.exp2(largest - higher)
        total = total * shrink + tl.sum(p, 1)
        largest = higher
        if PAGED:
            sums = add_values(sums, p, shrink, v_part, part, place, D, valid, D, V_BITS, V_DTYPE, SCALE_TILES)
        else:
            sums = add_values(
                sums, p, shrink, v_part, part, local, stride_v, valid, D, V_BITS, V_DTYPE, SCALE_TILES
            )  # fmt: skip
    return sums, largest, total


@triton.jit
def attend_tile(
    q, part, position, slope, table, k_base, v_base, stride_k, stride_v, first, last, clear, end, score_scale, cap,
    window,
    D: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_DTYPE: tl.constexpr, V_DTYPE: tl.constexpr,
    PAGED: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, CHUNKED: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr, SCALE_TILES: tl.constexpr, P_LOG2: tl.constexpr,
    ONE_LOOP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tokens [first, last) of a sequence for a tile of queries; every query sees all of [first, clear), which go
    through a loop without masks unless ONE_LOOP, which takes fewer registers.

    Returns:
        (sums, largest, total); the sums are still to be multiplied by sums_factor.
    """
    sums = empty_sums(M, part_size(D), V_BITS)
    largest = tl.full((M,), NOTHING, tl.float32)
    total = tl.zeros((M,), tl.float32)
    middle = tl.minimum(tl.maximum(first + (clear - first) // BN * BN, first), last)
    if not (HAS_WINDOW or ONE_LOOP):
        sums, largest, total = attend_range(
            q, part, sums, largest, total, first, middle, position, slope, table, k_base, v_base, stride_k, stride_v,
            end, score_scale, cap, window, D, M, BN, K_BITS, V_BITS, K_DTYPE, V_DTYPE, PAGED, False, CAUSAL, HAS_WINDOW,
            CHUNKED, HAS_CAP, HAS_SLOPES, SCALE_TILES, P_LOG2, STAGES,
        )  # fmt: skip
    else:
        middle = first
    return attend_range(
        q, part, sums, largest, total, middle, last, position, slope, table, k_base, v_base, stride_k, stride_v, end,
        score_scale, cap, window, D, M, BN, K_BITS, V_BITS, K_DTYPE, V_DTYPE, PAGED, True, CAUSAL, HAS_WINDOW,
        CHUNKED, HAS_CAP, HAS_SLOPES, SCALE_TILES, P_LOG2, STAGES,
    )  # fmt: skip


@triton.jit
def sink_share(sink, largest, P_LOG2: tl.constexpr):
    """What scores without a value add to totals with these maxima, of which it may be far above: then it is infinite,
    and a result divided by it the zero it should be."""
    return tl.exp2(sink * LOG2_E - largest + P_LOG2)


@triton.constexpr_function
def sums_factor(bits: int) -> float:
    """What the sums of values must be multiplied by to undo half levels."""
    return 1.0 if bits in (8, 16) else 2.0


@triton.constexpr_function
def query_factor(bits: int) -> float:
    """What half levels ask of the queries."""
    return 1.0 if bits in (8, 16) else 2.0
