"""Gated delta nets in GGUF files (qwen3next, qwen35, qwen35moe), and the gated attention between them.

Heads of queries and of gates alternate in one matrix. qwen35 has heads of values in another order than those who train
the model (`orders.Tiled`), which the converter of llama.cpp chooses; a decay's rate is stored as -exp of what it was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kbit.checkpoint.gguf.metadata import GGUFTensor
from kbit.checkpoint.gguf.orders import Order, Piece, Runs, Tiled

if TYPE_CHECKING:
    from kbit.checkpoint.gguf.keys import Keys

# Metadata keys of these models, after the architecture's name. Sections of a rotary embedding are of one position in a
# text; layers that predict further tokens come last and are left out.
DELTA_KEYS = frozenset(
    {
        "ssm.conv_kernel", "ssm.state_size", "ssm.group_count", "ssm.time_step_rank", "ssm.inner_size",
        "full_attention_interval", "attention.recurrent_layers", "rope.dimension_sections", "nextn_predict_layers",
    }
)  # fmt: skip

_PART = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z_0-9]+)(?:\.(weight|bias))?")
_LINEAR, _FULL = "linear_attention", "full_attention"
_MOST_HEADS, _MOST_WIDTH = 1 << 16, 1024


@dataclass(frozen=True)
class DeltaTensors:
    """How an architecture's delta nets are stored.

    Attributes:
        tiled: heads of values are in tiled order.
        together: both small projections are one matrix, by head of keys.
    """

    tiled: bool
    together: bool


@dataclass(frozen=True)
class _Sizes:
    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    taps: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> _Sizes:
        return cls(
            config["linear_num_key_heads"],
            config["linear_num_value_heads"],
            config["linear_key_head_dim"],
            config["linear_value_head_dim"],
            config["linear_conv_kernel_dim"],
        )

    @property
    def keys(self) -> int:
        """Rows of queries and keys."""
        return 2 * self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        return self.heads * self.value_dim


def delta_config(keys: Keys, layers: int) -> dict[str, Any]:
    """Entries of the configuration that say what delta nets there are, and in which layers.

    Raises:
        CheckpointError: a missing or senseless value.
    """
    heads, key_heads = keys.size("ssm.time_step_rank"), keys.size("ssm.group_count")
    inner, taps = keys.size("ssm.inner_size"), keys.size("ssm.conv_kernel")
    if heads % key_heads or heads > _MOST_HEADS:
        keys.header.fail(f"{keys.arch}.ssm.time_step_rank {heads} is not a multiple of ssm.group_count {key_heads}")
    if inner % heads or inner // heads > _MOST_WIDTH:
        keys.header.fail(f"{keys.arch}.ssm.inner_size {inner} is not that of {heads} heads")
    if taps < 2:
        keys.header.fail(f"{keys.arch}.ssm.conv_kernel is {taps}, expected 2 or more")
    recurrent = keys.flags("attention.recurrent_layers", layers)
    if recurrent is None:
        interval = keys.size("full_attention_interval", 4)
        recurrent = [(layer + 1) % interval != 0 for layer in range(layers)]
    return {
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": heads,
        "linear_key_head_dim": keys.size("ssm.state_size"),
        "linear_value_head_dim": inner // heads,
        "linear_conv_kernel_dim": taps,
        "layer_types": [_LINEAR if flag else _FULL for flag in recurrent],
    }


def expected_delta(
    delta: DeltaTensors, config: Mapping[str, Any], hidden: int, layer: int, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer, by GGUF name, with their shapes, from those of one that attends without a gate."""
    prefix = f"blk.{layer}."
    found = dict(shapes)
    if config["layer_types"][layer] == _FULL:
        rows, columns = found[f"{prefix}attn_q.weight"]
        found[f"{prefix}attn_q.weight"] = (2 * rows, columns)
        return found
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm", "attn_k_norm"):
        for kind in ("weight", "bias"):
            found.pop(f"{prefix}{part}.{kind}", None)
    size = _Sizes.of(config)
    found |= {
        f"{prefix}attn_qkv.weight": (size.keys + size.values, hidden),
        f"{prefix}attn_gate.weight": (size.values, hidden),
        f"{prefix}ssm_conv1d.weight": (size.keys + size.values, size.taps),
        f"{prefix}ssm_dt.bias": (size.heads,),
        f"{prefix}ssm_a": (size.heads,),
        f"{prefix}ssm_norm.weight": (size.value_dim,),
        f"{prefix}ssm_out.weight": (hidden, size.values),
    }
    if delta.together:
        found[f"{prefix}ssm_ba.weight"] = (2 * size.heads, hidden)
    else:
        found |= {f"{prefix}{part}.weight": (size.heads, hidden) for part in ("ssm_beta", "ssm_alpha")}
    return found


def delta_pieces(delta: DeltaTensors, config: Mapping[str, Any], name: str, tensor: GGUFTensor) -> list[Piece]:
    """The canonical tensors that a tensor holds; none where it is not of a delta net or of queries and their gates."""
    match = _PART.fullmatch(name)
    if match is None:
        return []
    layer, part, kind = match.groups()
    inside = f"model.layers.{layer}.linear_attn."
    if part == "attn_q":
        attention, head = f"model.layers.{layer}.self_attn.", int(config["head_dim"])
        half = _rows(tensor, tensor.shape[0] // 2)
        return [
            Piece(f"{attention}{module}.{kind}", half, Runs(first, head, 2 * head))
            for module, first in (("q_proj", 0), ("gate_proj", head))
        ]
    if config["layer_types"][int(layer)] != _LINEAR:
        return []
    size = _Sizes.of(config)
    shared = size.heads // size.key_heads
    tiled = delta.tiled and shared > 1

    def order(before: int, each: int) -> Order | None:
        return Tiled(before, size.key_heads, shared, each) if tiled else None

    if part == "ssm_ba":
        half = _rows(tensor, size.heads)
        return [
            Piece(f"{inside}in_proj_{which}.weight", half, Runs(first, shared, 2 * shared))
            for which, first in (("b", 0), ("a", shared))
        ]
    if part == "ssm_conv1d":
        channels, taps = tensor.shape
        each = replace(tensor, shape=(channels, 1, taps))
        return [Piece(f"{inside}conv1d.weight", each, order(size.keys, size.value_dim))]
    if part == "ssm_out":
        return [Piece(f"{inside}out_proj.weight", tensor, columns=order(0, size.value_dim))]
    if part == "ssm_a":
        return [Piece(f"{inside}A_log", tensor, order(0, 1), decays=True)]
    named: dict[str, tuple[str, Order | None]] = {
        "attn_qkv": ("in_proj_qkv.weight", order(size.keys, size.value_dim)),
        "attn_gate": ("in_proj_z.weight", order(0, size.value_dim)),
        "ssm_beta": ("in_proj_b.weight", order(0, 1)),
        "ssm_alpha": ("in_proj_a.weight", order(0, 1)),
        "ssm_dt": ("dt_bias", order(0, 1)),
        "ssm_norm": ("norm.weight", None),
    }
    return [Piece(inside + named[part][0], tensor, named[part][1])] if part in named else []


def _rows(tensor: GGUFTensor, count: int) -> GGUFTensor:
    """So many rows of a tensor, wherever they are in it."""
    shape = (count, *tensor.shape[1:])
    return replace(tensor, shape=shape, nbytes=tensor.nbytes // tensor.shape[0] * count)
