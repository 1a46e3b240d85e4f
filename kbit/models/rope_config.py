"""Rotary settings of a configuration, read and checked; rope.py, which needs numpy, turns them into angles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.models.config_values import ConfigValues, shown
from kbit.models.spec import MAX_CONTEXT, RopeSpec

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
DEFAULT_THETA = 10000.0

# Settings that change the rotation in families that read them, and would be ignored by the others.
_FOREIGN = ("alpha", "llama_4_scaling_beta", "mrope_section", "short_mscale", "long_mscale")

# Limits that keep every formula here finite; no real model comes near them.
_MAX_THETA = 1e30
_MIN_RATIO, _MAX_RATIO = 1e-6, 1e9


@dataclass(frozen=True)
class RopeRules:
    """What a family's rotary settings are, beyond the common ones.

    Attributes:
        theta: base of the wavelengths where the configuration names none.
        kinds: kinds of scaling.
        aliases: other names of kinds.
        share: partial_rotary_factor where the configuration names none; None: all of a head turns, always.
        dim: the key of how many features of a head turn, in place of `partial_rotary_factor`.
        share_key: what older configurations call that factor.
        by_layer_type: layers with a window have settings of their own (`rope_parameters.sliding_attention`); scaling
            in the older spelling is that of the other layers alone.
        window_theta: that older spelling's key of the base in layers with a window (None: there is none), and its
            default; None: the same.
        alpha: dynamic scaling with a fixed `alpha` is a larger base (theta alpha^(R/(R-2))) and no scaling.
        temperature: `llama_4_scaling_beta` multiplies queries (`ModelSpec.query_temperature`).
        full_settings: of layers without a window, where the configuration has none.
        mscales: `short_mscale` and `long_mscale` say what cosines and sines are multiplied by, with scaling.
        sections: `mrope_section` gives pairs to a token's time, height and width, which in a text are one position.
    """

    theta: float = DEFAULT_THETA
    kinds: tuple[str, ...] = KINDS
    aliases: Mapping[str, str] = field(default_factory=dict)
    share: float | None = None
    dim: str | None = None
    share_key: str = "partial_rotary_factor"
    by_layer_type: bool = False
    window_theta: tuple[str | None, float] | None = None
    alpha: bool = False
    temperature: bool = False
    full_settings: Mapping[str, Any] = field(default_factory=dict)
    sections: bool = False
    mscales: bool = False


@dataclass(frozen=True)
class Ropes:
    """The rotary embeddings of a model: see `ModelSpec.rope`, `window_rope` and `query_temperature`."""

    rope: RopeSpec
    window_rope: RopeSpec | None = None
    query_temperature: tuple[float, int] | None = None


@dataclass(frozen=True)
class _Reading:
    """What every rotary embedding of a configuration is read with.

    Attributes:
        config, where: the configuration and what to call it in errors.
        rules: the family's.
        head_dim: D.
        max_positions: max_position_embeddings.
        original: original_max_position_embeddings beside the settings, or None.
    """

    config: Mapping[str, Any]
    where: str
    rules: RopeRules
    head_dim: int
    max_positions: int
    original: int | None


def ropes_from_config(
    values: ConfigValues, head_dim: int, max_positions: int, rules: RopeRules, full_head_dim: int | None = None
) -> Ropes:
    """Read rotary settings in either spelling: `rope_parameters`, or `rope_theta` with `rope_scaling`.

    Where both are present `rope_scaling` wins, and a theta inside the object wins over one beside it: transformers'
    order.

    Args:
        values: the model's configuration.
        head_dim: D.
        max_positions: max_position_embeddings.
        rules: the family's.
        full_head_dim: of layers without a window, where they have another one.

    Raises:
        UnsupportedError: a kind of scaling, or a partial rotation, that is not implemented.
        CheckpointError: a missing or senseless value.
    """
    where = values.where
    key = "rope_scaling" if values.raw("rope_scaling") else "rope_parameters"
    settings = values.raw(key) or {}
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"{where}: {key} is {shown(settings)}; it should be an object")
    original = values.optional_integer("original_max_position_embeddings", 1, MAX_CONTEXT)
    of_family = {} if rules.dim is None else {rules.dim: values.raw(rules.dim)}
    reading = _Reading({**of_family, **values.values}, where, rules, head_dim, max_positions, original)
    theta = values.raw("rope_theta")
    theta = rules.theta if theta is None else theta
    nested = any(isinstance(value, Mapping) for value in settings.values())
    if not rules.by_layer_type:
        if nested:
            raise UnsupportedError(
                f"{where}: {key} gives each layer type its own settings, which kbit does not support for this model"
            )
        rope = _read(reading, key, settings, theta)
        return Ropes(rope, query_temperature=_temperature(reading, key, settings) if rules.temperature else None)
    of_window: Mapping[str, Any] = {}
    window_theta = theta
    if rules.window_theta is not None:
        window_key = rules.window_theta[0]
        found = None if window_key is None else values.raw(window_key)
        window_theta = rules.window_theta[1] if found is None else found
    if nested:
        key = f"{key}.full_attention"
        of_window, settings = (settings.get(kind) or {} for kind in ("sliding_attention", "full_attention"))
    elif settings and key == "rope_parameters":
        raise UnsupportedError(
            f"{where}: {key} should give each layer type its own settings (full_attention, sliding_attention)"
        )
    for kind, found in (("full_attention", settings), ("sliding_attention", of_window)):
        if not isinstance(found, Mapping):
            raise CheckpointError(f"{where}: rope_parameters.{kind} is {shown(found)}; it should be an object")
    full = replace(reading, head_dim=full_head_dim or head_dim)
    rope = _read(full, key, settings or rules.full_settings, theta)
    windowed = _read(reading, "rope_parameters.sliding_attention", of_window, window_theta)
    return Ropes(rope, None if windowed == rope else windowed)


def _read(reading: _Reading, key: str, settings: Mapping[str, Any], theta: Any) -> RopeSpec:
    """One rotary embedding.

    Args:
        reading: what all are read with.
        key: where the settings are.
        settings: the object there.
        theta: the base where they name none.
    """
    rules, where, head_dim = reading.rules, reading.where, reading.head_dim
    values = ConfigValues(settings, {"rope_theta": theta}, where, f"{key}.")
    kind = values.raw("rope_type") or values.raw("type") or "default"
    kind = rules.aliases.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in rules.kinds:
        raise UnsupportedError(
            f"{where}: RoPE scaling {shown(kind)} is not supported; kbit has {', '.join(rules.kinds)} for this model"
        )
    read = ("alpha",) * rules.alpha + ("llama_4_scaling_beta",) * rules.temperature
    read += ("mrope_section",) * rules.sections
    read += ("short_mscale", "long_mscale") * rules.mscales
    for foreign in _FOREIGN:
        if settings.get(foreign) is not None and foreign not in read:
            raise UnsupportedError(
                f"{where}: {key}.{foreign} {shown(settings[foreign])} is not supported for this model"
            )
    dim = head_dim if kind == "proportional" else _rotated(reading, settings)
    if dim % 2:
        rotated = f"head_dim is {head_dim}" if dim == head_dim else f"partial_rotary_factor rotates {dim} features"
        raise CheckpointError(f"{where}: {rotated}; rotary embedding needs it even")
    base = RopeSpec(
        kind, dim, values.number("rope_theta", above=1.0, below=_MAX_THETA), max_positions=reading.max_positions
    )
    if rules.alpha and kind == "dynamic" and values.raw("alpha"):
        if dim <= 2:
            raise CheckpointError(f"{where}: {key}.alpha needs a head_dim above 2, not {dim}")
        stretched = base.theta * _ratio(values, "alpha") ** (dim / (dim - 2))
        if not stretched < _MAX_THETA:
            raise values.error("alpha", f"less, as it makes the base {stretched:g}, above {_MAX_THETA:g}")
        return replace(base, kind="default", theta=stretched)
    return _READERS[kind](base, values, reading)


def _rotated(reading: _Reading, settings: Mapping[str, Any]) -> int:
    """Features of a head that turn."""
    share = reading.rules.share
    older = reading.config.get("partial_rotary_factor", reading.config.get(reading.rules.share_key))
    given = settings.get("partial_rotary_factor", older)
    if share is None:
        if given not in (None, 1, 1.0):
            raise UnsupportedError(
                f"{reading.where}: partial_rotary_factor {shown(given)} is not supported for this model"
            )
        return reading.head_dim
    if given is None and reading.rules.dim is not None and reading.config.get(reading.rules.dim) is not None:
        of_config = ConfigValues(reading.config, {}, reading.where)
        return of_config.integer(reading.rules.dim, 2, reading.head_dim)
    values = ConfigValues({"partial_rotary_factor": share if given is None else given}, {}, reading.where)
    dim = int(reading.head_dim * values.number("partial_rotary_factor", above=0.0, below=1.0 + 1e-9))
    if dim < 2:
        raise values.error("partial_rotary_factor", f"enough to rotate 2 of {reading.head_dim} features")
    return dim


def _temperature(reading: _Reading, key: str, settings: Mapping[str, Any]) -> tuple[float, int]:
    values = ConfigValues(settings, {}, reading.where, f"{key}.")
    beta = values.number("llama_4_scaling_beta", above=-_MIN_RATIO, below=_MAX_RATIO)
    return beta, values.integer("original_max_position_embeddings", 1, MAX_CONTEXT)


def _read_default(base: RopeSpec, values: ConfigValues, reading: _Reading) -> RopeSpec:
    return base


def _read_proportional(base: RopeSpec, values: ConfigValues, reading: _Reading) -> RopeSpec:
    """Wavelengths as if the whole head turned, of which the first pairs do (Gemma 4)."""
    share, factor = 1.0, 1.0
    if values.raw("partial_rotary_factor") is not None:
        share = values.number("partial_rotary_factor", above=0.0, below=1.0 + 1e-9)
    if values.raw("factor") is not None:
        factor = _ratio(values, "factor")
    return replace(base, factor=factor, turning=int(share * base.dim // 2))


def _read_linear(base: RopeSpec, values: ConfigValues, reading: _Reading) -> RopeSpec:
    return replace(base, factor=_ratio(values, "factor"))


def _read_dynamic(base: RopeSpec, values: ConfigValues, reading: _Reading) -> RopeSpec:
    if base.dim <= 2:
        raise CheckpointError(f"{values.where}: dynamic RoPE needs a head_dim above 2, not {base.dim}")
    return replace(base, factor=_ratio(values, "factor"))


def _read_llama3(base: RopeSpec, values: ConfigValues, reading: _Reading) -> RopeSpec:
    low, high = _ratio(values, "low_freq_factor"), _ratio(values, "high_freq_factor")
    if high < low:
        raise values.error("high_freq_factor", f"low_freq_factor, {low:g}, or more")
    return replace(
        base,
        factor=_ratio(values, "factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_positions=_original_positions(base, values, reading),
    )


def _read_yarn(base: RopeSpec, values: ConfigValues, reading: _Reading) -> RopeSpec:
    original = _original_positions(base, values, reading)
    factor = base.max_positions / original if values.raw("factor") is None else _ratio(values, "factor")
    scale, scale_all = _ratio_or(values, "mscale", 0.0), _ratio_or(values, "mscale_all_dim", 0.0)
    if values.raw("attention_factor") is not None:
        attention = _ratio(values, "attention_factor")
    else:
        attention = _mscale(factor, scale) / _mscale(factor, scale_all) if scale and scale_all else _mscale(factor, 1.0)
    slow, fast = _ratio_or(values, "beta_slow", 1.0), _ratio_or(values, "beta_fast", 32.0)
    if fast < slow:
        raise CheckpointError(f"{values.where}: {values.prefix}beta_fast {fast:g} is below beta_slow {slow:g}")
    truncate = values.raw("truncate")
    return replace(
        base,
        factor=factor,
        attention_factor=attention,
        temperature=_mscale(factor, scale_all),
        original_positions=original,
        beta_fast=fast,
        beta_slow=slow,
        truncate=True if truncate is None else values.boolean("truncate"),
    )


def _read_longrope(base: RopeSpec, values: ConfigValues, reading: _Reading) -> RopeSpec:
    """LongRoPE (Ding et al. 2024, 2402.13753) as transformers has it."""
    original = _original_positions(base, values, reading)
    factor = base.max_positions / original if values.raw("factor") is None else _ratio(values, "factor")
    attention = math.sqrt(1.0 + math.log(factor) / math.log(original)) if factor > 1.0 and original > 1 else 1.0
    if values.raw("attention_factor") is not None:
        attention = _ratio(values, "attention_factor")
    beyond = 0.0
    if reading.rules.mscales:
        attention, beyond = _ratio(values, "short_mscale"), _ratio(values, "long_mscale")
    return replace(
        base,
        factor=factor,
        attention_factor=attention,
        long_attention_factor=beyond,
        original_positions=original,
        short_factors=_factors(base, values, "short_factor"),
        long_factors=_factors(base, values, "long_factor"),
    )


def _factors(base: RopeSpec, values: ConfigValues, key: str) -> tuple[float, ...]:
    """A divisor for every pair of features."""
    found, pairs = values.raw(key), base.dim // 2
    wanted = f"a list of {pairs} positive numbers, one for each pair of features"
    if not isinstance(found, list) or len(found) != pairs:
        raise values.error(key, wanted)
    each = {str(index): value for index, value in enumerate(found)}
    inside = ConfigValues(each, {}, values.where, f"{values.prefix}{key}.")
    return tuple(_ratio(inside, index) for index in each)


_READERS = {
    "default": _read_default,
    "linear": _read_linear,
    "dynamic": _read_dynamic,
    "llama3": _read_llama3,
    "yarn": _read_yarn,
    "longrope": _read_longrope,
    "proportional": _read_proportional,
}


def _original_positions(base: RopeSpec, values: ConfigValues, reading: _Reading) -> int:
    """Pretraining length: beside the object (Phi's spelling, it wins), inside it, or max_position_embeddings."""
    if reading.original is not None:
        return reading.original
    return values.optional_integer("original_max_position_embeddings", 1, MAX_CONTEXT) or base.max_positions


def _ratio(values: ConfigValues, key: str) -> float:
    """A positive number of any sensible size."""
    return values.number(key, above=_MIN_RATIO, below=_MAX_RATIO)


def _ratio_or(values: ConfigValues, key: str, default: float) -> float:
    """The same, where null, absent and 0 all mean the default, as in transformers."""
    return default if values.raw(key) in (None, 0) else _ratio(values, key)


def _mscale(factor: float, scale: float) -> float:
    """YaRN's temperature (section 3.4): 0.1 c ln s + 1, and 1 where nothing is extended."""
    return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0
