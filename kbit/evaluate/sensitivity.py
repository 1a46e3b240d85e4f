"""How much a model's predictions suffer from an error in one of its matrices: for every matrix at once.

Put noise of relative size t into matrix l (each weight gets a normal error of t times the matrix's root mean square),
and the KL divergence of the model's predictions from the original's is, while t is small,

    KL = a_l t^2,        a_l = (||W||^2 / n) tr(F_l) / 2,

F_l the Fisher information of the matrix's n weights: KL's second derivative. t^2 is also the relative squared error of
a quantized matrix, so a_l times it predicts what quantizing that matrix costs, and the sum over matrices what
quantizing the model does (the linearity theorem of Malinovskii et al., "Pushing the limits of large language model
quantization via the linearity theorem" (HIGGS), 2024, who find a_l by trying noise in one matrix at a time).

Trying takes one run of the model per matrix. The trace takes none: F_l = E[g g^T] over texts, with g the gradient of
sum_t u_t z_t for logits z_t and random u_t of covariance diag(p_t) - p_t p_t^T. Different positions' u are independent
with mean zero, so the squared norm of one backward pass's gradient is an unbiased estimate of the sum over a window's
positions of tr(F), for all matrices together (Hutchinson's estimator applied to the generalised Gauss-Newton matrix;
Martens, "New insights and perspectives on the natural gradient method", 2020, section 9.1). `noise_kl` tries one
matrix, to check. Both are about small errors: report.layer_plots.LARGE_KL says how far that goes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.backends.reference.backend import ReferenceBackend
from kbit.backends.reference.gradients import GradientOps, KeepingBackend, dense
from kbit.checkpoint.source import CheckpointSource
from kbit.evaluate.compare import compare
from kbit.formats.quant_tensor import QuantTensor
from kbit.graph.ops import Weight
from kbit.host.errors import KbitError
from kbit.models.decoder import Decoder, DecoderDefinition
from kbit.models.load import load_decoder
from kbit.models.params import parameters
from kbit.text.windows import Windows

# Backward passes per window. The spread between windows is larger than that between passes, so more windows help more
# (docs/measurements.md; the standard error is reported).
PROBES = 2
# The noise's energy, relative to the matrix's, for trying: small enough for KL to be quadratic, far above rounding.
NOISE_ENERGY = 1e-3
_SEED = 20241126

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sensitivity:
    """What noise in one matrix does.

    Attributes:
        name: the matrix, as the checkpoint names it.
        kl_per_error: a_l: KL divergence in nats per token for each unit of relative squared error. Holds for small
            errors.
        stderr: its standard error over windows and passes; None for a single one.
    """

    name: str
    kl_per_error: float
    stderr: float | None


def measure_sensitivity(
    source: CheckpointSource,
    windows: Windows,
    *,
    probes: int = PROBES,
    seed: int = _SEED,
    progress: Progress | None = None,
) -> list[Sensitivity]:
    """a_l of every linear matrix inside the layers, in the layers' order.

    Runs on torch in float32, one window at a time. Memory: the weights as stored, and the activations of one window.

    Args:
        source: the model; quantized weights are taken for what they stand for.
        windows: the text. Positions count from first_scored on.
        probes: backward passes per window.
        progress: called as (windows done, windows in all).

    Raises:
        CheckpointError, UnsupportedError: a model that cannot be run (kbit.models.load).
        KbitError: gradients that are NaN or infinite, or a matrix of zeros.
    """
    decoder = load_decoder(source, KeepingBackend())
    definition = DecoderDefinition(decoder.spec, decoder.weights)
    names = matrix_names(decoder)
    places = {id(weight): place for place, (_, weight) in enumerate(names)}
    generator = torch.Generator().manual_seed(seed)
    traces = np.empty((windows.count, probes, len(names)))
    for index in range(windows.count):
        ids = torch.from_numpy(windows.ids[index, :-1])[None]  # (1, T): the last token is only predicted
        traces[index] = _traces(definition, ids, windows.first_scored, places, probes, generator)
        if progress is not None:
            progress(index + 1, windows.count)
    traces /= windows.scored_per_window
    found = []
    for place, (name, weight) in enumerate(names):
        square = float(dense(weight).double().square().mean())
        values = 0.5 * square * traces[:, :, place]
        if not (np.isfinite(values).all() and square > 0):
            raise KbitError(f"{source.path}: the sensitivity of {name} is not finite: the weights are broken, or zero")
        count = values.size
        # Passes over a window share its text, so windows are the unit where there are several.
        units = values.mean(axis=1) if len(values) > 1 else values.ravel()
        stderr = float(units.std(ddof=1) / np.sqrt(len(units))) if count > 1 and len(units) > 1 else None
        found.append(Sensitivity(name, float(values.mean()), stderr))
    return found


def noise_kl(
    source: CheckpointSource,
    windows: Windows,
    names: Sequence[str],
    *,
    energy: float = NOISE_ENERGY,
    seed: int = _SEED,
) -> list[float]:
    """KL divergence in nats per token with noise in one matrix at a time: a_l * energy, tried.

    Args:
        names: the matrices, as the checkpoint names them.
        energy: t^2, the noise's squared norm relative to the matrix's.
    """
    backend = ReferenceBackend()
    original = load_decoder(source, backend)
    found = []
    for offset, name in enumerate(names):
        noisy = load_decoder(_Noisy(source, name, energy, seed + offset), backend)
        found.append(compare(noisy, original, windows).kl_mean)
    return found


def matrix_names(decoder: Decoder) -> list[tuple[str, Weight]]:
    """(checkpoint name, prepared weight) of every linear matrix inside the layers, in order."""
    layers = decoder.weights.layers
    return [
        (p.name, layers[p.layer].matrices[p.slot])
        for p in parameters(decoder.spec)
        if p.layer is not None and p.role == "linear"
    ]


class _Noisy(CheckpointSource):
    """A model with normal noise in one matrix."""

    def __init__(self, source: CheckpointSource, name: str, energy: float, seed: int) -> None:
        self.path, self.config = source.path, source.config
        self._source, self._name, self._energy, self._seed = source, name, energy, seed

    @property
    def tensors(self) -> Any:
        return self._source.tensors

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.read(name)[start:stop]

    def read(self, name: str) -> torch.Tensor:
        weight: torch.Tensor = self._source.read(name)
        if name != self._name:
            return weight
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(self._seed))
        size: torch.Tensor = weight.norm() / noise.norm() * self._energy**0.5
        return weight.add(noise.mul_(size))

    def read_weight(self, name: str) -> torch.Tensor | QuantTensor:
        return self.read(name) if name == self._name else self._source.read_weight(name)

    def sidecar_files(self) -> Any:
        return self._source.sidecar_files()

    def fingerprint(self) -> str:
        return f"{self._source.fingerprint()}+noise"


def _traces(
    definition: DecoderDefinition,
    ids: torch.Tensor,
    first_scored: int,
    places: dict[int, int],
    probes: int,
    generator: torch.Generator,
) -> NDArray[np.float64]:
    """Estimates of the sum over scored positions of tr(F), for each pass and matrix: float64 (probes, matrices)."""
    sums = np.zeros((probes, len(places)))
    ops = _SquaredNorms(definition, ids.shape[1], places, sums)
    backward_passes(definition, ops, ids, first_scored, probes, generator)
    return sums


def backward_passes(
    definition: DecoderDefinition,
    ops: TracingOps,
    ids: torch.Tensor,
    first_scored: int,
    probes: int,
    generator: torch.Generator,
) -> None:
    """Run a text, ids (1, T), and send `probes` random u back from its scored positions: gradients go to `ops.take`.

    The expected square of a gradient is the sum over the scored positions of the diagonal of F.
    """
    with torch.enable_grad():
        logits = definition.head(ops, definition.body(ops, ids))[0, first_scored:]  # (S, V)
        roots = torch.softmax(logits.detach(), dim=1).sqrt_()  # sqrt(p)
        for probe in range(probes):
            ops.probe = probe
            # u = sqrt(p) e - p (sqrt(p) . e) has covariance diag(p) - p p^T for e of unit covariance.
            signs = torch.randint(0, 2, roots.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
            u = roots * signs
            u -= roots.square() * u.sum(dim=1, keepdim=True)
            torch.autograd.backward(logits, u, retain_graph=probe + 1 < probes)


class TracingOps(GradientOps):
    """The reference's operations with gradients, for one text from its start; `take` gets those of matrices.

    Args:
        tokens: of the text.
        wanted: ids (`id`) of the matrices whose gradients are asked for.

    Attributes:
        probe: which backward pass comes next.
    """

    def __init__(self, definition: DecoderDefinition, tokens: int, wanted: Collection[int]) -> None:
        super().__init__(definition, tokens)
        self.probe = 0
        self._wanted = wanted

    def collect(self, weight: Weight, x: torch.Tensor, gradient: torch.Tensor) -> None:
        if id(weight) in self._wanted:
            self.take(weight, gradient.flatten(0, -2).T @ x.flatten(0, -2))

    def take(self, weight: Weight, gradient: torch.Tensor) -> None:
        """Take the gradient (N, K) of a matrix that is asked for."""
        raise NotImplementedError


class _SquaredNorms(TracingOps):
    """Adds the squared norms of gradients to sums (probes, matrices)."""

    def __init__(
        self, definition: DecoderDefinition, tokens: int, places: dict[int, int], sums: NDArray[np.float64]
    ) -> None:
        super().__init__(definition, tokens, places)
        self._places, self._sums = places, sums

    def take(self, weight: Weight, gradient: torch.Tensor) -> None:
        self._sums[self.probe, self._places[id(weight)]] += float(gradient.square().sum(dtype=torch.float64))
