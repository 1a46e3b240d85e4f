"""Rotary position embedding and its context extensions: from its settings to cosines and sines.

Feature pair i of R/2 turns by position * f_i. Plain RoPE (Su et al. 2021, arXiv:2104.09864): f_i = theta^(-2i/R).

    linear    f_i / s                                            (position interpolation, Chen et al. 2023, 2306.15595)
    dynamic   theta * (s L/M - (s - 1))^(R/(R-2)) in place of theta, for L > M         ("dynamic NTK", bloc97, emozilla)
    llama3    f_i / s where the wavelength 2 pi/f_i is above O/l, f_i where it is below O/h, in between
              ((1-t)/s + t) f_i with t = (O f_i/(2 pi) - l) / (h - l)                     (Llama 3.1 reference code)
    yarn      (r_i/s + 1 - r_i) f_i with the ramp r_i = clamp((i - a)/(b - a), 0, 1); cosines and sines times m
              (Peng et al. 2023, 2309.00071); a and b are the features that turn beta_fast and beta_slow times within O

    longrope  f_i / e_i with the short or, where the text is longer than O, the long factors e; cosines and sines times
              sqrt(1 + ln s / ln O)                                                (Ding et al. 2024, 2402.13753; Phi-3)
              or times a number for either (Phi-3.5-MoE)
    proportional  f_i / s for the first pairs, 0 for the others                                               (Gemma 4)

with s the factor, M max_position_embeddings, O original_max_position_embeddings, l and h the low and high frequency
factors, and m the attention factor: as given, or mscale(s, mscale) / mscale(s, mscale_all_dim) where both are set, or
mscale(s, 1), with mscale(s, c) = 0.1 c ln s + 1.

Frequencies and angles are rounded to float32 in the order transformers uses, because models were trained with those
roundings: at position 8000 a frequency that is off by one part in 10^7 turns the fastest pair by 10^-3 radians. Powers,
cosines and sines are formed in float64 and rounded once: they are the nearest float32 (or, where float64 was off just
there, its neighbour), the same on every machine, which vector libraries in float32 are not.

*Dynamic scaling (longrope likewise) and the cache.* L is the length of the row once the step is in: the position of its
last real token plus one. A prefill longer than M therefore rotates all its tokens with the base for the full length,
and every decoding step beyond M rotates its token with a new, larger base while earlier keys keep the rotation they
were written with. That is what transformers does too, for one sequence that only grows, so logits agree for prefill and
for decoding; it also means that decoding is not equal to a prefill of the same text, there and here. Two accidents of
transformers are not copied: it takes L over the whole batch (a row's result then depends on its neighbours) and keeps
the last base between unrelated calls that stay above M. Here a row's angles depend on that row alone. (LongRoPE changes
once: where generation passes O, `kbit.engine` fills the cache anew, as transformers does.)
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kbit.models.spec import RopeSpec

Floats = NDArray[np.float32]


def inverse_frequencies(spec: RopeSpec, seq_lengths: NDArray[np.int64]) -> Floats:
    """Radians per position of every feature pair.

    Args:
        spec: the rotary embedding.
        seq_lengths: (B,), length of each row; looked at only where `spec.depends_on_length`.

    Returns:
        (1, R/2), or (B, R/2) where they depend on the length.
    """
    exponents = np.arange(0, spec.dim, 2, dtype=np.float32) / np.float32(spec.dim)
    if spec.kind == "dynamic":
        rows: Floats = np.float32(1) / _power(_dynamic_base(spec, seq_lengths)[:, None], exponents)
        return rows
    powers = _power(spec.theta, exponents)
    if spec.kind == "longrope":
        short, long = (np.array(factors, dtype=np.float32) for factors in (spec.short_factors, spec.long_factors))
        beyond = (seq_lengths > spec.original_positions)[:, None]
        chosen = np.where(beyond, long, short) if spec.depends_on_length else short[None]
        divided: Floats = np.float32(1) / (chosen * powers)
        return divided
    plain: Floats = np.float32(1) / powers
    if spec.kind in ("linear", "proportional"):
        plain = plain / np.float32(spec.factor)
        if spec.kind == "proportional":
            plain[spec.turning :] = 0
    elif spec.kind == "llama3":
        plain = _llama3(spec, plain)
    elif spec.kind == "yarn":
        keep = 1 - _yarn_ramp(spec)
        plain = np.float32(1) / (np.float32(spec.factor) * powers) * (1 - keep) + plain * keep
    return plain[None]


def _power(base: float | Floats, exponents: float | Floats) -> Floats:
    """base^exponents, rounded once. A Python number counts as the float32 that torch would make of it."""
    power = np.asarray(base, dtype=np.float32).astype(np.float64) ** exponents
    return power.astype(np.float32)


def _dynamic_base(spec: RopeSpec, seq_lengths: NDArray[np.int64]) -> Floats:
    """(B,): the base of each row."""
    lengths = seq_lengths.astype(np.float32)
    scale = np.float32(spec.factor) * lengths / np.float32(spec.max_positions) - np.float32(spec.factor - 1)
    # 1 or more for L >= M, but for what cancels in the subtraction when the factor is huge.
    grown = np.float32(spec.theta) * _power(np.maximum(scale, np.float32(1)), spec.dim / (spec.dim - 2))
    bases: Floats = np.where(seq_lengths > spec.max_positions, grown, np.float32(spec.theta))
    return bases


def _llama3(spec: RopeSpec, plain: Floats) -> Floats:
    wavelengths = np.float32(2 * math.pi) / plain
    long_from = spec.original_positions / spec.low_freq_factor
    short_to = spec.original_positions / spec.high_freq_factor
    if spec.low_freq_factor == spec.high_freq_factor:  # (Llama 4 Scout) no band between: a step
        return np.where(wavelengths > long_from, plain / np.float32(spec.factor), plain)
    smooth = np.float32(spec.original_positions) / wavelengths - np.float32(spec.low_freq_factor)
    smooth = smooth / np.float32(spec.high_freq_factor - spec.low_freq_factor)
    between = (1 - smooth) * plain / np.float32(spec.factor) + smooth * plain
    short = np.where(wavelengths < short_to, plain, between)
    return np.where(wavelengths > long_from, plain / np.float32(spec.factor), short)


def _yarn_ramp(spec: RopeSpec) -> Floats:
    """(R/2,): 0 where a pair keeps its frequency, 1 where it is interpolated."""

    def feature(rotations: float) -> float:
        """The (fractional) feature index that turns this often within the original context."""
        turns = spec.original_positions / (rotations * 2 * math.pi)
        return spec.dim * math.log(turns) / (2 * math.log(spec.theta))

    low, high = feature(spec.beta_fast), feature(spec.beta_slow)
    if spec.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, spec.dim - 1.0)
    if low == high:
        high += 0.001  # a step instead of a ramp, without dividing by zero
    pairs = np.arange(spec.dim // 2, dtype=np.float32)
    ramp: Floats = np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)
    return ramp


def rope_tables(spec: RopeSpec, positions: NDArray[np.int64], seq_lengths: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Cosines and sines for every token, attention factor included.

    Args:
        spec: the rotary embedding.
        positions: (B, T).
        seq_lengths: (B,), length of each row once these tokens are in (see "dynamic" above).

    Returns:
        cos and sin, each (B, T, R/2).
    """
    angles = positions[..., None].astype(np.float32) * inverse_frequencies(spec, seq_lengths)[:, None]
    exact = angles.astype(np.float64)
    factor = np.full((len(seq_lengths), 1, 1), spec.attention_factor, dtype=np.float32)
    if spec.long_attention_factor:
        factor[seq_lengths > spec.original_positions] = spec.long_attention_factor
    return np.cos(exact).astype(np.float32) * factor, np.sin(exact).astype(np.float32) * factor
