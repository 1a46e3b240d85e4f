"""Grids that other libraries' formats share: whole numbers, E2M1 and E4M3, times a scale for a run of columns.

Which of kbit's matrices lie on one, so that they can be written as it without rounding (`terms_of`), and rounding to
one (`rounded_to`). value = (code - zero) * scale of whole numbers, point(code) * scale of OCP's small floats
(`kbit.formats.microscaling`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kbit.formats.codebooks import int_codebook
from kbit.formats.microscaling import E2M1, e4m3, nearest_code
from kbit.formats.quant_format import QuantFormat
from kbit.formats.stored import StoredMatrix, rounded, widened
from kbit.formats.stored_planes import StoredPlanes
from kbit.host.errors import UsageError

# Named as their libraries name them: E2M1 with a power of two for 32 columns, with an E4M3 number for 16 of them and a
# factor for the matrix, and E4M3 with a float for a row.
_NAMED = {"mxfp4": ("e2m1", 4, 32), "nvfp4": ("e2m1", 4, 16), "fp8": ("e4m3", 8, 0)}
_E4M3_MAX, _E2M1_MAX = 448.0, 6.0
_EXPONENT_BIAS = 127


class NotOnGrid(Exception):
    """A matrix is on no grid; the text says why, after its name.

    Attributes:
        final: rounding it to one does not help.
    """

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


@dataclass(frozen=True)
class Grid:
    """One grid.

    Attributes:
        kind: "int", "e2m1" or "e4m3".
        bits: of a code.
        block: columns that share a scale; 0: a whole row.
        asymmetric: int only: every block has the code of 0 (`Terms.zeros`); else it is 2^(bits - 1).
        scale_kind: "fp32", "fp16" or "bf16"; of E2M1, whose scales are codes, "fp32".
    """

    kind: Literal["int", "e2m1", "e4m3"]
    bits: int
    block: int
    asymmetric: bool = False
    scale_kind: str = "fp32"

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Read "mxfp4", "nvfp4", "fp8", or a kbit format of integers: "int4-b128", "int8-row", "int4-b32-asym-bf16".

        Raises:
            UsageError: anything else.
        """
        if text in _NAMED:
            kind, bits, block = _NAMED[text]
            return cls(kind, bits, block)  # type: ignore[arg-type]
        format = QuantFormat.parse(text)
        if format.dtype != "int" or format.double_quant:
            raise UsageError(
                f"{text}: other libraries' formats are integers (int2 to int8, as in int4-b128, int8-row or "
                f"int4-b128-asym) and {', '.join(_NAMED)}"
            )
        return cls("int", format.bits, format.block_size, format.asymmetric, format.scale_dtype)

    def groups(self, columns: int) -> int:
        """Scales of a row.

        Raises:
            NotOnGrid: rows are no whole number of blocks.
        """
        if self.block == 0 or self.block == columns:
            return 1
        if columns % self.block:
            raise NotOnGrid(f"has rows of {columns} weights, no whole number of blocks of {self.block}")
        return columns // self.block


