"""Parameters: every tensor of a model, declared once by the block that it belongs to.

What the rest needs to know of them is read off the declarations: which tensors a checkpoint must have, what is prepared
and where it goes, how a model is cut among processes, which matrices a measurement goes through.
"""

from __future__ import annotations

from collections.abc import Iterator

from kbit.models.block_specs import LatentSpec, SoundSpec
from kbit.models.parameter import Parameter, Role, Unit, linear_of, norm_of, router_of
from kbit.models.params_recurrent import recurrent, scan_net
from kbit.models.spec import XIELU, ModelSpec

EXPERT_FEATURES: Unit = "expert features"
KEY_HEADS: Unit = "kv_heads"

# What stands outside of the layers, beside embedding and head, and is prepared with them.
OUTSIDE: tuple[Role, ...] = ("norm", "bias", "rows", "table", "router", "distances")

# Linears that read one input and are multiplied in one call.
QKV, GATE_UP, SHARED = ("q", "k", "v"), ("gate", "up"), ("shared_gate", "shared_up")
KEYS_VALUES = ("k", "v")
CROSS_KV = ("cross_k", "cross_v")
# Of an xIELU (`kbit.models.load`).
XIELU_PARTS = ("positive", "negative", "linear", "eps")


def parameters(spec: ModelSpec) -> tuple[Parameter, ...]:
    """Every tensor that a model needs, in the order of its computation. A tied head is not among them.

    Of an encoder-decoder those of both, each with the layers of its own stack; what they share is named once.
    """
    own = own_parameters(spec)
    if spec.encoder is None:
        return own
    names = {parameter.name for parameter in own}
    return (*(p for p in own_parameters(spec.encoder) if p.name not in names), *own)


def layer_numbers(spec: ModelSpec) -> dict[str, int | None]:
    """The layer of every parameter by name; of an encoder-decoder the decoder's go on where the encoder's end."""
    first = 0 if spec.encoder is None else spec.encoder.layers
    found = {} if spec.encoder is None else {p.name: p.layer for p in own_parameters(spec.encoder)}
    return found | {p.name: None if p.layer is None else first + p.layer for p in own_parameters(spec)}


def own_parameters(spec: ModelSpec) -> tuple[Parameter, ...]:
    """Those of one stack of layers: `parameters`, but of an encoder-decoder the decoder's alone."""
    names, vocabulary = spec.names, (spec.vocab_size, spec.embedding_width)
    found = [Parameter(f"{names.embedding}.weight", "embedding", None, "embedding", vocabulary)]
    if spec.sound is not None:
        found = list(_sound(spec, spec.sound))
    found += _beside_embedding(spec)
    for layer in range(spec.layers):
        if spec.recurs(layer):
            found += recurrent(spec, layer)
        elif spec.attends(layer):
            found += _attention(spec, layer)
        if spec.scan_beside is not None:
            found += scan_net(spec, spec.scan_beside, layer)
        if spec.encoder is not None:
            found += _cross(spec, layer)
        if not spec.has_mlp(layer):
            continue
        if spec.experts is not None and spec.experts.beside:
            found += _mlp(spec, layer)
            found += _beside_mlp(spec, layer)
        else:
            found += _experts(spec, layer) if spec.has_experts(layer) else _mlp(spec, layer)
        found += _layer_end(spec, layer)
    found += norm_of(spec, "final_norm", None)
    if spec.embedding_size:
        shape = (spec.embedding_size, spec.hidden_size)
        found.append(Parameter(f"{names.project_out}.weight", "project_out", None, "router", shape))
    found += _task(spec)
    if spec.head_bias and spec.task is None:
        found.append(Parameter(f"{names.head}.bias", "head", None, "bias", vocabulary[:1]))
    if not spec.tied_embeddings and spec.has_logits:
        found.append(Parameter(f"{names.head}.weight", "head", None, "head", vocabulary))
    return tuple(found)


def _beside_embedding(spec: ModelSpec) -> Iterator[Parameter]:
    """What `kbit.models.blocks.embedding` reads besides the embedding, and the table of distances."""
    if spec.embedding_size:
        shape = (spec.hidden_size, spec.embedding_size)
        yield Parameter(f"{spec.names.project_in}.weight", "project_in", None, "router", shape)
    for slot, rows in (("positions", spec.position_rows), ("types", spec.types)):
        if rows and not (slot == "positions" and spec.sinusoids is not None):
            name = f"{getattr(spec.names, slot)}.weight"
            yield Parameter(name, slot, None, "rows", (rows, spec.hidden_size))
    yield from norm_of(spec, "embedding_norm", None)
    if spec.layer_features:
        hidden, wide, names = spec.hidden_size, spec.layers * spec.layer_features, spec.names
        yield Parameter(f"{names.layer_embedding}.weight", "layer_embedding", None, "table", (spec.layer_tokens, wide))
        yield Parameter(f"{names.layer_features}.weight", "layer_features", None, "router", (wide, hidden))
        yield from norm_of(spec, "layer_features_norm", None, spec.layer_features)
    yield from _distances(spec, None)


