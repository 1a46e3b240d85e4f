"""Some panels of a matrix, copied together: products with them are those of the whole, to the bit, in every layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matmul_cases import inputs, weights
from trellis_cases import trellis_tensor

from kbit import _native
from kbit.backends.cpu.weight import prepare
from kbit.formats.nested import NestedFormat
from kbit.formats.nested_codec import narrowed
from kbit.formats.quant_tensor import QuantTensor

ROWS, COLUMNS = 100, 328
PANELS = -(-ROWS // 16)
PLANES = ("nf4-b64", "int3-b16-fp32", "lloyd7-b48-bf16", "float5-row", "int8-b64")


def matrix_of(name: str) -> QuantTensor | torch.Tensor:
    if name.startswith("nested"):
        x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(4))
        format = NestedFormat.parse("nested2..8-b64")
        return narrowed(format.encode(lambda start, stop: x[start:stop], (ROWS, COLUMNS)), int(name[-1]))
    if name.startswith("trellis"):
        return trellis_tensor(name, ROWS, COLUMNS)
    if name in PLANES:
        return weights(name, ROWS, COLUMNS)
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(5)).to(getattr(torch, name))


def multiply(matrix: _native.Matrix, context: _native.Context, x: torch.Tensor) -> np.ndarray:
    program = _native.Program(context, "int8")
    program.finish(program.buffer(matrix.columns))
    program.head(matrix, None, 0.0)
    out = np.full((len(x), matrix.rows), np.nan, dtype=np.float32)
    program.logits(x.numpy(), out)
    return out


@pytest.mark.parametrize(
    "name", [*PLANES, "nested-2", "nested-3", "nested-8", "trellis3-o64", "trellis2.5", "float32", "bfloat16"]
)
def test_selected_panels_give_the_bits_of_the_whole(name: str) -> None:
    context = _native.Context(None, 2)
    whole, x = prepare(matrix_of(name), context).matrix, inputs(3, COLUMNS)
    selection = whole.selection(4)
    assert (selection.rows, selection.columns, selection.bits) == (64, COLUMNS, whole.bits)
    expected = np.zeros((3, PANELS * 16), dtype=np.float32)  # rows beyond the last are zeros
    expected[:, :ROWS] = multiply(whole, context, x)
    panels = expected.reshape(3, PANELS, 16)
    for places, taken, now in (([], [], [0, 0, 0, 0]), ([1, 3], [6, 2], [0, 6, 0, 2]), ([3, 0], [5, 4], [4, 6, 0, 5])):
        selection.take(np.array(places, dtype=np.int64), np.array(taken, dtype=np.int64))
        np.testing.assert_array_equal(multiply(selection, context, x), panels[:, now].reshape(3, -1))


def test_a_selection_outlives_what_it_is_of() -> None:
    context = _native.Context(None, 1)
    whole, x = prepare(matrix_of("nested-3"), context).matrix, inputs(2, COLUMNS)
    expected = multiply(whole, context, x)
    selection = whole.selection(1)
    del whole
    selection.take(np.array([0]), np.array([3]))
    assert multiply(selection, context, x).tobytes() == expected[:, 48:64].tobytes()


def test_what_is_not_there_is_refused() -> None:
    matrix = prepare(matrix_of("nf4-b64"), _native.Context(None, 1)).matrix
    for panels in (0, PANELS + 1):
        with pytest.raises(ValueError, match="not so many panels"):
            matrix.selection(panels)
    selection = matrix.selection(2)
    for places, panels in (([2], [0]), ([-1], [0]), ([0], [PANELS]), ([0], [-1])):
        with pytest.raises(ValueError, match="no such panel"):
            selection.take(np.array(places), np.array(panels))
    with pytest.raises(ValueError, match="no such panel"):
        matrix.take(np.array([0]), np.array([0]))
    with pytest.raises(ValueError, match="every place"):
        selection.take(np.array([0, 1]), np.array([0]))
