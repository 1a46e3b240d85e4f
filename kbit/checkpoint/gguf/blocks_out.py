"""Kbit's matrices as GGUF's blocks of 32: what `blocks` reads, written.

Exactly where the type has the numbers: integers with a scale that float16 holds fit Q4_0, Q5_0 or Q8_0 once the code of
0 is taken away (codes less their zeros are whole numbers of one bit more), a float offset fits Q4_1 and Q5_1, E2M1 with
powers of two MXFP4. Types of 256 weights are not made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.gguf.blocks import BLOCK_TYPES
from kbit.formats.grids import NotOnGrid, Terms, mx_scales, terms_of
from kbit.formats.quant_format import QuantFormat
from kbit.formats.stored import StoredMatrix, widened
from kbit.formats.stored_planes import StoredPlanes

# Types of integers without offset, and the half of their codes.
_SYMMETRIC = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}
_WITH_OFFSETS = {"Q4_1": 4, "Q5_1": 5}
_BLOCK = 32
# What can be rounded to.
ROUNDED = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


@dataclass(frozen=True, eq=False)
class Form:
    """How a matrix is written.

    Attributes:
        type: ggml's.
        scales: (N, K / 32): patterns of float16, or MXFP4's bytes.
        offsets: the same, where the type has them.
        moved: int16 (N, K / 32): what is added to codes; None: nothing.
    """

    type: str
    scales: NDArray[Any]
    offsets: NDArray[Any] | None = None
    moved: NDArray[np.int16] | None = None


def form_of(matrix: StoredMatrix, rounded: str | None = None) -> Form:
    """The type that holds a matrix's numbers.

    Args:
        matrix: which.
        rounded: this type, with the matrix's codes and scales rounded to float16; None: only what is exact.

    Raises:
        NotOnGrid: there is none, or it is not `rounded`.
    """
    columns = matrix.shape[1]
    if columns % _BLOCK:
        raise NotOnGrid(f"has rows of {columns} weights, no whole number of GGUF's blocks of {_BLOCK}", final=True)
    if matrix.format.outliers:
        raise NotOnGrid(f"keeps weights apart from its codes ({matrix.format})")
    if rounded is None and np.array_equal(matrix.codebook, BLOCK_TYPES["IQ4_NL"].codebook):
        planes = StoredPlanes.of(matrix)
        scales, kind = planes.kernel_scales("scales")
        assert scales is not None
        return Form("IQ4_NL", _half(_spread(widened(scales, kind), columns)))
    try:
        terms = terms_of(matrix)
    except NotOnGrid:
        with_offsets = _with_offsets(matrix) if rounded is None else None
        if with_offsets is None:
            raise
        return with_offsets
    if terms.grid.kind == "int":
        return _symmetric(terms, columns, rounded)
    if terms.grid.kind == "e2m1" and terms.grid.block == _BLOCK and rounded is None:
        return Form("MXFP4", mx_scales(terms.scales))
    raise NotOnGrid(f"has numbers that are no GGUF type's ({matrix.format})")


def _symmetric(terms: Terms, columns: int, rounded: str | None) -> Form:
    middle = 2 ** (terms.grid.bits - 1)
    zeros = np.full(terms.scales.shape, middle, dtype=np.int16) if terms.zeros is None else terms.zeros.astype(np.int16)
    # The least and the greatest number of steps; kbit's own symmetric integers do not use the first code.
    least, most = -int(zeros.max()), 2**terms.grid.bits - 1 - int(zeros.min())
    fits = [name for name, half in _SYMMETRIC.items() if -half <= least and most < half]
    if not fits or (rounded is not None and rounded not in fits):
        raise NotOnGrid(f"has steps from {least} to {most}, which {rounded or 'no GGUF type'} has not")
    name = rounded or fits[0]
    scales = _spread(terms.scales, columns)
    patterns = _half(scales) if rounded is None else scales.astype(np.float16).view(np.uint16)
    return Form(name, patterns, moved=_spread(_SYMMETRIC[name] - zeros, columns))


def _with_offsets(matrix: StoredMatrix) -> Form | None:
    """Q4_1 or Q5_1, where codes are steps above an offset."""
    format, columns = matrix.format, matrix.shape[1]
    if not isinstance(format, QuantFormat):  # nested, or a trellis: no steps
        return None
    planes = StoredPlanes.of(matrix)
    scales, kind = planes.kernel_scales("scales")
    offsets, _ = planes.kernel_scales("offsets")
    name = next((name for name, bits in _WITH_OFFSETS.items() if format.bits <= bits), None)
    steps = np.arange(len(matrix.codebook), dtype=np.float32)
    if offsets is None or scales is None or name is None or not np.array_equal(matrix.codebook, steps):
        return None
    halves = [_half(_spread(widened(values, kind), columns)) for values in (scales, offsets)]
    return Form(name, halves[0], halves[1])


def _spread(values: NDArray[Any], columns: int) -> NDArray[Any]:
    """A value per block as a value per 32 columns.

    Raises:
        NotOnGrid: blocks are no whole number of those.
    """
    block = columns // values.shape[1]
    if block % _BLOCK or block * values.shape[1] != columns:
        raise NotOnGrid(f"has blocks of {block}, no multiple of GGUF's {_BLOCK}")
    return values.repeat(block // _BLOCK, axis=1)


def _half(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Patterns of float16.

    Raises:
        NotOnGrid: it does not hold one of them.
    """
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), values):
        raise NotOnGrid("has scales that float16 cannot hold, as GGUF's are")
    return half.view(np.uint16)


def encode(form: Form, codes: NDArray[np.uint8], start: int, stop: int) -> NDArray[np.uint8]:
    """Rows as they are stored.

    Args:
        form: of the matrix.
        codes: of these rows (R, K).
        start, stop: which these are.

    Returns:
        uint8 (R, bytes of a row).
    """
    rows, columns = codes.shape
    blocks: Any = codes.reshape(rows, columns // _BLOCK, _BLOCK)
    if form.moved is not None:
        blocks = (blocks + form.moved[start:stop, :, None]).astype(np.uint8)
    heads = [form.scales[start:stop], *([] if form.offsets is None else [form.offsets[start:stop]])]
    parts = [np.ascontiguousarray(head).view(np.uint8).reshape(rows, columns // _BLOCK, -1) for head in heads]
    if form.type == "Q8_0":
        parts.append(blocks ^ np.uint8(128))
    else:
        if form.type.startswith("Q5"):
            parts.append(np.packbits(blocks >> 4, axis=2, bitorder="little"))
        low = blocks & np.uint8(15)
        parts.append(low[..., : _BLOCK // 2] | (low[..., _BLOCK // 2 :] << np.uint8(4)))
    return np.concatenate(parts, axis=2).reshape(rows, -1)


def decoded(form: Form, stored: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The numbers that stored rows stand for, as `kbit.checkpoint.gguf.blocks` reads them."""
    kind = BLOCK_TYPES[form.type]
    block_bytes = stored.shape[1] // form.scales.shape[1]
    return kind.values(kind.decode(stored.tobytes(), stored.shape[0], block_bytes))
