"""Family: what a model family is, as data.

A family is one file of `kbit.models.families`: which configuration key means what, its defaults, which tensor goes
where, and which switches are on. `kbit.models.spec_config` reads configurations by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.models.config_values import shown
from kbit.models.expert_config import ExpertRules
from kbit.models.factors_config import ROOT_OF_WIDTH as ROOT_OF_WIDTH
from kbit.models.latent_config import LatentRules
from kbit.models.layer_shapes import ShapeRules
from kbit.models.layer_types import Rotated, Windows
from kbit.models.layout import Layout
from kbit.models.refused import reason
from kbit.models.rope_config import RopeRules
from kbit.models.scan_config import Scanned
from kbit.models.spec import Sinusoids
from kbit.models.task_heads import TaskHead
from kbit.models.tensor_names import TensorNames


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
