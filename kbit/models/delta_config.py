"""Which layers of a configuration have a gated delta rule in place of attention, and how large they are."""

from __future__ import annotations

from kbit.models.config_values import ConfigValues
from kbit.models.delta_net import DeltaNet
from kbit.models.layer_types import linear_layers

# Limits that no real model comes near.
_MAX_HEADS, _MAX_DIM, _MAX_TAPS = 1 << 16, 1024, 64

# What transformers takes where a configuration says nothing.
DEFAULTS = {
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
}


def delta_of(values: ConfigValues, layers: int) -> DeltaNet | None:
    """The gated delta nets of a configuration, or None where all layers attend.

    Args:
        values: the configuration.
        layers: how many there are.

    Raises:
        UnsupportedError: a layer type that kbit does not know.
        CheckpointError: a missing or senseless value.
    """
    which = linear_layers(values, layers)
    key_heads = values.integer("linear_num_key_heads", 1, _MAX_HEADS)
    heads = values.integer("linear_num_value_heads", 1, _MAX_HEADS)
    if heads % key_heads:
        raise values.error("linear_num_value_heads", f"a multiple of linear_num_key_heads ({key_heads})")
    key_dim = values.integer("linear_key_head_dim", 1, _MAX_DIM)
    value_dim = values.integer("linear_value_head_dim", 1, _MAX_DIM)
    taps = values.integer("linear_conv_kernel_dim", 2, _MAX_TAPS)
    return DeltaNet(which, key_heads, heads, key_dim, value_dim, taps) if any(which) else None
