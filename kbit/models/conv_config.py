"""LFM2's convolutions and MLP widths, as configurations describe them: read and checked."""

from __future__ import annotations

from kbit.models.config_values import ConfigValues
from kbit.models.layer_types import conv_layers
from kbit.models.mixer_specs import ConvNet
from kbit.models.scan_config import SHARES

# Limits that no real model comes near.
_MAX_TAPS, _MAX_MULTIPLE, _MAX_FACTOR = 64, 1 << 20, 1e3


def conv_of(values: ConfigValues, layers: int, hidden: int) -> ConvNet | None:
    """The convolutions of a configuration, or None where all layers attend.

    Args:
        values: the configuration.
        layers: how many there are.
        hidden: hidden_size.

    Raises:
        UnsupportedError: a layer type that kbit does not know.
        CheckpointError: a missing or senseless value.
    """
    which = conv_layers(values, layers)
    taps, bias = values.integer("conv_L_cache", 2, _MAX_TAPS), values.boolean("conv_bias")
    features = hidden // (values.optional_integer(SHARES, 1, hidden) or 1)
    return ConvNet(which, features, taps, bias) if any(which) else None


def adjusted_width(values: ConfigValues, width: int) -> int:
    """Features inside an MLP where `block_auto_adjust_ff_dim` says that the configuration names more (LFM2).

    Raises:
        CheckpointError: a senseless value.
    """
    if not values.boolean("block_auto_adjust_ff_dim"):
        return width
    width = int(2 * width / 3)
    factor = values.optional_number("block_ffn_dim_multiplier", above=0.0, below=_MAX_FACTOR)
    if factor is None:
        return width
    multiple = values.integer("block_multiple_of", 1, _MAX_MULTIPLE)
    return multiple * -(-int(factor * width) // multiple)
