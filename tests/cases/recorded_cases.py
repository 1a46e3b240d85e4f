"""Made-up definitions without attention: blocks that fuse, and such as must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from kbit.graph.ops import LowRank, Ops
from kbit.models.structure import NamedMatrix

WIDTH, INNER, VOCABULARY = 24, 40, 50


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


class Parts:
    """The weights of a made-up model, prepared by a backend (or by none, where only the recording is looked at)."""

    def __init__(self, backend: Any = None) -> None:
        def matrix(rows: int, columns: int, seed: int) -> Any:
            if backend is None:
                return NamedMatrix(f"matrix {seed}", (rows, columns))
            return backend.prepare(randn(rows, columns, seed=seed))

        self.embedding = matrix(VOCABULARY, WIDTH, 0)
        self.first, self.second = matrix(INNER, WIDTH, 1), matrix(INNER, WIDTH, 2)
        self.back, self.other = matrix(WIDTH, INNER, 3), matrix(WIDTH, INNER, 4)
        self.square = matrix(WIDTH, WIDTH, 5)

        self.up = LowRank(matrix(5, WIDTH, 10), matrix(INNER, 5, 11), 0.5)
        self.down = LowRank(matrix(3, INNER, 12), matrix(WIDTH, 3, 13), 2.0)

        def vector(values: torch.Tensor) -> Any:
            return values if backend is None else backend.prepare_vector(values)

        self.scale = vector(1.0 + randn(WIDTH, seed=6))
        self.bias = vector(randn(INNER, seed=7))
        self.shift = vector(randn(WIDTH, seed=8))
        self.run = vector(1.0 + randn(8, seed=9))


Body = Callable[[Parts, Ops[Any], Any], Any]


def gated(w: Parts, ops: Ops[Any], x: Any) -> Any:
    gate, up = ops.linear_group([w.first, w.second], ops.norm(x, w.scale, 1e-5), [w.bias, None])
    return ops.add(x, ops.linear(w.back, ops.activate(gate, up, "silu")))


def swapped(w: Parts, ops: Ops[Any], x: Any) -> Any:
    """The group makes up and gate in the other order, so it cannot apply the activation."""
    up, gate = ops.linear_group([w.second, w.first], ops.norm(x, w.scale, 1e-5), [None, w.bias])
    return ops.add(x, ops.linear(w.back, ops.activate(gate, up, "silu")))


def plain(w: Parts, ops: Ops[Any], x: Any) -> Any:
    """An MLP without gating, and without a norm or a residual."""
    return ops.linear(w.back, ops.activate(ops.linear(w.first, x, w.bias), None, "gelu"))


def shared_norm(w: Parts, ops: Ops[Any], x: Any) -> Any:
    h = ops.norm(x, w.scale, 1e-5)
    gate = ops.linear(w.first, h)
    up = ops.linear(w.second, h, w.bias)
    return ops.add(h, ops.linear(w.back, ops.activate(gate, up, "relu")))


def parallel(w: Parts, ops: Ops[Any], x: Any) -> Any:
    """Two branches off one input, as in GPT-NeoX; both norms are taken before the first sum takes x's place."""
    left = ops.linear(w.first, ops.norm(x, w.scale, 1e-5), w.bias)
    right = ops.linear(w.second, ops.norm(x, w.scale, 1e-3))
    x = ops.add(x, ops.linear(w.back, left))
    return ops.add(x, ops.linear(w.other, right))


def late_norm(w: Parts, ops: Ops[Any], x: Any) -> Any:
    """The norm's product comes after the sum that takes x's place: the norm must not wait for it."""
    h = ops.norm(x, w.scale, 1e-5)
    x = ops.add(x, ops.linear(w.back, ops.linear(w.first, x)))
    return ops.add(x, ops.linear(w.other, ops.linear(w.second, h)))


def own_residual(w: Parts, ops: Ops[Any], x: Any) -> Any:
    """A product reads the norm of what it is added to."""
    return ops.add(x, ops.linear(w.square, ops.norm(x, w.scale, 1e-5)))


def kept_products(w: Parts, ops: Ops[Any], x: Any) -> Any:
    """The gate is read again after its activation."""
    gate, up = ops.linear_group([w.first, w.second], x, [None, None])
    inner = ops.linear(w.back, ops.activate(gate, up, "gelu_tanh"))
    return ops.add(inner, ops.linear(w.back, gate))


def last_norm(w: Parts, ops: Ops[Any], x: Any) -> Any:
    """The hidden states are a norm, which is read by no product of the body."""
    return ops.norm(ops.linear(w.square, x), w.scale, 1e-5)


