"""Family: what a model family is, as data, and the ModelSpec that a configuration of one describes.

A family is one file of `kbit.models.families`: which configuration key means what, its defaults, which tensor
goes where, and which switches are on.

Sizes that a model cannot be guessed without (vocab_size, hidden_size, intermediate_size, num_hidden_layers,
num_attention_heads) must be there. Other keys that are absent take the default of transformers' configuration class
(`LlamaConfig`, `MistralConfig`, `Qwen2Config`): context length, key/value heads, head size, activation, norm epsilon,
tying, biases, sliding windows and RoPE. Keys that are named neither below nor by a family are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.models.config_values import ConfigValues, shown
from kbit.models.rope_config import rope_from_config
from kbit.models.spec import MAX_CONTEXT, ModelSpec, TensorNames

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
}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model_type: its name in configurations.
        architectures: accepted entries of `architectures`.
        defaults: values of keys that config.json leaves out.
        qkv_bias, output_bias, mlp_bias: fixed, or the configuration key that says.
        windows: which layers slide: "none"; "all" (`sliding_window` unless null); "chosen" (`use_sliding_window` and
            then `layer_types`, or every layer from `max_window_layers` on).
        names: tensor names; a norm that has none is not there.
        norm: kind of every norm.
        norm_bias: whether norms have biases.
        norm_eps: the key of every norm's epsilon.
        mask: which tokens a query sees.
    """

    model_type: str
    architectures: tuple[str, ...]
    defaults: Mapping[str, Any]
    qkv_bias: bool | str
    output_bias: bool | str
    mlp_bias: bool | str
    windows: Literal["none", "all", "chosen"]
    names: TensorNames
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    norm_eps: str = "rms_norm_eps"
    mask: Literal["causal", "bidirectional", "prefix"] = "causal"


def read_spec(families: Mapping[str, Family], config: Mapping[str, Any], where: str) -> ModelSpec:
    """The ModelSpec of a Hugging Face configuration.

    Args:
        families: those there are, by model_type.
        config: the parsed config.json.
        where: what to call it in errors.

    Raises:
        UnsupportedError: an unknown family, architecture, RoPE scaling or layer type.
        CheckpointError: a missing or senseless value; the line names key and value.
    """
    family = _family(families, config, where)
    values = ConfigValues(config, family.defaults, where)
    layers = values.integer("num_hidden_layers", 1, _MAX_LAYERS)
    hidden = values.integer("hidden_size", 1, _MAX_WIDTH)
    heads = values.integer("num_attention_heads", 1, _MAX_WIDTH)
    kv_heads = values.optional_integer("num_key_value_heads", 1, _MAX_WIDTH) or heads
    if heads % kv_heads:
        raise values.error("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    head_dim = values.optional_integer("head_dim", 1, _MAX_WIDTH)
    if head_dim is None:
        if hidden % heads:
            raise values.error("hidden_size", f"a multiple of num_attention_heads ({heads}), as there is no head_dim")
        head_dim = hidden // heads
    max_positions = values.integer("max_position_embeddings", 1, MAX_CONTEXT)
    return ModelSpec(
        family=family.model_type,
        vocab_size=values.integer("vocab_size", 1, _MAX_VOCAB),
        hidden_size=hidden,
        intermediate_size=values.integer("intermediate_size", 1, _MAX_WIDTH),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=values.number(family.norm_eps, above=0.0, below=1.0),
        activation=values.choice("hidden_act", _ACTIVATIONS),
        rope=rope_from_config(config, head_dim, max_positions, where),
        windows=_windows(family, values, layers),
        qkv_bias=_switch(family.qkv_bias, values),
        output_bias=_switch(family.output_bias, values),
        mlp_bias=_switch(family.mlp_bias, values),
        tied_embeddings=values.boolean("tie_word_embeddings"),
        names=family.names,
        norm=family.norm,
        norm_bias=family.norm_bias,
        mask=family.mask,
    )


def _family(families: Mapping[str, Family], config: Mapping[str, Any], where: str) -> Family:
    """By model_type, or by architecture where an old config.json has no model_type."""
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise CheckpointError(f"{where}: architectures is {shown(architectures)}; it should be a list of names")
    if model_type is not None and not isinstance(model_type, str):
        raise CheckpointError(f"{where}: model_type is {shown(model_type)}; it should be a name")
    if not model_type and not architectures:
        raise CheckpointError(f"{where}: model_type is missing, so the kind of model is unknown")
    supported = f"kbit runs {', '.join(families)}"
    if not model_type:
        for family in families.values():
            if set(architectures or ()) & set(family.architectures):
                return family
        raise UnsupportedError(f"{where}: architecture {shown(architectures)} is not supported; {supported}")
    if model_type not in families:
        raise UnsupportedError(f"{where}: model_type {shown(model_type)} is not supported; {supported}")
    family = families[model_type]
    if architectures and not set(architectures) & set(family.architectures):
        raise UnsupportedError(
            f"{where}: architecture {shown(architectures)} is not supported; for model_type {model_type!r} kbit "
            f"runs {', '.join(family.architectures)}"
        )
    return family


def _switch(setting: bool | str, values: ConfigValues) -> bool:
    return values.boolean(setting) if isinstance(setting, str) else setting


def _windows(family: Family, values: ConfigValues, layers: int) -> tuple[int | None, ...]:
    """Sliding window of every layer."""
    window = None
    if family.windows == "all" or (family.windows == "chosen" and values.boolean("use_sliding_window")):
        window = values.optional_integer("sliding_window", 1, MAX_CONTEXT)
    types = _layer_types(values, layers)
    if family.windows == "chosen":
        if types is None:
            if window is None:
                return (None,) * layers
            first = values.integer("max_window_layers", 0, MAX_CONTEXT)
            return tuple(window if layer >= first else None for layer in range(layers))
        if window is None and "sliding_attention" in types:
            raise values.error("layer_types", "without sliding_attention, as use_sliding_window and sliding_window say")
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    fixed = "full_attention" if window is None else "sliding_attention"
    if types is not None and set(types) != {fixed}:
        raise UnsupportedError(f"{values.where}: layer_types other than {fixed} are not supported for this model")
    return (window,) * layers


def _layer_types(values: ConfigValues, layers: int) -> list[str] | None:
    types = values.raw("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != layers or not all(isinstance(kind, str) for kind in types):
        raise values.error("layer_types", f"a list of {layers} names, one per layer")
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedError(
            f"{values.where}: layer_types has {shown(sorted(unknown)[0])}, which kbit does not support"
        )
    return types
