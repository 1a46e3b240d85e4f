"""A model beside its original: how far it diverges, and the slopes of that to its weights, rows and norms.

Every sequence is worked through by one thread and sums are formed in a fixed order: the result does not depend on the
number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.backends.reference.backend import ReferenceBackend, tensor_of
from kbit.backends.reference.gradients import GradientOps, KeepingBackend, dense
from kbit.calibration.workers import workers
from kbit.checkpoint.source import CheckpointSource
from kbit.graph.ops import Vector, Weight
from kbit.models.decoder import DecoderDefinition
from kbit.models.load import load_decoder
from kbit.models.params import parameters


def divergence(source: CheckpointSource, quantized: CheckpointSource, text: NDArray[np.int64]) -> float:
    """KL divergence of a model from its original, nats per token, over sequences (S, T)."""
    with workers(torch.get_num_threads()) as pool:
        return Pair(source, quantized, pool, 1).divergence(text)


@dataclass(frozen=True, eq=False)
class Given:
    """What a model has in place of its own, by name.

    Attributes:
        weights: matrices (N, K), float32.
        factors: of the rows of matrices (N,), and of the weights of norms.
    """

    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    factors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def free(self) -> Given:
        """The same numbers as leaves of a graph of their own."""
        weights, factors = (
            {name: value.detach().requires_grad_() for name, value in values.items()}
            for values in (self.weights, self.factors)
        )
        return Given(weights, factors)

    def all(self) -> list[torch.Tensor]:
        return [*self.weights.values(), *self.factors.values()]


class Pair:
    """A model beside its original.

    Holds the original as it is stored, and the model in float32.

    Args:
        source: the original.
        model: the same with other weights.
        pool: of threads that each compute with one.
        threads: how many of the pool's work at a time; as many gradients of all weights are in memory.

    Attributes:
        places: of the linear matrices inside the layers and of norms, by name: what operations know them by.
        norms: how many weights each has, by name.
    """

    def __init__(
        self, source: CheckpointSource, model: CheckpointSource, pool: ThreadPoolExecutor, threads: int
    ) -> None:
        original, other = load_decoder(source, KeepingBackend()), load_decoder(model, ReferenceBackend())
        self._original = DecoderDefinition(original.spec, original.weights)
        self._model = DecoderDefinition(other.spec, other.weights)
        self.places, self.norms = {}, {}
        for p in parameters(other.spec):
            held = other.weights.final if p.layer is None else other.weights.layers[p.layer]
            if p.role == "linear" and p.layer is not None:
                self.places[p.name] = id(held.matrices[p.slot])
            elif p.role == "norm":
                self.places[p.name] = id(held.norms[p.slot])
                self.norms[p.name] = p.shape[0]
        self._pool, self._threads = pool, threads

    def divergence(self, text: NDArray[np.int64], given: Given | None = None) -> float:
        """Nats per token, over sequences (S, T)."""

        def run(ids: NDArray[np.int64]) -> float:
            with torch.no_grad():
                return float(self._divergence(torch.from_numpy(ids)[None], given or Given()))

        return float(np.mean(list(self._pool.map(run, text))))

    def gradients(self, free: Given, fixed: Given, text: NDArray[np.int64]) -> list[torch.Tensor]:
        """Of the mean divergence over sequences (S, T), to what is free, in the order of `Given.all`.

        Args:
            free: what gradients are wanted of.
            fixed: what else the model has in place of its own.
            text: int64 (S, T).
        """

        def run(ids: NDArray[np.int64]) -> Sequence[torch.Tensor]:
            own = free.free()
            with torch.enable_grad():
                given = Given({**fixed.weights, **own.weights}, {**fixed.factors, **own.factors})
                loss = self._divergence(torch.from_numpy(ids)[None], given)
                # (An expert that no token of the text went to has none.)
                return torch.autograd.grad(loss, own.all(), allow_unused=True, materialize_grads=True)

        total: list[torch.Tensor] | None = None
        for start in range(0, len(text), self._threads):
            for found in self._pool.map(run, text[start : start + self._threads]):
                if total is None:
                    total = list(found)
                else:
                    for sum_, gradient in zip(total, found, strict=True):
                        sum_ += gradient
        assert total is not None
        return [gradient / len(text) for gradient in total]

    def _divergence(self, ids: torch.Tensor, given: Given) -> torch.Tensor:
        with torch.no_grad():
            wanted = torch.log_softmax(_logits(self._original, ids, {}, {}), dim=-1)
        weights, factors = (
            {self.places[name]: value for name, value in values.items()} for values in (given.weights, given.factors)
        )
        found = torch.log_softmax(_logits(self._model, ids, weights, factors), dim=-1)
        return (wanted.exp() * (wanted - found)).sum(dim=-1).mean()


def _logits(
    definition: DecoderDefinition,
    ids: torch.Tensor,
    weights: Mapping[int, torch.Tensor],
    factors: Mapping[int, torch.Tensor],
) -> torch.Tensor:
    ops = _GivenOps(definition, ids.shape[1], weights, factors)
    return definition.head(ops, definition.body(ops, ids))


class _GivenOps(GradientOps):
    """Products and norms with other weights, and with factors of rows, with gradients to these."""

    def __init__(
        self,
        definition: DecoderDefinition,
        tokens: int,
        weights: Mapping[int, torch.Tensor],
        factors: Mapping[int, torch.Tensor],
    ) -> None:
        super().__init__(definition, tokens)
        self._weights, self._factors = weights, factors

    def linear(self, weight: Weight, x: torch.Tensor, bias: Vector | None = None) -> torch.Tensor:
        given = self._weights.get(id(weight))
        out = torch.nn.functional.linear(x, dense(weight) if given is None else given)
        factor = self._factors.get(id(weight))
        out = out if factor is None else out * factor
        return out if bias is None else out + tensor_of(bias)

    def norm(self, x: torch.Tensor, weight: Vector, eps: float, groups: int = 1, parts: bool = False) -> torch.Tensor:
        return super().norm(x, self._scaled(weight), eps, groups, parts)

    def layer_norm(self, x: torch.Tensor, weight: Vector, bias: Vector | None, eps: float) -> torch.Tensor:
        return super().layer_norm(x, self._scaled(weight), bias, eps)

    def _scaled(self, weight: Vector) -> Vector:
        factor = self._factors.get(id(weight))
        return weight if factor is None else tensor_of(weight) * factor

    def logits(self, weight: Weight, x: torch.Tensor, bias: Vector | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, dense(weight), None if bias is None else tensor_of(bias))
