"""Multi-head latent attention: with the keys and values of every head, or with the vectors that these are made of.

Keys are k_h = [r, W_h c] and values v_h = V_h c, of a vector c (`LatentSpec.rank`) and turned features r that all heads
share. Since q_h . k_h = q_r . r + (W_h^T q_n) . c, and the weighted sum of values is V_h times that of the c, a cache
may keep (r, c) alone: one head of keys for all queries, whose weighted sum is taken to the heads' values at the end.
That is exact, and a few percent of the memory; a query's products are longer. (DeepSeek-V2, arXiv 2405.04434, section
2.1.2, "absorbed".) A token's result must not depend on how its text is cut into passes, so prompts go the same way.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kbit.graph.backend import Backend
from kbit.graph.ops import Ops, X
from kbit.models.block_specs import LatentSpec
from kbit.models.mixers import together
from kbit.models.params import KEYS_VALUES, latent_inputs
from kbit.models.spec import ModelSpec

if TYPE_CHECKING:
    from kbit.models.blocks import Weights

# What heads' features, and rows of their matrices, must be a multiple of: a panel of the native layout.
_UNIT = 16


def compressed(spec: ModelSpec, backend: Backend) -> ModelSpec:
    """What a backend runs of a model: with latent vectors in its cache where both can."""
    return with_latents(spec) if backend.keeps_latents else spec


def with_latents(spec: ModelSpec) -> ModelSpec:
    """The model with latent vectors in its cache, if its sizes allow it: all are multiples of 16."""
    latent = spec.latent
    if latent is None:
        return spec
    sizes = (latent.rank, latent.value_dim, spec.head_dim - spec.rope.dim, latent.rank + spec.rope.dim)
    if any(size % _UNIT for size in sizes):
        return spec
    return replace(spec, latent=replace(latent, expanded=False))


def latent_heads(ops: Ops[X], spec: ModelSpec, latent: LatentSpec, weights: Weights, normed: X) -> tuple[X, X, X]:
    """Queries, keys and values, not yet turned: (..., hidden) -> (..., H D) each.

    Where the cache keeps latents: queries still of D features, and (r, c) as keys and as values.
    """
    q, kv, shared = together(ops, weights, latent_inputs(latent), normed)
    if latent.query_rank:
        q = ops.linear(weights.matrices["q"], ops.norm(q, weights.norms["q_a_norm"], latent.eps))
    vector = ops.norm(kv, weights.norms["kv_a_norm"], latent.eps)
    if not latent.expanded:
        both = ops.fit_heads(vector, 1, spec.rope.dim + latent.rank, shared)
        return q, both, both
    k, v = together(ops, weights, KEYS_VALUES, vector)
    k = ops.fit_heads(k, spec.heads, spec.head_dim, shared)
    return q, k, v if latent.value_dim == spec.head_dim else ops.fit_heads(v, spec.heads, spec.head_dim)


def latent_queries(ops: Ops[X], spec: ModelSpec, weights: Weights, q: X) -> X:
    """Queries as they meet what the cache keeps: (..., H D) -> (..., H (R + rank)), R features of each as they are."""
    return ops.by_heads(weights.matrices["k"], q, spec.heads, spec.rope.dim, backward=True)


def latent_values(ops: Ops[X], spec: ModelSpec, latent: LatentSpec, weights: Weights, seen: X) -> X:
    """What attention made of such values, as the last linear reads it: (..., H D), or of latents (..., H (R + rank)),
    -> (..., H D_v)."""
    if not latent.expanded:
        return ops.by_heads(weights.matrices["v"], seen, spec.heads, spec.rope.dim, backward=False)
    return seen if latent.value_dim == spec.head_dim else ops.fit_heads(seen, spec.heads, latent.value_dim)