@dataclass(frozen=True, eq=False)
class Terms:
    """The scales of a matrix on a grid.

    Attributes:
        grid: which.
        scales: float32 (N, G).
        zeros: uint8 (N, G): the code of 0, where the grid is asymmetric.
    """

    grid: Grid
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8] | None = None

    def values(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What codes (N, K) stand for, float32."""
        repeat = codes.shape[1] // self.scales.shape[1]
        if self.grid.kind == "int":
            found = codes.astype(np.float32)
            found -= (
                np.float32(2 ** (self.grid.bits - 1))
                if self.zeros is None
                else self.zeros.astype(np.float32).repeat(repeat, axis=1)
            )
        else:
            found = (E2M1 if self.grid.kind == "e2m1" else e4m3())[codes]
        found *= self.scales.repeat(repeat, axis=1)
        return found


def terms_of(matrix: StoredMatrix) -> Terms:
    """The grid and the scales of a stored matrix, whose codes are then the grid's.

    A scale is the stored one but of kbit's own symmetric integers, whose codebook ends at 1: there it is the stored one
    divided by the largest code, rounded to float32, and values may differ in the last places of float32.

    Raises:
        NotOnGrid: it is on none.
    """
    if not isinstance(matrix.format, QuantFormat):
        raise NotOnGrid(f"is held as {matrix.format}, which is no code times a scale")
    if matrix.format.outliers:
        raise NotOnGrid(f"keeps weights apart from its codes ({matrix.format})")
    planes, format = StoredPlanes.of(matrix), matrix.format
    scales, kind = planes.kernel_scales("scales")
    offsets, offset_kind = planes.kernel_scales("offsets")
    assert scales is not None
    wide, book = widened(scales, kind), matrix.codebook
    steps = book - book[0]
    zero = -float(book[0])
    if np.array_equal(steps, np.arange(len(book), dtype=np.float32)) and zero == int(zero):
        return _integers(format, kind, wide, None if offsets is None else widened(offsets, offset_kind), int(zero))
    if offsets is None and format.dtype == "int" and np.array_equal(book, int_codebook(format.bits, False)):
        top = np.float32(2 ** (format.bits - 1) - 1)
        return Terms(Grid("int", format.bits, format.block_size), wide / top)
    if offsets is not None:
        raise NotOnGrid(f"has offsets that are no whole numbers of steps ({format})")
    if np.array_equal(book, E2M1):
        return Terms(Grid("e2m1", 4, format.block_size), wide)
    if np.array_equal(book, e4m3()):
        return Terms(Grid("e4m3", 8, format.block_size, scale_kind=kind), wide)
    raise NotOnGrid(f"has levels that are neither whole numbers nor OCP's floats ({format})")


def _integers(
    format: QuantFormat, kind: str, scales: NDArray[np.float32], offsets: NDArray[np.float32] | None, zero: int
) -> Terms:
    """(code - zero) * scale + offset, as it is where the offset is a whole number of steps."""
    bits, block = format.bits, format.block_size
    if offsets is None:
        if zero == 2 ** (bits - 1):
            return Terms(Grid("int", bits, block, scale_kind=kind), scales)
        moved = np.full(scales.shape, zero, dtype=np.float32)
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            moved = np.where(scales == 0, np.float32(2 ** (bits - 1)), zero - np.rint(offsets / scales))
        if not np.array_equal(offsets, scales * (zero - moved)):
            raise NotOnGrid(f"has offsets that are no whole numbers of steps ({format})")
    if moved.min() < 0 or moved.max() >= 2**bits:
        raise NotOnGrid(f"has zeros outside of its codes ({format})")
    return Terms(Grid("int", bits, block, True, kind), scales, moved.astype(np.uint8))


def mx_scales(scales: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Scales as E8M0 codes, 2^(code - 127).

    Raises:
        NotOnGrid: one is no such power of two.
    """
    bits = scales.view(np.uint32)
    codes: NDArray[Any] = bits >> np.uint32(23)
    smallest = bits == 1 << 22  # 2^-127
    if not bool((smallest | ((bits & 0x7FFFFF) == 0) & (codes > 0) & (codes < 255)).all()):
        raise NotOnGrid("has scales that are no powers of two, as MXFP4's are")
    return np.where(smallest, 0, codes).astype(np.uint8)


def nvfp4_scales(scales: NDArray[np.float32]) -> tuple[NDArray[np.uint8], np.float32]:
    """Scales as E4M3 codes and what these are divided by, in float32, so that quotients are the scales, bit for bit.

    There are at most 126 positive codes, so one of them is the largest scale's; what divides it is then the quotient,
    or a neighbour of that.

    Raises:
        NotOnGrid: no divisor gives all of them.
    """
    found, places = np.unique(scales, return_inverse=True)
    levels = e4m3()[:127]
    if found[0] >= 0 and found[-1] > 0 and np.isfinite(found[-1]):
        for level in levels[:0:-1]:
            quotient = np.float32(level / found[-1])
            for divisor in (quotient, *(np.nextafter(quotient, np.float32(end)) for end in (0, np.inf))):
                codes = nearest_code(levels, found * divisor)
                if np.array_equal(levels[codes] / divisor, found):
                    return codes[places].reshape(scales.shape).astype(np.uint8), divisor
    raise NotOnGrid("has scales that are no numbers of E4M3 over one divisor, as NVFP4's are")


def rounded_to(values: NDArray[np.float32], grid: Grid) -> tuple[Terms, NDArray[np.uint8]]:
    """A matrix (N, K) rounded to nearest: scales from the largest magnitude (or the range) of each block.

    MXFP4's scale is 2^(floor(log2(largest)) - 2) (OCP Microscaling Formats v1.0, section 6.3); NVFP4's divisor brings
    the largest scale to 448, E4M3's largest number.

    Returns:
        Scales as the grid holds them, and codes (N, K).

    Raises:
        NotOnGrid: rows are no whole number of blocks.
    """
    rows, columns = values.shape
    blocks = values.reshape(rows, grid.groups(columns), -1)
    largest = np.abs(blocks).max(axis=2)
    if grid.kind == "int":
        return _rounded_integers(blocks, largest, grid)
    if grid.kind == "e4m3":
        scales = largest / np.float32(_E4M3_MAX)
    elif grid.block == 32:
        exponent = np.floor(np.log2(np.maximum(largest, np.float32(2.0**-120)))) - 2
        scales = np.ldexp(np.float32(1), np.maximum(exponent, 1 - _EXPONENT_BIAS).astype(np.int32))
    else:
        whole = largest.max()
        divisor = np.float32(_E4M3_MAX * _E2M1_MAX / whole) if whole > 0 else np.float32(1)
        levels = e4m3()[:127]
        # A scale that is not zero stays so: its block would vanish.
        codes = np.where(largest > 0, np.maximum(nearest_code(levels, largest / _E2M1_MAX * divisor), 1), 0)
        scales = levels[codes] / divisor
    points = E2M1[:8] if grid.kind == "e2m1" else e4m3()[:127]
    with np.errstate(divide="ignore", invalid="ignore"):
        quotients = np.where(scales[..., None] > 0, blocks / scales[..., None], 0)
    codes = nearest_code(points, np.abs(quotients)) | np.where(np.signbit(blocks), 1 << (grid.bits - 1), 0)
    return Terms(grid, scales.astype(np.float32)), codes.reshape(rows, columns).astype(np.uint8)


def _rounded_integers(
    blocks: NDArray[np.float32], largest: NDArray[np.float32], grid: Grid
) -> tuple[Terms, NDArray[np.uint8]]:
    """As kbit's own: symmetric ones from -top to top; asymmetric ones from the least to the most, 0 among them."""
    count, middle = 2**grid.bits, 2 ** (grid.bits - 1)
    low = np.minimum(blocks.min(axis=2), 0)
    span = (np.maximum(blocks.max(axis=2), 0) - low) / np.float32(count - 1)
    scales = widened(
        rounded(span if grid.asymmetric else largest / np.float32(middle - 1), grid.scale_kind), grid.scale_kind
    )
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        steps = np.where(scales[..., None] > 0, np.rint(blocks / scales[..., None]), 0)
        zeros = np.where(scales > 0, np.rint(-low / scales), middle) if grid.asymmetric else None
    zeros = None if zeros is None else np.clip(zeros, 0, count - 1)
    least = 1 if zeros is None else 0
    codes = np.clip(steps + (middle if zeros is None else zeros[..., None]), least, count - 1)
    terms = Terms(grid, scales, None if zeros is None else zeros.astype(np.uint8))
    return terms, codes.reshape(blocks.shape[0], -1).astype(np.uint8)
