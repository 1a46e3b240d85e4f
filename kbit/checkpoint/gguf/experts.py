"""Mixtures of experts in GGUF files: one tensor holds all of a layer's matrices of a kind, and each is a part of it.

What llama.cpp's code knows and the file need not say: how an architecture's router scores, and whether it normalises.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kbit.checkpoint.gguf.metadata import GGUFTensor
from kbit.host.errors import UnsupportedError

if TYPE_CHECKING:
    from kbit.checkpoint.gguf.keys import Keys

# Metadata keys of experts, after the architecture's name.
EXPERT_KEYS = frozenset(
    {
        "expert_feed_forward_length", "expert_shared_feed_forward_length", "expert_shared_count", "expert_gating_func",
        "expert_weights_norm", "expert_weights_scale", "expert_group_count", "expert_group_used_count",
        "leading_dense_block_count", "nextn_predict_layers",
    }
)  # fmt: skip
# Values of expert_gating_func.
SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN = 1, 2, 3

_PART = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.(weight|bias)")
_STACKS = {"ffn_gate_exps": 0, "ffn_up_exps": 1, "ffn_down_exps": 2}
_SHARED = {"ffn_gate_shexp": "gate_proj", "ffn_up_shexp": "up_proj", "ffn_down_shexp": "down_proj"}
_NO_NUMBER = "is not supported for this architecture"


@dataclass(frozen=True)
class ExpertTensors:
    """How an architecture's experts are called, and what its router does.

    Attributes:
        count, width: entries of the configuration: the number of experts, and the features inside one.
        block: where the experts are in a layer, canonically.
        names: of an expert's gate, up and down there.
        router: there.
        selection_bias: canonical name in a layer of what is added where experts are chosen.
        shared: canonical place of the shared expert in a layer.
        shared_down: the name of its matrix back, there.
        shared_width: the configuration's name for its features where the file has their number; 0: there is none.
        switch: that of the gate on it.
        biases: whether experts and router have biases.
        scores: the value of expert_gating_func.
        normalises: whether chosen experts' scores are divided by their sum, where the file does not say.
        entry: the configuration's name for that; None: it is always so.
        scaled, grouped, leading: whether a factor on scores, groups of experts, and dense layers at the beginning are
            read.
        optional: files without experts are of this architecture, too.
    """

    count: str = "num_experts"
    width: str = "moe_intermediate_size"
    block: str = "mlp"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    router: str = "gate"
    selection_bias: str | None = None
    shared: str | None = None
    shared_down: str = "down_proj"
    shared_width: str | None = None
    switch: str | None = None
    biases: bool = False
    scores: int = SOFTMAX
    normalises: bool = True
    entry: str | None = None
    scaled: bool = False
    grouped: bool = False
    leading: bool = False
    optional: bool = False


def expert_config(keys: Keys, experts: ExpertTensors) -> dict[str, Any]:
    """Entries of the configuration that say what experts there are; none where there are none.

    Raises:
        CheckpointError: a missing or senseless value.
        UnsupportedError: a value that means another model than the architecture's.
    """
    if experts.optional and not keys.count("expert_count"):
        return {}
    count = keys.size("expert_count")
    config: dict[str, Any] = {experts.count: count, "num_experts_per_tok": keys.size("expert_used_count")}
    if config["num_experts_per_tok"] > count:
        keys.header.fail(f"{keys.arch}.expert_used_count is more than the {count} experts there are")
    named = f"{keys.arch}.expert_feed_forward_length" in keys.header
    config[experts.width] = keys.size("expert_feed_forward_length" if named else "feed_forward_length")
    gating = keys.count("expert_gating_func")
    if gating not in (0, experts.scores):
        raise UnsupportedError(f"{keys.header.path}: '{keys.arch}.expert_gating_func' {gating} {_NO_NUMBER}")
    normalises = keys.header.value(f"{keys.arch}.expert_weights_norm")
    normalises = experts.normalises if normalises is None else normalises
    if experts.entry is not None:
        config[experts.entry] = bool(normalises)
    elif bool(normalises) != experts.normalises:
        raise UnsupportedError(f"{keys.header.path}: '{keys.arch}.expert_weights_norm' {normalises} {_NO_NUMBER}")
    scale = keys.real("expert_weights_scale", 1.0) or 1.0  # 0 says that there is none
    if experts.scaled:
        config["routed_scaling_factor"] = scale
    elif scale != 1.0:
        raise UnsupportedError(f"{keys.header.path}: '{keys.arch}.expert_weights_scale' {scale} {_NO_NUMBER}")
    groups = keys.size("expert_group_count", 1)
    if experts.grouped:
        config["n_group"], config["topk_group"] = groups, keys.size("expert_group_used_count", 1)
    elif groups != 1:
        raise UnsupportedError(f"{keys.header.path}: '{keys.arch}.expert_group_count' {groups} {_NO_NUMBER}")
    leading = keys.count("leading_dense_block_count")
    if experts.leading:
        config["first_k_dense_replace"] = leading
    elif leading:
        raise UnsupportedError(f"{keys.header.path}: '{keys.arch}.leading_dense_block_count' {leading} {_NO_NUMBER}")
    if experts.shared_width is not None:
        config[experts.shared_width] = keys.count("expert_shared_feed_forward_length")
    elif experts.switch is not None:
        config["shared_expert_intermediate_size"] = keys.size("expert_shared_feed_forward_length")
    elif experts.shared is not None:
        config["n_shared_experts"] = keys.count("expert_shared_count")
    return config


def expected_experts(
    experts: ExpertTensors, config: Mapping[str, Any], hidden: int, layer: int
) -> dict[str, tuple[int, ...]] | None:
    """The tensors that a layer has in place of an MLP, by GGUF name, with their shapes; None: it has an MLP.

    Args:
        experts: the architecture's.
        config: of `expert_config`.
        hidden: the model's.
        layer: its index.
    """
    if not config or layer < config.get("first_k_dense_replace", 0):
        return None
    count, width = config[experts.count], config[experts.width]
    prefix = f"blk.{layer}."
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}ffn_gate_inp.weight": (count, hidden)}
    for part, place in _STACKS.items():
        rows, columns = (width, hidden) if place < 2 else (hidden, width)
        shapes[f"{prefix}{part}.weight"] = (count, rows, columns)
        if experts.biases:
            shapes[f"{prefix}{part}.bias"] = (count, rows)
    if experts.biases:
        shapes[f"{prefix}ffn_gate_inp.bias"] = (count,)
    if experts.selection_bias is not None:
        shapes[f"{prefix}exp_probs_b.bias"] = (count,)
    entry = experts.shared_width or "shared_expert_intermediate_size"
    shared = config.get(entry, width * config.get("n_shared_experts", 0))
    if experts.shared is not None and shared:
        for part in _SHARED:
            shapes[f"{prefix}{part}.weight"] = (hidden, shared) if "down" in part else (shared, hidden)
        if experts.switch is not None:
            shapes[f"{prefix}ffn_gate_inp_shexp.weight"] = (1, hidden)
    return shapes


def as_row(name: str, tensor: GGUFTensor) -> GGUFTensor:
    """The gate of a shared expert as a matrix of one row: some files have it as a vector."""
    if name.endswith(".ffn_gate_inp_shexp.weight") and len(tensor.shape) == 1:
        return replace(tensor, shape=(1, *tensor.shape))
    return tensor


def expert_rows(experts: ExpertTensors, name: str, tensor: GGUFTensor) -> list[tuple[str, GGUFTensor]]:
    """The canonical tensors that a tensor holds, each as the part of it that it is; none where it is not of experts."""
    match = _PART.fullmatch(name)
    if match is None:
        return []
    layer, part, kind = match.groups()
    prefix = f"model.layers.{layer}."
    if part in _STACKS:
        size = tensor.nbytes // tensor.shape[0]
        module = experts.names[_STACKS[part]]
        return [
            (
                f"{prefix}{experts.block}.experts.{index}.{module}.{kind}",
                replace(tensor, shape=tensor.shape[1:], offset=tensor.offset + index * size, nbytes=size),
            )
            for index in range(tensor.shape[0])
        ]
    if part == "ffn_gate_inp":
        return [(f"{prefix}{experts.block}.{experts.router}.{kind}", tensor)]
    if part == "exp_probs_b" and experts.selection_bias is not None:
        return [(prefix + experts.selection_bias, tensor)]
    if part == "ffn_gate_inp_shexp" and experts.switch is not None:
        return [(f"{prefix}{experts.switch}.{kind}", as_row(name, tensor))]
    if part in _SHARED and experts.shared is not None:
        module = experts.shared_down if part == "ffn_down_shexp" else _SHARED[part]
        return [(f"{prefix}{experts.shared}.{module}.{kind}", tensor)]
    return []
