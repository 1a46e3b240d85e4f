"""Latent attention as configurations describe it: sizes and the factor on scores, read and checked."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kbit.host.errors import UnsupportedError
from kbit.models.block_specs import LatentSpec
from kbit.models.config_values import ConfigValues, shown
from kbit.models.rope_spec import RopeSpec
from kbit.models.tensor_names import TensorNames

# A limit that no real model comes near.
_MAX_WIDTH = 1 << 24


@dataclass(frozen=True)
class LatentRules:
    """How a family's configuration describes latent attention.

    Attributes:
        plain_q: what makes queries where `q_lora_rank` is null; `TensorNames.q` makes them of a vector of that rank.
        eps: epsilon of the norms of latent vectors, which no configuration says.
        whole_share: `partial_rotary_factor` is of all features of a head, not of those that turn.
    """

    plain_q: str
    eps: float = 1e-6
    whole_share: bool = False


@dataclass(frozen=True)
class Latent:
    """What a configuration says.

    Attributes:
        spec: sizes.
        head_dim: features of a head's queries and keys.
        turned: how many of them turn.
        rope_dim: of how many features rotary settings speak.
        names: the family's tensors, those alone that there are.
    """

    spec: LatentSpec
    head_dim: int
    turned: int
    rope_dim: int
    names: TensorNames


def read_latent(rules: LatentRules, values: ConfigValues, names: TensorNames, hidden: int, heads: int) -> Latent:
    """Sizes of latent attention.

    Args:
        rules: the family's.
        values: the configuration.
        names: the family's.
        hidden: hidden_size.
        heads: num_attention_heads.

    Raises:
        CheckpointError: a missing or senseless value.
        UnsupportedError: values wider than keys, or fewer key/value heads than heads.
    """
    turned = values.integer("qk_rope_head_dim", 2, _MAX_WIDTH)
    head_dim = turned + values.integer("qk_nope_head_dim", 1, _MAX_WIDTH)
    value_dim = values.optional_integer("v_head_dim", 1, _MAX_WIDTH) or hidden // heads
    if value_dim > head_dim:
        raise UnsupportedError(
            f"{values.where}: v_head_dim {value_dim} is not supported; it must be at most qk_nope_head_dim + "
            f"qk_rope_head_dim, {head_dim}"
        )
    if values.raw("num_key_value_heads") not in (None, heads):
        raise UnsupportedError(
            f"{values.where}: num_key_value_heads {shown(values.raw('num_key_value_heads'))} is not supported for "
            f"latent attention, whose heads have keys of their own; it must be num_attention_heads, {heads}"
        )
    query_rank = values.optional_integer("q_lora_rank", 1, _MAX_WIDTH) or 0
    if not query_rank:
        names = replace(names, q=rules.plain_q, q_a=None, q_a_norm=None)
    spec = LatentSpec(values.integer("kv_lora_rank", 1, _MAX_WIDTH), query_rank, value_dim, rules.eps)
    return Latent(spec, head_dim, turned, head_dim if rules.whole_share else turned, names)


def check_turned(latent: Latent, rope: RopeSpec, growing: bool, where: str) -> None:
    """Raise where rotary settings do not fit the heads.

    Args:
        latent: the heads.
        rope: the settings.
        growing: queries grow with their position, pair by pair of features.
        where: what to call the configuration.

    Raises:
        UnsupportedError: they turn more or fewer features than the keys of all heads share, or leave half a pair.
    """
    if rope.dim != latent.turned:
        raise UnsupportedError(
            f"{where}: partial_rotary_factor turns {rope.dim} features; with latent attention it must be "
            f"qk_rope_head_dim, {latent.turned}"
        )
    if growing and latent.head_dim % 2:
        raise UnsupportedError(
            f"{where}: qk_nope_head_dim + qk_rope_head_dim is {latent.head_dim}; kbit needs it even for this model"
        )


def latent_scale(latent: Latent, rope: RopeSpec) -> float | None:
    """The factor on dot products; None: D^-0.5. An extended context's temperature is in it, squared (DeepSeek-V2)."""
    return None if rope.temperature == 1.0 else float(latent.head_dim**-0.5 * rope.temperature**2)
