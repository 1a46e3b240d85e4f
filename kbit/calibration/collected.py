"""Adding up factors from what the products of a layer saw, piece by piece, with the heaviest tokens held back.

A few tokens can be most of a matrix's Fisher information: what attention rests on where it has nothing to look at (the
first token, above all) has activations and gradients that are hundreds of times the others' (Sun et al., "Massive
activations in large language models", 2024). One Kronecker product cannot say that an error which such tokens do not
feel is still felt by all others: both factors would be theirs alone, and the rest would count as share times share. So
H_O is formed with the weights of the heaviest tokens cut to that of the lightest of them. H_I keeps all of it, since
rounding can make errors orthogonal to single inputs; or part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from kbit.backends.reference.gradients import GradientOps
from kbit.backends.reference.products import product
from kbit.calibration.factors import Factors
from kbit.checkpoint.source import CheckpointSource
from kbit.graph.backend import Definition
from kbit.graph.ops import Vector, Weight
from kbit.host.errors import KbitError

# The share of tokens that are called heavy.
_HEAVY = 0.01
# How much of their surplus weight H_I does not get where it is for rounding: with all of it there is little else that
# rounding attends to, and 16 bits, in which it is kept, do not tell what else there is (docs/measurements.md).
CUT = 0.5
# Tokens that an expert sees at least: below, there is less to be known of its inputs than of the other experts'.
LEAST_TOKENS = 32
# Rows of a factor computed by one task.
_PANEL = 512
# A factor over the outputs is measured up to this many; for more (a head) only its diagonal.
_MOST_OUTPUTS = 16384


class Capture:
    """What the products of one piece saw: inputs (R, K) and gradients (R, N), by name."""

    def __init__(self, names: dict[int, str]) -> None:
        self.names = names
        self.inputs: dict[str, torch.Tensor] = {}
        self.gradients: dict[str, torch.Tensor] = {}


class CapturingOps(GradientOps):
    """Products that show themselves to a capture: on the way back, or where there is none, on the way forward."""

    def __init__(self, definition: Definition, tokens: int, capture: Capture | None = None) -> None:
        super().__init__(definition, tokens)
        self._capture = capture

    def linear(self, weight: Weight, x: torch.Tensor, bias: Vector | None = None) -> torch.Tensor:
        if self._capture is not None and not torch.is_grad_enabled():
            name = self._capture.names.get(id(weight))
            if name is not None:  # a router is not measured
                self._capture.inputs[name] = x.flatten(0, -2)
        return super().linear(weight, x, bias)

    def collect(self, weight: Weight, x: torch.Tensor, gradient: torch.Tensor) -> None:
        name = None if self._capture is None else self._capture.names.get(id(weight))
        if self._capture is not None and name is not None:
            self._capture.inputs[name] = x.detach().flatten(0, -2)
            self._capture.gradients[name] = gradient.detach().flatten(0, -2)


class Collected:
    """Factors being added up.

    Args:
        most_outputs: outputs up to which H_O is measured whole.
        coherent: whether tokens of a piece are of one text, so that their gradients add up before they are squared.
        cut: how much of the heavy tokens' surplus weight H_I does not get, as an exponent: 0, none; 1, all of it.
    """

    def __init__(self, most_outputs: int = _MOST_OUTPUTS, coherent: bool = True, cut: float = 0.0) -> None:
        self._most_outputs, self._coherent, self._cut = most_outputs, coherent, cut
        self._inputs: dict[str, torch.Tensor] = {}
        self._outputs: dict[str, torch.Tensor] = {}
        self._squares: dict[str, list[float]] = {}  # of texts' gradients, and of tokens'
        self._weighted = True
        self._rows: dict[str, int] = {}

    def add(self, captures: list[Capture], pool: ThreadPoolExecutor) -> None:
        """Add what some pieces saw, in their order."""
        work: list[tuple[torch.Tensor, torch.Tensor, slice]] = []
        for name in dict.fromkeys(name for capture in captures for name in capture.inputs):
            seen = [capture for capture in captures if name in capture.inputs]  # an expert's tokens are in some pieces
            x = torch.cat([capture.inputs[name] for capture in seen])
            self._rows[name] = self._rows.get(name, 0) + len(x)
            if name not in seen[0].gradients:
                self._weighted = False
                work += self._panels(self._inputs, name, x)
                continue
            d = torch.cat([capture.gradients[name] for capture in seen])
            x_square, d_square = (v.square().sum(dim=1, keepdim=True) for v in (x, d))
            kept = light_share(x_square * d_square)
            work += self._panels(self._inputs, name, x * (d_square * kept**self._cut).sqrt())
            if d.shape[1] <= self._most_outputs:
                work += self._panels(self._outputs, name, d * (x_square * kept).sqrt())
            else:
                diagonal = (d.square() * x_square * kept).sum(dim=0)
                self._outputs[name] = self._outputs[name] + diagonal if name in self._outputs else diagonal
            if self._coherent:
                lengths = [len(capture.inputs[name]) for capture in seen]
                texts = zip(torch.split(d * kept.sqrt(), lengths), torch.split(x, lengths), strict=True)
                sums = self._squares.setdefault(name, [0.0, 0.0])
                sums[0] += sum(pool.map(_square_of_gradient, texts))
                sums[1] += float((x_square * d_square * kept).sum(dtype=torch.float64))
        list(pool.map(_add_panel, work))

    def factors(self, tokens: int, source: CheckpointSource, alike: Sequence[Sequence[str]] = ()) -> dict[str, Factors]:
        """What was added up, per token.

        Args:
            tokens: in all.
            source: the model, for errors.
            alike: names of the matrices that experts of a layer have in one place. One that fewer than LEAST_TOKENS
                tokens went through gets the mean of the others' factors (`Factors.borrowed`).
        """
        few = {name for group in alike for name in group if self._rows.get(name, 0) < LEAST_TOKENS}
        found = self._measured(tokens, source)
        for group in alike:
            known = [found[name] for name in group if name not in few] or [
                found[name] for name in group if name in found
            ]
            mean = _mean(known) if few.intersection(group) else None
            if mean is not None:
                found |= {name: mean for name in group if name in few}
        return found

    def _measured(self, tokens: int, source: CheckpointSource) -> dict[str, Factors]:
        found = {}
        for name in list(self._inputs):
            inputs, outputs = _whole(self._inputs.pop(name), tokens), self._outputs.pop(name, None)
            if outputs is not None:
                outputs = _whole(outputs, tokens) if outputs.dim() == 2 else outputs / tokens
            for factor in (inputs, outputs):
                if factor is not None and not bool(torch.isfinite(factor.sum())):
                    raise KbitError(f"{source.path}: the gradients of {name} are not finite: the weights are broken")
            together, alone = self._squares.get(name, (1.0, 1.0))
            coherence = together / alone if alone > 0 else 1.0
            found[name] = Factors(inputs, outputs, coherence, self._weighted)
        return found

    def _panels(
        self, sums: dict[str, torch.Tensor], name: str, rows: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor, slice]]:
        size = rows.shape[1]
        total = sums.setdefault(name, torch.zeros(size, size))
        return [(total, rows, slice(start, min(start + _PANEL, size))) for start in range(0, size, _PANEL)]


def _mean(factors: Sequence[Factors]) -> Factors:
    """What experts that were measured have on average: for one that was not."""
    inputs = torch.stack([each.inputs for each in factors]).mean(dim=0)
    outputs = [each.outputs for each in factors if each.outputs is not None]
    coherence = sum(each.coherence for each in factors) / len(factors)
    of_outputs = torch.stack(outputs).mean(dim=0) if outputs else None
    return Factors(inputs, of_outputs, coherence, factors[0].weighted, borrowed=True)


def light_share(weight: torch.Tensor) -> torch.Tensor:
    """What is kept of each token's weight where the heaviest count as the lightest of them: in shares, (R, 1).

    Args:
        weight: of R tokens, (R, 1), not negative.
    """
    limit = weight.flatten().topk(max(1, int(_HEAVY * len(weight)))).values[-1]
    return torch.where(weight > limit, limit / weight, 1.0)


def _square_of_gradient(text: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Of the sum of d x' over a text's tokens, the squared norm."""
    d, x = text
    return float(product(d.T, x).square().sum(dtype=torch.float64))


def _add_panel(work: tuple[torch.Tensor, torch.Tensor, slice]) -> None:
    """Some rows of rows' rows, from the diagonal on."""
    total, rows, panel = work
    total[panel, panel.start :] += product(rows[:, panel].T, rows[:, panel.start :])


def _whole(upper: torch.Tensor, tokens: int) -> torch.Tensor:
    """The symmetric matrix, per token, of which the panels from the diagonal on were summed."""
    upper /= tokens
    return upper.triu_() + upper.triu(1).T
