"""Mamba-2's layers as configurations describe them: read and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from kbit.host.errors import UnsupportedError
from kbit.models.config_values import ConfigValues, shown
from kbit.models.factors_config import FACTORS, numbers
from kbit.models.layer_types import FULL, LINEAR, typed_layers
from kbit.models.mixer_specs import ScanNet

# Limits that no real model comes near.
_MAX_HEADS, _MAX_DIM, _MAX_TAPS, _MAX_EXPAND = 1 << 16, 1024, 64, 64

# The same as Python's JSON and as transformers writes it.
_NO_LIMITS: tuple[Any, ...] = (None, [0.0, math.inf], [0.0, {"__float__": "Infinity"}])

# In the configuration of one process's share of a model: of how many. Its heads, or the features of its convolutions,
# are then as many times fewer.
SHARES = "kbit_shares"

# What transformers takes where a configuration says nothing.
DEFAULTS = {
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_head": "auto",
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}

# Of which layers Mamba-2's are, and how they are described: as `layer_types` says; all but those of
# `attn_layer_indices`; in all layers, beside attention (Falcon-H1); as `layer_types` says, of layers that are an MLP
# alone or none (Nemotron-H).
Scanned = Literal["listed", "but listed", "beside", "mixed"]

# What layers of a Nemotron-H are called, in lists and in a pattern.
MOE, MLP = "moe", "mlp"
_MIXED = {"M": LINEAR, "*": FULL, "E": MOE, "-": MLP, "mamba": LINEAR, "attention": FULL}


def scan_of(rule: Scanned, values: ConfigValues, layers: int, hidden: int) -> ScanNet | None:
    """The state spaces of a configuration, or None where all layers attend.

    Args:
        rule: which layers.
        values: the configuration.
        layers: how many there are.
        hidden: hidden_size.

    Raises:
        UnsupportedError: a layer type that kbit does not know; norms by group, biases, or steps within limits.
        CheckpointError: a missing or senseless value.
    """
    which = _which(rule, values, layers)
    heads = values.integer("mamba_n_heads", 1, _MAX_HEADS)
    inner = _inner_width(rule, values, heads, hidden)
    value_dim = inner // heads if values.raw("mamba_d_head") == "auto" else values.integer("mamba_d_head", 1, _MAX_DIM)
    shares = values.optional_integer(SHARES, 1, _MAX_HEADS) or 1
    if value_dim * heads * shares != inner:
        named = values.raw("mamba_d_ssm") if rule == "beside" else None
        what = "mamba_expand hidden_size" if named is None else "mamba_d_ssm"
        raise values.error("mamba_d_head", f"such that {heads} heads of it are {what}, {inner}")
    groups = values.integer("mamba_n_groups", 1, heads)
    if heads % groups:
        raise values.error("mamba_n_groups", f"a divisor of mamba_n_heads ({heads})")
    limits = values.raw("time_step_limit")
    if limits not in _NO_LIMITS:
        raise UnsupportedError(
            f"{values.where}: time_step_limit {shown(limits)} is not supported, only [0.0, Infinity]"
        )
    by_group = rule in ("beside", "mixed")
    for key, only in (("mamba_proj_bias", False), ("mamba_n_groups", groups if by_group else 1)):
        if values.raw(key) != only:
            raise UnsupportedError(f"{values.where}: {key} {shown(values.raw(key))} is not supported, only {only}")
    key_dim, taps = values.integer("mamba_d_state", 1, _MAX_DIM), values.integer("mamba_d_conv", 2, _MAX_TAPS)
    found = ScanNet(which, groups, heads, key_dim, value_dim, taps, values.boolean("mamba_conv_bias"))
    if rule == "beside":
        found = _beside(found, values)
    elif rule == "mixed":
        found = replace(found, norms=groups)
        values.choice("mamba_hidden_act", {"silu": "silu", "swish": "silu"})
    return found if any(which) else None


def mixing_of(values: ConfigValues, layers: int) -> tuple[bool, ...]:
    """Of a rule "mixed": whether every layer attends or recurs, and else is an MLP or experts."""
    return tuple(kind in (LINEAR, FULL) for kind in _mixed(values, layers))


def with_mixed_layers(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration whose layers a list or a pattern names ("M-M*"), with `layer_types` and their number."""
    named = next(
        (config[key] for key in ("layer_types", "layers_block_type", "hybrid_override_pattern") if config.get(key)),
        [LINEAR, MOE, FULL, MLP],  # (as transformers has it)
    )
    if not isinstance(named, list | str):
        return config
    kinds = [_MIXED.get(kind, kind) if isinstance(kind, str) else kind for kind in named]
    return {**config, "layer_types": kinds, "num_hidden_layers": len(kinds)}


def _mixed(values: ConfigValues, layers: int) -> list[str]:
    known = {kind: kind for kind in (LINEAR, FULL, MOE, MLP)}
    kinds = typed_layers(values, layers, known)
    if kinds is None:
        raise values.error("layers_block_type", "a list of what the layers are")
    return kinds


def _inner_width(rule: Scanned, values: ConfigValues, heads: int, hidden: int) -> int:
    """Features of all heads' values."""
    if rule == "mixed":
        return heads * values.integer("mamba_d_head", 1, _MAX_DIM)
    named = values.optional_integer("mamba_d_ssm", 1, _MAX_EXPAND * hidden) if rule == "beside" else None
    return named or values.integer("mamba_expand", 1, _MAX_EXPAND) * hidden


def _beside(net: ScanNet, values: ConfigValues) -> ScanNet:
    """Falcon-H1's: factors everywhere, and perhaps no norm."""
    normed = values.boolean("mamba_rms_norm")
    for key, only in (("projectors_bias", False), *((("mamba_norm_before_gate", False),) if normed else ())):
        if values.raw(key) != only:
            raise UnsupportedError(f"{values.where}: {key} {shown(values.raw(key))} is not supported, only {only}")
    into = values.number("ssm_in_multiplier", *FACTORS)
    gate, value, key, query, steps = (into * factor for factor in numbers(values, "ssm_multipliers", 5))
    return replace(
        net,
        beside=True,
        norms=net.groups if normed else 0,
        gate=gate,
        parts=(value, key, query),
        steps=steps,
        out=values.number("ssm_out_multiplier", *FACTORS),
    )


def _which(rule: Scanned, values: ConfigValues, layers: int) -> tuple[bool, ...]:
    if rule == "listed":
        types = typed_layers(values, layers, {"mamba": LINEAR, "attention": FULL, LINEAR: LINEAR, FULL: FULL})
        return (True,) * layers if types is None else tuple(kind == LINEAR for kind in types)
    if rule == "beside":
        return (True,) * layers
    if rule == "mixed":
        return tuple(kind == LINEAR for kind in _mixed(values, layers))
    attend = values.raw("attn_layer_indices") or []
    if not isinstance(attend, list) or not all(type(layer) is int and 0 <= layer < layers for layer in attend):
        raise values.error("attn_layer_indices", f"a list of layers, numbers from 0 to {layers - 1}")
    return tuple(layer not in attend for layer in range(layers))
