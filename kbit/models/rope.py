"""Rotary position embedding and its context extensions: from configuration to cosines and sines.

Feature pair i of R/2 turns by position * f_i. Plain RoPE (Su et al. 2021, arXiv:2104.09864): f_i = theta^(-2i/R).

    linear    f_i / s                                            (position interpolation, Chen et al. 2023, 2306.15595)
    dynamic   theta * (s L/M - (s - 1))^(R/(R-2)) in place of theta, for L > M         ("dynamic NTK", bloc97, emozilla)
    llama3    f_i / s where the wavelength 2 pi/f_i is above O/l, f_i where it is below O/h, in between
              ((1-t)/s + t) f_i with t = (O f_i/(2 pi) - l) / (h - l)                     (Llama 3.1 reference code)
    yarn      (r_i/s + 1 - r_i) f_i with the ramp r_i = clamp((i - a)/(b - a), 0, 1); cosines and sines times m
              (Peng et al. 2023, 2309.00071); a and b are the features that turn beta_fast and beta_slow times within O

with s the factor, M max_position_embeddings, O original_max_position_embeddings, l and h the low and high frequency
factors, and m the attention factor: as given, or mscale(s, mscale) / mscale(s, mscale_all_dim) where both are set, or
mscale(s, 1), with mscale(s, c) = 0.1 c ln s + 1.

Everything is computed in float32 in the order transformers uses, because models were trained with those roundings:
at position 8000 a frequency that is off by one part in 10^7 turns the fastest pair by 10^-3 radians.

*Dynamic scaling and the cache.* L is the length of the row once the step is in: the position of its last real token
plus one. A prefill longer than M therefore rotates all its tokens with the base for the full length, and every decoding
step beyond M rotates its token with a new, larger base while earlier keys keep the rotation they were written with.
That is what transformers does too, for one sequence that only grows, so logits agree for prefill and for decoding; it
also means that decoding is not equal to a prefill of the same text, there and here. Two accidents of transformers are
not copied: it takes L over the whole batch (a row's result then depends on its neighbours) and keeps the last base
between unrelated calls that stay above M. Here a row's angles depend on that row alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from kbit.errors import CheckpointError, UnsupportedError
from kbit.models.config_values import ConfigValues, shown
from kbit.models.spec import RopeSpec

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
DEFAULT_THETA = 10000.0
_MAX_POSITIONS = 1 << 31

# Limits that keep every formula here finite; no real model comes near them.
_MAX_THETA = 1e30
_MIN_RATIO, _MAX_RATIO = 1e-6, 1e9


def rope_from_config(config: Mapping[str, Any], head_dim: int, max_positions: int, where: str) -> RopeSpec:
    """Read rotary settings in either spelling: `rope_parameters`, or `rope_theta` with `rope_scaling`.

    Where both are present `rope_scaling` wins, and a theta inside the object wins over one beside it: transformers'
    order.

    Args:
        config: the model's configuration.
        head_dim: D; all of it is rotated.
        max_positions: max_position_embeddings.
        where: what to call the file in errors.

    Raises:
        UnsupportedError: a kind of scaling, or a partial rotation, that is not implemented.
        CheckpointError: a missing or senseless value.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    settings = config.get(key) or {}
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"{where}: {key} is {shown(settings)}; it should be an object")
    if any(isinstance(value, Mapping) for value in settings.values()):
        raise UnsupportedError(f"{where}: {key} gives each layer type its own settings, which kbit does not support")
    theta = config.get("rope_theta")
    values = ConfigValues(settings, {"rope_theta": DEFAULT_THETA if theta is None else theta}, where, f"{key}.")
    kind = values.raw("rope_type") or values.raw("type") or "default"
    if kind not in KINDS:
        raise UnsupportedError(f"{where}: RoPE scaling {shown(kind)} is not supported; kbit has {', '.join(KINDS)}")
    for holder in (config, settings):
        if holder.get("partial_rotary_factor") not in (None, 1, 1.0):
            value = shown(holder["partial_rotary_factor"])
            raise UnsupportedError(f"{where}: partial_rotary_factor {value} is not supported for this model")
    if head_dim % 2:
        raise CheckpointError(f"{where}: head_dim is {head_dim}; rotary embedding needs it even")
    base = RopeSpec(
        kind, head_dim, values.number("rope_theta", above=1.0, below=_MAX_THETA), max_positions=max_positions
    )
    return _READERS[kind](base, values, config)


def _read_default(base: RopeSpec, values: ConfigValues, config: Mapping[str, Any]) -> RopeSpec:
    return base


def _read_linear(base: RopeSpec, values: ConfigValues, config: Mapping[str, Any]) -> RopeSpec:
    return replace(base, factor=_ratio(values, "factor"))


def _read_dynamic(base: RopeSpec, values: ConfigValues, config: Mapping[str, Any]) -> RopeSpec:
    if base.dim <= 2:
        raise CheckpointError(f"{values.where}: dynamic RoPE needs a head_dim above 2, not {base.dim}")
    return replace(base, factor=_ratio(values, "factor"))


def _read_llama3(base: RopeSpec, values: ConfigValues, config: Mapping[str, Any]) -> RopeSpec:
    low = _ratio(values, "low_freq_factor")
    return replace(
        base,
        factor=_ratio(values, "factor"),
        low_freq_factor=low,
        high_freq_factor=values.number("high_freq_factor", above=low, below=_MAX_RATIO),
        original_positions=_original_positions(base, values, config),
    )