def squared(w: Parts, ops: Ops[Any], x: Any) -> Any:
    """Gate and up are the same value."""
    gate = ops.linear(w.first, x)
    return ops.linear(w.back, ops.activate(gate, gate, "silu"))


def read_later(w: Parts, ops: Ops[Any], x: Any) -> Any:
    """What is added to is read again: the sum takes a place of its own."""
    y = ops.add(x, ops.linear(w.square, ops.norm(x, w.scale, 1e-5)))
    return ops.add(x, ops.linear(w.square, y))


def post_norm(w: Parts, ops: Ops[Any], x: Any) -> Any:
    """What is added to the stream is normalised first: the product has no residual, and its parts are summed before."""
    inner = ops.activate(ops.linear(w.first, ops.layer_norm(x, w.scale, w.shift, 1e-5), w.bias), None, "gelu")
    out = ops.sum_parts(ops.linear(w.back, inner), w.shift)
    return ops.add(x, ops.layer_norm(out, w.scale, None, 1e-3))


def summed(w: Parts, ops: Ops[Any], x: Any) -> Any:
    """The sum over processes with its bias, and a residual."""
    inner = ops.activate(ops.linear(w.first, x, w.bias), None, "silu")
    return ops.add(x, ops.sum_parts(ops.linear(w.back, inner), w.shift))


def by_runs(w: Parts, ops: Ops[Any], x: Any) -> Any:
    """A norm of runs of features, which no product takes over; and a factor, which keeps a residual from its product."""
    inner = ops.linear(w.first, ops.norm(x, w.run, 1e-5))
    return ops.add(x, ops.scale(ops.linear(w.back, inner), 0.5))


def capped(w: Parts, ops: Ops[Any], x: Any) -> Any:
    return ops.add(x, ops.soft_cap(ops.scale(ops.linear(w.square, x), 3.0), 0.7))


def turned(w: Parts, ops: Ops[Any], x: Any) -> Any:
    """Three heads of 8 by each of the table's two columns alone, and then by both."""
    y = ops.rotate(ops.rotate(ops.linear(w.square, x), 8, (0, 1)), 8, (1, 2))
    return ops.add(x, ops.rotate(y, 8, (0, 2)))


def adapted(w: Parts, ops: Ops[Any], x: Any) -> Any:
    """Adapters of a group, of which one leaves one product alone, and of a product that is added to the stream."""
    h = ops.norm(x, w.scale, 1e-5)
    made = ops.linear_group([w.first, w.second], h, [w.bias, None])
    gate, up = ops.adapt(h, made, [[w.up, None], [None, w.up]])
    inner = ops.activate(gate, up, "silu")
    (out,) = ops.adapt(inner, [ops.linear(w.back, inner)], [[w.down, w.down]])
    return ops.add(x, ops.sum_parts(out, w.shift))


def adapted_stream(w: Parts, ops: Ops[Any], x: Any) -> Any:
    """What is added to is what the adapter reads, too."""
    (out,) = ops.adapt(x, [ops.linear(w.first, x)], [[w.up, None]])
    return ops.add(x, ops.adapt(out, [ops.linear(w.back, out)], [[None, w.down]])[0])


def adapted_twice(w: Parts, ops: Ops[Any], x: Any) -> Any:
    """What an adapter made is read twice, once by a sum."""
    inner = ops.linear(w.first, x)
    (out,) = ops.adapt(inner, [ops.linear(w.back, inner)], [[w.down, None]])
    return ops.add(ops.add(x, out), ops.linear(w.square, out))


BODIES: tuple[Body, ...] = (
    gated,
    swapped,
    plain,
    shared_norm,
    parallel,
    late_norm,
    own_residual,
    kept_products,
    last_norm,
    squared,
    read_later,
    post_norm,
    summed,
    by_runs,
    capped,
    turned,
    adapted,
    adapted_stream,
    adapted_twice,
)


class Made:
    """A definition with one of these bodies and no attention."""

    rotation_depends_on_length = False

    def __init__(self, backend: Any, body: Body) -> None:
        self.parts = Parts(backend)
        self._body = body

    def body(self, ops: Ops[Any], ids: Any) -> Any:
        return self._body(self.parts, ops, ops.embed(self.parts.embedding, ids))

    def head(self, ops: Ops[Any], hidden: Any) -> Any:
        return ops.logits(self.parts.embedding, ops.norm(hidden, self.parts.scale, 1e-6))

    def rotation(self, positions: Any, lengths: Any) -> tuple[Any, Any]:
        angles = positions[..., None] * np.array([1.0, 0.1])
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
