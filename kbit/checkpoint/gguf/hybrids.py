"""GGUF files of models that do not attend in all layers, or not alone: LFM2's convolutions, Granite 4's and Falcon-H1's
state spaces.

As llama.cpp's converter writes them (`conversion/lfm2.py`, `granite.py`, `mamba.py`, `falcon_h1.py`, which puts the
factors of Falcon-H1 into the weights). Which layers attend their tensors
say: the numbers of key/value heads, 0 for the others, are not right in every file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from kbit.checkpoint.gguf.metadata import GGUFHeader, GGUFTensor
from kbit.checkpoint.gguf.names import Dimensions, LayerSizes, Special
from kbit.checkpoint.gguf.orders import Piece, one_after_another
from kbit.host.errors import UnsupportedError

if TYPE_CHECKING:
    from kbit.checkpoint.gguf.keys import Keys
    from kbit.checkpoint.gguf.names import Architecture

LFM2_KEYS = frozenset({"shortconv.l_cache"})
SCAN_KEYS = frozenset({"ssm.conv_kernel", "ssm.state_size", "ssm.group_count", "ssm.time_step_rank", "ssm.inner_size"})

LFM2_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "token_embd_norm.weight": "model.embedding_norm.weight",
    "output.weight": "lm_head.weight",
}
# Where the width of Granite's experts is put down, whose name in config.json others' MLPs have.
EXPERT_WIDTH = "expert_width"

_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
}
LFM2_LINEARS = {
    **_ATTENTION,
    "attn_output": "self_attn.out_proj",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
}
FALCON_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.final_layernorm.weight",
    "output.weight": "lm_head.weight",
}
FALCON_LINEARS = {
    **_ATTENTION,
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "feed_forward.gate_proj",
    "ffn_up": "feed_forward.up_proj",
    "ffn_down": "feed_forward.down_proj",
}
GRANITE_LINEARS = {
    **_ATTENTION,
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "shared_mlp.gate_proj",
    "ffn_up": "shared_mlp.up_proj",
    "ffn_down": "shared_mlp.output_linear",
}
_SHARED = {"ffn_gate_shexp": "gate_proj", "ffn_up_shexp": "up_proj", "ffn_down_shexp": "output_linear"}
_OF_ATTENTION = frozenset({"attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm", "attn_k_norm"})
_CONV = {"conv": "conv.weight", "out_proj": "out_proj.weight"}
# What is in one matrix there, in the order of its rows.
_CONV_IN = ("b_proj", "c_proj", "x_proj")
# Of a layer with state spaces, beside what is in one matrix there (`state_space`).
SSM = {
    "ssm_conv1d.weight": "conv1d.weight",
    "ssm_conv1d.bias": "conv1d.bias",
    "ssm_dt.bias": "dt_bias",
    "ssm_a": "A_log",
    "ssm_d": "D",
    "ssm_norm.weight": "norm.weight",
    "ssm_out.weight": "out_proj.weight",
}
_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)")


def _attends(tensors: Mapping[str, GGUFTensor] | frozenset[str], layer: int) -> bool:
    return f"blk.{layer}.attn_q.weight" in tensors


def _sizes(keys: Keys, layers: int) -> LayerSizes:
    """The heads and the width of every layer; a layer that does not attend has those of the others."""
    hidden, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    if hidden % heads and f"{keys.arch}.attention.key_length" not in keys.header:
        keys.header.fail(f"{keys.arch}.embedding_length {hidden} is not a multiple of attention.head_count {heads}")
    head_dim = keys.size("attention.key_length", hidden // heads)
    if head_dim % 2 or keys.size("attention.value_length", head_dim) != head_dim:
        keys.header.fail(f"{keys.arch}.attention.value_length is not that of keys, {head_dim}, an even number")
    rows = {
        tensor.shape[0]
        for name, tensor in keys.header.tensors.items()
        if name.endswith(".attn_k.weight") and len(tensor.shape) == 2
    }
    if len(rows) > 1 or any(count % head_dim for count in rows):
        raise UnsupportedError(f"{keys.header.path}: keys have {sorted(rows)} rows, not one number of heads")
    kv_heads = rows.pop() // head_dim if rows else heads
    return LayerSizes([head_dim] * layers, [kv_heads] * layers, [_width(keys)] * layers)


def _width(keys: Keys) -> int:
    """Features inside an MLP; Granite 4's is the one for all tokens."""
    shared = "expert_shared_feed_forward_length"
    return keys.size(shared if f"{keys.arch}.{shared}" in keys.header else "feed_forward_length")


