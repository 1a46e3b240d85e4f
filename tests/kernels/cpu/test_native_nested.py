"""Nested matrices on every instruction set: the very bits that the same codes give with their planes together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from matmul_cases import exact, inputs, multiply

from kbit import _native
from kbit.backends.cpu.weight import nested_matrix, prepare
from kbit.formats.nested import NestedFormat
from kbit.formats.nested_codec import codes_at, narrowed, scales_at
from kbit.formats.planes import pack
from kbit.formats.quant_format import QuantFormat, plane_widths
from kbit.formats.quant_tensor import QuantTensor
from kbit.formats.stored import StoredMatrix
from kbit.formats.stored_nested import StoredNested

SETS = [*_native.instruction_sets(), *_native.emulated_sets()]
WIDTHS = range(2, 9)
BLOCKS = ("b64", "b16", "b48-bf16", "row-fp32")


@pytest.fixture(scope="module")
def contexts() -> Callable[[str], _native.Context]:
    made: dict[str, _native.Context] = {}
    return lambda isa: made.setdefault(isa, _native.Context(isa, 1))


def nested(rows: int, columns: int, blocks: str = "b64") -> QuantTensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    format = NestedFormat.parse(f"nested2..8-{blocks}")
    return format.encode(lambda start, stop: x[start:stop], (rows, columns))


def together(matrix: QuantTensor, width: int) -> QuantTensor:
    """The same codes, levels and scales in a format of planes."""
    format = matrix.format
    assert isinstance(format, NestedFormat)
    flags = f"b{format.block_size}" if format.block_size else "row"
    plain = QuantFormat.parse(f"levels{width}-{flags}-{format.scale_dtype}")
    codes = codes_at(format, matrix.stored, matrix.shape[1], width)
    stored = dict(zip((f"plane{w}" for w in plane_widths(width)), pack(codes, width), strict=True))
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[format.scale_dtype]
    levels = matrix.codebook[format.levels_at(width)].clone()
    stored |= {"scales": scales_at(format, matrix.stored, width).to(kind), "codebook": levels}
    return QuantTensor(plain, matrix.shape, stored, levels)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("isa", SETS)
def test_planes_apart_give_the_bits_of_planes_together(
    contexts: Callable[[str], _native.Context], isa: str, width: int, blocks: str
) -> None:
    context = contexts(isa)
    computes = ("int8", "fp32", "bf16") if context.has_bf16 else ("int8", "fp32")
    for rows, columns, batches in ((33, 128, (1, 3)), (50, 321, (2, 7, 70))):
        whole = nested(rows, columns, blocks)
        plain = together(whole, width)
        for batch in batches:
            x = inputs(batch, columns)
            for compute in computes:
                found = multiply(context, narrowed(whole, width), x, compute)
                assert found.tobytes() == multiply(context, plain, x, compute).tobytes(), (compute, batch)


@pytest.mark.parametrize("width", WIDTHS)
def test_fp32_is_what_the_codes_mean(contexts: Callable[[str], _native.Context], width: int) -> None:
    matrix = narrowed(nested(50, 321), width)
    x = inputs(7, 321)
    expected, size = exact(matrix, x)
    for isa in SETS:
        # A chain of K fused multiply-adds errs by at most K/2 ulp of the sum of magnitudes.
        error = np.abs(multiply(contexts(isa), matrix, x, "fp32") - expected)
        assert (error <= 321 * 2.0**-24 * size + 1e-30).all()


def test_eight_bits_are_one_digit(contexts: Callable[[str], _native.Context]) -> None:
    """Levels of 8 bits are whole steps, so a second int8 product is not needed; those of 6 and 7 bits are not."""
    whole = nested(16, 64)
    digits = {width: prepare(narrowed(whole, width), contexts("scalar")).matrix.two_digits for width in WIDTHS}
    assert digits == {2: False, 3: False, 4: False, 5: False, 6: True, 7: True, 8: False}


def test_a_width_takes_the_bytes_of_a_plain_matrix(contexts: Callable[[str], _native.Context]) -> None:
    whole, context = nested(48, 256), contexts("scalar")
    stored = StoredNested.of(
        StoredMatrix(
            whole.format,
            whole.shape,
            {
                k: v.view(torch.uint16).numpy() if v.dtype == torch.float16 else v.numpy()
                for k, v in whole.stored.items()
            },
            whole.codebook.numpy(),
        )
    )
    for width in WIDTHS:
        plain = prepare(together(whole, width), context).matrix
        assert nested_matrix(stored, width, context).nbytes == plain.nbytes


def test_bad_planes_are_refused(contexts: Callable[[str], _native.Context]) -> None:
    context = contexts("scalar")
    two, one = np.zeros((4, 4), np.uint8), np.zeros((4, 2), np.uint8)
    scales, codebook = np.zeros((4, 1), np.uint16), np.zeros(16, np.float32)
    arguments = {
        "bits": 4, "columns": 16, "block_size": 16, "scales": scales, "offsets": None, "scale_kind": "fp16",
        "codebook": codebook, "context": context, "apart": True,
    }  # fmt: skip
    _native.Matrix.quantized([two, one, one], **arguments)
    for planes in ([two, one], [two, one, one, one], [one, one, one], [two, two, one]):
        with pytest.raises(ValueError, match="plane"):
            _native.Matrix.quantized(planes, **arguments)
    with pytest.raises(ValueError, match="from 3 bits on"):
        _native.Matrix.quantized([two], **(arguments | {"bits": 2, "codebook": codebook[:4]}))
