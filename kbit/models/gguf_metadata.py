"""A model's settings as GGUF metadata: what `kbit.checkpoint.gguf.config` reads, written, in llama.cpp's terms.

Whether the architecture can say what the model is, is found out: the metadata is read back, and must describe the same
ModelSpec (`check_same`). What llama.cpp is known to do otherwise than a file says is refused first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from kbit.checkpoint.gguf.architectures import ARCHITECTURES
from kbit.checkpoint.gguf.experts import SIGMOID
from kbit.checkpoint.gguf.names import ATTENTION_BIASES, MLP_BIASES, QKV, ROPE_FACTORS, ROPE_FREQS, Architecture
from kbit.checkpoint.gguf.older import FALCON_LAYOUT, MOST_BIAS, large_falcon
from kbit.checkpoint.gguf.rope import llama3_divisors
from kbit.host.errors import UnsupportedError
from kbit.host.notes import note
from kbit.models.gguf_hybrids import check_hybrid, hybrid_keys
from kbit.models.gguf_mixers import NEVER, check_latent, delta_keys, gemma4_keys, latent_keys
from kbit.models.spec import ModelSpec, RopeSpec

if TYPE_CHECKING:
    from kbit.checkpoint.gguf.writing import Value

_INSTEAD = "export plain floats with --to safetensors"
# Families that are written as another's architecture.
_ALIASES = {"mistral": "llama", "mixtral": "llama", "olmo3": "olmo2", "granitemoeshared": "granitemoe"}
_ALIASES |= {"deepseek_v3": "deepseek2", "youtu": "deepseek2", "bamba": "granitehybrid", "nemotron_h": "nemotron_h"}
# Architectures to which llama.cpp gives windows in all layers or a pattern from the file; the others have their own.
_PATTERNS = ("olmo2", "exaone4", "gemma-embedding")
# Whose windows llama.cpp does not have, or not in models of other sizes.
_NO_WINDOWS: dict[str, Callable[[ModelSpec], bool]] = {
    "llama": lambda spec: True,
    "phi3": lambda spec: True,
    "starcoder2": lambda spec: True,
    "exaone4": lambda spec: spec.layers != 64,
}
# A difference of two float32 numbers that mean the same decimal, with room for a formula's rounding.
_TOLERANCE = 1e-6
_HALF_TOLERANCE = 2.0**-8  # bfloat16's rounding


def architecture_of(spec: ModelSpec, where: str) -> Architecture:
    """The architecture a model is written as.

    Raises:
        UnsupportedError: there is none, or llama.cpp has not what the model needs.
    """
    by_type = {each.model_type: each for each in ARCHITECTURES.values() if bool(each.beside) == (spec.task is not None)}
    arch = ARCHITECTURES.get(_ALIASES.get(spec.family, "")) or by_type.get(spec.family)
    if arch is None:
        known = ", ".join(sorted({*by_type, *_ALIASES}))
        raise UnsupportedError(
            f"{where}: kbit writes no GGUF file of a {spec.family} model, but of {known}; {_INSTEAD}"
        )
    if arch.sigmoid is not None and spec.family == arch.sigmoid[0]:
        arch = replace(arch, model_type=spec.family, experts=arch.sigmoid[2])
    if arch.name == "gemma4" and spec.logit_cap is None:
        raise UnsupportedError(
            f"{where}: llama.cpp caps a gemma4 model's logits at 30 where there is no cap; {_INSTEAD}"
        )
    if arch.latent:
        check_latent(spec, arch, where)
    if spec.recurrent and spec.delta is None:
        arch = check_hybrid(spec, arch, where)
    lost = arch.name in _NO_WINDOWS and _NO_WINDOWS[arch.name](spec)
    if lost and any(window is not None and window < spec.context_length for window in spec.windows):
        raise UnsupportedError(
            f"{where}: llama.cpp has no sliding windows for its {arch.name} architecture as this model has; {_INSTEAD}"
        )
    if arch.own_head and spec.tied_embeddings:
        raise UnsupportedError(f"{where}: llama.cpp reads no {arch.name} model whose head is its embedding; {_INSTEAD}")
    if arch.biases is not None and set(bias_parts(spec)) & set(arch.linears) != set(arch.biases):
        have = "have biases" if arch.biases else "have none"
        raise UnsupportedError(
            f"{where}: matrices of this model have biases, or none, where GGUF files of the {arch.name} architecture "
            f"{have}; {_INSTEAD}"
        )
    if arch.name == "falcon" and spec.names.mlp_norm is not None:
        arch = large_falcon(arch)
    if spec.rope.kind == "longrope" and not arch.scaled and not _divides_alone(spec.rope):
        raise UnsupportedError(f"{where}: kbit writes no LongRoPE for llama.cpp's {arch.name} architecture; {_INSTEAD}")
    return arch


def bias_parts(spec: ModelSpec) -> tuple[str, ...]:
    """The parts of a layer that have biases."""
    return (
        *(QKV if spec.qkv_bias else ()),
        *(ATTENTION_BIASES[3:] if spec.output_bias else ()),
        *(MLP_BIASES if spec.mlp_bias else ()),
    )


def metadata(spec: ModelSpec, arch: Architecture) -> dict[str, Value]:
    """Metadata keys of an architecture, its name before each."""
    rope = spec.rope
    keys: dict[str, Value | None] = {
        "block_count": spec.layers,
        "context_length": spec.position_rows or rope.max_positions,
        "embedding_length": spec.hidden_size,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.heads,
        "attention.head_count_kv": spec.kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        arch.epsilon[0]: spec.norm_eps,
        "vocab_size": spec.vocab_size,
    }
    if arch.positions == "turned":
        keys |= {"rope.dimension_count": rope.dim, "rope.freq_base": rope.theta, **_rope(rope)}
    if "use_parallel_residual" in arch.keys:
        keys["use_parallel_residual"] = spec.parallel
    if "attention.max_alibi_bias" in arch.keys:
        keys["attention.max_alibi_bias"] = MOST_BIAS
    if arch.layout == FALCON_LAYOUT:
        keys["tensor_data_layout"] = arch.layout
    windows = {window for window in spec.windows if window is not None}
    if windows:
        # (One to both sides has half of its tokens on each.)
        keys["attention.sliding_window"] = 2 * (max(windows) - 1) if spec.mask == "bidirectional" else max(windows)
        if arch.name in _PATTERNS:
            keys["attention.sliding_window_pattern"] = [window is not None for window in spec.windows]
    elif arch.name == "phi3":
        keys["attention.sliding_window"] = 0
    if spec.window_rope is not None:
        keys["rope.freq_base_swa"] = spec.window_rope.theta
    divided = arch.numbers.get("logit_scale") == "logits_scaling"  # Granite's
    own: dict[str, float | None] = {
        "attn_logit_softcapping": spec.score_cap,
        "final_logit_softcapping": spec.logit_cap,
        "attention.scale": spec.score_scale,
        "embedding_scale": spec.embedding_multiplier,
        "residual_scale": spec.residual_multiplier,
        "logit_scale": 1 / spec.logit_multiplier if divided else spec.logit_multiplier,
    }
    keys |= {key: own[key] for key in arch.numbers}
    if spec.query_temperature is not None:
        keys["attention.temperature_scale"] = spec.query_temperature[0]
        # mscale, which is what it is divided by: all that these models have.
        keys["rope.scaling.yarn_log_multiplier"] = 1.0
        keys.pop("rope.scaling.yarn_attn_factor", None)
    keys |= _experts(spec, arch)
    if arch.latent:
        keys |= latent_keys(spec, arch)
    if arch.delta is not None:
        keys |= delta_keys(spec, arch)
    if arch.name == "gemma4":
        keys |= gemma4_keys(spec)
    if spec.recurrent and spec.delta is None:
        keys |= hybrid_keys(spec, arch)
    return {f"{arch.name}.{key}": value for key, value in keys.items() if value is not None}


def rope_tensors(spec: ModelSpec) -> dict[str, list[float]]:
    """Tensors of factors that scale the rotation."""
    rope = spec.rope
    if rope.kind == "proportional":
        turning = rope.turning
        return {ROPE_FREQS: [1.0] * turning + [NEVER] * (rope.dim // 2 - turning)}
    if _divides_alone(rope):
        return {ROPE_FREQS: list(rope.short_factors)}
    if rope.kind == "longrope":
        return dict(zip(ROPE_FACTORS, (list(rope.short_factors), list(rope.long_factors)), strict=True))
    if rope.kind != "llama3":
        return {}
    low, high, original = rope.low_freq_factor, rope.high_freq_factor, rope.original_positions
    return {ROPE_FREQS: llama3_divisors(rope.dim, rope.theta, rope.factor, low, high, original)}


def _divides_alone(rope: RopeSpec) -> bool:
    """Whether factors, the same for all texts, are all there is: any architecture has a tensor for them."""
    return rope.kind == "longrope" and not rope.depends_on_length and rope.attention_factor == 1.0


def _rope(rope: RopeSpec) -> dict[str, Value | None]:
    if rope.kind in ("linear", "yarn"):
        found: dict[str, Value | None] = {"rope.scaling.type": rope.kind, "rope.scaling.factor": rope.factor}
    else:
        found = {}
    if rope.kind == "yarn":
        usual = 0.1 * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0
        found["rope.scaling.original_context_length"] = rope.original_positions
        if abs(rope.attention_factor - usual) > _TOLERANCE * usual:
            found["rope.scaling.yarn_attn_factor"] = rope.attention_factor / usual
        for name, value, default in (("fast", rope.beta_fast, 32.0), ("slow", rope.beta_slow, 1.0)):
            found[f"rope.scaling.yarn_beta_{name}"] = None if value == default else value
    elif rope.kind == "llama3":
        found["rope.scaling.original_context_length"] = rope.original_positions
    elif rope.kind == "longrope" and not _divides_alone(rope):
        found["rope.scaling.original_context_length"] = rope.original_positions
        found["rope.scaling.attn_factor"] = rope.attention_factor
    return found


def _experts(spec: ModelSpec, arch: Architecture) -> dict[str, Value | None]:
    experts, tensors = spec.experts, arch.experts
    if experts is None or tensors is None:
        return {}
    routing = experts.routing
    found: dict[str, Value | None] = {"expert_count": routing.experts, "expert_used_count": routing.chosen}
    if arch.name not in ("llama", "olmoe", "granitemoe", "granitehybrid"):
        found["expert_feed_forward_length"] = experts.width
    if tensors.switch is not None or (tensors.shared_width is not None and experts.shared_width):
        found["expert_shared_feed_forward_length"] = experts.shared_width
    elif tensors.shared is not None and tensors.shared_width is None:
        found["expert_shared_count"] = experts.shared_width // experts.width
    if tensors.scores == SIGMOID:
        found["expert_gating_func"] = SIGMOID
    if tensors.scaled:
        found |= {"expert_weights_scale": routing.scale, "expert_weights_norm": routing.normalise}
    if tensors.grouped:
        found |= {"expert_group_count": routing.groups, "expert_group_used_count": routing.chosen_groups}
    if tensors.leading:
        found["leading_dense_block_count"] = experts.layers.index(True)
    return found


def check_same(spec: ModelSpec, found: ModelSpec, arch: Architecture, where: str) -> None:
    """Raise where metadata, read back, describes another model.

    Raises:
        UnsupportedError: it does; the line names what differs.
    """
    plain = [layer for layer in range(spec.layers) if spec.has_mlp(layer) and not spec.has_experts(layer)]
    unread = {"family", *(("intermediate_size",) if spec.mixing and not plain else ())}
    for name, ours, theirs in _differences(spec, found, ""):
        if name in unread:
            continue
        if name == "embedding_multiplier" and math.isclose(ours, theirs, rel_tol=_HALF_TOLERANCE):
            note(
                f"{where}: llama.cpp does not round the factor on embeddings to the weights' type, as transformers does"
            )
            continue
        raise UnsupportedError(
            f"{where}: GGUF files of the {arch.name} architecture cannot say that {name} is {str(ours)[:60]} (it would "
            f"be {str(theirs)[:60]}); {_INSTEAD}"
        )


def _differences(ours: Any, theirs: Any, name: str) -> list[tuple[str, Any, Any]]:
    if is_dataclass(ours) and type(ours) is type(theirs):
        found = []
        for field in fields(ours):
            one, other = getattr(ours, field.name), getattr(theirs, field.name)
            found += _differences(one, other, f"{name}.{field.name}" if name else field.name)
        return found
    if isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        return [each for pair in zip(ours, theirs, strict=True) for each in _differences(*pair, name)]
    if isinstance(ours, float) and isinstance(theirs, int | float):
        return [] if math.isclose(ours, theirs, rel_tol=_TOLERANCE) else [(name, ours, theirs)]
    return [] if ours == theirs else [(name, ours, theirs)]
