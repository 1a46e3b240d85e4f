"""The ModelSpec that a configuration describes, read as its family says (`kbit.models.family`).

Sizes that a model cannot be guessed without (vocab_size, hidden_size, intermediate_size, num_hidden_layers,
num_attention_heads) must be there. Other keys that are absent take the default of transformers' configuration class
(`LlamaConfig`, `MistralConfig`, ...): context length, key/value heads, head size, activation, norm epsilon, tying,
biases, sliding windows and RoPE. Of the keys that a family does not read, those that change another family's result
(`kbit.models.foreign_keys`) are refused unless their value is harmless; the rest are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kbit.host.errors import UnsupportedError
from kbit.models.block_specs import SoundSpec
from kbit.models.config_values import ConfigValues, shown
from kbit.models.conv_config import adjusted_width, conv_of
from kbit.models.delta_config import delta_of
from kbit.models.expert_config import check_fixed, experts_of
from kbit.models.factors_config import (
    cap,
    embedding_multiplier,
    logit_multiplier,
    multiplied_scores,
    multipliers,
    residual_multiplier,
    root,
    score_scale,
)
from kbit.models.family import Family, family_of
from kbit.models.foreign_keys import FOREIGN_KEYS
from kbit.models.latent_config import Latent, check_turned, latent_scale, read_latent
from kbit.models.layer_shapes import LayerShape, layer_shapes
from kbit.models.layer_types import rotated_layers, windows_of
from kbit.models.mixer_specs import Multipliers
from kbit.models.rope_config import DEFAULT_THETA, Ropes, ropes_from_config
from kbit.models.rope_spec import MAX_CONTEXT, RopeSpec
from kbit.models.scan_config import mixing_of, scan_of
from kbit.models.spec import SQUARED, ModelSpec
from kbit.models.stack_config import (
    distances_of,
    embedding_size_of,
    layer_features_of,
    names_of,
    temperature_of,
    with_fallbacks,
)
from kbit.models.task_config import position_table, read_task, token_types

# Limits that no real model comes near; they keep a hostile config from asking for unbounded work.
_MAX_LAYERS = 4096
_MAX_WIDTH = 1 << 24
_MAX_VOCAB = 1 << 28

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": SQUARED,
}


def read_spec(families: Mapping[str, Family], config: Mapping[str, Any], where: str) -> ModelSpec:
    """The ModelSpec of a Hugging Face configuration.

    Args:
        families: those there are, by model_type.
        config: the parsed config.json.
        where: what to call it in errors.

    Raises:
        UnsupportedError: an unknown family, architecture, RoPE scaling or layer type, or a key that would change the
            result and is not read.
        CheckpointError: a missing or senseless value; the line names key and value.
    """
    family = family_of(families, config, where)
    values = ConfigValues(with_fallbacks(family, config), family.defaults, where, names=family.keys)
    spec = _read_stack(family, values)
    if family.encoder is not None:
        spec = replace(spec, encoder=_read_stack(family.encoder, replace(values, names=family.encoder.keys)))
    for one, other in family.equal:
        found, wanted = values.raw(one), values.raw(other)
        if found not in (None, wanted):
            raise UnsupportedError(
                f"{where}: {one} {shown(found)} is not supported; it must be {other}, {shown(wanted)}"
            )
    for key, harmless in FOREIGN_KEYS.items():
        if key not in values.asked and key not in family.ignored and config.get(key) not in harmless:
            raise UnsupportedError(
                f"{where}: {key} {shown(config[key])} is not supported for model_type {family.model_type!r}; without "
                "it this would be another model"
            )
    return spec


def _read_stack(family: Family, values: ConfigValues) -> ModelSpec:
    """The stack of layers that a family describes; of an encoder-decoder one of the two."""
    layers = values.integer("num_hidden_layers", 1, _MAX_LAYERS)
    hidden = values.integer("hidden_size", 1, _MAX_WIDTH)
    heads = values.integer("num_attention_heads", 1, _MAX_WIDTH)
    latent = None if family.latent is None else read_latent(family.latent, values, family.names, hidden, heads)
    kv_heads = values.optional_integer("num_key_value_heads", 1, _MAX_WIDTH) or heads
    if family.even_slopes and heads & (heads - 1):
        raise UnsupportedError(
            f"{values.where}: {heads} heads are no power of two, as kbit has {family.model_type} slopes for"
        )
    if heads % kv_heads:
        raise values.error("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    head_dim = values.optional_integer("head_dim", 1, _MAX_WIDTH) if latent is None else latent.head_dim
    if head_dim is None:
        if hidden % heads:
            raise values.error("hidden_size", f"a multiple of num_attention_heads ({heads}), as there is no head_dim")
        head_dim = hidden // heads
    max_positions = values.integer("max_position_embeddings", 1, MAX_CONTEXT)
    delta = delta_of(values, layers) if family.delta else None
    conv = conv_of(values, layers, hidden) if family.conv else None
    scan = scan_of(family.scan, values, layers, hidden) if family.scan is not None else None
    windows: tuple[int | None, ...] = (None,) * layers
    if not (family.delta or family.conv or family.scan):
        windows = windows_of(family.windows, family.window_period, values, layers)
    both_sides = family.mask == "bidirectional" or (
        family.bidirectional is not None and values.boolean(family.bidirectional)
    )
    if both_sides:
        windows = tuple(None if window is None else window // 2 + 1 for window in windows)
    width = _intermediate_size(family, values, hidden)
    usual = LayerShape(kv_heads, head_dim, width, 0)
    shapes = () if family.shapes is None else layer_shapes(family.shapes, values, windows, heads, usual)
    positions = position_table(family, values, max_positions)
    turns = not positions.rows and not family.sloped and family.distances is None
    if not turns:
        longest = positions.rows - positions.first if positions.rows else max_positions
        ropes = Ropes(RopeSpec("default", 0, DEFAULT_THETA, max_positions=longest))
    else:
        rope_dim = head_dim if latent is None else latent.rope_dim
        of_full = next((shape.head_dim for shape, one in zip(shapes, windows, strict=False) if one is None), None)
        ropes = ropes_from_config(values, rope_dim, max_positions, family.rope, of_full)
    vocabulary = values.integer("vocab_size", 1, _MAX_VOCAB)
    features, feature_rows = layer_features_of(family, values, vocabulary)
    norm_bias = _switch(family.norm_bias, values)
    names = names_of(family if latent is None else replace(family, names=latent.names), values)
    if latent is not None:
        check_turned(latent, ropes.rope, ropes.query_temperature is not None, values.where)
    check_fixed(family.fixed, values, family.model_type)
    spec = ModelSpec(
        family=family.model_type,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=values.number(family.norm_eps, above=0.0, below=1.0),
        activation=values.choice(family.activation, {**_ACTIVATIONS, **family.activations}),
        rope=ropes.rope,
        windows=windows,
        qkv_bias=_switch(family.qkv_bias, values),
        output_bias=_switch(family.output_bias, values),
        mlp_bias=_switch(family.mlp_bias, values),
        tied_embeddings=values.boolean("tie_word_embeddings"),
        names=names,
        norm=family.norm,
        norm_bias=norm_bias,
        mask="bidirectional" if both_sides else family.mask,
        rotated=rotated_layers(family.rotated, values, windows) if turns else (False,) * layers,
        window_rope=ropes.window_rope,
        qk_norm=family.qk_norm,
        norm_rotated=family.norm_rotated,
        score_scale=_score_scale(family, values, latent, ropes, head_dim),
        score_cap=cap(family.score_cap, values),
        logit_cap=cap(family.logit_cap, values),
        embedding_multiplier=embedding_multiplier(family, values, hidden),
        residual_multiplier=residual_multiplier(family, values, layers),
        logit_multiplier=logit_multiplier(family, values, hidden),
        query_temperature=ropes.query_temperature,
        experts=None if family.experts is None else experts_of(family.experts, values, layers),
        delta=delta,
        conv=conv,
        scan=scan,
        position_rows=positions.rows,
        first_position=positions.first,
        types=token_types(family, values),
        sinusoids=family.sinusoids,
        distances=distances_of(family, values),
        sloped=family.sloped,
        slope_factor=float(head_dim**-0.5) if family.slopes_scaled else 1.0,
        unnormed=family.unnormed,
        parallel=_switch(family.parallel, values),
        head_bias=_switch(family.head_bias, values),
        task=read_task(family, values, _ACTIVATIONS, norm_bias),
        latent=None if latent is None else latent.spec,
        shapes=shapes,
        value_norm=family.value_norm,
        layer_features=features,
        layer_tokens=feature_rows,
        layer_multiplier=root(values, features) if features else 1.0,
        key_bias=family.key_bias,
        multipliers=multipliers(values) if family.multiplied else Multipliers(),
        mixing=mixing_of(values, layers) if family.scan == "mixed" else (),
        embedding_size=embedding_size_of(family, values, hidden),
        chunked=family.windows == "chunks",
        unturned_temperature=temperature_of(family, values),
        key_norms=family.key_norms is not None and values.boolean(family.key_norms),
        sound=None if family.sound is None else SoundSpec(values.integer(family.sound, 1, _MAX_WIDTH)),
    )
    if spec.activation == SQUARED and spec.experts is not None and names.expert_gate is not None:
        raise UnsupportedError(
            f"{values.where}: {family.activation} {SQUARED!r} is supported for experts without a gate"
        )
    return spec


def _intermediate_size(family: Family, values: ConfigValues, hidden: int) -> int:
    if family.mlp_ratio is not None and values.raw("intermediate_size") is None:
        return family.mlp_ratio * hidden
    if family.experts is not None and family.experts.layers == "all" and values.raw("intermediate_size") is None:
        return values.integer(family.experts.width, 1, _MAX_WIDTH)  # no layer has a plain MLP
    width = values.integer(family.mlp_width, 1, _MAX_WIDTH)
    return adjusted_width(values, width) if family.adjusted else width


def _score_scale(
    family: Family, values: ConfigValues, latent: Latent | None, ropes: Ropes, head_dim: int
) -> float | None:
    """The factor on dot products; None: D^-0.5."""
    if family.multiplied:
        return multiplied_scores(values, head_dim)
    return score_scale(family, values) if latent is None else latent_scale(latent, ropes.rope)


def _switch(setting: bool | str, values: ConfigValues) -> bool:
    return values.boolean(setting) if isinstance(setting, str) else setting
