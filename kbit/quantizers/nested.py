"""Rounding a matrix to nested codes: the errors of every width made good as well as the others allow.

Feedback at one width (kbit.quantizers.ldlq) moves weights out of the cells that further bits could refine: what it
gains there, wider widths lose. So no width is rounded by itself. All codes begin as the nearest of the widest width,
and coordinate descent looks at all widths at once: each code in turn becomes the one for which the sum over widths of
what their errors cost, in shares of what rounding to nearest costs at that width, is least
(kernels/cpu/rounding/nested_descent.h). The anchor counts more than others. Between sweeps every width's factor of
every row is solved for exactly: the cost is quadratic in them. And no width is to be worse than rounding to nearest
would be: one that costs more counts more from sweep to sweep, and where that is not enough, all begins again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kbit import _native
from kbit.backends.reference.products import product, product_with_rows
from kbit.formats.blockwise import (
    CHUNK_WEIGHTS,
    Encoder,
    block_statistics,
    check_finite,
    normalise,
    quantize_blockwise,
)
from kbit.formats.nested import NestedFormat
from kbit.formats.nested_codec import fitted_factors, packed, scales_at, stored_factors
from kbit.formats.planes_codec import decode
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.formats.scales import store_scales
from kbit.host.errors import KbitError
from kbit.quantizers.descent import Curvature
from kbit.quantizers.ldlq import SHARES, Feedback
from kbit.quantizers.row_scales import solve_for_rows
from kbit.quantizers.settings import Nesting

# As in kbit.quantizers.descent.
_ROWS, _TOGETHER = 16, 64


def round_nested(
    weight: torch.Tensor, format: NestedFormat, feedback: Feedback, nesting: Nesting, *, name: str
) -> QuantTensor:
    """A matrix in a nested format.

    Args:
        weight: float32 (N, K).
        format: all widths.
        feedback: what its errors cost.
        nesting: what the widths weigh against each other.
        name: what to call the matrix in errors.

    Raises:
        KbitError: the matrix holds NaN or infinity, or scales that the format cannot hold.
    """
    levels = torch.from_numpy(format.codebook(weight.shape[1]).copy())
    scales = _shared_scales(weight, format, levels, feedback.importance_by_column, nesting, name)
    work = _Work(weight, format, levels, scales)
    if feedback.curvature is not None:
        nearest = _nearest_costs(weight, format, feedback.curvature)
        weights = nesting.shares(nearest)
        for _ in range(nesting.tries - 1):
            if work.descend(feedback.curvature, nesting, nearest, weights):
                return work.tensor()
            # What has moved too far does not find back: it begins again, with what the weights have become.
            weights[nesting.anchor] /= nesting.less
            work = _Work(weight, format, levels, scales)
        work.descend(feedback.curvature, nesting, nearest, weights)
    return work.tensor()


def _shared_scales(
    weight: torch.Tensor,
    format: NestedFormat,
    levels: torch.Tensor,
    importance: torch.Tensor,
    nesting: Nesting,
    name: str,
) -> torch.Tensor:
    """Scales that all widths share, (N, blocks), as they are stored.

    Of some shares of what spans a block, the one with the least sum over widths of what rounding to nearest costs.
    Narrow widths are better off where the largest weights are cut; wide ones are not.
    """
    count, columns = weight.shape
    block = min(format.block_size or columns, columns)
    widest = format.plain(format.bits)
    encoders = {width: Encoder.for_codebook(levels[format.levels_at(width)]) for width in format.widths}
    weights = dict(zip(sorted(format.widths), nesting.weights(sorted(format.widths)), strict=True))
    found = []
    step = max(1, CHUNK_WEIGHTS // columns)
    for start in range(0, count, step):
        x = check_finite(weight[start : start + step], start, min(start + step, count), name)
        try:
            span = store_scales(block_statistics(x, widest)[0], None, widest)["scales"]
        except KbitError as error:
            raise KbitError(f"{name}: {error}") from None
        best, chosen = torch.full(span.shape, torch.inf), span
        for share in SHARES:
            scales = (span.float() * share).to(span.dtype)
            unit = normalise(x, scales.float(), None, widest)
            cost = torch.zeros(span.shape)
            for width, encoder in encoders.items():
                places = encoder.encode(unit).int().view(-1)
                missed = levels[format.levels_at(width)].index_select(0, places).view(x.shape).sub_(unit).square_()
                missed = torch.nn.functional.pad(missed * importance, (0, -columns % block)).view(len(x), -1, block)
                cost += weights[width] * missed.sum(dim=2)
            cost *= scales.float().square()
            better = cost < best
            best, chosen = torch.where(better, cost, best), torch.where(better, scales, chosen)
        found.append(chosen)
    return torch.cat(found)


class _Work:
    """A matrix's codes, scales and factors while they are found.

    Attributes:
        codes: of the widest width, uint8 (N, K).
        factors: float32 (N, 1) of every width, as they are stored.
    """

    def __init__(self, weight: torch.Tensor, format: NestedFormat, levels: torch.Tensor, scales: torch.Tensor) -> None:
        self.weight, self.format, self.levels, self.scales = weight, format, levels, scales
        self.codes = self._nearest()
        fitted = fitted_factors(format, weight, self.codes, scales.float(), levels)
        self.factors = {width: fitted[f"factor{width}"] for width in format.widths}

    def _nearest(self) -> torch.Tensor:
        """Codes of the nearest levels of the widest width, uint8 (N, K)."""
        count, columns = self.weight.shape
        widest = self.format.plain(self.format.bits)
        encoder = Encoder.for_codebook(self.levels[self.format.levels_at(self.format.bits)])
        codes = torch.empty(count, columns, dtype=torch.uint8)
        step = max(1, CHUNK_WEIGHTS // columns)
        for start in range(0, count, step):
            rows = slice(start, start + step)
            codes[rows] = encoder.encode(normalise(self.weight[rows], self.scales[rows].float(), None, widest))
        return codes

    def values(self, width: int, factor: bool = True) -> torch.Tensor:
        """What the codes stand for at a width, (N, K), with its factor or without."""
        stored: Mapping[str, torch.Tensor] = {
            "scales": self.scales,
            f"factor{width}": self.factors[width] if factor else torch.ones_like(self.factors[width]),
        }
        levels = self.levels[self.format.levels_at(width)]
        codes = self.codes & (2**width - 1)
        return decode(codes, scales_at(self.format, stored, width), None, levels, self.format.plain(width))

    def fit(self, curvature: Curvature) -> None:
        """Every width's factors to what costs least."""
        for width in self.format.widths:
            self.factors[width] = stored_factors(_best_factors(self.weight, self.values(width, False), curvature))

    def descend(
        self, curvature: Curvature, nesting: Nesting, nearest: Mapping[int, float], weights: dict[int, float]
    ) -> bool:
        """Sweeps over all codes, with factors fitted before each and at the end.

        From half of them on, a width that costs more than rounding to nearest gets a larger weight before the next one.

        Args:
            curvature: what errors cost.
            nesting: see there.
            nearest: what rounding to nearest costs at each width.
            weights: what a unit of each width's cost counts; changed.

        Returns:
            Whether no width costs more than rounding to nearest.
        """
        for sweep in range(nesting.most_sweeps):
            self.fit(curvature)
            over = {width: self.cost(width, curvature) / cost for width, cost in nearest.items()}
            if sweep >= nesting.sweeps and max(over.values()) <= 1:
                return True
            if 2 * sweep >= nesting.sweeps:  # the first ones show what the rest will be like
                for width, share in over.items():
                    weights[width] *= min(max(share / nesting.margin, 1.0) ** 2, nesting.step)
            if not self._sweep(curvature, list(weights.values())) and max(over.values()) <= 1:
                return True
        self.fit(curvature)
        return all(self.cost(width, curvature) <= cost for width, cost in nearest.items())

    def cost(self, width: int, curvature: Curvature) -> float:
        """What a width's errors cost."""
        return _cost(self.weight - self.values(width), curvature)

    def _sweep(self, curvature: Curvature, weights: list[float]) -> bool:
        """One pass over all codes; whether any changed."""
        count, columns = self.weight.shape
        inputs, outputs = curvature.inputs, curvature.outputs
        widths = sorted(self.format.widths)
        levels = [self.levels[self.format.levels_at(width)].contiguous() for width in widths]
        stored = {"scales": self.scales} | {f"factor{width}": self.factors[width] for width in widths}
        scales = torch.stack([scales_at(self.format, stored, width) for width in widths])
        firsts = []
        for width in widths:
            slope = product_with_rows(self.weight - self.values(width), inputs)
            firsts.append(slope if outputs is None else product(outputs, slope))
        first = torch.stack(firsts)
        heard = torch.zeros_like(first)
        before = self.codes.clone()
        alone = torch.eye(_ROWS)
        for start in reversed(range(0, count, _TOGETHER)):
            group = slice(start, min(start + _TOGETHER, count))
            slopes = first[:, group].clone()
            for index in range(len(widths)):
                slopes[index] -= heard[index, group] if outputs is None else product(outputs[group], heard[index])
            for begin in reversed(range(0, group.stop - start, _ROWS)):
                within = slice(begin, min(begin + _ROWS, group.stop - start))
                rows = slice(start + within.start, start + within.stop)
                size = rows.stop - rows.start
                among = (alone[:size, :size] if outputs is None else outputs[rows, rows]).contiguous()
                change = torch.empty(len(widths), size, columns)
                _native.descend_nested_rows(
                    slopes[:, within].contiguous(), inputs, among, levels, weights, self.format.block_size or columns,
                    scales[:, rows].contiguous(), self.codes[rows], change,
                )  # fmt: skip
                told = product_with_rows(change.view(-1, columns), inputs).view(change.shape)
                heard[:, rows] += told
                if outputs is not None and begin:
                    for index in range(len(widths)):
                        slopes[index, :begin] -= product(outputs[start : start + begin, rows], told[index])
        return not torch.equal(before, self.codes)

    def tensor(self) -> QuantTensor:
        format, shape = self.format, (self.weight.shape[0], self.weight.shape[1])
        stored = {**packed(format, self.codes), "scales": self.scales}
        stored |= {f"factor{width}": factor for width, factor in self.factors.items()}
        return QuantTensor(format, shape, {name: stored[name] for name in format.parts(*shape)}, self.levels)


