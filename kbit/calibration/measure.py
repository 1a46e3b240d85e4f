"""Measuring the factors: one pass forward and one backward, layer by layer, with bounded memory.

Forward, the input of every layer is kept (in 16 bits). Backward, from the last layer to the first, a layer is computed
again with gradients, its factors are added up, and what it hands down is the next gradient: never more than one layer's
weights and factors are held. Where layers attend to the keys of an earlier one, these are kept, too, and that layer
gets the sum of their gradients. The gradient at the logits comes from a random u of covariance diag(p) - p p' at every
position, which has the second moment of targets drawn from the model (kbit.evaluate.sensitivity).

Work is cut into pieces that do not depend on the number of threads, each is computed by one thread, and sums are formed
in a fixed order: so are the bits of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.backends.reference.backend import ReferenceBackend
from kbit.backends.reference.gradients import KeepingBackend, dense
from kbit.backends.reference.products import product
from kbit.calibration.collected import Capture, CapturingOps, Collected, light_share
from kbit.calibration.factors import Factors
from kbit.calibration.sizes import CHUNK_TOKENS, LOGITS_BYTES
from kbit.calibration.workers import workers
from kbit.checkpoint.source import CheckpointSource
from kbit.graph.ops import Vector, Weight
from kbit.host.errors import KbitError
from kbit.models import blocks, per_layer
from kbit.models.blocks import Weights
from kbit.models.decoder import DecoderDefinition, DecoderWeights
from kbit.models.families import spec_from_config
from kbit.models.load import load_ends, load_layer
from kbit.models.params import expert_slots, parameters
from kbit.models.spec import ModelSpec

# Pieces of logits that are waited for at once.
_LOGITS_AT_ONCE = 4

# (steps done, steps in all), in units that take about as long.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class LayerFactors:
    """What was measured in one layer.

    Attributes:
        layer: its index; None for what stands outside of layers: the embedding (inputs: the second moment of the
            gradient at its output) and the head.
        factors: by the matrix's name in the checkpoint.
    """

    layer: int | None
    factors: dict[str, Factors]


def measure_factors(
    source: CheckpointSource,
    ids: NDArray[np.int64],
    *,
    gradients: bool = True,
    cut: float = 0.0,
    threads: int,
    seed: int = 20261128,
    skip: Callable[[int | None], bool] = lambda layer: False,
    progress: Progress | None = None,
) -> Iterator[LayerFactors]:
    """The factors of every linear matrix, from the last layer to the first, then those of embedding and head.

    Args:
        source: the model.
        ids: texts of equal length, (S, T).
        gradients: False: only what goes in (`Factors.weighted` False), in one pass forward, from the first layer on.
        cut: see `kbit.calibration.collected.Collected`.
        threads: workers.
        seed: of u.
        skip: layers whose factors are at hand already; they are passed through.
        progress: called after each piece.

    Raises:
        CheckpointError, UnsupportedError: a model that cannot be run (kbit.models.load).
        KbitError: activations or gradients that are NaN or infinite.
    """
    spec = spec_from_config(source.config, where=f"config of {source.path}")
    with workers(threads) as pool:
        passes = Passes(source, spec, ids, cut, seed, pool, progress)
        yield from passes.backward(skip) if gradients else passes.forward_only(skip)


class Passes:
    """The two passes over one text (`measure_factors`).

    Attributes:
        made: what the last layer made, (S, T, hidden), bfloat16, once `forward_only` is through.
    """

    def __init__(
        self,
        source: CheckpointSource,
        spec: ModelSpec,
        ids: NDArray[np.int64],
        cut: float,
        seed: int,
        pool: ThreadPoolExecutor,
        progress: Progress | None,
    ) -> None:
        self.source, self.spec, self.seed, self.pool, self.progress = source, spec, seed, pool, progress
        self.cut = cut
        self.ids = torch.from_numpy(ids)
        self.count, self.tokens = ids.shape
        self.backend = ReferenceBackend()
        self.names = {(p.layer, p.slot): p.name for p in parameters(spec) if p.role == "linear"}
        empty = DecoderWeights(Nothing(), (), Weights(), Nothing())
        self.definition = DecoderDefinition(spec, empty)
        self.by_distance: Vector | None = None
        self.features: torch.Tensor | None = None  # (S, T, layers f), bfloat16: see kbit.models.per_layer
        shapes = ((layer, spec.shape(layer).source) for layer in range(spec.layers))
        self.shared = {source for layer, source in shapes if source != layer}
        # Of these layers, turned keys, and values, (S, T, H_kv, D) each, in bfloat16; and their gradients, in float32.
        self.written: dict[int, tuple[torch.Tensor, ...]] = {}
        self.written_gradients: dict[int, tuple[torch.Tensor, ...]] = {}
        self.made = torch.empty(0)
        self.done, self.total = 0, 0

    # ---- forward

    def backward(self, skip: Callable[[int | None], bool]) -> Iterator[LayerFactors]:
        self.total = 4 * self.spec.layers + 4
        ends = load_ends(self.source, self.spec, KeepingBackend())
        inputs = [self._embed(ends)]
        for layer in range(self.spec.layers):
            inputs.append(self._forward(layer, inputs[-1]))
            self._step(1)
        gradient, head = self._head(ends, inputs.pop())
        tied, projection = ends.head is ends.embedding, ends.final.matrices.get("project_in")
        del ends
        self._step(4)
        for layer in reversed(range(self.spec.layers)):
            collected = None if skip(layer) else Collected(cut=self.cut)
            gradient = self._back_through(layer, inputs.pop(), gradient, collected)
            if collected is not None:
                yield LayerFactors(layer, self._factors(layer, collected))
            self._step(3)
        if not skip(None):
            yield LayerFactors(None, self._outside(projection, head, gradient, tied))

    def forward_only(self, skip: Callable[[int | None], bool]) -> Iterator[LayerFactors]:
        self.total = 2 * self.spec.layers
        x = self._embed(load_ends(self.source, self.spec, KeepingBackend()))
        for layer in range(self.spec.layers):
            collected = None if skip(layer) else Collected()
            x = self._forward(layer, x, collected)
            if collected is not None:
                yield LayerFactors(layer, self._factors(layer, collected))
            self._step(2)
        self.made = x

    def _embed(self, ends: DecoderWeights) -> torch.Tensor:
        """(S, T, hidden), bfloat16; and features of layers, if they have some of their own."""
        self.by_distance = ends.final.biases.get("distances")
        ops = CapturingOps(self.definition, self.tokens)
        embedded, features = [], []
        with torch.no_grad():
            for row in self.ids:
                x = blocks.embedding(ops, self.spec, ends.embedding, ends.final, row[None])
                embedded.append(x[0].bfloat16())
                found = per_layer.features(ops, self.spec, ends.final, row[None], x)
                if found is not None:
                    features.append(found[0].bfloat16())
        self.features = torch.stack(features) if features else None
        return torch.stack(embedded)

    def _layer(
        self, ops: CapturingOps, weights: Weights, layer: int, x: torch.Tensor, index: int
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """A layer's output of text number `index`, x (1, T, hidden), and keys and values of an earlier layer that it
        attended to, if it did."""
        own, source = None, self.spec.shape(layer).source
        given: tuple[torch.Tensor, ...] = ()
        if self.features is not None:
            own = per_layer.of_layer(ops, self.spec, self.features[index : index + 1], layer).float()
        if source != layer:
            keys, values = (
                part[index : index + 1].float().requires_grad_(torch.is_grad_enabled()) for part in self.written[source]
            )
            ops.written[source] = keys, values
            given = keys, values
        return blocks.layer(ops, self.spec, weights, layer, x, self.by_distance, own), given

    def _forward(self, layer: int, x: torch.Tensor, collected: Collected | None = None) -> torch.Tensor:
        """The layer's output of x (S, T, hidden), bfloat16."""
        weights = load_layer(self.source, self.spec, self.backend, layer)
        names = self._names_of(layer, weights)
        out = torch.empty_like(x)
        written: list[tuple[torch.Tensor, ...] | None] = [None] * self.count

        def run(index: int) -> Capture | None:
            capture = None if collected is None else Capture(names)
            ops = CapturingOps(self.definition, self.tokens, capture)
            with torch.no_grad():
                made, _ = self._layer(ops, weights, layer, x[index : index + 1].float(), index)
            out[index] = made[0].bfloat16()
            if layer in self.shared:
                written[index] = tuple(part[0].bfloat16() for part in ops.written[layer])
            return capture

        for chunk in self._chunks():
            captures = list(self.pool.map(run, chunk))
            if collected is not None:
                collected.add([capture for capture in captures if capture is not None], self.pool)
        if layer in self.shared:
            self.written[layer] = tuple(
                torch.stack(parts) for parts in zip(*(each for each in written if each is not None), strict=True)
            )
            self.written_gradients[layer] = tuple(
                torch.zeros_like(part, dtype=torch.float32) for part in self.written[layer]
            )
        if not bool(torch.isfinite(out).all()):
            raise KbitError(
                f"{self.source.path}: activations of layer {layer} are not finite: the weights are broken, or the "
                "model needs more than float32's range"
            )
        return out

    # ---- backward

    def _head(self, ends: DecoderWeights, hidden: torch.Tensor) -> tuple[torch.Tensor, Factors]:
        """The gradient at the hidden states (S, T, hidden), and the head's factors."""
        head = _dense_matrix(ends.head)
        definition = DecoderDefinition(self.spec, DecoderWeights(head, (), ends.final, head))
        flat = hidden.flatten(0, 1)
        gradient = torch.empty(flat.shape)
        step = max(1, LOGITS_BYTES // (4 * self.spec.vocab_size))
        starts = range(0, len(flat), step)

        def run(start: int) -> Capture:
            capture = Capture({id(head): "head"})
            ops = CapturingOps(definition, self.tokens, capture)
            generator = torch.Generator().manual_seed(self.seed + start)
            with torch.enable_grad():
                x = flat[start : start + step].float().requires_grad_()
                logits = definition.head(ops, blocks.narrowed(ops, self.spec, ends.final, x))  # (R, V)
                root = torch.softmax(logits.detach(), dim=-1).sqrt_()
                signs = torch.randint(0, 2, root.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
                u = root * signs
                u -= root.square() * u.sum(dim=-1, keepdim=True)
                logits.backward(u)  # type: ignore[no-untyped-call]
            assert x.grad is not None
            gradient[start : start + step] = x.grad
            return capture

        collected = Collected(most_outputs=0, coherent=False, cut=self.cut)
        for first in range(0, len(starts), _LOGITS_AT_ONCE):
            for capture in self.pool.map(run, starts[first : first + _LOGITS_AT_ONCE]):
                collected.add([capture], self.pool)  # one by one: each holds its gradients of all logits
        return gradient.view_as(hidden), collected.factors(len(flat), self.source)["head"]

    def _back_through(
        self, layer: int, x: torch.Tensor, gradient: torch.Tensor, collected: Collected | None
    ) -> torch.Tensor:
        """The gradient at a layer's input from that at its output, both float32 (S, T, hidden)."""
        weights = load_layer(self.source, self.spec, self.backend, layer)
        names = self._names_of(layer, weights)
        handed_down = torch.empty_like(gradient)  # not over `gradient`: the last product's is a view of it

        def run(index: int) -> Capture:
            capture = Capture(names)
            ops = CapturingOps(self.definition, self.tokens, capture)
            with torch.enable_grad():
                at = x[index : index + 1].float().requires_grad_()
                out, given = self._layer(ops, weights, layer, at, index)
                made, known = [out], [gradient[index : index + 1]]
                if layer in self.shared:
                    made += ops.written[layer]
                    known += [part[index : index + 1] for part in self.written_gradients[layer]]
                torch.autograd.backward(made, known)
            assert at.grad is not None
            handed_down[index] = at.grad[0]
            if given:
                totals = self.written_gradients[self.spec.shape(layer).source]
                for part, total in zip(given, totals, strict=True):
                    assert part.grad is not None
                    total[index] += part.grad[0]
            return capture

        for chunk in self._chunks():
            captures = list(self.pool.map(run, chunk))
            if collected is not None:
                collected.add(captures, self.pool)
        if layer in self.shared:
            del self.written[layer], self.written_gradients[layer]
        return handed_down

    def _outside(
        self, projection: Weight | None, head: Factors, gradient: torch.Tensor, tied: bool
    ) -> dict[str, Factors]:
        # (Not counting what comes by way of features of layers, which a small part of it makes.)
        flat = gradient.flatten(0, 1) * self.spec.embedding_multiplier
        if projection is not None:
            flat = flat @ dense(projection).float()
        flat = flat * light_share(flat.square().sum(dim=1, keepdim=True)).sqrt()  # single tokens are single rows
        second_moment = product(flat.T, flat) / len(flat)
        embedding = parameters(self.spec)[0].name
        if not tied:
            return {embedding: Factors(second_moment, None), f"{self.spec.names.head}.weight": head}
        # One matrix in two places. As an embedding, row v is hit by the share of tokens that are v; as a head by its
        # share of the outputs' gradient; both follow the frequency of v, so one sum serves.
        return {embedding: Factors(head.inputs + second_moment, head.outputs)}

    # ---- pieces

    def _chunks(self) -> Iterator[range]:
        step = max(1, CHUNK_TOKENS // self.tokens)
        for start in range(0, self.count, step):
            yield range(start, min(start + step, self.count))

    def _names_of(self, layer: int, weights: Weights) -> dict[int, str]:
        known = ((id(matrix), self.names.get((layer, slot))) for slot, matrix in weights.matrices.items())
        return {matrix: name for matrix, name in known if name is not None}

    def _factors(self, layer: int, collected: Collected) -> dict[str, Factors]:
        """What was measured of a layer; of experts that few tokens chose, what the others have."""
        alike: list[list[str]] = []
        if self.spec.experts is not None and self.spec.has_experts(layer):
            slots = zip(*expert_slots(self.spec.experts.routing.experts), strict=True)
            named = [[self.names[layer, slot] for slot in place if (layer, slot) in self.names] for place in slots]
            alike = [names for names in named if names]
        return collected.factors(self.count * self.tokens, self.source, alike)

    def _step(self, steps: int) -> None:
        self.done += steps
        if self.progress is not None:
            self.progress(self.done, self.total)


class Nothing(Weight):
    """Stands where a definition has a matrix that is not used."""

    @property
    def shape(self) -> tuple[int, int]:
        return (0, 0)

    @property
    def nbytes(self) -> int:
        return 0


def _dense_matrix(weight: Weight) -> Weight:
    return ReferenceBackend().prepare(dense(weight))
