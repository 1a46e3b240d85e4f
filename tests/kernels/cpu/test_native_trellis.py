"""Products with trellis codes, of every instruction set, against what the codes mean; the rotation of x among them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matmul_cases import inputs, multiply
from trellis_cases import trellis_tensor

from kbit import _native
from kbit.backends.cpu.weight import prepare
from kbit.formats.outlier_weights import add_outliers
from kbit.formats.quant_tensor import QuantTensor
from kbit.formats.rotation import rotate
from kbit.formats.trellis import TrellisFormat

SETS = _native.instruction_sets()
FORMATS = (
    *(f"trellis{bits}" for bits in range(2, 9)),
    "trellis2-sum4",
    "trellis2-l12",
    "trellis5-l12-h32",
    "trellis4-h128",
    "trellis2.5",
    "trellis3.5",
    "trellis4.5-l12",
    "trellis5.5",
    "trellis3-l12-o64",
    "trellis8-o8",
)
SHAPES = ((33, 128, 1), (16, 200, 3), (50, 321, 13), (7, 16, 2))
ULP = 2.0**-24


@pytest.fixture(scope="module")
def contexts() -> Callable[[str], _native.Context]:
    made: dict[str, _native.Context] = {}
    return lambda isa: made.setdefault(isa, _native.Context(isa, 1))


def rotated(weight: QuantTensor, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """W R and R' x in float64, and what float32 may err in R' x: a rounding at each of log2(mixed) sums and two factors,
    each of at most the sum of a block's magnitudes."""
    format = weight.format
    assert isinstance(format, TrellisFormat)
    mixed, signs = format.columns_mixed(weight.shape[1]), weight.stored["signs"]
    columns = 8 * len(signs)
    turned = rotate(x.double(), signs, mixed)
    full = torch.nn.functional.pad(x.abs().double(), (0, columns - x.shape[1]))
    sums = (full.view(len(x), -1, mixed).sum(-1) / mixed**0.5).repeat_interleave(mixed, dim=1)
    error = (np.log2(mixed) + 2) * ULP * sums
    return format.decode_rotated(weight, slice(0, weight.shape[0])).double().numpy(), turned.numpy(), error.numpy()


