"""Tuning after rounding: the scales of every row, and the weights of norms, against the divergence from the original.

Rounding goes by the second moment of the gradients, matrix by matrix; what errors of several matrices do together, and
what is not quadratic, only the model itself can tell. So codes stay; every row's scales get one factor, and so does
every weight of a norm, which is a factor for the columns of the matrices behind it and takes no further bytes. They are
found by Adam on text of the calibration (as DWQ of mlx-lm does for all scales; docs/methods.md says what it buys). The
result is taken only if it diverges less on text that neither has seen.

Every sequence is worked through by one thread and sums are formed in a fixed order: the result does not depend on the
number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.backends.reference.backend import ReferenceBackend, tensor_of
from kbit.backends.reference.gradients import GradientOps, KeepingBackend, dense
from kbit.calibration.workers import workers
from kbit.checkpoint.source import CheckpointSource
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.formats.trellis import TrellisFormat
from kbit.graph.ops import Vector, Weight
from kbit.host.progress import Progress
from kbit.models.decoder import DecoderDefinition
from kbit.models.load import load_decoder
from kbit.models.params import parameters
from kbit.quantizers.settings import Tuning


def can_scale(matrix: QuantTensor) -> bool:
    """Whether its rows have scales of their own."""
    format = matrix.format
    return isinstance(format, TrellisFormat) or (isinstance(format, QuantFormat) and not format.double_quant)


def scale_rows(matrix: QuantTensor, factors: torch.Tensor | None) -> QuantTensor:
    """The matrix with each row's scales (and offsets) times a factor (N,), rounded to what its format stores."""
    if factors is None:
        return matrix
    assert can_scale(matrix)
    stored = dict(matrix.stored)
    for name in ("scales", "offsets"):
        if name in stored:
            stored[name] = (stored[name].float() * factors[:, None]).to(stored[name].dtype)
    return replace(matrix, stored=stored)


def tune_rows(
    source: CheckpointSource,
    quantized: CheckpointSource,
    matrices: Mapping[str, QuantTensor],
    text: NDArray[np.int64],
    tuning: Tuning,
    *,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Factors for the rows of the linear matrices among some, and for the weights of norms, by name, float32 (N,).

    Holds the original as it is stored, and the quantized model in float32.

    Args:
        source: the original.
        quantized: the same, with these matrices.
        matrices: quantized ones, by name.
        text: sequences, int64 (S, T).
        tuning: how.
        progress: told of steps.
    """
    with workers(torch.get_num_threads()) as pool:
        pair = _Pair(source, quantized, pool)
        scaled = [name for name in pair.places if name in matrices and can_scale(matrices[name])]
        if not scaled:
            return {}
        sizes = {name: matrices[name].shape[0] for name in scaled} | pair.norms
        factors = {name: torch.ones(size) for name, size in sizes.items()}
        optimizer = torch.optim.Adam(list(factors.values()), lr=tuning.rate, betas=(0.9, 0.95))
        for step in range(tuning.steps):
            batch = np.take(text, range(step * tuning.batch, (step + 1) * tuning.batch), axis=0, mode="wrap")
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * tuning.rate * (1 + math.cos(math.pi * step / tuning.steps))
            for name, gradient in pair.gradients(factors, batch).items():
                factors[name].grad = gradient
            optimizer.step()
            if progress is not None:
                progress("tuning scales", step + 1, tuning.steps)
    return {name: factor.detach() for name, factor in factors.items()}


def divergence(source: CheckpointSource, quantized: CheckpointSource, text: NDArray[np.int64]) -> float:
    """KL divergence of a model from its original, nats per token, over sequences (S, T)."""
    with workers(torch.get_num_threads()) as pool:
        return _Pair(source, quantized, pool).divergence(text)


class _Pair:
    """A model beside its original.

    Attributes:
        places: of the linear matrices inside the layers and of norms, by name: what operations know them by.
        norms: how many weights each has, by name.
    """

    def __init__(self, source: CheckpointSource, quantized: CheckpointSource, pool: ThreadPoolExecutor) -> None:
        original, model = load_decoder(source, KeepingBackend()), load_decoder(quantized, ReferenceBackend())
        self._original = DecoderDefinition(original.spec, original.weights)
        self._model = DecoderDefinition(model.spec, model.weights)
        self.places, self.norms = {}, {}
        for p in parameters(model.spec):
            held = model.weights.final if p.layer is None else model.weights.layers[p.layer]
            if p.role == "linear" and p.layer is not None:
                self.places[p.name] = id(held.matrices[p.slot])
            elif p.role == "norm":
                self.places[p.name] = id(held.norms[p.slot])
                self.norms[p.name] = p.shape[0]
        self._pool = pool

    def divergence(self, text: NDArray[np.int64]) -> float:
        """Nats per token, over sequences (S, T)."""

        def run(ids: NDArray[np.int64]) -> float:
            with torch.no_grad():
                return float(self._divergence(torch.from_numpy(ids)[None], {}))

        return float(np.mean(list(self._pool.map(run, text))))

    def gradients(self, factors: Mapping[str, torch.Tensor], text: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """Of the mean divergence over sequences (S, T), to the factors of the rows."""

        def run(ids: NDArray[np.int64]) -> Sequence[torch.Tensor]:
            own = {name: factor.detach().clone().requires_grad_() for name, factor in factors.items()}
            with torch.enable_grad():
                placed = {self.places[name]: factor for name, factor in own.items()}
                loss = self._divergence(torch.from_numpy(ids)[None], placed)
                # (An expert that no token of the text went to has none.)
                return torch.autograd.grad(loss, list(own.values()), allow_unused=True, materialize_grads=True)

        total: list[torch.Tensor] | None = None
        for found in self._pool.map(run, text):
            total = list(found) if total is None else [a + b for a, b in zip(total, found, strict=True)]
        assert total is not None
        return {name: gradient / len(text) for name, gradient in zip(factors, total, strict=True)}

    def _divergence(self, ids: torch.Tensor, factors: Mapping[int, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            wanted = torch.log_softmax(_logits(self._original, ids, {}), dim=-1)
        found = torch.log_softmax(_logits(self._model, ids, factors), dim=-1)
        return (wanted.exp() * (wanted - found)).sum(dim=-1).mean()


def _logits(definition: DecoderDefinition, ids: torch.Tensor, factors: Mapping[int, torch.Tensor]) -> torch.Tensor:
    ops = _ScaledOps(definition, ids.shape[1], factors)
    return definition.head(ops, definition.body(ops, ids))


class _ScaledOps(GradientOps):
    """Products and norms whose rows have factors, with gradients to these."""

    def __init__(self, definition: DecoderDefinition, tokens: int, factors: Mapping[int, torch.Tensor]) -> None:
        super().__init__(definition, tokens)
        self._factors = factors

    def linear(self, weight: Weight, x: torch.Tensor, bias: Vector | None = None) -> torch.Tensor:
        out = torch.nn.functional.linear(x, dense(weight))
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
