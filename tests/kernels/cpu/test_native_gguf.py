"""GGUF's block types in the CPU engine: K types' scales are kept as steps of a size, with the same bits as numbers."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from kbit import _native
from kbit.backends.cpu.weight import prepare_stored
from kbit.checkpoint.gguf.blocks import BLOCK_TYPES
from kbit.checkpoint.gguf.types import GGML_TYPES
from kbit.formats.quant_format import plane_widths
from kbit.formats.stored import StoredMatrix
from kbit.formats.stored_planes import pack_codes
from kbit.graph.pages import pages_for
from kbit.planner.memory import prepared_bytes
from kbit.planner.weights import Weight

TYPES = {t.name: t for t in GGML_TYPES.values() if t.name in BLOCK_TYPES}
STEPPED = sorted(name for name, block_type in BLOCK_TYPES.items() if block_type.format.scale_dtype == "fp32")
STEPPED.remove("NVFP4")  # whose scales are no multiples of one
ROWS, COLUMNS = 37, 768
# Byte offsets of the fp16 numbers in a block, whose random bits are replaced by finite ones.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "MXFP4": (), "NVFP4": (), "IQ1_S": (0,), "IQ1_M": (), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,),
    "IQ3_XXS": (0,), "IQ3_S": (0,), "TQ1_0": (52,), "TQ2_0": (64,), "Q1_0": (0,), "Q2_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def raw_blocks(name: str) -> npt.NDArray[np.uint8]:
    """Random rows of a type, (ROWS, bytes of a row); sizes of either sign, and blocks of zeros among them."""
    kind = TYPES[name]
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (ROWS * COLUMNS // kind.block, kind.block_bytes), dtype=np.uint8)
    for at in HALVES[name]:
        halves = rng.normal(size=(len(raw), 1)).astype(np.float16)
        halves[:: 7 + at] = 0.0
        raw[:, at : at + 2] = halves.view(np.uint8)
    if name == "MXFP4":  # its scale is a power of two, of which most are out of all proportion
        raw[:, 0] = rng.integers(120, 134, len(raw))
    if name == "IQ1_M":  # its scale is in the upper quarters of the last four words
        halves = rng.normal(size=len(raw)).astype(np.float16).view(np.uint16)
        for place in range(4):
            raw[:, 49 + 2 * place] = (raw[:, 49 + 2 * place] & 15) | (((halves >> (4 * place)) & 15) << 4)
    if name == "NVFP4":
        raw[:, :4] = rng.integers(40, 70, (len(raw), 4))
    return raw.reshape(ROWS, -1)


def stored(name: str, raw: npt.NDArray[np.uint8], as_numbers: bool = False) -> StoredMatrix:
    """The matrix; `as_numbers` adds a row whose scales are no multiples of anything, so that none are kept as steps."""
    block_type = BLOCK_TYPES[name]
    blocks = block_type.decode(raw.tobytes(), len(raw), TYPES[name].block_bytes)
    parts = (
        {"scales": blocks.scales} if blocks.offsets is None else {"scales": blocks.scales, "offsets": blocks.offsets}
    )
    codes = blocks.codes
    if as_numbers:
        codes = np.concatenate([codes, codes[:1]])
        odd = np.random.default_rng(2).normal(size=(1, blocks.scales.shape[1]))
        parts = {part: np.concatenate([values, odd.astype(values.dtype)]) for part, values in parts.items()}
    bits = block_type.format.bits
    parts |= {f"plane{width}": plane for width, plane in zip(plane_widths(bits), pack_codes(codes, bits), strict=True)}
    parts = {part: values.view(np.uint16) if values.dtype == np.float16 else values for part, values in parts.items()}
    return StoredMatrix(block_type.format, codes.shape, parts, block_type.codebook)


def multiply(matrix: _native.Matrix, context: _native.Context, x: npt.NDArray[np.float32], compute: str) -> np.ndarray:
    program = _native.Program(context, compute)
    program.finish(program.buffer(matrix.columns))
    program.head(matrix, None, 0.0)
    out = np.full((len(x), matrix.rows), np.nan, dtype=np.float32)
    program.logits(x, out)
    return out


def looked_up(matrix: _native.Matrix, context: _native.Context) -> np.ndarray:
    """All rows by way of an embedding."""
    program = _native.Program(context, "fp32")
    hidden = program.buffer(matrix.columns)
    program.embed(matrix, hidden)
    program.finish(hidden)
    rows = matrix.rows
    count = pages_for(rows)
    pages, tables = _native.KVPages(1, 1, 16, "fp16", count), np.arange(count, dtype=np.int32)[None]
    table, zeros = np.ones((1, 8), dtype=np.float32), np.zeros(rows, dtype=np.int32)
    out = np.full((rows, matrix.columns), np.nan, dtype=np.float32)
    positions = np.arange(rows, dtype=np.int32)
    program.run(np.arange(rows), zeros, positions, table, table, zeros, pages, tables, None, out)
    return out


@pytest.fixture(scope="module", params=_native.instruction_sets())
def context(request: pytest.FixtureRequest) -> _native.Context:
    return _native.Context(request.param, 2)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_every_type_runs_packed(context: _native.Context, name: str) -> None:
    raw = raw_blocks(name)
    if name in ("Q1_0", "Q2_0"):  # gguf decodes none
        block_type = BLOCK_TYPES[name]
        values = block_type.values(block_type.decode(raw.tobytes(), ROWS, TYPES[name].block_bytes))
    else:
        values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    matrix = prepare_stored(stored(name, raw), context).matrix
    np.testing.assert_array_equal(looked_up(matrix, context), values)
    x = np.random.default_rng(3).normal(size=(70, COLUMNS)).astype(np.float32)
    expected, size = x.astype(np.float64) @ values.astype(np.float64).T, np.abs(x) @ np.abs(values).T
    for rows in (1, 3, 70):
        exact = multiply(matrix, context, x[:rows], "fp32")
        assert (np.abs(exact - expected[:rows]) <= COLUMNS * 2.0**-24 * size[:rows]).all()
        rounded = multiply(matrix, context, x[:rows], "int8")
        assert np.linalg.norm(rounded - expected[:rows]) < 0.01 * np.linalg.norm(expected[:rows])


@pytest.mark.parametrize("name", STEPPED)
def test_steps_have_the_bits_of_numbers(context: _native.Context, name: str) -> None:
    raw = raw_blocks(name)
    steps = prepare_stored(stored(name, raw), context).matrix
    numbers = prepare_stored(stored(name, raw, as_numbers=True), context).matrix
    assert _native.describe_matrix(steps)["kind"] == "fp32-steps"
    assert _native.describe_matrix(numbers)["kind"] == "fp32"
    stored_bits = max(TYPES[name].block_bytes * 8 / 256, BLOCK_TYPES[name].format.bits)  # IQ1 to IQ3 are wider here
    assert steps.nbytes * 8 / (48 * COLUMNS) < stored_bits + 1  # Q2_K's steps have 4 bits there
    assert steps.nbytes == prepared_bytes(Weight("w", "linear", ROWS, COLUMNS, BLOCK_TYPES[name].format, steps=True))
    assert looked_up(steps, context).tobytes() == looked_up(numbers, context)[:ROWS].tobytes()
    x = np.random.default_rng(4).normal(size=(70, COLUMNS)).astype(np.float32)
    for compute in ("int8", "fp32"):
        for rows in (1, 2, 4, 9, 70):
            found, expected = (multiply(matrix, context, x[:rows], compute) for matrix in (steps, numbers))
            assert found.tobytes() == expected[:, :ROWS].tobytes(), (compute, rows)


def test_sets_agree_to_the_bit() -> None:
    x = np.random.default_rng(5).normal(size=(40, COLUMNS)).astype(np.float32)
    for name in BLOCK_TYPES:
        raw, results = raw_blocks(name), set()
        for isa in _native.instruction_sets():
            context = _native.Context(isa, 1)
            matrix = prepare_stored(stored(name, raw), context).matrix
            results |= {multiply(matrix, context, x[:rows], "int8")[0].tobytes() for rows in (1, 8, 40)}
        assert len(results) == 1, name


def test_a_prepared_file_holds_steps(context: _native.Context, tmp_path: object) -> None:
    matrix = prepare_stored(stored("Q4_K", raw_blocks("Q4_K")), context).matrix
    begins, data = [], b""
    for array in _native.matrix_arrays(matrix):
        begins.append(len(data))
        data += array.tobytes() + bytes(-len(array) % 64)
    path = f"{tmp_path}/prepared"
    with open(path, "wb") as file:
        file.write(data)
    described = _native.describe_matrix(matrix)
    mapped = _native.map_matrix(_native.MappedFile(path), **described, begins=begins)
    assert looked_up(mapped, context).tobytes() == looked_up(matrix, context).tobytes()
    with pytest.raises(ValueError, match="steps in blocks of 16 or 32"):
        _native.map_matrix(_native.MappedFile(path), **(described | {"block_size": 64}), begins=begins)


@pytest.mark.parametrize("block", [0, 64, 512, 1 << 30])
def test_steps_of_other_blocks_are_refused(block: int) -> None:
    """256 columns share a size: larger blocks had none, and a size of zero was divided by."""
    with pytest.raises(ValueError, match="scales are steps in blocks of 16 or 32 only"):
        _native.matrix_bytes(4, 1024, 4, block, "fp32-steps", False)
    assert _native.matrix_bytes(4, 1024, 4, 32, "fp32-steps", False) > 0
