"""The Fisher information of a matrix as a Kronecker product.

An error E of a matrix W (N, K) makes, to second order, a KL divergence of vec(E)' F vec(E) / 2 per token, F the Fisher
information: the second moment of the gradient of a log-probability whose target is drawn from the model itself. With x
a token's input of the matrix and d the gradient at its output, the gradient of the weights is d x'. Taking tokens for
independent of each other (YAQA, arXiv 2505.22988, "sketch A"),

    F = H_O (x) H_I / trace,    H_I = E |d|^2 x x',    H_O = E |x|^2 d d',    trace = E |d|^2 |x|^2,

the best H_I for H_O = 1 and the best H_O for H_I = 1. Tokens of a text are not independent where attention averages
them (values, above all), so F is scaled to its true trace, the mean square of a text's gradient sum d x'. Tokens that
are most of the trace by themselves count less (`kbit.calibration.collected`), in H_O and in `trace` above all. H_I of
plain x x' (GPTQ, arXiv 2210.17323) is what is left where there are no gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kbit.backends.reference.products import product, product_with_rows

# Rows of a vocabulary that are rounded, and whose errors are weighed, at once: it bounds what lies between.
ROWS_AT_ONCE = 8192


@dataclass(frozen=True, eq=False)
class Factors:
    """Of one matrix (N, K), per token.

    Attributes:
        inputs: H_I, float32 (K, K), symmetric.
        outputs: H_O, float32 (N, N); its diagonal (N,) for a matrix with too many rows (a head); or None: not measured,
            equal for all rows.
        coherence: the true trace of F over `trace`.
        weighted: whether H_I weighs tokens by their gradients; if not, divergences cannot be told.
        borrowed: of an expert that too few tokens went through: what its layer's experts have on average.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor | None
    coherence: float = 1.0
    weighted: bool = True
    borrowed: bool = False

    @property
    def trace(self) -> float:
        """E |d|^2 |x|^2; of the outputs where measured: a tied head's inputs hold the embedding's share too."""
        if self.outputs is None:
            return float(self.inputs.diagonal().sum(dtype=torch.float64))
        diagonal = self.outputs if self.outputs.dim() == 1 else self.outputs.diagonal()
        return float(diagonal.sum(dtype=torch.float64))

    @property
    def rows_apart(self) -> bool:
        """Whether rows know nothing of each other, so that what an error costs is the sum over its rows."""
        return self.outputs is None or self.outputs.dim() == 1

    def divergence(self, error: torch.Tensor, first: int = 0, rows: int | None = None) -> float:
        """KL divergence in nats per token that an error (N, K) makes, to second order.

        Without gradients: half the squared error of the matrix's outputs, which compares errors of one matrix only.

        Args:
            error: of the matrix; or, of one whose rows are apart, of some of them.
            first: the first of these.
            rows: N, of which the error has only some; None: it has all.
        """
        rows = len(error) if rows is None else rows
        if self.outputs is None:
            return 0.5 * sum(self._of_rows(error, None)) / (rows if self.weighted else 1)
        trace = self.trace
        if not trace > 0:
            return 0.0
        if self.outputs.dim() == 1:
            outputs = self.outputs[first : first + len(error)]
            return 0.5 * self.coherence * sum(self._of_rows(error, outputs)) / trace
        heard = product_with_rows(error, self.inputs)  # (N, K): symmetric
        weighed = product(self.outputs, error)
        return 0.5 * self.coherence * float((weighed * heard).sum(dtype=torch.float64)) / trace

    def _of_rows(self, error: torch.Tensor, weights: torch.Tensor | None) -> Iterator[float]:
        """Weighted sums of e H_I e' over the rows e of an error, some rows at a time: a vocabulary has many."""
        for start in range(0, len(error), ROWS_AT_ONCE):
            some = slice(start, start + ROWS_AT_ONCE)
            heard = product_with_rows(error[some], self.inputs)  # symmetric
            heard *= error[some]
            if weights is not None:
                heard *= weights[some, None]
            yield float(heard.sum(dtype=torch.float64))