def _absent(keys: Keys, layers: int, tensors: Mapping[str, GGUFTensor]) -> list[frozenset[str]]:
    return [frozenset() if _attends(tensors, layer) else _OF_ATTENTION for layer in range(layers)]


def _more_of_lfm2(
    keys: Keys, dims: Dimensions, layers: int, tensors: Mapping[str, GGUFTensor]
) -> dict[str, tuple[int, ...]]:
    hidden, taps = dims.hidden, keys.size("shortconv.l_cache")
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        if not _attends(tensors, layer):
            shapes[f"blk.{layer}.shortconv.in_proj.weight"] = (3 * hidden, hidden)
            shapes[f"blk.{layer}.shortconv.conv.weight"] = (hidden, taps)
            shapes[f"blk.{layer}.shortconv.out_proj.weight"] = (hidden, hidden)
    return shapes


def _with_state_spaces(
    keys: Keys, dims: Dimensions, layers: int, tensors: Mapping[str, GGUFTensor]
) -> dict[str, tuple[int, ...]]:
    heads, inner = keys.size("ssm.time_step_rank"), keys.size("ssm.inner_size")
    groups, hidden, beside = keys.size("ssm.group_count"), dims.hidden, keys.arch == "falcon-h1"
    if inner % groups:
        keys.header.fail(f"{keys.arch}.ssm.inner_size {inner} is not a multiple of ssm.group_count {groups}")
    convolved, taps = inner + 2 * groups * keys.size("ssm.state_size"), keys.size("ssm.conv_kernel")
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        at = f"blk.{layer}."
        if keys.count("expert_count"):
            shapes |= {f"{at}{part}.weight": (dims.mlp, hidden) for part in ("ffn_gate_shexp", "ffn_up_shexp")}
            shapes[f"{at}ffn_down_shexp.weight"] = (hidden, dims.mlp)
        if _attends(tensors, layer) and not beside:
            continue
        shapes |= {
            f"{at}ssm_in.weight": (inner + convolved + heads, hidden),
            f"{at}ssm_conv1d.weight": (convolved, taps),
            f"{at}ssm_dt.bias": (heads,),
            f"{at}ssm_a": (heads, 1),
            f"{at}ssm_d": (heads, 1),
            f"{at}ssm_out.weight": (hidden, inner),
        }
        if beside:
            shapes[f"{at}ffn_norm"] = (hidden,)
        if not beside or f"{at}ssm_norm.weight" in tensors:
            shapes[f"{at}ssm_norm.weight"] = (groups, inner // groups)
        if f"{at}ssm_conv1d.bias" in tensors:
            shapes[f"{at}ssm_conv1d.bias"] = (convolved,)
    return shapes


def _located_in_lfm2(name: str, tensor: GGUFTensor, config: Mapping[str, Any]) -> list[Piece] | None:
    match = _LAYER.fullmatch(name)
    part = match[2].removeprefix("shortconv.").removesuffix(".weight") if match else ""
    if match is None or not match[2].startswith("shortconv."):
        return None
    at = f"model.layers.{match[1]}.conv."
    if part == "in_proj":
        return one_after_another(tensor, [(f"{at}{each}.weight", tensor.shape[0] // 3) for each in _CONV_IN])
    if part not in _CONV:
        return None
    held = replace(tensor, shape=(tensor.shape[0], 1, tensor.shape[1])) if part == "conv" else tensor
    return [Piece(at + _CONV[part], held)]


def _located_state_spaces(name: str, tensor: GGUFTensor, config: Mapping[str, Any]) -> list[Piece] | None:
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    layer, part = match.groups()
    shared = _SHARED.get(part.removesuffix(".weight"))
    if shared is not None:
        return [Piece(f"model.layers.{layer}.shared_mlp.{shared}.weight", tensor)]
    if part == "ffn_norm":  # (of Falcon-H1, whose norm the converter names so)
        return [Piece(f"model.layers.{layer}.pre_ff_layernorm.weight", tensor)]
    return state_space(f"model.layers.{layer}.mamba.", part, tensor, config)


def state_space(at: str, part: str, tensor: GGUFTensor, config: Mapping[str, Any]) -> list[Piece] | None:
    """The canonical tensors of a Mamba-2 that a tensor holds; None: it is not of one.

    Args:
        at: what stands before their names.
        part: of the layer, with its ending.
        tensor: of the file.
        config: what it says of the model, in Granite's terms or in Nemotron-H's.
    """
    if part == "ssm_in.weight":
        heads, width, groups, keys = (
            int(config[one] if one in config else config[other])
            for one, other in (
                ("mamba_n_heads", "mamba_num_heads"),
                ("mamba_d_head", "mamba_head_dim"),
                ("mamba_n_groups", "n_groups"),
                ("mamba_d_state", "ssm_state_size"),
            )
        )
        inner = heads * width
        counts = {"z_proj": inner, "xbc_proj": inner + 2 * groups * keys, "dt_proj": heads}
        return one_after_another(tensor, [(f"{at}{name}.weight", count) for name, count in counts.items()])
    if part not in SSM:
        return None
    if part == "ssm_conv1d.weight":
        tensor = replace(tensor, shape=(tensor.shape[0], 1, tensor.shape[1]))
    elif part in ("ssm_a", "ssm_d", "ssm_norm.weight"):
        tensor = replace(tensor, shape=(prod(tensor.shape),))
    return [Piece(at + SSM[part], tensor, decays=part == "ssm_a")]


def no_scaling(keys: Keys, config: dict[str, Any]) -> None:
    """Refuses rotations that are scaled."""
    kind = keys.header.string(f"{keys.arch}.rope.scaling.type")
    if kind not in (None, "none") or keys.divisors is not None:
        raise UnsupportedError(f"{keys.header.path}: rotations that are scaled are not supported for this architecture")
    config.pop("rope_scaling")


def lfm2(keys: Keys, config: dict[str, Any]) -> None:
    """What config.json says of these models (`kbit.models.families.lfm2`)."""
    no_scaling(keys, config)
    layers = int(config["num_hidden_layers"])
    config["layer_types"] = ["full_attention" if _attends(keys.tensors, layer) else "conv" for layer in range(layers)]
    config["norm_eps"] = config.pop("rms_norm_eps")
    config["conv_L_cache"], config["conv_bias"] = keys.size("shortconv.l_cache"), False
    if "first_k_dense_replace" in config:
        config["num_dense_layers"] = config.pop("first_k_dense_replace")
    else:
        config["block_auto_adjust_ff_dim"] = False


def granite(keys: Keys, config: dict[str, Any]) -> None:
    """What config.json says of these models (`kbit.models.families.granitemoehybrid`)."""
    no_scaling(keys, config)
    layers = int(config["num_hidden_layers"])
    config["layer_types"] = ["attention" if _attends(keys.tensors, layer) else "mamba" for layer in range(layers)]
    config["position_embedding_type"] = "rope" if rotates(keys.header) else "nope"
    head_dim = int(config["head_dim"])
    if rotates(keys.header) and keys.size("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedError(f"{keys.header.path}: '{keys.arch}.rope.dimension_count' is not the size of a head")
    config["shared_intermediate_size"] = config["intermediate_size"]
    config["intermediate_size"] = config.pop(EXPERT_WIDTH, None) or keys.size("feed_forward_length")
    config.setdefault("num_local_experts", 0)
    config.setdefault("attention_multiplier", float(config["head_dim"]) ** -0.5)
    _in_place_of_attention(keys, config, layers)


def bamba(keys: Keys, config: dict[str, Any]) -> None:
    """What config.json says of these models (`kbit.models.families.bamba`)."""
    no_scaling(keys, config)
    layers = int(config["num_hidden_layers"])
    config["partial_rotary_factor"] = keys.size("rope.dimension_count", config["head_dim"]) / config["head_dim"]
    config["attn_layer_indices"] = [layer for layer in range(layers) if _attends(keys.tensors, layer)]
    _in_place_of_attention(keys, config, layers)


def _in_place_of_attention(keys: Keys, config: dict[str, Any], layers: int) -> None:
    """Of models whose layers have either."""
    inner, hidden = keys.size("ssm.inner_size"), int(config["hidden_size"])
    if inner % hidden:
        keys.header.fail(f"{keys.arch}.ssm.inner_size is {inner}, no multiple of {hidden} features")
    config["mamba_expand"] = inner // hidden
    scans = [layer for layer in range(layers) if not _attends(keys.tensors, layer)]
    _state_spaces(keys, config, scans[0] if scans else 0)


def rotates(header: GGUFHeader) -> bool:
    """Whether positions turn: a key that says so, without which llama.cpp turns them."""
    says = header.flag(f"{header.string('general.architecture')}.rope.scaling.finetuned")
    return says is None or says


def falcon(keys: Keys, config: dict[str, Any]) -> None:
    """What config.json says of these models (`kbit.models.families.falcon_h1`), whose factors are in the weights."""
    no_scaling(keys, config)
    config["mamba_d_ssm"] = keys.size("ssm.inner_size")
    config["mamba_rms_norm"] = "blk.0.ssm_norm.weight" in keys.tensors
    config["mamba_norm_before_gate"], config["projectors_bias"] = False, False
    _state_spaces(keys, config, 0)


def _state_spaces(keys: Keys, config: dict[str, Any], first: int) -> None:
    """How large they are, and whether the convolution of the first layer that has one has a bias."""
    config["mamba_n_heads"] = heads = keys.size("ssm.time_step_rank")
    inner = keys.size("ssm.inner_size")
    if inner % heads:
        keys.header.fail(f"{keys.arch}.ssm.inner_size is {inner}, no multiple of {heads} heads")
    config["mamba_d_head"] = inner // heads
    for entry, name in (("n_groups", "group_count"), ("d_state", "state_size"), ("d_conv", "conv_kernel")):
        config[f"mamba_{entry}"] = keys.size(f"ssm.{name}")
    config["mamba_conv_bias"] = f"blk.{first}.ssm_conv1d.bias" in keys.tensors
    config["mamba_proj_bias"] = False


def granite_or_bamba(header: GGUFHeader, arch: Architecture) -> Architecture:
    """Bamba has neither Granite's factors nor experts, and turns a part of each head."""
    granite = [key for key in arch.numbers if f"{arch.name}.{key}" in header]
    if granite or header.integer(f"{arch.name}.expert_count") or not rotates(header):
        return arch
    return as_bamba(arch)


def as_bamba(arch: Architecture) -> Architecture:
    """Granite 4's architecture as Bamba has it."""
    return replace(
        arch,
        model_type="bamba",
        hf_class="BambaForCausalLM",
        norms={"attn_norm": "input_layernorm", "ffn_norm": "pre_ff_layernorm"},
        outside=FALCON_OUTSIDE,
        linears=FALCON_LINEARS,
        numbers={},
        experts=None,
        keys=arch.keys | {"expert_count", "expert_used_count", "expert_shared_feed_forward_length"},
        configure=bamba,
    )


LFM2 = Special(_sizes, _absent, _more_of_lfm2, _located_in_lfm2)
STATE_SPACES = Special(_sizes, _absent, _with_state_spaces, _located_state_spaces)
