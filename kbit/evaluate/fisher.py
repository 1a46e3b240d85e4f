"""What any error in the weights will cost, from the gradients of the model as it is: before anything is quantized.

To second order an error dW in the weights makes a KL divergence of dW' F dW / 2, F the Fisher information of the
weights (kbit.evaluate.sensitivity). Errors of rounding are as good as independent, so of F only the diagonal counts:

    KL = 1/2 sum_l sum_ij F_l[i, j] dW_l[i, j]^2

A matrix's diagonal is kept as what its rows and its columns sum to (F[i, j] = rows[i] columns[j] / total): N + K
numbers, as Adafactor keeps its second moments (Shazeer and Stern, 2018). The full diagonal predicts no better; one
number for each matrix (sensitivity.Sensitivity) predicts far worse in models with outliers, where input features differ
most (docs/measurements.md).

One gradient pass over a few windows serves all formats. There is nothing to fit: what formats with small errors cost is
what this says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.backends.reference.gradients import KeepingBackend
from kbit.checkpoint.source import CheckpointSource
from kbit.evaluate.sensitivity import PROBES, TracingOps, backward_passes, matrix_names
from kbit.graph.ops import Weight
from kbit.host.errors import KbitError
from kbit.models.decoder import DecoderDefinition
from kbit.models.load import load_decoder
from kbit.text.windows import Windows

# Tokens and windows that gradients are taken of at least, spread over the text: on half as many the sum comes out up to
# a tenth too large or too small (novels family).
TOKENS, WINDOWS = 2048, 4
_SEED = 20251122


@dataclass(frozen=True, eq=False)
class Diagonal:
    """The diagonal of the Fisher information of a matrix's N x K weights, per scored token.

    Attributes:
        rows: float32 (N,): sums over the inputs.
        columns: float32 (K,): sums over the outputs, divided by the sum over both.
    """

    rows: NDArray[np.float32]
    columns: NDArray[np.float32]

    def expected_kl(self, error: torch.Tensor) -> float:
        """The divergence in nats per token that an error (N, K) of the weights makes, to second order."""
        rows, columns = torch.from_numpy(self.rows), torch.from_numpy(self.columns)
        return 0.5 * float(rows @ (error.square() @ columns))


def measure_diagonal(
    source: CheckpointSource, windows: Windows, *, probes: int = PROBES, seed: int = _SEED
) -> dict[str, Diagonal]:
    """The diagonal of every linear matrix inside the layers, by the name the checkpoint has for it.

    Runs on torch in float32, one window at a time. Memory: the weights as stored, and the activations of one window.

    Args:
        source: the model; quantized weights are taken for what they stand for.
        windows: the text; some of its windows are used.
        probes: backward passes per window.

    Raises:
        CheckpointError, UnsupportedError: a model that cannot be run (kbit.models.load).
        KbitError: gradients that are NaN or infinite.
    """
    decoder = load_decoder(source, KeepingBackend())
    definition = DecoderDefinition(decoder.spec, decoder.weights)
    names = matrix_names(decoder)
    sums = {id(weight): _Sums.of(weight) for _, weight in names}
    generator = torch.Generator().manual_seed(seed)
    count = min(max(WINDOWS, -(-TOKENS // windows.context)), windows.count)
    chosen = np.unique(np.linspace(0, windows.count - 1, count).round().astype(int))
    for index in chosen:
        ids = torch.from_numpy(windows.ids[index, :-1])[None]  # (1, T): the last token is only predicted
        ops = _SummingOps(definition, ids.shape[1], sums)
        backward_passes(definition, ops, ids, windows.first_scored, probes, generator)
    tokens = len(chosen) * probes * windows.scored_per_window
    found = {}
    for name, weight in names:
        own = sums[id(weight)]
        total = float(own.columns.sum())
        if not np.isfinite(total):
            raise KbitError(f"{source.path}: the gradients of {name} are not finite: the weights are broken")
        rows = own.rows.numpy() / tokens
        columns = own.columns.numpy() / (total or 1.0)
        found[name] = Diagonal(rows.astype(np.float32), columns.astype(np.float32))
    return found


def write_diagonal(path: Path, diagonal: Mapping[str, Diagonal]) -> None:
    """Write to an .npz file, which is whole or not there.

    Raises:
        OSError: it cannot be written.
    """
    import io

    from kbit.host.files import write_durably

    arrays = {}
    for name, own in diagonal.items():
        arrays[f"rows {name}"], arrays[f"columns {name}"] = own.rows, own.columns
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_durably(path, buffer.getvalue())


def read_diagonal(path: Path) -> dict[str, Diagonal]:
    """What `write_diagonal` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    with np.load(path, allow_pickle=False) as arrays:
        names = [key.removeprefix("rows ") for key in arrays.files if key.startswith("rows ")]
        return {name: Diagonal(arrays[f"rows {name}"], arrays[f"columns {name}"]) for name in names}


@dataclass(frozen=True, eq=False)
class _Sums:
    """Squared gradients of a matrix, added up: float64 (N,) over the inputs and (K,) over the outputs."""

    rows: torch.Tensor
    columns: torch.Tensor

    @classmethod
    def of(cls, weight: Weight) -> _Sums:
        n, k = weight.shape
        return cls(torch.zeros(n, dtype=torch.float64), torch.zeros(k, dtype=torch.float64))


class _SummingOps(TracingOps):
    """Adds up squared gradients by row and by column."""

    def __init__(self, definition: DecoderDefinition, tokens: int, sums: dict[int, _Sums]) -> None:
        super().__init__(definition, tokens, sums)
        self._sums = sums

    def take(self, weight: Weight, gradient: torch.Tensor) -> None:
        own, square = self._sums[id(weight)], gradient.square()
        own.rows.add_(square.sum(dim=1, dtype=torch.float64))
        own.columns.add_(square.sum(dim=0, dtype=torch.float64))