def _read_yarn(base: RopeSpec, values: ConfigValues, config: Mapping[str, Any]) -> RopeSpec:
    original = _original_positions(base, values, config)
    factor = base.max_positions / original if values.raw("factor") is None else _ratio(values, "factor")
    if values.raw("attention_factor") is not None:
        attention = _ratio(values, "attention_factor")
    else:
        scale, scale_all = _ratio_or(values, "mscale", 0.0), _ratio_or(values, "mscale_all_dim", 0.0)
        attention = _mscale(factor, scale) / _mscale(factor, scale_all) if scale and scale_all else _mscale(factor, 1.0)
    slow, fast = _ratio_or(values, "beta_slow", 1.0), _ratio_or(values, "beta_fast", 32.0)
    if fast < slow:
        raise CheckpointError(f"{values.where}: {values.prefix}beta_fast {fast:g} is below beta_slow {slow:g}")
    truncate = values.raw("truncate")
    return replace(
        base,
        factor=factor,
        attention_factor=attention,
        original_positions=original,
        beta_fast=fast,
        beta_slow=slow,
        truncate=True if truncate is None else values.boolean("truncate"),
    )


_READERS = {
    "default": _read_default,
    "linear": _read_linear,
    "dynamic": _read_dynamic,
    "llama3": _read_llama3,
    "yarn": _read_yarn,
}


def _original_positions(base: RopeSpec, values: ConfigValues, config: Mapping[str, Any]) -> int:
    """Pretraining length: beside the object (Phi's spelling, it wins), inside it, or max_position_embeddings."""
    key = "original_max_position_embeddings"
    if config.get(key) is not None:
        return ConfigValues(config, {}, values.where).integer(key, 1, _MAX_POSITIONS)
    return values.optional_integer(key, 1, _MAX_POSITIONS) or base.max_positions


def _ratio(values: ConfigValues, key: str) -> float:
    """A positive number of any sensible size."""
    return values.number(key, above=_MIN_RATIO, below=_MAX_RATIO)


def _ratio_or(values: ConfigValues, key: str, default: float) -> float:
    """The same, where null, absent and 0 all mean the default, as in transformers."""
    return default if values.raw(key) in (None, 0) else _ratio(values, key)


def _mscale(factor: float, scale: float) -> float:
    """YaRN's temperature (section 3.4): 0.1 c ln s + 1, and 1 where nothing is extended."""
    return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0


def inverse_frequencies(spec: RopeSpec, seq_lengths: torch.Tensor) -> torch.Tensor:
    """Radians per position of every feature pair.

    Args:
        spec: the rotary embedding.
        seq_lengths: int64 (B,), length of each row; only "dynamic" looks at it.

    Returns:
        float32 (1, R/2), or (B, R/2) for "dynamic".
    """
    device = seq_lengths.device
    exponents = torch.arange(0, spec.dim, 2, dtype=torch.float32, device=device) / spec.dim
    if spec.kind == "dynamic":
        return 1.0 / (_dynamic_base(spec, seq_lengths)[:, None] ** exponents)
    powers = spec.theta**exponents
    plain = 1.0 / powers
    if spec.kind == "linear":
        plain = plain / spec.factor
    elif spec.kind == "llama3":
        plain = _llama3(spec, plain)
    elif spec.kind == "yarn":
        keep = 1 - _yarn_ramp(spec, device)
        plain = 1.0 / (spec.factor * powers) * (1 - keep) + plain * keep
    return plain[None]


def _dynamic_base(spec: RopeSpec, seq_lengths: torch.Tensor) -> torch.Tensor:
    """float32 (B,): the base of each row."""
    scale = (spec.factor * seq_lengths / spec.max_positions) - (spec.factor - 1)
    # 1 or more for L >= M, but for what cancels in the subtraction when the factor is huge.
    grown = spec.theta * scale.clamp(min=1.0) ** (spec.dim / (spec.dim - 2))
    return torch.where(seq_lengths > spec.max_positions, grown, spec.theta)


def _llama3(spec: RopeSpec, plain: torch.Tensor) -> torch.Tensor:
    wavelengths = 2 * math.pi / plain
    long_from = spec.original_positions / spec.low_freq_factor
    short_to = spec.original_positions / spec.high_freq_factor
    smooth = spec.original_positions / wavelengths - spec.low_freq_factor
    smooth = smooth / (spec.high_freq_factor - spec.low_freq_factor)
    between = (1 - smooth) * plain / spec.factor + smooth * plain
    short = torch.where(wavelengths < short_to, plain, between)
    return torch.where(wavelengths > long_from, plain / spec.factor, short)


def _yarn_ramp(spec: RopeSpec, device: torch.device) -> torch.Tensor:
    """float32 (R/2,): 0 where a pair keeps its frequency, 1 where it is interpolated."""

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
    return ((torch.arange(spec.dim // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)


def rope_tables(
    spec: RopeSpec, positions: torch.Tensor, seq_lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for every token, attention factor included.

    Args:
        spec: the rotary embedding.
        positions: int64 (B, T).
        seq_lengths: int64 (B,), length of each row once these tokens are in (see "dynamic" above).

    Returns:
        cos and sin, each float32 (B, T, R/2).
    """
    angles = positions[..., None].float() * inverse_frequencies(spec, seq_lengths)[:, None]
    return angles.cos() * spec.attention_factor, angles.sin() * spec.attention_factor
