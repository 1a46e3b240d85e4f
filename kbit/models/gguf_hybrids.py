"""Settings of models that have convolutions or state spaces in place of attention, or beside it, as GGUF metadata."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kbit.checkpoint.gguf.experts import SIGMOID
from kbit.checkpoint.gguf.hybrids import as_bamba
from kbit.checkpoint.gguf.names import Architecture
from kbit.host.errors import UnsupportedError
from kbit.models.spec import ModelSpec

if TYPE_CHECKING:
    from kbit.checkpoint.gguf.writing import Value

_INSTEAD = "export plain floats with --to safetensors"


def check_hybrid(spec: ModelSpec, arch: Architecture, where: str) -> Architecture:
    """The architecture as it is of this model.

    Raises:
        UnsupportedError: llama.cpp has not what the model needs.
    """
    if spec.family == "bamba":
        arch = as_bamba(arch)
    elif spec.family == "nemotron_h" and spec.experts is not None:
        arch = replace(arch, name="nemotron_h_moe")
    lacks = None
    if not spec.attention_layers:
        lacks = "files of models in which no layer attends"
    elif spec.conv is not None and spec.conv.bias:
        lacks = "biases of convolutions"
    elif spec.scan is not None and not spec.scan.bias:
        lacks = "convolutions without biases (it adds one that is not there)"
    elif arch.name.startswith("lfm2") and spec.heads * spec.head_dim != spec.hidden_size:
        lacks = "heads that are not the hidden size together"
    elif arch.name == "granitehybrid" and spec.scan is not None and spec.scan.inner_width != 2 * spec.hidden_size:
        lacks = f"state spaces of another width ({spec.scan.inner_width}) than twice the hidden size"
    elif arch.name == "granitehybrid" and len(set(spec.rotated)) > 1:
        lacks = "positions that turn in some layers only"
    elif arch.name == "lfm2moe" and spec.experts is not None:
        routing = spec.experts.routing
        lacks = None if routing.normalise and routing.scale == 1.0 else "experts whose weights do not sum to 1"
    elif arch.name.startswith("nemotron") and spec.experts is not None and not all(_one_kind(spec)):
        lacks = "MLPs in models with experts"
    if lacks is not None:
        raise UnsupportedError(f"{where}: llama.cpp's {arch.name} architecture has no {lacks}; {_INSTEAD}")
    return arch


def _one_kind(spec: ModelSpec) -> list[bool]:
    """Of the layers that do not mix tokens, whether they have experts."""
    return [spec.has_experts(layer) for layer in range(spec.layers) if spec.has_mlp(layer)]


def hybrid_keys(spec: ModelSpec, arch: Architecture) -> dict[str, Value | None]:
    """What these architectures have, besides what all have. Layers without heads of keys are those that recur."""
    keys: dict[str, Value | None] = {}
    if spec.scan_beside is None:
        heads = [spec.kv_heads if spec.attends(layer) else 0 for layer in range(spec.layers)]
        keys["attention.head_count_kv"] = heads
    if spec.conv is not None:
        return {**keys, "shortconv.l_cache": spec.conv.taps}
    scan = spec.scan
    assert scan is not None
    keys |= {
        "ssm.conv_kernel": scan.taps,
        "ssm.state_size": scan.key_dim,
        "ssm.group_count": scan.groups,
        "ssm.inner_size": scan.inner_width,
        "ssm.time_step_rank": scan.heads,
    }
    if arch.name == "granitehybrid":
        keys["rope.scaling.finetuned"] = not spec.rotated or all(spec.rotated)
        if spec.experts is not None:
            keys["feed_forward_length"] = spec.experts.width
            keys["expert_shared_feed_forward_length"] = spec.experts.shared_width
    if arch.name.startswith("nemotron"):
        keys |= _nemotron_keys(spec)
    return keys


def _nemotron_keys(spec: ModelSpec) -> dict[str, Value | None]:
    experts = spec.experts
    width = spec.intermediate_size if experts is None else experts.width
    keys: dict[str, Value | None] = {
        "feed_forward_length": [width if spec.has_mlp(layer) else 0 for layer in range(spec.layers)],
        "attention.layer_norm_rms_epsilon": spec.norm_eps,
        "rope.scaling.finetuned": False,
        "rope.dimension_count": None,
    }
    if experts is None:
        return keys
    routing = experts.routing
    return keys | {
        "expert_count": routing.experts,
        "expert_used_count": routing.chosen,
        "expert_feed_forward_length": experts.width,
        "expert_shared_feed_forward_length": experts.shared_width,
        "expert_shared_count": 1,
        "expert_weights_norm": routing.normalise,
        "expert_weights_scale": routing.scale,
        "expert_group_count": routing.groups,
        "expert_group_used_count": routing.chosen_groups,
        "expert_gating_func": SIGMOID,
    }
