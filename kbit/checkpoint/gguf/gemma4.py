"""Gemma 4 in GGUF: layers of two shapes, tensors that no other architecture has, and what config.json says of both.

As llama.cpp writes and reads it (`conversion/gemma.py`, `src/models/gemma4.cpp`): metadata is of layers without a
window, with `_swa` of the others; numbers that layers differ in are arrays; which pairs turn in layers without a window
is told by `rope_freqs.weight`, whose divisors are 1 for these and 1e30 for the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kbit.checkpoint.gguf.metadata import GGUFTensor
from kbit.checkpoint.gguf.names import Dimensions, LayerSizes, Special
from kbit.checkpoint.gguf.orders import Piece
from kbit.host.errors import UnsupportedError

if TYPE_CHECKING:
    from kbit.checkpoint.gguf.keys import Keys

_FULL, _SLIDING = "full_attention", "sliding_attention"

KEYS = frozenset(
    {
        "attention.sliding_window_pattern", "attention.shared_kv_layers", "attention.key_length_swa",
        "attention.value_length_swa", "rope.freq_base_swa", "rope.dimension_count_swa",
        "embedding_length_per_layer_input", "expert_count", "expert_used_count", "expert_feed_forward_length",
        "final_logit_softcapping",
    }
)  # fmt: skip

_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z0-9_]+)\.(weight|scale)")
_GLOBAL = {
    "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
}
_PARTS = {
    "layer_output_scale.weight": "layer_scalar",
    "inp_gate.weight": "per_layer_input_gate.weight",
    "proj.weight": "per_layer_projection.weight",
    "post_norm.weight": "post_per_layer_input_norm.weight",
    "pre_ffw_norm_2.weight": "pre_feedforward_layernorm_2.weight",
    "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
    "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight",
    "ffn_gate_inp.weight": "router.proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
}
# Of experts: the matrices that a tensor's rows are.
_STACKS = {
    "ffn_gate_up_exps": ("gate_proj", "up_proj"),
    "ffn_gate_exps": ("gate_proj",),
    "ffn_up_exps": ("up_proj",),
    "ffn_down_exps": ("down_proj",),
}


def _slides(keys: Keys, layers: int) -> list[bool]:
    flags = keys.flags("attention.sliding_window_pattern", layers)
    if flags is None:
        keys.header.fail(f"metadata key '{keys.arch}.attention.sliding_window_pattern' is missing", "convert it again")
    if flags[-1]:
        keys.header.fail(f"'{keys.arch}.attention.sliding_window_pattern' gives the last layer a window")
    return flags


def _sizes(keys: Keys, layers: int) -> LayerSizes:
    """The heads and the width of every layer."""
    slides, heads = _slides(keys, layers), keys.size("attention.head_count")
    full, windowed = keys.size("attention.key_length"), keys.size("attention.key_length_swa")
    for name, wanted in (
        ("attention.value_length", full),
        ("attention.value_length_swa", windowed),
        ("rope.dimension_count", full),
        ("rope.dimension_count_swa", windowed),
    ):
        if keys.size(name, wanted) != wanted:
            raise UnsupportedError(
                f"{keys.header.path}: '{keys.arch}.{name}' is {keys.size(name)} while heads have {wanted} values; kbit "
                "needs them equal"
            )
    return LayerSizes(
        head_dims=[windowed if slide else full for slide in slides],
        kv_heads=keys.sizes("attention.head_count_kv", layers, heads),
        widths=keys.sizes("feed_forward_length", layers),
    )


def _absent(keys: Keys, layers: int, tensors: Mapping[str, GGUFTensor]) -> list[frozenset[str]]:
    """What every layer may lack: keys of its own where it attends to another one's, and values that its keys are."""
    first = layers - keys.count("attention.shared_kv_layers")
    return [
        frozenset({"attn_k", "attn_v", "attn_k_norm"})
        if layer >= first
        else frozenset({"attn_v"} if f"blk.{layer}.attn_v.weight" not in tensors else ())
        for layer in range(layers)
    ]


def _more(keys: Keys, dims: Dimensions, layers: int, tensors: Mapping[str, GGUFTensor]) -> dict[str, tuple[int, ...]]:
    """The tensors beyond those of other architectures, with their shapes."""
    hidden, own, experts = dims.hidden, keys.count("embedding_length_per_layer_input"), keys.count("expert_count")
    shapes: dict[str, tuple[int, ...]] = {}
    if own:
        shapes["per_layer_token_embd.weight"] = (dims.vocab, layers * own)
        shapes["per_layer_model_proj.weight"] = (layers * own, hidden)
        shapes["per_layer_proj_norm.weight"] = (own,)
    for layer in range(layers):
        shapes[f"blk.{layer}.layer_output_scale.weight"] = (1,)
        if own:
            shapes[f"blk.{layer}.inp_gate.weight"] = (own, hidden)
            shapes[f"blk.{layer}.proj.weight"] = (hidden, own)
            shapes[f"blk.{layer}.post_norm.weight"] = (hidden,)
        if experts:
            width = keys.size("expert_feed_forward_length")
            for norm in ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2"):
                shapes[f"blk.{layer}.{norm}.weight"] = (hidden,)
            shapes[f"blk.{layer}.ffn_gate_inp.weight"] = (experts, hidden)
            shapes[f"blk.{layer}.ffn_gate_inp.scale"] = (hidden,)
            shapes[f"blk.{layer}.ffn_down_exps.scale"] = (experts,)
            shapes[f"blk.{layer}.ffn_down_exps.weight"] = (experts, hidden, width)
            if f"blk.{layer}.ffn_gate_up_exps.weight" in tensors:
                shapes[f"blk.{layer}.ffn_gate_up_exps.weight"] = (experts, 2 * width, hidden)
            else:
                shapes[f"blk.{layer}.ffn_gate_exps.weight"] = (experts, width, hidden)
                shapes[f"blk.{layer}.ffn_up_exps.weight"] = (experts, width, hidden)
    return shapes


