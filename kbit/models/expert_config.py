"""Which experts a configuration has, and how they are chosen: read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kbit.graph.experts import Clamp, Routing, Score
from kbit.host.errors import UnsupportedError
from kbit.models.block_specs import ExpertsSpec
from kbit.models.config_values import ConfigValues, shown

# Limits that no real model comes near.
_MAX_EXPERTS, _MAX_WIDTH, _MAX_LAYERS = 4096, 1 << 24, 4096
_MIN_FACTOR, _MAX_FACTOR = 1e-9, 1e9

# Of what the best are chosen, by `topk_method`.
_METHODS = {"greedy": "all", "group_limited_greedy": "groups"}

# Keys that count shared experts.
_SHARED_COUNTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")

# Bytes beyond which the matrices of a hostile configuration are not even listed.
_MAX_MATRICES = 1 << 20


@dataclass(frozen=True)
class ExpertRules:
    """How a family's configuration describes its experts.

    Attributes:
        count: keys of the number of experts, any of which may be given.
        width: key of the features inside an expert.
        chosen: key of how many of them a token goes to.
        switch: the key that says whether there are any; None: there are.
        layers: which have experts: "all"; "stepped" (every `decoder_sparse_step`-th, but for `mlp_only_layers`);
            "later" (from `first_k_dense_replace` on, or what `first` names); "listed" (`mlp_layer_types` says "sparse";
            all but the first); "typed" (`layer_types` says "moe"); "spaced" (from
            `moe_layer_start_index` to `moe_layer_end_index`, every `moe_layer_interval`-th); "numbered" (those of
            `moe_layers`, or every `interleave_moe_layer_step`-th).
        first: with "later", the key of the first layer that has some.
        score, grouped: see `kbit.graph.experts.Routing`; grouped: `n_group` and `topk_group` are read.
        group_score: see `kbit.graph.experts.Routing`; or the key of the method, "greedy" (of all experts) or
            "group_limited_greedy" (of the groups with the best ones).
        normalise: fixed, or the key that says.
        scale: the key of the factor on the chosen experts' scores.
        shared: key of the shared expert's width, or of how many there are (_SHARED_COUNTS), each as wide as an expert.
        router_bias, selection_bias, bias, beside: see `kbit.models.spec.ExpertsSpec`; the second may be the key that
            says.
        optional: a count of 0 says that there are none.
        jitter: the key of the factor of "sparsemixer".
        scales_input: see `kbit.graph.experts.Routing`.
        clamped: the activation is gpt-oss's, of `swiglu_alpha` and `swiglu_limit`.
    """

    count: tuple[str, ...] = ("num_experts", "num_local_experts")
    width: str = "moe_intermediate_size"
    chosen: str = "num_experts_per_tok"
    switch: str | None = None
    layers: Literal["all", "stepped", "later", "listed", "typed", "spaced", "numbered"] = "all"
    first: str = "first_k_dense_replace"
    score: Score = "softmax"
    normalise: bool | str = True
    scale: str | None = None
    grouped: bool = False
    group_score: Literal["two best", "topk_method"] = "two best"
    shared: str | None = None
    router_bias: bool = False
    selection_bias: bool | str = False
    bias: bool = False
    optional: bool = False
    clamped: bool = False
    jitter: str | None = None
    scales_input: bool = False
    beside: bool = False


def experts_of(rules: ExpertRules, values: ConfigValues, layers: int) -> ExpertsSpec | None:
    """The experts of a configuration, or None where no layer has any.

    Args:
        rules: the family's.
        values: the configuration.
        layers: how many there are.

    Raises:
        UnsupportedError: more experts than any model has.
        CheckpointError: a missing or senseless value.
    """
    if rules.switch is not None and not values.boolean(rules.switch):
        return None
    key = next((key for key in rules.count if key in values.values), rules.count[0])
    if rules.optional and values.raw(key) == 0:
        return None
    count = values.integer(key, 1, _MAX_EXPERTS)
    for other in rules.count:
        if values.raw(other) not in (None, count) and other in values.values:
            raise values.error(other, f"{key}, {count}, as both are the number of experts")
    if 3 * count * layers > _MAX_MATRICES:
        raise UnsupportedError(f"{values.where}: {key} {count} in {layers} layers are more matrices than kbit reads")
    chosen = values.integer(rules.chosen, 1, count)
    width = values.integer(rules.width, 1, _MAX_WIDTH)
    shared = 0
    if rules.shared in _SHARED_COUNTS:
        shared = width * values.integer(str(rules.shared), 0, _MAX_EXPERTS)
    elif rules.shared is not None:
        shared = values.integer(rules.shared, 1, _MAX_WIDTH)
    have = _layers(rules, values, layers)
    routing = _routing(rules, values, count, chosen)
    clamp = None
    if rules.clamped:
        clamp = Clamp(
            values.number("swiglu_alpha", above=_MIN_FACTOR, below=_MAX_FACTOR),
            values.number("swiglu_limit", above=_MIN_FACTOR, below=_MAX_FACTOR),
        )
    if not any(have):
        return None
    added = rules.selection_bias
    added = values.boolean(added) if isinstance(added, str) else added
    return ExpertsSpec(routing, width, have, shared, rules.router_bias, rules.bias, added, clamp, rules.beside)


def check_fixed(fixed: Mapping[str, tuple[object, ...]], values: ConfigValues, model_type: str) -> None:
    """Raise where a key that other implementations read says what this family does not do.

    Args:
        fixed: by key, or key of an object and key inside of it ("attn_config.alibi"), the values that say what it does.

    Raises:
        UnsupportedError: another value.
    """
    for key, usual in fixed.items():
        outer, _, inner = key.partition(".")
        found = values.raw(outer)
        found = found.get(inner) if inner and isinstance(found, Mapping) else found
        if found is not None and found not in usual:
            wanted = " or ".join(repr(value) for value in usual)
            raise UnsupportedError(
                f"{values.where}: {key} {shown(found)} is not supported for model_type {model_type!r}, only {wanted}"
            )


def _layers(rules: ExpertRules, values: ConfigValues, layers: int) -> tuple[bool, ...]:
    if rules.layers == "later":
        first = values.integer(rules.first, 0, _MAX_LAYERS)
        return tuple(layer >= first for layer in range(layers))
    if rules.layers == "typed":
        return tuple(kind == "moe" for kind in values.raw("layer_types"))
    if rules.layers == "spaced":
        first, last, step = (
            values.integer(f"moe_layer_{key}", low, _MAX_LAYERS)
            for key, low in (("start_index", 0), ("end_index", -1), ("interval", 1))
        )
        last = layers - 1 if last == -1 else last
        return tuple(first <= layer <= last and (layer + 1) % step == 0 for layer in range(layers))
    if rules.layers == "numbered":
        return _numbered(values, layers)
    if rules.layers == "listed":
        return _listed(values, layers)
    if rules.layers == "all":
        return (True,) * layers
    step = values.integer("decoder_sparse_step", 1, _MAX_LAYERS)
    dense = values.raw("mlp_only_layers")
    dense = [] if dense is None else dense
    if not isinstance(dense, list) or not all(type(layer) is int and 0 <= layer < layers for layer in dense):
        raise values.error("mlp_only_layers", f"a list of layers, numbers from 0 to {layers - 1}")
    return tuple((layer + 1) % step == 0 and layer not in dense for layer in range(layers))


def _numbered(values: ConfigValues, layers: int) -> tuple[bool, ...]:
    numbers = values.raw("moe_layers")
    step = values.integer("interleave_moe_layer_step", 1, _MAX_LAYERS)
    if numbers is None:
        return tuple((layer + 1) % step == 0 for layer in range(layers))
    if not isinstance(numbers, list) or not all(type(layer) is int and 0 <= layer < layers for layer in numbers):
        raise values.error("moe_layers", f"a list of layers, numbers from 0 to {layers - 1}")
    return tuple(layer in numbers for layer in range(layers))


def _listed(values: ConfigValues, layers: int) -> tuple[bool, ...]:
    kinds, dense = values.raw("mlp_layer_types"), values.optional_integer("first_k_dense_replace", 0, _MAX_LAYERS)
    if kinds is None:
        kinds = ["dense"] + ["sparse"] * (layers - 1)
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in ("dense", "sparse") for kind in kinds):
        raise values.error("mlp_layer_types", f'a list of {layers} names, "dense" or "sparse"')
    if dense is not None and kinds != ["dense" if layer < dense else "sparse" for layer in range(layers)]:
        raise values.error("first_k_dense_replace", f"as mlp_layer_types says, which is {shown(kinds)}")
    return tuple(kind == "sparse" for kind in kinds)


def _routing(rules: ExpertRules, values: ConfigValues, count: int, chosen: int) -> Routing:
    groups = taking_part = 1
    by_method = rules.group_score == "topk_method"
    ungrouped = by_method and values.choice("topk_method", _METHODS) == "all"
    if rules.grouped and ungrouped:
        values.raw("n_group")  # which then means nothing
    elif rules.grouped:
        groups = values.integer("n_group", 1, count)
        taking_part = values.integer("topk_group", 1, groups)
        if count % groups or (groups > 1 and count // groups < 2):
            raise values.error("n_group", f"a divisor of the {count} experts, with two or more in each group")
        if chosen > taking_part * (count // groups):
            raise values.error("topk_group", f"more, as {chosen} experts are chosen in groups of {count // groups}")
    normalise = values.boolean(rules.normalise) if isinstance(rules.normalise, str) else rules.normalise
    scale = 1.0 if rules.scale is None else values.number(rules.scale, above=_MIN_FACTOR, below=_MAX_FACTOR)
    group_score: Literal["two best", "best"] = "best" if by_method else "two best"
    jitter = 0.0 if rules.jitter is None else values.number(rules.jitter, above=-_MIN_FACTOR, below=1.0)
    if rules.score == "sparsemixer" and chosen != 2:
        raise values.error(rules.chosen, "2, as SparseMixer chooses as many")
    return Routing(
        count, chosen, rules.score, normalise, scale, groups, taking_part, group_score, jitter, rules.scales_input
    )
