"""Embeddings that every layer has of its own (Gemma 4's E models): a second table, and what layers do with it.

Each layer gets (norm(P x h^-1/2) + sqrt(f) t) / sqrt(2): P projects the first embedding x (h features) to f features
for every layer, t is the token's row of the second table, of as many. At its end (`kbit.models.blocks.layer`) a layer
adds norm(U (act(G y) * features)) to the residual stream y.
"""

from __future__ import annotations

from kbit.graph.ops import Ops, X
from kbit.models.blocks import Weights, norm
from kbit.models.spec import ModelSpec


def features(ops: Ops[X], spec: ModelSpec, outside: Weights, ids: X, x: X) -> X | None:
    """The features of all layers, or None where there are none.

    Args:
        ids: token ids.
        x: their embeddings (..., hidden).

    Returns:
        (..., layers f).
    """
    if not spec.layer_features:
        return None
    table = ops.scale(ops.embed(outside.matrices["layer_embedding"], ids), spec.layer_multiplier)
    projected = ops.scale(ops.linear(outside.matrices["layer_features"], x), float(spec.hidden_size**-0.5))
    projected = norm(ops, spec, outside, "layer_features_norm", projected)
    return ops.scale(ops.add(projected, table), 2.0**-0.5)


def of_layer(ops: Ops[X], spec: ModelSpec, features: X, layer: int) -> X:
    """Those of one layer: (..., layers f) -> (..., f)."""
    return ops.columns(features, layer * spec.layer_features, spec.layer_features)