def _located(name: str, tensor: GGUFTensor, config: Mapping[str, Any]) -> list[Piece] | None:
    """The canonical tensors that a tensor holds, each as the part of it that it is; None where it is like others'."""
    if name in _GLOBAL:
        return [Piece(_GLOBAL[name], tensor)]
    match = _BLOCK.fullmatch(name)
    if match is None:
        return None
    layer, part, kind = match.groups()
    prefix = f"model.layers.{layer}."
    if part in ("attn_k", "attn_v", "attn_k_norm"):
        first = int(config["num_hidden_layers"]) - int(config["num_kv_shared_layers"])
        return [] if int(layer) >= first else None
    if f"{part}.{kind}" in _PARTS:
        return [Piece(prefix + _PARTS[f"{part}.{kind}"], tensor)]
    if part not in _STACKS:
        return None
    found, modules = [], _STACKS[part]
    count, rows, columns = tensor.shape
    size = tensor.nbytes // count // len(modules)
    for expert in range(count):
        for at, module in enumerate(modules):
            place = tensor.offset + (expert * len(modules) + at) * size
            piece = replace(tensor, shape=(rows // len(modules), columns), offset=place, nbytes=size)
            found.append(Piece(f"{prefix}experts.{expert}.{module}.weight", piece))
    return found


def configure(keys: Keys, config: dict[str, Any]) -> None:
    """What config.json says of these models (`kbit.models.families.gemma4`)."""
    layers = int(config["num_hidden_layers"])
    slides, sizes = _slides(keys, layers), _sizes(keys, layers)
    shared = keys.count("attention.shared_kv_layers")
    if shared >= layers:
        keys.header.fail(f"'{keys.arch}.attention.shared_kv_layers' is {shared}, of {layers} layers")
    config["layer_types"] = [_SLIDING if slide else _FULL for slide in slides]
    config["sliding_window"] = keys.size("attention.sliding_window")
    config["num_kv_shared_layers"] = shared
    full = slides.index(False)
    usual = slides.index(True) if True in slides else full
    config["head_dim"], config["global_head_dim"] = sizes.head_dims[usual], sizes.head_dims[full]
    config["num_key_value_heads"] = sizes.kv_heads[usual]
    config["attention_k_eq_v"] = full < layers - shared and f"blk.{full}.attn_v.weight" not in keys.tensors
    if config["attention_k_eq_v"]:
        config["num_global_key_value_heads"] = sizes.kv_heads[full]
    config["intermediate_size"] = sizes.widths[0]
    config["use_double_wide_mlp"] = shared > 0 and sizes.widths[-1] == 2 * sizes.widths[0]
    for layer in range(layers):
        width = sizes.widths[0] * (2 if config["use_double_wide_mlp"] and layer >= layers - shared else 1)
        heads = config["num_key_value_heads"] if slides[layer] else sizes.kv_heads[full]
        if sizes.widths[layer] != width or sizes.kv_heads[layer] != heads:
            raise UnsupportedError(
                f"{keys.header.path}: '{keys.arch}.feed_forward_length' or 'attention.head_count_kv' of layer {layer} "
                "is not that of the layers before it of its kind"
            )
    if sizes.kv_heads[full] != sizes.kv_heads[usual] and not config["attention_k_eq_v"]:
        raise UnsupportedError(
            f"{keys.header.path}: '{keys.arch}.attention.head_count_kv' differs where values have tensors of their own"
        )
    own = keys.count("embedding_length_per_layer_input")
    config["hidden_size_per_layer_input"], config["vocab_size_per_layer_input"] = own, config["vocab_size"]
    experts = keys.count("expert_count")
    config["enable_moe_block"] = experts > 0
    if experts:
        config["num_experts"], config["top_k_experts"] = experts, keys.size("expert_used_count")
        config["moe_intermediate_size"] = keys.size("expert_feed_forward_length")
    theta = config.pop("rope_theta")
    config.pop("rope_scaling")
    config["rope_parameters"] = {
        _FULL: {"rope_theta": theta, **_turning(keys, config["global_head_dim"])},
        _SLIDING: {"rope_theta": keys.real("rope.freq_base_swa", 10000.0), "rope_type": "default"},
    }


def _turning(keys: Keys, head_dim: int) -> dict[str, Any]:
    """How many pairs of layers without a window turn, as a share of a head."""
    divisors = keys.divisors
    if divisors is None:
        return {"rope_type": "default"}
    pairs = head_dim // 2
    count = sum(value == 1.0 for value in divisors)
    # (1e30 in float32 is not 1e30.)
    known = all(value == 1.0 if at < count else value > 9e29 for at, value in enumerate(divisors))
    if len(divisors) != pairs or not known:
        raise UnsupportedError(
            f"{keys.header.path}: tensor 'rope_freqs.weight' is not {pairs} divisors, 1 of the first pairs and 1e30 of "
            "the others"
        )
    share = 2 * count / head_dim
    if int(share * head_dim // 2) != count:
        share = (2 * count + 0.5) / head_dim
    return {"rope_type": "proportional", "partial_rotary_factor": share}


SPECIAL = Special(_sizes, _absent, _more, _located)
