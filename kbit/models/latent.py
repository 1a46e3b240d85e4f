"""Multi-head latent attention, expanded: every head's queries, keys and values as attention of any kind takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbit.graph.ops import Ops, X
from kbit.models.mixers import together
from kbit.models.params import KEYS_VALUES, latent_inputs
from kbit.models.spec import LatentSpec, ModelSpec

if TYPE_CHECKING:
    from kbit.models.blocks import Weights


def latent_heads(ops: Ops[X], spec: ModelSpec, latent: LatentSpec, weights: Weights, normed: X) -> tuple[X, X, X]:
    """Queries, keys and values, not yet turned: (..., hidden) -> (..., H D) each."""
    q, kv, shared = together(ops, weights, latent_inputs(latent), normed)
    if latent.query_rank:
        q = ops.linear(weights.matrices["q"], ops.norm(q, weights.norms["q_a_norm"], latent.eps))
    k, v = together(ops, weights, KEYS_VALUES, ops.norm(kv, weights.norms["kv_a_norm"], latent.eps))
    k = ops.fit_heads(k, spec.heads, spec.head_dim, shared)
    return q, k, v if latent.value_dim == spec.head_dim else ops.fit_heads(v, spec.heads, spec.head_dim)


def latent_values(ops: Ops[X], spec: ModelSpec, latent: LatentSpec, seen: X) -> X:
    """What attention made of such values, without what they were filled up with: (..., H D) -> (..., H D_v)."""
    return seen if latent.value_dim == spec.head_dim else ops.fit_heads(seen, spec.heads, latent.value_dim)
