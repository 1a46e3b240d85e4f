"""Mamba-2's layers as configurations describe them: read and checked."""

from __future__ import annotations

import math
from typing import Any, Literal

from kbit.host.errors import UnsupportedError
from kbit.models.config_values import ConfigValues, shown
from kbit.models.layer_types import FULL, LINEAR, typed_layers
from kbit.models.mixer_specs import ScanNet

# Limits that no real model comes near.
_MAX_HEADS, _MAX_DIM, _MAX_TAPS, _MAX_EXPAND = 1 << 16, 1024, 64, 64

# The same as Python's JSON and as transformers writes it.
_NO_LIMITS: tuple[Any, ...] = (None, [0.0, math.inf], [0.0, {"__float__": "Infinity"}])

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

# Which layers are Mamba-2's: as `layer_types` says, or all but those of `attn_layer_indices`.
Scanned = Literal["listed", "but listed"]


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
    heads, expand = values.integer("mamba_n_heads", 1, _MAX_HEADS), values.integer("mamba_expand", 1, _MAX_EXPAND)
    inner = expand * hidden
    value_dim = inner // heads if values.raw("mamba_d_head") == "auto" else values.integer("mamba_d_head", 1, _MAX_DIM)
    if value_dim * heads != inner:
        raise values.error("mamba_d_head", f"such that {heads} heads of it are mamba_expand hidden_size, {inner}")
    groups = values.integer("mamba_n_groups", 1, heads)
    limits = values.raw("time_step_limit")
    if limits not in _NO_LIMITS:
        raise UnsupportedError(
            f"{values.where}: time_step_limit {shown(limits)} is not supported, only [0.0, Infinity]"
        )
    for key, only in (("mamba_proj_bias", False), ("mamba_n_groups", 1)):
        if values.raw(key) != only:
            raise UnsupportedError(f"{values.where}: {key} {shown(values.raw(key))} is not supported, only {only}")
    key_dim, taps = values.integer("mamba_d_state", 1, _MAX_DIM), values.integer("mamba_d_conv", 2, _MAX_TAPS)
    bias = values.boolean("mamba_conv_bias")
    return ScanNet(which, groups, heads, key_dim, value_dim, taps, bias) if any(which) else None


def _which(rule: Scanned, values: ConfigValues, layers: int) -> tuple[bool, ...]:
    if rule == "listed":
        types = typed_layers(values, layers, {"mamba": LINEAR, "attention": FULL, LINEAR: LINEAR, FULL: FULL})
        return (True,) * layers if types is None else tuple(kind == LINEAR for kind in types)
    attend = values.raw("attn_layer_indices") or []
    if not isinstance(attend, list) or not all(type(layer) is int and 0 <= layer < layers for layer in attend):
        raise values.error("attn_layer_indices", f"a list of layers, numbers from 0 to {layers - 1}")
    return tuple(layer not in attend for layer in range(layers))