def _sound(spec: ModelSpec, sound: SoundSpec) -> Iterator[Parameter]:
    """The convolutions of `kbit.models.sound`: a row has all features of its frames, of each feature all frames."""
    for slot, features in (("sound_first", sound.bins), ("sound_second", spec.hidden_size)):
        name, hidden = getattr(spec.names, slot), spec.hidden_size
        yield Parameter(f"{name}.weight", slot, None, "router", (hidden, features * sound.taps))
        yield Parameter(f"{name}.bias", slot, None, "bias", (hidden,))


def _distances(spec: ModelSpec, layer: int | None) -> Iterator[Parameter]:
    """The table of distances of a layer, or of all (None), where the model has it there."""
    template = str(spec.names.distances)
    if spec.distances is not None and ("{layer}" in template) == (layer is not None):
        name = f"{template.format(layer=layer)}.weight"
        yield Parameter(name, "distances", layer, "distances", (spec.distances[0], spec.heads), (1, "sinks"))


def _task(spec: ModelSpec) -> Iterator[Parameter]:
    """What `kbit.engine.heads` reads."""
    if (task := spec.task) is None:
        return
    hidden = spec.hidden_size
    for name, shape, bias in (
        (task.dense, (hidden, hidden), f"{task.dense}.bias" if task.dense_bias else None),
        (task.norm, (hidden,), f"{task.norm}.bias" if task.norm_bias else None),
        (task.out, (task.labels, hidden), task.out_bias),
    ):
        if name is not None:
            yield Parameter(f"{name}.weight", "task", None, "task", shape)
            if bias is not None:
                yield Parameter(bias, "task", None, "task", shape[:1])
    if task.kind == "mask" and task.out_bias is not None:
        yield Parameter(task.out_bias, "task", None, "task", (spec.vocab_size,))


def _attention(spec: ModelSpec, layer: int) -> Iterator[Parameter]:
    """What `kbit.models.blocks.attention` reads."""
    if spec.latent is not None:
        yield from _latent_attention(spec, spec.latent, layer)
        return
    shape = spec.shape(layer)
    hidden, queries, keys = spec.hidden_size, spec.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    own, inputs = qkv(spec, layer), attention_inputs(spec, layer)
    if layer not in spec.unnormed:
        yield from norm_of(spec, "attention_norm", layer)
    yield from linear_of(spec, "q", layer, (queries, hidden), (0, "heads"), inputs, spec.qkv_bias)
    for slot in own[1:]:
        yield from linear_of(spec, slot, layer, (keys, hidden), (0, "kv_heads"), inputs, _biased(spec, slot))
    if spec.names.output_gate is not None:
        yield from linear_of(spec, "output_gate", layer, (queries, hidden), (0, "heads"), inputs, spec.qkv_bias)
    whole = spec.qk_norm == "whole"
    yield from norm_of(spec, "q_norm", layer, queries if whole else shape.head_dim, (0, "heads") if whole else None)
    if len(own) > 1:
        by_head = (0, KEY_HEADS) if whole else None
        yield from norm_of(spec, "k_norm", layer, keys if whole else shape.head_dim, by_head)
    yield from _distances(spec, layer)
    if spec.names.sinks is not None:
        yield Parameter(spec.names.sinks.format(layer=layer), "sinks", layer, "bias", (spec.heads,), (0, "sinks"))
    yield from norm_of(spec, "attention_inner_norm", layer, queries, (0, "heads"))
    yield from linear_of(spec, "o", layer, (hidden, queries), (1, "heads"), ("o",), spec.output_bias)
    yield from norm_of(spec, "attention_post_norm", layer)
    yield from norm_of(spec, "attention_sum_norm", layer)


