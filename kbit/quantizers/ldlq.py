"""Rounding a matrix so that what its errors cost is small: searched scales, and errors made good by later weights.

The cost of an error E is tr(H_O E H_I E'), the factors from calibration (kbit.calibration.factors). With H_I = L D L',
L unit lower triangular, and likewise H_O = M G M', that is the sum over all weights of G_i D_j (M' E L)_ij^2. From the
last row and column to the first, a weight's term holds its own error plus what later ones have left; so it is rounded
after that has been added to it, and its term is a rounding error, the least it can be. H_O = 1 is LDLQ (QuIP, arXiv
2307.13304), which is GPTQ (arXiv 2210.17323) in another order; both factors are YAQA's rounding (arXiv 2505.22988).

Rows go in blocks of 16 (kernels/cpu/rounding): within one, M is taken for the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kbit import _native
from kbit.backends.reference.products import product
from kbit.calibration.factors import ROWS_AT_ONCE, Factors
from kbit.formats.blockwise import block_statistics, check_finite, matrix_codebook, used_levels
from kbit.formats.planes import pack
from kbit.formats.planes_codec import PlanesTensor
from kbit.formats.quant_format import QuantFormat, plane_widths
from kbit.formats.scales import load_scales, store_scales
from kbit.host.errors import KbitError
from kbit.quantizers.descent import Curvature, Rounded, descend
from kbit.quantizers.settings import Settings

# Scales that are tried, in shares of the one that spans the block.
SHARES = tuple(round(0.5 + 0.04 * i, 2) for i in range(15))
# Rows whose errors do not reach each other; and how many of those are told of at once.
_ROWS, _ROUND = 16, 256


@dataclass(frozen=True, eq=False)
class Feedback:
    """How errors are passed on in a matrix (N, K), whatever its format.

    Attributes:
        columns: L' (K, K), float32; None for the identity.
        importance: D (K,): what a column's squared error weighs when a scale is chosen.
        rows: M (N, N), unit in blocks of 16 rows; None for the identity.
        curvature: what descent goes by, columns as in the matrix; None where there is none.
        order: which column stands where in `columns` and `importance`, int64 (K,): the last is rounded first; None: as
            in the matrix.
    """

    columns: torch.Tensor | None
    importance: torch.Tensor
    rows: torch.Tensor | None
    curvature: Curvature | None
    order: torch.Tensor | None = None

    @classmethod
    def of(cls, factors: Factors | None, settings: Settings, columns: int) -> Feedback:
        """What a matrix of so many columns gets from its factors, or from none."""
        if factors is None or not settings.feedback:
            return cls(None, _importance(factors, settings, columns), None, None)
        order = torch.argsort(factors.inputs.diagonal(), stable=True) if settings.act_order else None
        ordered = factors.inputs if order is None else factors.inputs[order[:, None], order]
        inputs, lower = damped(ordered, settings.input_damping)
        if order is not None:
            back = torch.argsort(order)
            inputs = inputs[back[:, None], back]
        diagonal = lower.diagonal().clone()
        outputs = rows = None
        if settings.two_sided and factors.outputs is not None and factors.outputs.dim() == 2:
            outputs, rows = damped(factors.outputs, settings.output_damping)
            unit_in_blocks(rows, _ROWS)
        curvature = Curvature(inputs, outputs) if settings.sweeps else None
        return cls((lower / diagonal).T.contiguous(), diagonal.square(), rows, curvature, order)

    @property
    def importance_by_column(self) -> torch.Tensor:
        """`importance` in the matrix's order."""
        return self.importance if self.order is None else self.importance[torch.argsort(self.order)]


def round_matrix(
    weight: torch.Tensor, format: QuantFormat, factors: Factors | None, settings: Settings, *, name: str = "tensor"
) -> PlanesTensor:
    """A matrix in a format.

    Runs in the calling thread but for matrix products; the result does not depend on torch's number of threads as
    long as those products do not.

    Args:
        weight: float32 (N, K).
        format: of the planes codec.
        factors: of the matrix; None: all errors cost the same.
        settings: see there.
        name: what to call the matrix in errors.

    Raises:
        KbitError: the matrix holds NaN or infinity, or scales that the format cannot hold.
    """
    return round_with(weight, format, Feedback.of(factors, settings, weight.shape[1]), settings, name=name)


