"""Queries and keys as attention takes them: normalised, and turned as their positions say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kbit.graph.ops import Ops, X
from kbit.models.spec import ModelSpec

if TYPE_CHECKING:
    from kbit.models.blocks import Weights


@dataclass(frozen=True)
class Angles:
    """Which columns of the rotary tables (`DecoderDefinition.rotation`) turn a layer's queries and keys.

    Attributes:
        query, key: [first, stop) columns.
        factor: columns that multiply whole queries, of which only a part turns; or None.
    """

    query: tuple[int, int]
    key: tuple[int, int]
    factor: tuple[int, int] | None = None

    @classmethod
    def of(cls, spec: ModelSpec, layer: int) -> Angles | None:
        """None where a layer does not rotate. The tables: every rope's pairs in turn, then those of queries, or
        of a factor on all pairs of their features."""
        if spec.rotated and not spec.rotated[layer]:
            return None
        pairs = [rope.dim // 2 for rope in spec.ropes]
        which = 1 if spec.window_rope is not None and spec.windows[layer] is not None else 0
        key = (sum(pairs[:which]), sum(pairs[: which + 1]))
        if spec.query_temperature is not None and spec.rope.dim < spec.head_dim:
            return cls(key, key, (sum(pairs), sum(pairs) + spec.head_dim // 2))
        query = key if spec.query_temperature is None else (key[0] + sum(pairs), key[1] + sum(pairs))
        return cls(query, key)


def positioned(
    ops: Ops[X], spec: ModelSpec, weights: Weights, index: int, q: X, k: X | None
) -> tuple[X, X | None, tuple[int, int] | None]:
    """Queries and keys (where the layer has its own) normalised, and turned where that is not left to attention: where
    the norm comes after it, or queries turn by other angles than keys. And the angles that are left to attention, or
    None."""
    turns = Angles.of(spec, index)
    if turns is None and spec.unturned_temperature is not None:
        pairs = spec.rope.dim // 2  # behind which the tables have the factor
        q = ops.rotate(q, spec.head_dim, (pairs, pairs + spec.head_dim // 2))
    if turns is not None and turns.factor is not None:
        q = ops.rotate(q, spec.head_dim, turns.factor)
    if not spec.norm_rotated:
        q, k = _normalised(ops, spec, weights, q, k)
    if turns is not None and not spec.norm_rotated and turns.query == turns.key:
        return q, k, turns.key
    if turns is not None:
        dim = spec.shape(index).head_dim
        q, k = ops.rotate(q, dim, turns.query), None if k is None else ops.rotate(k, dim, turns.key)
    if spec.norm_rotated:
        q, k = _normalised(ops, spec, weights, q, k)
    return q, k, None


def _normalised(ops: Ops[X], spec: ModelSpec, weights: Weights, q: X, k: X | None) -> tuple[X, X | None]:
    """The RMS norms of queries and keys, if any: of each head, or of all together, as their weights are wide."""
    of_q, of_k = weights.norms.get("q_norm"), weights.norms.get("k_norm")
    whole = spec.qk_norm == "whole"
    q = q if of_q is None else ops.norm(q, of_q, spec.norm_eps, parts=whole)
    return q, k if of_k is None or k is None else ops.norm(k, of_k, spec.norm_eps, parts=whole)
