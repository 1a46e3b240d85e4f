"""Rotary settings of a configuration, read and checked; rope.py, which needs numpy, turns them into angles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.models.config_values import ConfigValues, shown
from kbit.models.spec import MAX_CONTEXT, RopeSpec

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
DEFAULT_THETA = 10000.0

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
        return ConfigValues(config, {}, values.where).integer(key, 1, MAX_CONTEXT)
    return values.optional_integer(key, 1, MAX_CONTEXT) or base.max_positions


def _ratio(values: ConfigValues, key: str) -> float:
    """A positive number of any sensible size."""
    return values.number(key, above=_MIN_RATIO, below=_MAX_RATIO)


def _ratio_or(values: ConfigValues, key: str, default: float) -> float:
    """The same, where null, absent and 0 all mean the default, as in transformers."""
    return default if values.raw(key) in (None, 0) else _ratio(values, key)


def _mscale(factor: float, scale: float) -> float:
    """YaRN's temperature (section 3.4): 0.1 c ln s + 1, and 1 where nothing is extended."""
    return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0