def _latent_attention(spec: ModelSpec, latent: LatentSpec, layer: int) -> Iterator[Parameter]:
    """What `kbit.models.latent` reads, and attention's last linear."""
    hidden, heads, group = spec.hidden_size, spec.heads, latent_inputs(latent)
    queries, own, values = (heads * dim for dim in (spec.head_dim, spec.head_dim - spec.rope.dim, latent.value_dim))
    yield from norm_of(spec, "attention_norm", layer)
    if latent.query_rank:
        yield from linear_of(spec, "q_a", layer, (latent.query_rank, hidden), None, group, spec.qkv_bias)
        yield from norm_of(spec, "q_a_norm", layer, latent.query_rank)
        yield from linear_of(spec, "q", layer, (queries, latent.query_rank), (0, "heads"), ("q",), False)
    else:
        yield from linear_of(spec, "q", layer, (queries, hidden), (0, "heads"), group, False)
    yield from linear_of(spec, "kv_a", layer, (latent.rank, hidden), None, group, spec.qkv_bias)
    yield from linear_of(spec, "k_shared", layer, (spec.rope.dim, hidden), None, group, spec.qkv_bias)
    yield from norm_of(spec, "kv_a_norm", layer, latent.rank)
    yield from linear_of(spec, "k", layer, (own, latent.rank), (0, "latent keys"), KEYS_VALUES, False)
    yield from linear_of(spec, "v", layer, (values, latent.rank), (0, "latent values"), KEYS_VALUES, False)
    yield from linear_of(spec, "o", layer, (hidden, values), (1, "latent values"), ("o",), spec.output_bias)


def latent_inputs(latent: LatentSpec) -> tuple[str, str, str]:
    """The slots of what latent attention multiplies its input with."""
    return ("q_a" if latent.query_rank else "q", "kv_a", "k_shared")


def qkv(spec: ModelSpec, layer: int) -> tuple[str, ...]:
    """The slots of what attention multiplies its input with, queries first."""
    shape = spec.shape(layer)
    if shape.source != layer:
        return ("q",)
    return ("q", "k") if shape.keys_as_values else QKV


def _biased(spec: ModelSpec, slot: str) -> bool:
    """Whether keys or values have a bias."""
    return spec.qkv_bias and (spec.key_bias or slot != "k")


def weightless_norms(spec: ModelSpec, layer: int) -> dict[str, int]:
    """The widths of a layer's norms that have no weight, by slot."""
    shape = spec.shape(layer)
    found = {"v_norm": shape.head_dim} if spec.value_norm and shape.source == layer else {}
    if spec.key_norms and spec.attends(layer) and (not spec.rotated or spec.rotated[layer]):
        found |= {"q_norm": shape.head_dim, "k_norm": shape.head_dim}
    return found


def _cross(spec: ModelSpec, layer: int) -> Iterator[Parameter]:
    """What `kbit.models.blocks.cross` reads, and what makes an encoder's keys and values."""
    hidden, queries, keys = spec.hidden_size, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    yield from norm_of(spec, "cross_norm", layer)
    yield from linear_of(spec, "cross_q", layer, (queries, hidden), (0, "heads"), ("cross_q",), spec.qkv_bias)
    yield from linear_of(spec, "cross_k", layer, (keys, hidden), (0, "kv_heads"), CROSS_KV, _biased(spec, "k"))
    yield from linear_of(spec, "cross_v", layer, (keys, hidden), (0, "kv_heads"), CROSS_KV, spec.qkv_bias)
    yield from linear_of(spec, "cross_o", layer, (hidden, queries), (1, "heads"), ("cross_o",), spec.output_bias)
    yield from norm_of(spec, "cross_sum_norm", layer)


def _mlp(spec: ModelSpec, layer: int) -> Iterator[Parameter]:
    """What `kbit.models.blocks.mlp` reads."""
    hidden, features = spec.hidden_size, spec.shape(layer).width
    yield from norm_of(spec, "mlp_norm", layer)
    inputs = gate_up(spec)
    for slot in inputs:
        yield from linear_of(spec, slot, layer, (features, hidden), (0, "features"), inputs, spec.mlp_bias)
    yield from norm_of(spec, "mlp_inner_norm", layer, features, (0, "features"))
    yield from linear_of(spec, "down", layer, (hidden, features), (1, "features"), ("down",), spec.mlp_bias)
    for part in XIELU_PARTS if spec.activation == XIELU else ():
        name = str(getattr(spec.names, f"xielu_{part}")).format(layer=layer)
        shape = (1,) if part in ("positive", "negative") else ()  # as published
        yield Parameter(name, f"xielu_{part}", layer, "bias", shape)
    yield from norm_of(spec, "mlp_post_norm", layer)
    yield from norm_of(spec, "mlp_sum_norm", layer)


