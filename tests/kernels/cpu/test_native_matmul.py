"""The packed matmul of every instruction set against plain dequantize-and-multiply.

A program that is nothing but a head runs one matmul: logits(x) = x W^T.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from matmul_cases import exact, inputs, int8_bound, multiply, weights

from kbit import _native
from kbit.formats.quant_tensor import QuantTensor

SETS = _native.instruction_sets()
FORMATS = (
    *(f"{dtype}{bits}-b64" for bits in range(2, 9) for dtype in ("int", "nf", "lloyd", "float")),
    *(f"int{bits}-b64-asym" for bits in range(2, 9)),
    "quantile4-b64",
    "dynamic8-b64",
    "nf4-b16",
    "nf4-b32",
    "nf4-b48",
    "nf3-b128",
    "nf4-row",
    "int8-row-fp32",
    "nf4-b64-dq",
    "int4-b64-asym-dq",
    "lloyd6-b32-bf16",
    "int5-b96-asym-fp32",
    "nf3-b64-o64",
    "int4-b32-asym-o8",
)


@pytest.fixture(scope="module")
def contexts() -> Callable[[str], _native.Context]:
    made: dict[str, _native.Context] = {}
    return lambda isa: made.setdefault(isa, _native.Context(isa, 1))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", SETS)
def test_fp32_equals_dequantized(contexts: Callable[[str], _native.Context], isa: str, format: str) -> None:
    for rows, columns, batch in ((33, 128, 1), (16, 200, 3), (50, 321, 13)):
        weight, x = weights(format, rows, columns), inputs(batch, columns)
        expected, size = exact(weight, x)
        # A chain of K fused multiply-adds errs by at most K/2 ulp of the sum of magnitudes.
        bound = columns * 2.0**-24 * size + 1e-30
        assert (np.abs(multiply(contexts(isa), weight, x, "fp32") - expected) <= bound).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", SETS)
def test_int8_is_within_its_rounding(contexts: Callable[[str], _native.Context], isa: str, format: str) -> None:
    for rows, columns, batch in ((33, 128, 1), (16, 200, 3), (50, 321, 13)):
        weight, x = weights(format, rows, columns), inputs(batch, columns)
        expected, size = exact(weight, x)
        out = multiply(contexts(isa), weight, x, "int8")
        assert (np.abs(out - expected) <= int8_bound(weight, x) + columns * 2.0**-22 * size).all()
        if format == "nf4-b64":  # and no better than it should be: the bound is not vacuous
            assert np.abs(out - expected).max() > 0.01 * int8_bound(weight, x).max()


@pytest.mark.parametrize("format", FORMATS)
def test_sets_agree_to_the_bit(contexts: Callable[[str], _native.Context], format: str) -> None:
    for compute in ("int8", "fp32"):
        weight, x = weights(format, 40, 200), inputs(11, 200)
        expected = multiply(contexts("scalar"), weight, x, compute)
        for isa in SETS[1:]:
            assert multiply(contexts(isa), weight, x, compute).tobytes() == expected.tobytes(), isa


@pytest.mark.parametrize("compute", ["int8", "fp32", "bf16"])
@pytest.mark.parametrize("format", ["nf3-b64-o512", "int8-b64", "lloyd7-b64", "int4-b32-asym", None])
@pytest.mark.parametrize("isa", SETS)
def test_a_row_does_not_depend_on_the_others(
    contexts: Callable[[str], _native.Context], isa: str, format: str | None, compute: str
) -> None:
    if compute == "bf16" and not contexts(isa).has_bf16:
        pytest.skip(f"{isa} has no bf16 products")
    rows, columns = 70, 1600  # more columns than the buffered matmul takes at once
    weight = weights(format, rows, columns) if format else inputs(rows, columns).half()
    x = inputs(41, columns)
    whole = multiply(contexts(isa), weight, x, compute)
    for first, last in ((0, 1), (1, 3), (3, 10), (10, 18), (18, 41)):
        assert multiply(contexts(isa), weight, x[first:last], compute).tobytes() == whole[first:last].tobytes()


@pytest.mark.parametrize("compute", ["int8", "fp32"])
def test_threads_do_not_matter(compute: str) -> None:
    weight, x = weights("nf4-b64-o512", 500, 256), inputs(300, 256)
    expected = multiply(_native.Context(None, 1), weight, x, compute)
    for threads in (2, 3, 5):
        context = _native.Context(None, threads)
        for batch in (1, 2, 300):
            assert multiply(context, weight, x[:batch], compute).tobytes() == expected[:batch].tobytes()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("isa", SETS)
def test_dense(contexts: Callable[[str], _native.Context], isa: str, kind: torch.dtype) -> None:
    for compute in ("int8", "fp32"):  # weights that are not quantized are multiplied in fp32 in both
        for rows, columns, batch in ((17, 64, 1), (40, 100, 9), (5, 7, 2)):
            weight, x = inputs(rows, columns).to(kind), inputs(batch, columns)
            expected, size = exact(weight, x)
            error = np.abs(multiply(contexts(isa), weight, x, compute) - expected)
            assert (error <= columns * 2.0**-24 * size).all()


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("format", ["nf4-b64", "int8-b64", "lloyd5-b32"])
def test_bf16(contexts: Callable[[str], _native.Context], isa: str, format: str) -> None:
    context = contexts(isa)
    if not context.has_bf16:
        with pytest.raises(ValueError, match="bfloat16"):
            _native.Program(context, "bf16")
        return
    weight, x = weights(format, 40, 300), inputs(9, 300)
    expected, size = exact(weight, x)
    # Both factors are rounded to 8 significant bits (by at most 2^-8), the sums in fp32.
    assert (
        np.abs(multiply(context, weight, x, "bf16") - expected) <= (2 * 2.0**-8 + 2.0**-16 + 300 * 2.0**-23) * size
    ).all()


@pytest.mark.parametrize("isa", SETS)
def test_extremes(contexts: Callable[[str], _native.Context], isa: str) -> None:
    """Zeros give zeros; huge and tiny rows keep their own scale; an identity reads the weights back."""
    weight = weights("int8-b64", 64, 64)
    x = torch.zeros(3, 64)
    assert (multiply(contexts(isa), weight, x, "int8") == 0).all()
    x[0], x[1] = 1e30, 1e-30
    out = multiply(contexts(isa), weight, x, "int8")
    sums = weight.dequantize().double().sum(1).numpy()
    size = weight.dequantize().double().abs().sum(1).numpy()
    assert (np.abs(out[0] / 1e30 - sums) <= 1e-5 * size).all()
    assert (np.abs(out[1] / 1e-30 - sums) <= 1e-5 * size).all()
    identity = multiply(contexts(isa), weight, torch.eye(64), "int8").T
    values = weight.dequantize().numpy()
    assert (np.abs(identity - values) <= 4 * 2.0**-24 * np.abs(values).max()).all()


def test_a_code_that_is_never_produced_still_means_its_codebook_entry(
    contexts: Callable[[str], _native.Context],
) -> None:
    """Symmetric integers: code 0 is one step below -1; a file may hold it."""
    weight = weights("int8-b64", 16, 64)
    stored = dict(weight.stored)
    stored["plane8"] = torch.zeros_like(stored["plane8"])
    hostile = QuantTensor(weight.format, weight.shape, stored, weight.codebook)
    x = torch.full((1, 64), 127.0)
    expected, size = exact(hostile, x)
    for isa in SETS:
        assert (np.abs(multiply(contexts(isa), hostile, x, "int8") - expected) <= 1e-6 * size).all()


def test_bad_arguments_are_refused() -> None:
    context = _native.Context("scalar", 1)
    planes, scales = [np.zeros((4, 8), np.uint8)], np.zeros((4, 1), np.uint16)
    codebook = np.zeros(16, np.float32)
    _native.Matrix.quantized(planes, 4, 16, 16, scales, None, "fp16", codebook, context)
    for change in (
        {"bits": 9},
        {"bits": 5},
        {"columns": 17},
        {"block_size": 24},
        {"scales": np.zeros((4, 2), np.uint16)},
        {"scales": np.zeros((4, 1), np.float32)},
        {"scale_kind": "fp8"},
        {"codebook": np.zeros(15, np.float32)},
    ):
        arguments = {
            "planes": planes,
            "bits": 4,
            "columns": 16,
            "block_size": 16,
            "scales": scales,
            "offsets": None,
            "scale_kind": "fp16",
            "codebook": codebook,
            "context": context,
        }
        with pytest.raises(ValueError, match=r"bits|plane|block|shape|fp16|number type|codebook"):
            _native.Matrix.quantized(**{**arguments, **change})
    with pytest.raises(ValueError, match="KBIT_CPU_ISA|instruction set"):
        _native.Context("mmx", 1)
    with pytest.raises(ValueError, match="int8, bf16 or fp32"):
        _native.Program(context, "fp64")
