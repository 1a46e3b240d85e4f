"""TensorNames: what a family calls the tensors of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorNames:
    """Where a family keeps its tensors. Names of layers contain {layer}; they lack .weight and .bias.

    A norm without a name is not there. Those of a layer: before attention, of what attention adds to the residual
    stream, of the stream with it, and the same three of the MLP; what the last linear of both reads
    (`attention_inner_norm`, `mlp_inner_norm`); and of queries and keys. Without a gate the MLP is
    plain. With an `output_gate` the sigmoid of what it makes is multiplied with what attention made. `positions`,
    `types` and `distances` are tables that are looked up by a token's position, its type, and its distance from
    another. Names of an expert contain {expert}; those of sinks, of the selection bias, of the scales, of
    xIELU, and of the rates
    and the bias of a delta net are whole. `cross_*` are of attention to an encoder's text, and of its norms: before it,
    and of the stream with it. `copies` may be stored again, and are the embedding then; `logit_bias`, whole, is added
    to logits where it is there. `sound_*` are convolutions over frames of sound, in place of an embedding.
    `project_in` and `project_out` are between embeddings that are narrower than the residual stream and that.

    Where experts stand beside an MLP, their input has a norm of its own, `experts_norm`, and there are norms of what
    both add: `mlp_own_norm` and `experts_post_norm`. A second embedding (`layer_embedding`) has features for every
    layer, to which a projection of the first one is added under a norm (`layer_features`, `layer_features_norm`); what
    a layer makes of its own goes through `layer_gate`, `layer_up` and `layer_post_norm`.
    """

    embedding: str
    final_norm: str | None
    head: str
    q: str
    k: str
    v: str
    o: str
    gate: str | None
    up: str
    down: str
    attention_norm: str | None = None
    attention_post_norm: str | None = None
    attention_sum_norm: str | None = None
    mlp_norm: str | None = None
    mlp_post_norm: str | None = None
    mlp_sum_norm: str | None = None
    embedding_norm: str | None = None
    xielu_positive: str | None = None
    xielu_negative: str | None = None
    xielu_linear: str | None = None
    xielu_eps: str | None = None
    project_in: str | None = None
    project_out: str | None = None
    positions: str | None = None
    types: str | None = None
    distances: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    cross_norm: str | None = None
    cross_q: str | None = None
    cross_k: str | None = None
    cross_v: str | None = None
    cross_o: str | None = None
    cross_sum_norm: str | None = None
    logit_bias: str | None = None
    sound_first: str | None = None
    sound_second: str | None = None
    copies: tuple[str, ...] = ()
    output_gate: str | None = None
    attention_inner_norm: str | None = None
    mlp_inner_norm: str | None = None
    sinks: str | None = None
    router: str | None = None
    selection_bias: str | None = None
    expert_gate: str | None = None
    expert_up: str | None = None
    expert_down: str | None = None
    shared_gate: str | None = None
    shared_up: str | None = None
    shared_down: str | None = None
    shared_switch: str | None = None
    q_a: str | None = None
    q_a_norm: str | None = None
    kv_a: str | None = None
    kv_a_norm: str | None = None
    k_shared: str | None = None
    router_scale: str | None = None
    expert_scales: str | None = None
    mlp_own_norm: str | None = None
    experts_norm: str | None = None
    experts_post_norm: str | None = None
    layer_scale: str | None = None
    layer_embedding: str | None = None
    layer_features: str | None = None
    layer_features_norm: str | None = None
    layer_gate: str | None = None
    layer_up: str | None = None
    layer_post_norm: str | None = None
    conv_b: str | None = None
    conv_c: str | None = None
    conv_x: str | None = None
    conv_taps: str | None = None
    conv_out: str | None = None
    scan_z: str | None = None
    scan_x: str | None = None
    scan_steps: str | None = None
    scan_bias: str | None = None
    scan_rates: str | None = None
    scan_skips: str | None = None
    scan_taps: str | None = None
    scan_norm: str | None = None
    scan_out: str | None = None
    delta_qkv: str | None = None
    delta_z: str | None = None
    delta_decay: str | None = None
    delta_write: str | None = None
    delta_rates: str | None = None
    delta_bias: str | None = None
    delta_taps: str | None = None
    delta_norm: str | None = None
    delta_out: str | None = None