def apart(weight: QuantTensor, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What weights that are kept apart add to a product in float64, and what float32 may err in it: a rounding of each
    product and of each sum."""
    rows, columns = weight.shape
    kept = add_outliers(torch.zeros(rows, columns), weight.stored, columns, torch.arange(rows)).double()
    most = int((kept != 0).sum(dim=1).max())
    return (x.double() @ kept.T).numpy(), (2 * most * ULP * (x.double().abs() @ kept.abs().T)).numpy()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", SETS)
def test_fp32_equals_dequantized(contexts: Callable[[str], _native.Context], isa: str, format: str) -> None:
    for rows, columns, batch in SHAPES:
        weight, x = trellis_tensor(format, rows, columns), inputs(batch, columns)
        turned, of_x, error = rotated(weight, x)
        # Three roundings of a weight (its step, its scale, their product with the level), and a chain of K sums.
        bound = error @ np.abs(turned).T + (turned.shape[1] + 3) * ULP * (np.abs(of_x) @ np.abs(turned).T)
        added, more = apart(weight, x)
        bound += more + 2 * ULP * np.abs(of_x @ turned.T + added)
        out = multiply(contexts(isa), weight, x, "fp32")
        assert (np.abs(out - of_x @ turned.T - added) <= bound).all()
        # And by the way that the reference backend takes: rows turned back.
        plain = x.double() @ weight.dequantize().double().T
        assert (np.abs(out - plain.numpy()) <= 2 * bound + 4e-6 * float(plain.abs().max())).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", SETS)
def test_int8_is_within_its_rounding(contexts: Callable[[str], _native.Context], isa: str, format: str) -> None:
    for rows, columns, batch in SHAPES:
        weight, x = trellis_tensor(format, rows, columns), inputs(batch, columns)
        turned, of_x, error = rotated(weight, x)
        width = -(-of_x.shape[1] // 64) * 64
        full = np.pad(np.abs(of_x), ((0, 0), (0, width - of_x.shape[1]))).reshape(batch, -1, 64)
        step = np.repeat(full.max(axis=-1), 64, axis=1)[:, : of_x.shape[1]] / 254 * 1.001
        bound = (step + error) @ np.abs(turned).T + (turned.shape[1] + 8) * ULP * (np.abs(of_x) @ np.abs(turned).T)
        added, more = apart(weight, x)
        bound += more + 2 * ULP * np.abs(of_x @ turned.T + added)
        out = multiply(contexts(isa), weight, x, "int8")
        assert (np.abs(out - of_x @ turned.T - added) <= bound).all()
        if rows == 50:  # and no better than it should be: the bound is not vacuous
            assert np.abs(out - of_x @ turned.T - added).max() > 0.01 * bound.max()


@pytest.mark.parametrize("format", FORMATS)
def test_sets_agree_to_the_bit(contexts: Callable[[str], _native.Context], format: str) -> None:
    for compute in ("int8", "fp32"):
        weight, x = trellis_tensor(format, 40, 200), inputs(11, 200)
        expected = multiply(contexts("scalar"), weight, x, compute)
        for isa in (*SETS[1:], *_native.emulated_sets()):
            assert multiply(contexts(isa), weight, x, compute).tobytes() == expected.tobytes(), isa


@pytest.mark.parametrize("compute", ["int8", "fp32", "bf16"])
@pytest.mark.parametrize("format", ["trellis2", "trellis3-o64", "trellis3.5", "trellis6", "trellis8"])
@pytest.mark.parametrize("isa", SETS)
def test_a_row_does_not_depend_on_the_others(
    contexts: Callable[[str], _native.Context], isa: str, format: str, compute: str
) -> None:
    if compute == "bf16" and not contexts(isa).has_bf16:
        pytest.skip(f"{isa} has no bf16 products")
    rows, columns = 38, 4200  # more columns than are repeated, or kept in digits, at once
    weight, x = trellis_tensor(format, rows, columns), inputs(41, columns)
    whole = multiply(contexts(isa), weight, x, compute)
    for first, last in ((0, 1), (1, 3), (3, 10), (10, 18), (18, 41)):
        assert multiply(contexts(isa), weight, x[first:last], compute).tobytes() == whole[first:last].tobytes()


def test_threads_do_not_matter() -> None:
    weight, x = trellis_tensor("trellis3-o256", 300, 256), inputs(60, 256)
    expected = multiply(_native.Context(None, 1), weight, x, "int8")
    for batch in (1, 2, 60):
        assert multiply(_native.Context(None, 3), weight, x[:batch], "int8").tobytes() == expected[:batch].tobytes()


def test_what_cannot_be_multiplied_together_is_refused() -> None:
    context = _native.Context(None, 1)
    program = _native.Program(context, "int8")
    x, out, other = (program.buffer(256) for _ in range(3))
    pair = [prepare(trellis_tensor(format, 256, 256), context).matrix for format in ("trellis3", "trellis3-h128")]
    with pytest.raises(ValueError, match="rotated in different ways"):
        program.matmul(x, pair, [None, None], [out, other], None, 0.0, None, None)
    with pytest.raises(ValueError, match="not looked up"):
        program.embed(pair[0], out)
    codes, scales = np.zeros((1, 1, 64), dtype=np.uint8), np.zeros((17, 1), dtype=np.uint16)
    with pytest.raises(ValueError, match="rows / 16"):
        _native.Matrix.trellis(codes, 2, "sum2", 16, 16, scales, np.zeros(2, dtype=np.uint8), 16, context)
    with pytest.raises(ValueError, match="sum2: 2"):
        _native.Matrix.trellis(codes, 2, "sum2", 16, 16, scales, np.zeros(2, dtype=np.uint8), 16, context, half=True)
    with pytest.raises(ValueError, match="only trellises have half a bit"):
        _native.map_matrix(_native.MappedFile(__file__), 16, 16, 2, 0, "fp16", False, [0, 0, 0, 0], half=True)


@pytest.mark.parametrize("format", ["trellis2.5", "trellis4-o16", "trellis7-o16"])
def test_a_prepared_file_holds_half_widths_and_outliers(tmp_path: Path, format: str) -> None:
    context, x = _native.Context(None, 1), inputs(3, 200)
    weight = trellis_tensor(format, 40, 200)
    matrix = prepare(weight, context).matrix
    begins, data = [], b""
    for array in _native.matrix_arrays(matrix):
        begins.append(len(data))
        data += array.tobytes() + bytes(-len(array) % 64)
    (tmp_path / "prepared").write_bytes(data)
    mapped = _native.map_matrix(
        _native.MappedFile(str(tmp_path / "prepared")), **_native.describe_matrix(matrix), begins=begins
    )
    found = []
    for kept in (matrix, mapped):
        program = _native.Program(context, "int8")
        hidden = program.buffer(200)
        program.finish(hidden)
        program.head(kept, None, 0.0)
        out = np.full((3, 40), np.nan, dtype=np.float32)
        program.logits(x.numpy(), out)
        found.append(out)
    assert found[0].tobytes() == found[1].tobytes() == multiply(context, weight, x, "int8").tobytes()


def test_bytes_are_planned_as_they_are_kept() -> None:
    context = _native.Context(None, 1)
    for format in ("trellis3", "trellis3.5"):
        weight = trellis_tensor(format, 40, 200)
        kept = prepare(weight, context).matrix
        assert kept.nbytes == _native.matrix_bytes(40, 200, 3, 0, "fp16", False, half=format == "trellis3.5")


def test_rotated_columns_with_scales_for_few_of_them_are_refused() -> None:
    """Their inputs are rounded by 64 columns: scales for 48 would be taken from beyond what there is."""
    context = _native.Context("scalar", 1)
    codebook, signs = np.zeros(16, np.float32), np.zeros(24, np.uint8)

    def matrix(block: int) -> _native.Matrix:
        scales = np.zeros((3, -(-192 // block) if block else 1), np.float32)
        planes = [np.zeros((3, 96), np.uint8)]
        return _native.Matrix.quantized(planes, 4, 192, block, scales, None, "fp32", codebook, context, signs, 16)

    for block in (16, 32, 48, 96):
        with pytest.raises(ValueError, match="rotated columns have scales for multiples of 64"):
            matrix(block)
    for block in (0, 64, 192):
        assert matrix(block).rows == 3


def test_weights_that_a_matrix_cannot_keep_apart_are_refused(tmp_path: Path) -> None:
    context = _native.Context("scalar", 1)

    def matrix(format: str = "trellis3") -> _native.Matrix:
        return prepare(trellis_tensor(format, 40, 64), context).matrix

    def arrays(rows: list[int], columns: list[int], values: list[float]) -> tuple[np.ndarray, ...]:
        return np.array(rows, np.int32), np.array(columns, np.int32), np.array(values, np.float32)

    for rows, columns, value in (([40, 41], [0, 1], 1.0), ([3, 2], [0, 1], 1.0), ([0, 1], [0, 64], 1.0),
                                 ([-1, 1], [0, 1], 1.0), ([0, 1], [-1, 1], 1.0), ([0, 1], [0, 1], np.inf)):  # fmt: skip
        with pytest.raises(ValueError, match="no such weights"):
            matrix().keep_apart(*arrays(rows, columns, [1.0, value]))
    with pytest.raises(ValueError, match="a row and a column"):
        matrix().keep_apart(*arrays([1], [1, 2], [1.0]))
    with pytest.raises(ValueError, match="from codes, once"):
        matrix("trellis3-o8").keep_apart(*arrays([1], [2], [1.0]))
    with pytest.raises(ValueError, match="from codes, once"):
        prepare(torch.ones(40, 64), context).matrix.keep_apart(*arrays([1], [2], [1.0]))
    # And in a prepared file whose bytes have changed.
    kept = matrix("trellis3-o8")
    begins, data = [], b""
    for array in _native.matrix_arrays(kept):
        begins.append(len(data))
        data += array.tobytes() + bytes(-len(array) % 64)
    end = begins[3] + len(_native.matrix_arrays(kept)[3])
    for first, number in ((end - 3 * 4 * 7, 1000), (end - 2 * 4 * 7, -5)):  # a row, and a column
        path = tmp_path / f"prepared{number}"
        path.write_bytes(data[:first] + np.int32(number).tobytes() + data[first + 4 :])
        with pytest.raises(ValueError, match="no such weights"):
            _native.map_matrix(_native.MappedFile(str(path)), **_native.describe_matrix(kept), begins=begins)
