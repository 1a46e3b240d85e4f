"""Settings of latent attention, of gated delta nets and of Gemma 4 as GGUF metadata."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kbit.host.errors import UnsupportedError
from kbit.models.spec import ModelSpec

if TYPE_CHECKING:
    from kbit.checkpoint.gguf.names import Architecture
    from kbit.checkpoint.gguf.writing import Value

# What the pairs of a head that do not turn are divided by, in llama.cpp's files of Gemma 4.
NEVER = 1e30
# Layers of the models of which llama.cpp reads queries that are made without a vector between.
_LITE = (26, 27)


def check_latent(spec: ModelSpec, arch: Architecture, where: str) -> None:
    """Refuse what llama.cpp does not read.

    Raises:
        UnsupportedError: it does not.
    """
    if spec.latent is None or spec.latent.query_rank:
        return
    if arch.halves or spec.layers not in _LITE:
        of = "no" if arch.halves else "26 or 27"
        raise UnsupportedError(
            f"{where}: llama.cpp reads queries without a rank (q_lora_rank) in {arch.name} models of {of} layers, and "
            f"this one has {spec.layers}; export plain floats with --to safetensors"
        )


def latent_keys(spec: ModelSpec, arch: Architecture) -> dict[str, Value | None]:
    """Of latent attention, which llama.cpp takes for attention with one key for all heads (but MiniCPM3's)."""
    assert spec.latent is not None
    rank, turned, rope = spec.latent.rank, spec.rope.dim, spec.rope
    ranks = {"attention.kv_lora_rank": rank, "attention.q_lora_rank": spec.latent.query_rank or None}
    if arch.halves:
        return {**ranks, "attention.value_length": spec.latent.value_dim}
    keys: dict[str, Value | None] = {
        **ranks,
        "attention.head_count_kv": 1,
        "attention.key_length": rank + turned,
        "attention.value_length": rank,
        "attention.key_length_mla": spec.head_dim,
        "attention.value_length_mla": spec.latent.value_dim,
    }
    if spec.experts is None:
        # (Which llama.cpp asks of all these files.)
        keys |= {"leading_dense_block_count": spec.layers, "expert_feed_forward_length": spec.intermediate_size}
        keys["expert_shared_count"] = 0
    if rope.kind == "yarn" and rope.factor > 1:
        # A tenth of mscale_all_dim; mscale, of which it is taken to be the same, has no key.
        keys["rope.scaling.yarn_log_multiplier"] = 0.1 * (rope.temperature - 1) / (0.1 * math.log(rope.factor))
        keys["rope.scaling.yarn_attn_factor"] = None
    return keys


def delta_keys(spec: ModelSpec, arch: Architecture) -> dict[str, Value | None]:
    """Of gated delta nets, and of the layers between them."""
    delta = spec.delta
    assert delta is not None
    keys: dict[str, Value | None] = {
        "ssm.conv_kernel": delta.taps,
        "ssm.state_size": delta.key_dim,
        "ssm.group_count": delta.key_heads,
        "ssm.time_step_rank": delta.heads,
        "ssm.inner_size": delta.heads * delta.value_dim,
    }
    if arch.delta is not None and arch.delta.together:
        full = [layer for layer, recurs in enumerate(delta.layers) if not recurs]
        return {**keys, "full_attention_interval": full[0] + 1 if full else spec.layers + 1}
    # Every third pair is of a text's position, of a row and of a column, which are one in texts.
    pairs = spec.rope.dim // 2
    sections = [-(-(pairs - first) // 3) for first in range(3)]
    return {**keys, "attention.recurrent_layers": list(delta.layers), "rope.dimension_sections": [*sections, 0]}


def gemma4_keys(spec: ModelSpec) -> dict[str, Value | None]:
    """Of layers that differ."""
    slides = [window is not None for window in spec.windows]
    each = [spec.shape(layer) for layer in range(spec.layers)]
    full = each[slides.index(False)]
    usual = each[slides.index(True)] if True in slides else full
    keys: dict[str, Value | None] = {
        "attention.shared_kv_layers": sum(one.source != layer for layer, one in enumerate(each)),
        "embedding_length_per_layer_input": spec.layer_features,
        "attention.sliding_window_pattern": slides,
        "attention.key_length": full.head_dim,
        "attention.value_length": full.head_dim,
        "attention.key_length_swa": usual.head_dim,
        "attention.value_length_swa": usual.head_dim,
        "rope.dimension_count": full.head_dim,
        "rope.dimension_count_swa": usual.head_dim,
    }
    for key, values in (
        ("feed_forward_length", [one.width for one in each]),
        ("attention.head_count_kv", [one.kv_heads for one in each]),
    ):
        keys[key] = values[0] if len(set(values)) == 1 else values
    if spec.experts is not None:
        routing = spec.experts.routing
        keys |= {"expert_count": routing.experts, "expert_used_count": routing.chosen}
        keys["expert_feed_forward_length"] = spec.experts.width
    return keys
