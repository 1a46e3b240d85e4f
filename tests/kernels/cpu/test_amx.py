"""Matmuls on AMX tiles: int8 equals the plain C++ kernels bit for bit, bf16 is within its rounding.

Verified this way: the kernels on emulated tiles, on any machine; their machine code, by tools/amx/check.sh, with the
AMX instructions executed in software where the processor faults on them; and "amx" itself on a machine that has it.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from machine_code_cases import machine_code, run_check
from matmul_cases import exact, inputs, multiply, weights

from kbit import _native
from kbit.backends.cpu.weight import prepare
from kbit.formats.quant_tensor import QuantTensor

TILES = [*_native.emulated_sets(), *(name for name in _native.instruction_sets() if name == "amx")]
FORMATS = (
    *(f"{dtype}{bits}-b64" for bits in range(2, 9) for dtype in ("int", "nf")),
    *(f"lloyd{bits}-b64" for bits in (6, 7, 8)),  # two digits
    *(f"int{bits}-b64-asym" for bits in (2, 3, 5, 8)),
    "dynamic8-b64",
    "nf4-b128",
    "nf4-row",
    "int8-row-fp32",
    "int5-b192-asym-fp32",
    "lloyd6-b64-bf16",
    "nf3-b32",  # segments of half and a quarter of a tile
    "int4-b48-asym",
)
# (N, K, rows of x): tiles and panels that are not full; one row to several blocks of 32; 8 rows, where tiles take over
# from the direct kernels; 1 to 4 segments in the last unit, and a second stretch after 512 columns.
SHAPES = (
    (16, 64, 1),
    (16, 64, 16),
    (33, 100, 8),
    (33, 128, 9),
    (50, 321, 15),
    (16, 200, 17),
    (64, 512, 32),
    (40, 577, 33),
    (70, 1600, 47),
    (20, 256, 70),
)


@functools.cache
def context(isa: str, threads: int = 1) -> _native.Context:
    return _native.Context(isa, threads)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", TILES)
def test_int8_equals_plain_kernels_to_the_bit(isa: str, format: str) -> None:
    for rows, columns, batch in SHAPES:
        weight, x = weights(format, rows, columns), inputs(batch, columns)
        expected = multiply(context("scalar"), weight, x, "int8")
        assert multiply(context(isa), weight, x, "int8").tobytes() == expected.tobytes(), (rows, columns, batch)


def test_formats_cover_what_the_kernels_tell_apart() -> None:
    two_digits = {prepare(weights(f, 16, 64), context("scalar")).matrix.two_digits for f in FORMATS}
    assert two_digits == {False, True}


@pytest.mark.parametrize(
    "format", ["nf4-b64", "int8-b64-asym", "lloyd6-b32", torch.float16, torch.bfloat16, torch.float32]
)
@pytest.mark.parametrize("isa", TILES)
def test_bf16_is_within_its_rounding(isa: str, format: str | torch.dtype) -> None:
    for rows, columns, batch in ((16, 64, 1), (33, 100, 9), (40, 300, 16), (50, 1601, 47)):
        x = inputs(batch, columns)
        weight = weights(format, rows, columns) if isinstance(format, str) else inputs(rows, columns).to(format)
        expected, size = exact(weight, x)
        # Each factor is rounded to 8 bits: by at most 2^-8 of itself. In fp32, a product goes through at most 16
        # roundings in its chain of every other column of 32, one where two chains meet, K / 32 in the sum of those.
        bound = (2 * 2.0**-8 + 2.0**-16 + (17 + columns / 32 + 1) * 2.0**-24) * size * 1.01
        error = np.abs(multiply(context(isa), weight, x, "bf16") - expected)
        assert (error <= bound).all()
        if columns == 100:
            assert (error > columns * 2.0**-24 * size).any()  # more than fp32 would err: so it was not used


@pytest.mark.parametrize("isa", TILES)
def test_bf16_of_small_integers_is_exact(isa: str) -> None:
    """Integers of up to 8 bits are bfloat16, and sums below 2^24 are floats, so no step rounds."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns, batch in ((16, 64, 1), (33, 100, 17), (48, 1601, 33), (70, 2100, 70)):
        weight = torch.randint(-9, 10, (rows, columns), generator=generator).float()
        x = torch.randint(-255, 256, (batch, columns), generator=generator).float()
        expected = (x.double() @ weight.double().T).numpy()
        np.testing.assert_array_equal(multiply(context(isa), weight, x, "bf16"), expected)


@pytest.mark.parametrize("format", ["nf4-b64", "lloyd7-b64", None])
@pytest.mark.parametrize("compute", ["int8", "bf16"])
@pytest.mark.parametrize("isa", TILES)
def test_a_row_depends_neither_on_the_others_nor_on_threads(isa: str, compute: str, format: str | None) -> None:
    weight: QuantTensor | torch.Tensor = weights(format, 70, 1100) if format else inputs(70, 1100).half()
    x = inputs(70, 1100)
    whole = multiply(context(isa), weight, x, compute)
    for first, last in ((0, 1), (1, 3), (3, 13), (13, 38), (38, 70)):
        assert multiply(context(isa), weight, x[first:last], compute).tobytes() == whole[first:last].tobytes()
    assert multiply(context(isa, 3), weight, x, compute).tobytes() == whole.tobytes()


def test_emulated_sets_are_used_only_when_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _native.emulated_sets() == ["amx-emulated"]
    assert not set(_native.emulated_sets()) & set(_native.instruction_sets())
    assert context("amx-emulated").isa == "amx-emulated"
    assert context("amx-emulated").has_bf16
    monkeypatch.setenv("KBIT_CPU_ISA", "amx-emulated")
    with pytest.raises(ValueError, match="KBIT_CPU_ISA=amx-emulated .* choose one of: scalar"):
        _native.Context()


@pytest.mark.skipif("avx512bf16" not in _native.instruction_sets(), reason="the amx set has AVX-512 BF16 code in it")
@machine_code("g++")
def test_machine_code_equals_plain_kernels(tmp_path: Path) -> None:
    check = run_check("amx", tmp_path)
    if "amx" not in _native.instruction_sets():
        assert int(re.findall(r"(\d+) AMX instructions executed", check.stderr)[0]) > 10000