def attention_inputs(spec: ModelSpec, layer: int) -> tuple[str, ...]:
    """The slots of what attention multiplies its input with, a gate on what it makes last."""
    gate = () if spec.names.output_gate is None else ("output_gate",)
    return (*qkv(spec, layer), *gate)


def gate_up(spec: ModelSpec) -> tuple[str, ...]:
    """The slots of what an MLP multiplies its input with."""
    return GATE_UP if spec.names.gate is not None else ("up",)


def shared_inputs(spec: ModelSpec) -> tuple[str, ...]:
    """The slots of what a shared expert multiplies its input with."""
    return SHARED if spec.names.shared_gate is not None else ("shared_up",)


def expert_slots(experts: int) -> tuple[tuple[str, str, str], ...]:
    """The slots of every expert's gate, up and down."""
    return tuple((f"experts.{i}.gate", f"experts.{i}.up", f"experts.{i}.down") for i in range(experts))


def _experts(spec: ModelSpec, layer: int) -> Iterator[Parameter]:
    """What `kbit.models.blocks.mixture` reads."""
    experts, names, hidden = spec.experts, spec.names, spec.hidden_size
    assert experts is not None
    count, width, shared = experts.routing.experts, experts.width, experts.shared_width
    active = experts.routing.chosen / count
    yield from norm_of(spec, "mlp_norm", layer)
    yield from router_of(spec, "router", layer, count, experts.router_bias)
    if experts.selection_bias:
        yield Parameter(str(names.selection_bias).format(layer=layer), "selection_bias", layer, "bias", (count,))
    for expert, (gate, up, down) in enumerate(expert_slots(count)):
        for template, slot, shape, group, dim in (
            (names.expert_gate, gate, (width, hidden), (gate, up), 0),
            (names.expert_up, up, (width, hidden), (gate, up), 0),
            (names.expert_down, down, (hidden, width), (down,), 1),
        ):
            if template is None:
                continue
            name, own = str(template).format(layer=layer, expert=expert), (dim, EXPERT_FEATURES)
            group = group if names.expert_gate is not None or slot == down else (up,)
            yield Parameter(f"{name}.weight", slot, layer, "linear", shape, own, group, active)
            if experts.bias:
                rows = own if dim == 0 else None
                yield Parameter(f"{name}.bias", slot, layer, "bias", shape[:1], rows, (), active, dim == 1)
    if shared:
        inputs = shared_inputs(spec)
        features: Unit = "shared features"
        for slot in inputs:
            yield from linear_of(spec, slot, layer, (shared, hidden), (0, features), inputs, spec.mlp_bias)
        back = (hidden, shared)
        yield from linear_of(spec, "shared_down", layer, back, (1, features), ("shared_down",), spec.mlp_bias)
        if names.shared_switch is not None:
            yield from router_of(spec, "shared_switch", layer, 1, False)
    yield from norm_of(spec, "mlp_post_norm", layer)


def _beside_mlp(spec: ModelSpec, layer: int) -> Iterator[Parameter]:
    """What `kbit.models.blocks.mixture_beside` reads besides the MLP's: experts, and norms around both."""
    experts, names = spec.experts, spec.names
    assert experts is not None
    yield Parameter(str(names.router_scale).format(layer=layer), "router_scale", layer, "norm", (spec.hidden_size,))
    yield from (p for p in _experts(spec, layer) if p.slot not in ("mlp_norm", "mlp_post_norm"))
    scales = str(names.expert_scales).format(layer=layer)
    yield Parameter(scales, "expert_scales", layer, "bias", (experts.routing.experts,))
    for slot in ("mlp_own_norm", "experts_norm", "experts_post_norm"):
        yield from norm_of(spec, slot, layer)


def _layer_end(spec: ModelSpec, layer: int) -> Iterator[Parameter]:
    """What comes after attention and MLP: see `kbit.models.per_layer`, and a factor on the layer's result."""
    hidden, own = spec.hidden_size, spec.layer_features
    if own:
        yield from linear_of(spec, "layer_gate", layer, (own, hidden), None, ("layer_gate",), False)
        yield from linear_of(spec, "layer_up", layer, (hidden, own), None, ("layer_up",), False)
        yield from norm_of(spec, "layer_post_norm", layer)
    if spec.names.layer_scale is not None:
        yield Parameter(spec.names.layer_scale.format(layer=layer), "layer_scale", layer, "bias", (1,))
