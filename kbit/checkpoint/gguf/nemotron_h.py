"""GGUF files of Nemotron-H and Nemotron 3, whose layers are Mamba-2, attention, an MLP or experts, one of these each.

What a layer is its tensors say. MLPs and experts have no gate; the activation is in llama.cpp's code only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kbit.checkpoint.gguf.experts import EXPERT_KEYS, SIGMOID
from kbit.checkpoint.gguf.hybrids import SCAN_KEYS, no_scaling, state_space
from kbit.checkpoint.gguf.metadata import GGUFTensor
from kbit.checkpoint.gguf.names import RMS_EPSILON, Dimensions, LayerSizes, Special
from kbit.checkpoint.gguf.orders import Piece
from kbit.host.errors import UnsupportedError

if TYPE_CHECKING:
    from kbit.checkpoint.gguf.keys import Keys

KEYS = SCAN_KEYS | EXPERT_KEYS | {"expert_count", "expert_used_count"}
OUTSIDE = {
    "token_embd.weight": "backbone.embeddings.weight",
    "output_norm.weight": "backbone.norm_f.weight",
    "output.weight": "lm_head.weight",
}
LINEARS = {
    "attn_q": "mixer.q_proj",
    "attn_k": "mixer.k_proj",
    "attn_v": "mixer.v_proj",
    "attn_output": "mixer.o_proj",
    "ffn_up": "mixer.up_proj",
    "ffn_down": "mixer.down_proj",
}
_MAMBA, _ATTENTION, _MLP, _MOE = "mamba", "attention", "mlp", "moe"
# What is in a layer of each kind, and in no other.
_SIGNS = {"ssm_in": _MAMBA, "attn_q": _ATTENTION, "ffn_up": _MLP, "ffn_gate_inp": _MOE}
_OF_ATTENTION = frozenset({"attn_q", "attn_k", "attn_v", "attn_output"})
_OF_MLP = frozenset({"ffn_up", "ffn_down"})
_STACKS = {"ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_EXPERTS = {
    "ffn_gate_inp.weight": "gate.weight",
    "exp_probs_b.bias": "gate.e_score_correction_bias",
    "ffn_up_shexp.weight": "shared_experts.up_proj.weight",
    "ffn_down_shexp.weight": "shared_experts.down_proj.weight",
}
_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)")


def _kinds(tensors: Mapping[str, object] | frozenset[str], layers: int, path: object) -> list[str]:
    found = []
    for layer in range(layers):
        signs = [kind for part, kind in _SIGNS.items() if f"blk.{layer}.{part}.weight" in tensors]
        if len(signs) != 1:
            said = f"several: {', '.join(signs)}" if signs else "none that kbit knows"
            raise UnsupportedError(f"{path}: the tensors of layer {layer} are of {said}")
        found += signs
    return found


def _sizes(keys: Keys, layers: int) -> LayerSizes:
    """The heads and the width of every layer: those of the layers that have them."""
    head_dim, heads = keys.size("attention.key_length"), keys.size("attention.head_count")
    if keys.size("attention.value_length", head_dim) != head_dim:
        keys.header.fail(f"{keys.arch}.attention.value_length is not that of keys, {head_dim}")
    kv_heads = _rows(keys, "attn_k", heads * head_dim) // head_dim or 1
    return LayerSizes([head_dim] * layers, [kv_heads] * layers, [_rows(keys, "ffn_up", 1)] * layers)


def _rows(keys: Keys, part: str, default: int) -> int:
    """How many rows all matrices of a part have; `default` where there are none."""
    rows = {
        tensor.shape[0]
        for name, tensor in keys.header.tensors.items()
        if name.endswith(f".{part}.weight") and len(tensor.shape) == 2
    }
    if len(rows) > 1:
        raise UnsupportedError(f"{keys.header.path}: {part} differs from layer to layer, which is not supported")
    return rows.pop() if rows else default


def _absent(keys: Keys, layers: int, tensors: Mapping[str, GGUFTensor]) -> list[frozenset[str]]:
    lacking = {_ATTENTION: _OF_MLP, _MLP: _OF_ATTENTION}
    return [lacking.get(kind, _OF_ATTENTION | _OF_MLP) for kind in _kinds(tensors, layers, keys.header.path)]


def _more(keys: Keys, dims: Dimensions, layers: int, tensors: Mapping[str, GGUFTensor]) -> dict[str, tuple[int, ...]]:
    hidden, shapes = dims.hidden, dict[str, tuple[int, ...]]()
    for layer, kind in enumerate(_kinds(tensors, layers, keys.header.path)):
        at = f"blk.{layer}."
        if kind == _MAMBA:
            heads, inner, groups = (
                keys.size(f"ssm.{name}") for name in ("time_step_rank", "inner_size", "group_count")
            )
            if inner % groups:
                keys.header.fail(f"{keys.arch}.ssm.inner_size {inner} is not a multiple of ssm.group_count {groups}")
            convolved = inner + 2 * groups * keys.size("ssm.state_size")
            shapes |= {
                f"{at}ssm_in.weight": (inner + convolved + heads, hidden),
                f"{at}ssm_conv1d.weight": (convolved, keys.size("ssm.conv_kernel")),
                f"{at}ssm_dt.bias": (heads,),
                f"{at}ssm_a": (heads, 1),
                f"{at}ssm_d": (heads, 1),
                f"{at}ssm_norm.weight": (groups, inner // groups),
                f"{at}ssm_out.weight": (hidden, inner),
            }
            if f"{at}ssm_conv1d.bias" in tensors:
                shapes[f"{at}ssm_conv1d.bias"] = (convolved,)
        elif kind == _MOE:
            count, width = keys.size("expert_count"), keys.size("expert_feed_forward_length")
            shared = keys.size("expert_shared_feed_forward_length")
            shapes |= {
                f"{at}ffn_gate_inp.weight": (count, hidden),
                f"{at}exp_probs_b.bias": (count,),
                f"{at}ffn_up_exps.weight": (count, width, hidden),
                f"{at}ffn_down_exps.weight": (count, hidden, width),
                f"{at}ffn_up_shexp.weight": (shared, hidden),
                f"{at}ffn_down_shexp.weight": (hidden, shared),
            }
    return shapes


def _located(name: str, tensor: GGUFTensor, config: Mapping[str, Any]) -> list[Piece] | None:
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    at, part = f"backbone.layers.{match[1]}.mixer.", match[2]
    stack = _STACKS.get(part.removesuffix(".weight"))
    if stack is not None:
        size = tensor.nbytes // tensor.shape[0]
        return [
            Piece(
                f"{at}experts.{index}.{stack}.weight",
                replace(tensor, shape=tensor.shape[1:], offset=tensor.offset + index * size, nbytes=size),
            )
            for index in range(tensor.shape[0])
        ]
    if part in _EXPERTS:
        return [Piece(at + _EXPERTS[part], tensor)]
    return state_space(at, part, tensor, config)


def configure(keys: Keys, config: dict[str, Any]) -> None:
    """What config.json says of these models (`kbit.models.families.nemotron_h`)."""
    no_scaling(keys, config)
    if keys.header.value(f"{keys.arch}.rope.scaling.finetuned"):
        raise UnsupportedError(f"{keys.header.path}: '{keys.arch}.rope.scaling.finetuned' says that positions rotate")
    if f"{keys.arch}.{RMS_EPSILON[0]}" in keys.header:  # (the other one is of layers that predict further tokens)
        config["layer_norm_epsilon"] = keys.real(RMS_EPSILON[0])
    kinds = _kinds(keys.tensors, int(config["num_hidden_layers"]), keys.header.path)
    config["layers_block_type"] = kinds
    heads, inner = keys.size("ssm.time_step_rank"), keys.size("ssm.inner_size")
    if inner % heads:
        keys.header.fail(f"{keys.arch}.ssm.inner_size is {inner}, no multiple of {heads} heads")
    config |= {
        "mamba_num_heads": heads,
        "mamba_head_dim": inner // heads,
        "ssm_state_size": keys.size("ssm.state_size"),
        "n_groups": keys.size("ssm.group_count"),
        "conv_kernel": keys.size("ssm.conv_kernel"),
        "use_conv_bias": any(f"blk.{layer}.ssm_conv1d.bias" in keys.tensors for layer in range(len(kinds))),
    }
    if _MOE not in kinds:
        return
    gating = keys.count("expert_gating_func")
    if gating not in (0, SIGMOID) or keys.size("expert_shared_count", 1) != 1:
        raise UnsupportedError(
            f"{keys.header.path}: kbit knows {keys.arch} models with one shared expert, and scores by sigmoids"
        )
    config |= {
        "n_routed_experts": keys.size("expert_count"),
        "num_experts_per_tok": keys.size("expert_used_count"),
        "moe_intermediate_size": keys.size("expert_feed_forward_length"),
        "moe_shared_expert_intermediate_size": keys.size("expert_shared_feed_forward_length"),
        "norm_topk_prob": bool(keys.header.value(f"{keys.arch}.expert_weights_norm")),
        "routed_scaling_factor": keys.real("expert_weights_scale", 1.0) or 1.0,
        "n_group": keys.size("expert_group_count", 1),
        "topk_group": keys.size("expert_group_used_count", 1),
    }


SPECIAL = Special(_sizes, _absent, _more, _located)