def round_with(
    weight: torch.Tensor,
    format: QuantFormat,
    feedback: Feedback,
    settings: Settings,
    *,
    name: str = "tensor",
    codebook: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> PlanesTensor:
    """`round_matrix` with its factors taken apart already, for who rounds one matrix to several formats.

    With a codebook float32 (2^k,), in place of the format's own: codes are its places. With scales (N, blocks), of the
    type that the format stores, none are chosen.
    """
    rows, columns = weight.shape
    weight = weight.contiguous()
    check_finite(weight, 0, rows, name)
    try:
        for start in range(0, rows, ROWS_AT_ONCE):  # refuses what the scales' type cannot hold
            store_scales(*block_statistics(weight[start : start + ROWS_AT_ONCE], format), format)
    except KbitError as error:
        raise KbitError(f"{name}: {error}") from None
    work = _Work(
        format, (rows, columns), matrix_codebook(weight, format) if codebook is None else codebook, settings.search
    )
    if scales is not None:
        work.fix_scales({"scales": scales})
    elif format.double_quant or settings.static_scales:
        # Scales that share factors over many rows are fixed before the first code is, too.
        free = work.run(weight, None, None, feedback.importance_by_column, slice(0, rows))
        work.fix_scales(store_scales(free.scales, free.offsets, format))
    ordered = weight if feedback.order is None else work.reorder(weight, feedback.order)
    descends = feedback.curvature is not None and settings.sweeps > 0
    if feedback.rows is None:
        # No row knows of another.
        for start in range(0, rows, ROWS_AT_ONCE):
            some = slice(start, min(start + ROWS_AT_ONCE, rows))
            work.run(ordered, None, feedback.columns, feedback.importance, some)
            if descends and feedback.order is None:
                work.descend(weight, feedback.curvature, settings.sweeps, some)
    else:
        left = torch.zeros_like(weight)  # E L, of the finished rows
        for start in reversed(range(0, rows, _ROWS)):
            block = slice(start, min(start + _ROWS, rows))
            # From a round number on, where `left` is still zero: oneDNN compiles code for every shape that it meets.
            below = slice(block.stop // _ROUND * _ROUND, rows)
            correction = product(feedback.rows[below, block].T, left[below])  # (16, K)
            done = work.run(ordered, correction, feedback.columns, feedback.importance, block)
            left[block] = done.residual - correction
    if feedback.order is not None:
        work.codes = work.codes[:, torch.argsort(feedback.order)].contiguous()
    if descends and (feedback.rows is not None or feedback.order is not None):
        work.descend(weight, feedback.curvature, settings.sweeps, slice(0, rows))
    return work.tensor()


def _importance(factors: Factors | None, settings: Settings, columns: int) -> torch.Tensor:
    """What a column's squared error weighs where errors are not passed on, (K,)."""
    if factors is None:
        return torch.ones(columns)
    diagonal = factors.inputs.diagonal().clone()
    floor = settings.input_damping * float(diagonal.mean())
    return diagonal + floor if floor > 0 else torch.ones(columns)


def damped(factor: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A factor in units of its mean diagonal plus damping, and its lower Cholesky factor; of zeros, the identity."""
    size = len(factor)
    mean = float(factor.diagonal().mean())
    if not mean > 0:
        return torch.eye(size), torch.eye(size)
    while True:
        damped = factor / mean
        damped.diagonal().add_(damping)
        lower: torch.Tensor
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return damped, lower
        damping = max(10 * damping, 1e-4)  # float32 could not tell it from singular


def unit_in_blocks(lower: torch.Tensor, size: int) -> None:
    """Make a lower triangular matrix one whose blocks of so many rows on the diagonal are the identity, in place."""
    for start in range(0, len(lower), size):
        block = slice(start, start + size)
        corner = lower[block, block].clone()
        lower[:, block] = torch.linalg.solve_triangular(corner, lower[:, block], upper=False, left=False)


@dataclass(frozen=True, eq=False)
class _Done:
    """Rows that are rounded."""

    scales: torch.Tensor
    offsets: torch.Tensor | None
    residual: torch.Tensor


class _Work:
    """The arrays of one matrix, filled row block by row block."""

    def __init__(self, format: QuantFormat, shape: tuple[int, int], codebook: torch.Tensor, search: bool) -> None:
        rows, columns = shape
        self.format, self.shape, self.codebook = format, shape, codebook
        blocks = format.blocks_per_row(columns)
        self.levels, self.codes_of_levels = used_levels(codebook)
        self.shares = torch.tensor(SHARES if search else ())
        self.codes = torch.empty(shape, dtype=torch.uint8)
        self.scales = torch.empty(rows, blocks)
        self.offsets = torch.empty(rows, blocks) if format.asymmetric else None
        self.fixed: dict[str, torch.Tensor] | None = None
        self.blocks_of: torch.Tensor | None = None  # int32 (K,), of columns that are out of their order
        self.block = format.block_size or columns
        self.scale_type = "fp32" if format.double_quant else format.scale_dtype

    def run(
        self,
        weight: torch.Tensor,
        correction: torch.Tensor | None,
        feedback: torch.Tensor | None,
        importance: torch.Tensor,
        rows: slice,
    ) -> _Done:
        """Round some rows."""
        offsets = None if self.offsets is None else self.offsets[rows]
        given = given_offsets = None
        if self.fixed is not None:
            given = load_scales(self.fixed, "scales", self.format, rows)
            given_offsets = load_scales(self.fixed, "offsets", self.format, rows)
        residual = torch.empty_like(weight[rows])
        _native.round_matrix(
            weight[rows], correction, feedback, importance, self.levels, self.codes_of_levels,
            self.block, self.scale_type,
            self.format.asymmetric, self.shares, given, given_offsets, self.codes[rows], self.scales[rows], offsets,
            residual, self.blocks_of,
        )  # fmt: skip
        return _Done(self.scales[rows], offsets, residual)

    def reorder(self, weight: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """The weight's columns in an order that the next rows are rounded in; their scales are fixed."""
        assert self.fixed is not None
        self.blocks_of = (order // self.block).int()
        for name, values in (("scales", self.scales), ("offsets", self.offsets)):
            fixed = load_scales(self.fixed, name, self.format)
            if values is not None and fixed is not None:
                values.copy_(fixed)
        return weight[:, order].contiguous()

    def fix_scales(self, stored: dict[str, torch.Tensor]) -> None:
        self.fixed = stored

    def descend(self, weight: torch.Tensor, curvature: Curvature | None, sweeps: int, rows: slice) -> None:
        """Coordinate descent on some rows, or on all; some only where no row knows of another."""
        assert curvature is not None
        offsets = None if self.offsets is None else self.offsets[rows]
        rounded = Rounded(
            self.levels, self.codes_of_levels, self.block, self.scale_type, self.fixed is not None, self.codes[rows],
            self.scales[rows], offsets,
        )  # fmt: skip
        descend(rounded, weight[rows] - self.values(rows), curvature, sweeps)

    def values(self, rows: slice) -> torch.Tensor:
        """What codes and scales of some rows stand for now, (R, K)."""
        columns = self.shape[1]
        found = self.codebook[self.codes[rows].int()]
        found *= self.scales[rows].repeat_interleave(self.block, dim=1)[:, :columns]
        return (
            found if self.offsets is None else found + self.offsets[rows].repeat_interleave(self.block, 1)[:, :columns]
        )

    def tensor(self) -> PlanesTensor:
        format = self.format
        parts = self.fixed if self.fixed is not None else store_scales(self.scales, self.offsets, format)
        planes = pack(self.codes, format.bits)
        stored = {f"plane{width}": plane for width, plane in zip(plane_widths(format.bits), planes, strict=True)}
        stored |= parts
        if format.has_own_codebook:
            stored["codebook"] = self.codebook
        ordered = {suffix: stored[suffix] for suffix in format.parts(*self.shape)}
        return PlanesTensor(format, self.shape, ordered, self.codebook)