def _nearest_costs(weight: torch.Tensor, format: NestedFormat, curvature: Curvature) -> dict[int, float]:
    """What rounding to nearest costs at each width, narrowest first: in its default format, in the same blocks."""
    costs = {}
    for width in sorted(format.widths):
        plain = format.at_width(width)
        assert isinstance(plain, QuantFormat)
        nearest = quantize_blockwise(weight, plain).dequantize()
        costs[width] = max(_cost(weight - nearest, curvature), 1e-30)  # of zeros, nothing
    return costs


def _cost(error: torch.Tensor, curvature: Curvature) -> float:
    """tr(H_O E H_I E')."""
    heard = product_with_rows(error, curvature.inputs)
    heard = heard if curvature.outputs is None else product(curvature.outputs, heard)
    return float((heard * error).sum(dtype=torch.float64))


def _best_factors(weight: torch.Tensor, values: torch.Tensor, curvature: Curvature) -> torch.Tensor:
    """The factor of every row under which tr(H_O E H_I E') of E = weight - factor * values is least, (N, 1).

    With both factors of the Fisher information rows know of each other: (H_O o V H_I V') f = diag(H_O W H_I V').
    """
    heard = product_with_rows(values, curvature.inputs)  # (N, K)
    if curvature.outputs is None:
        energy = (heard * values).sum(dim=1)
        return ((weight * heard).sum(dim=1) / torch.where(energy > 0, energy, 1.0))[:, None]
    system = curvature.outputs * product_with_rows(heard, values)
    wanted = (product(curvature.outputs, weight) * heard).sum(dim=1)
    found = solve_for_rows(system, wanted)
    return torch.ones(len(weight), 1) if found is None else found[:, None]
