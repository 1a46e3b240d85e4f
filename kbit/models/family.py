"""Family: what a model family is, as data, and the ModelSpec that a configuration of one describes.

A family is one file of `kbit.models.families`: which configuration key means what, its defaults, which tensor
goes where, and which switches are on.

Sizes that a model cannot be guessed without (vocab_size, hidden_size, intermediate_size, num_hidden_layers,
num_attention_heads) must be there. Other keys that are absent take the default of transformers' configuration class
(`LlamaConfig`, `MistralConfig`, ...): context length, key/value heads, head size, activation, norm epsilon, tying,
biases, sliding windows and RoPE. Of the keys that a family does not read, those that change another family's result
(`kbit.models.foreign_keys`) are refused unless their value is harmless; the rest are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.models.config_values import ConfigValues, shown
from kbit.models.conv_config import adjusted_width, conv_of
from kbit.models.delta_config import delta_of
from kbit.models.expert_config import ExpertRules, check_fixed, experts_of
from kbit.models.factors_config import ROOT_OF_WIDTH as ROOT_OF_WIDTH
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
from kbit.models.foreign_keys import FOREIGN_KEYS
from kbit.models.latent_config import Latent, LatentRules, check_turned, latent_scale, read_latent
from kbit.models.layer_shapes import LayerShape, ShapeRules, layer_shapes
from kbit.models.layer_types import Rotated, Windows, rotated_layers, windows_of
from kbit.models.layout import Layout
from kbit.models.mixer_specs import Multipliers
from kbit.models.refused import reason
from kbit.models.rope_config import DEFAULT_THETA, RopeRules, Ropes, ropes_from_config
from kbit.models.scan_config import Scanned, mixing_of, scan_of
from kbit.models.spec import MAX_CONTEXT, SQUARED, ModelSpec, RopeSpec, Sinusoids, SoundSpec
from kbit.models.stack_config import (
    distances_of,
    embedding_size_of,
    layer_features_of,
    names_of,
    temperature_of,
    with_fallbacks,
)
from kbit.models.task_config import position_table, read_task, token_types
from kbit.models.task_heads import TaskHead
from kbit.models.tensor_names import TensorNames

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


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model_type: its name in configurations.
        architectures: accepted entries of `architectures`.
        defaults: values of keys that config.json leaves out.
        qkv_bias, output_bias, mlp_bias, head_bias: fixed, or the configuration key that says.
        windows: which layers slide (`kbit.models.layer_types`).
        names: tensor names; a norm that has none is not there.
        norm: kind of every norm.
        norm_bias: whether norms have biases.
        norm_eps: the key of every norm's epsilon.
        mask: which tokens a query sees.
        window_period: with windows "period", full attention is in every so many-th layer; or the key that says.
        rotated: which layers rotate queries and keys (`kbit.models.layer_types`).
        rope: what is special about rotary settings.
        activation: the key of the activation.
        activations: names of activations that mean another one here.
        qk_norm, norm_rotated: see ModelSpec; they matter where `names` has norms of queries and keys.
        qk_norms: the key that says whether there are these norms; None: as `names` says.
        score_scale: the factor on scores, or its key.
        score_width: the key of what stands for D in D^-0.5.
        score_cap, logit_cap: keys of caps.
        embedding_multiplier: the key of the factor on embeddings, or ROOT_OF_WIDTH.
        scaled_embedding: the key that says whether that factor is the root of the width.
        residual_multiplier: the key of the factor on what a block adds.
        logit_divisor: the key of what logits are divided by.
        scaled_logits: the key that says whether it is the root of the width; where absent, that of a tied head is.
        experts: how the configuration describes experts; None: there are none.
        delta: layers of the type "linear_attention" have a gated delta rule (`kbit.models.delta_config`).
        conv: whether layers have convolutions in place of attention (`kbit.models.conv_config`).
        scan: which layers have state spaces in place of attention (`kbit.models.scan_config`); None: no layer has.
        mlp_width: the key of the features inside an MLP.
        adjusted: whether `block_auto_adjust_ff_dim` and its like change the width of MLPs.
        fixed: keys that other implementations read, and the values that say what this family does.
        layout: how published tensors differ from those that `names` names.
        keys: what configurations call keys that are known here by other names.
        bidirectional: the key that says that queries see the whole text; its windows reach to both sides, half each.
        first_position: with a table of positions (`names.positions`), its row of position 0; "pad": the one after that
            of padding.
        sinusoids, sloped: see ModelSpec.
        distances: see ModelSpec; fixed, or the keys that say.
        slopes_scaled: what falls with the distance is multiplied by D^-0.5, as scores are.
        even_slopes: slopes are known of a power of two heads alone.
        unnormed: see ModelSpec.
        extra_positions: rows that the table of positions has beside max_position_embeddings.
        parallel: see ModelSpec; fixed, or the key that says.
        mlp_ratio: intermediate_size over hidden_size where the configuration names none.
        logit_factor: the key of the factor on logits.
        equal: keys of two sizes that a published model may have apart, and kbit has not.
        embedding_width: the key of the width of embeddings, where there are projections between them and the stream.
        task: what is computed of hidden states, see ModelSpec.
        heads: what else, by architecture; of an activation "config" the configuration says which. Keys of HEAD_KEYS
            that these families have say the rest.
        latent: how the configuration describes latent attention; None: there is none.
        depth_scale: the key of what a block's addition is multiplied by, times the root of the number of layers.
        logit_width: the key of the width that logits are scaled to: they are multiplied by it over hidden_size.
        ignored: keys that change another family's result, but not this one's.
        shapes: how the configuration describes layers of different shapes; None: they are all alike.
        value_norm: see ModelSpec.
        layer_features: the keys of `layer_features` and `layer_tokens` of ModelSpec.
        encoder: of an encoder-decoder, whose decoder the rest describes, the other half.
        fallbacks: keys that say what others do not, where these are absent or null.
        shared: the key that says whether encoder and decoder have one embedding, and its name then.
        plain_up: the name of `up` where the activation's name does not begin with "gated-": then there is no gate.
        multiplied: there are Falcon-H1's factors inside of layers (`kbit.models.factors_config`).
        temperature: the keys of `ModelSpec.unturned_temperature`: whether there is one, b, and n.
        key_norms: the key of the same of ModelSpec.
        key_bias, sound: see ModelSpec; sound: the key of its frames' features.
        variants: (key, value, family): what a configuration of this model_type is where a key has a value, the first
            that it has.
    """

    model_type: str
    architectures: tuple[str, ...]
    defaults: Mapping[str, Any]
    qkv_bias: bool | str
    output_bias: bool | str
    mlp_bias: bool | str
    windows: Windows
    names: TensorNames
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool | str = False
    norm_eps: str = "rms_norm_eps"
    mask: Literal["causal", "bidirectional", "prefix"] = "causal"
    window_period: int | str = 0
    rotated: Rotated = "all"
    rope: RopeRules = field(default_factory=RopeRules)
    activation: str = "hidden_act"
    activations: Mapping[str, str] = field(default_factory=dict)
    qk_norm: Literal["head", "whole"] = "head"
    norm_rotated: bool = False
    qk_norms: str | None = None
    score_scale: str | float | None = None
    score_width: str | None = None
    score_cap: str | None = None
    logit_cap: str | None = None
    embedding_multiplier: str | None = None
    scaled_embedding: str | None = None
    residual_multiplier: str | None = None
    logit_divisor: str | None = None
    scaled_logits: str | None = None
    experts: ExpertRules | None = None
    delta: bool = False
    conv: bool = False
    scan: Scanned | None = None
    mlp_width: str = "intermediate_size"
    adjusted: bool = False
    fixed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    layout: Layout = field(default_factory=Layout)
    ignored: tuple[str, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    bidirectional: str | None = None
    first_position: int | Literal["pad"] = 0
    sinusoids: Sinusoids | None = None
    distances: tuple[int, int] | tuple[str, str] | None = None
    sloped: bool = False
    slopes_scaled: bool = False
    even_slopes: bool = False
    unnormed: tuple[int, ...] = ()
    extra_positions: int = 0
    parallel: bool | str = False
    mlp_ratio: int | None = None
    logit_factor: str | None = None
    equal: tuple[tuple[str, str], ...] = ()
    embedding_width: str | None = None
    latent: LatentRules | None = None
    depth_scale: str | None = None
    logit_width: str | None = None
    head_bias: bool | str = False
    variants: tuple[tuple[str, object, Family], ...] = ()
    task: TaskHead | None = None
    heads: Mapping[str, TaskHead] = field(default_factory=dict)
    shapes: ShapeRules | None = None
    value_norm: bool = False
    layer_features: tuple[str, str] | None = None
    encoder: Family | None = None
    fallbacks: Mapping[str, str] = field(default_factory=dict)
    shared: tuple[str, str] | None = None
    plain_up: str | None = None
    multiplied: bool = False
    key_bias: bool = True
    sound: str | None = None
    temperature: tuple[str, str, str] | None = None
    key_norms: str | None = None

    @property
    def accepted(self) -> tuple[str, ...]:
        """Entries of `architectures`."""
        return (*self.architectures, *self.heads)


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


def family_of(families: Mapping[str, Family], config: Mapping[str, Any], where: str) -> Family:
    """The family of a configuration, by model_type, or by architecture where an old config.json has no model_type.

    Raises:
        UnsupportedError: one that kbit does not run.
        CheckpointError: a missing or senseless value.
    """
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise CheckpointError(f"{where}: architectures is {shown(architectures)}; it should be a list of names")
    if model_type is not None and not isinstance(model_type, str):
        raise CheckpointError(f"{where}: model_type is {shown(model_type)}; it should be a name")
    if not model_type and not architectures:
        raise CheckpointError(
            f'{where}: model_type is missing, so the kind of model is unknown: add it, for example "model_type": '
            '"bert", and "architectures": ["BertForMaskedLM"], which old versions of transformers did not write'
        )
    supported = f"kbit runs {', '.join(families)}"
    if not model_type:
        for family in families.values():
            if set(architectures or ()) & set(family.accepted):
                return family
        raise UnsupportedError(f"{where}: architecture {shown(architectures)} is not supported; {supported}")
    if model_type not in families:
        why = reason(model_type)
        raise UnsupportedError(f"{where}: model_type {shown(model_type)} is not supported{why}; {supported}")
    family = families[model_type]
    family = next((other for key, value, other in family.variants if config.get(key) == value), family)
    if architectures and not set(architectures) & set(family.accepted):
        raise UnsupportedError(
            f"{where}: architecture {shown(architectures)} is not supported; for model_type {model_type!r} kbit "
            f"runs {', '.join(family.accepted)}"
        )
    return family


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
