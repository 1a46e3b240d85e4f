"""Launches of the row kernels and of blockwise quantization, for tools/aot.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kbit.formats.codebooks import codebook
from kbit.formats.quant_format import QuantFormat
from kbit.kernels.triton.attention import rotary, softcap
from kbit.kernels.triton.codecs import dequantize, quantize
from kbit.kernels.triton.codecs.layout import TritonWeight
from kbit.kernels.triton.rows import activate, embed, norm
from triton_lint.cases import Case, Gate
from triton_lint.chips import TARGETS
from triton_lint.driver import Launch
from triton_lint.model import Work
from triton_lint.prepared import meta_quant, meta_weight

HALF = torch.float16


def meta(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def case(name: str, call: Callable[[], object], work: Callable[[Launch], Work | None], *, quick: bool = False) -> Case:
    """A case with the launcher's own configuration, whose machine code must not spill on any target."""
    return Case(
        name,
        lambda arch, config: call(),
        work=lambda launch, config: work(launch),
        gates={arch: Gate() for arch in TARGETS},
        quick=quick,
    )


def elements(size: int, read: float, written: float, steps: float = 0) -> Callable[[Launch], Work]:
    """Work of a kernel that reads and writes so many bytes an element; `steps` turns of a loop, if it has one."""
    return lambda launch: Work(bytes=size * (read + written), units=size, steps=steps)


def cases() -> list[Case]:
    return [*row_cases(), *blockwise_cases()]


def row_cases() -> list[Case]:
    rows, columns, wide, long = 512, 4096, 11008, 32768
    x, weight = meta(rows, columns), meta(columns)
    chunks = 4096  # features of a long row that a turn of the loop takes
    both = meta(rows, 2 * wide)
    angles = meta(rows, 64, dtype=torch.float32)
    found = [
        case(
            "rms_norm/512x4096",
            lambda: norm.rms_norm(x, weight, 1e-5),
            elements(x.numel(), 2, 2),
            quick=True,
        ),
        case(
            "rms_norm+residual/512x4096",
            lambda: norm.rms_norm(x, weight, 1e-5, x),
            elements(x.numel(), 4, 4),
        ),
        case(
            "rms_norm+residual/1x4096",
            lambda: norm.rms_norm(x[:1], weight, 1e-5, x[:1]),
            elements(columns, 4, 4),
        ),
        case(
            "rms_norm/512x32768",
            lambda: norm.rms_norm(meta(rows, long), meta(long), 1e-5),
            elements(rows * long, 2, 2, steps=2 * rows * long // chunks),
        ),
        case(
            "layer_norm/512x4096",
            lambda: norm.layer_norm(x, weight, weight, 1e-5),
            elements(x.numel(), 2, 2),
        ),
        case("softcap/4x128256", lambda: softcap.softcap(meta(4, 128256), 30.0), elements(4 * 128256, 2, 2)),
        case(
            "rotary/512x32x128",
            lambda: rotary.rotary(meta(rows, 32, 128), angles, angles),
            elements(rows * 32 * 128, 2 + 4 / 32, 2),
        ),
    ]
    found += [
        case(
            f"activate/{kind}/512x11008",
            lambda kind=kind: activate.activate(both[:, :wide], both[:, wide:], kind),  # type: ignore[misc]
            elements(rows * wide, 4, 2),
            quick=kind == "gelu",
        )
        for kind in activate.KINDS
    ]
    return found


def blockwise_cases() -> list[Case]:
    rows = columns = 4096
    size = rows * columns
    found = []
    formats = ["int2-b32", "nf3-b64", "nf4-b64-dq", "lloyd5-b128", "float6-b64", "int7-b64-asym", "int8-row"]
    for text in formats:
        quant_format = QuantFormat.parse(text)
        packed = quant_format.nbytes(rows, columns) / size
        portable = meta_quant(quant_format, (rows, columns))
        weight = meta_weight(text, (rows, columns), HALF)
        found += [
            case(
                f"dequantize/{text}/4096x4096",
                lambda portable=portable: dequantize.dequantize(portable, HALF),  # type: ignore[misc]
                elements(size, packed, 2),
                quick=text == "nf3-b64",
            ),
            case(
                f"embed/{text}/64x4096",
                lambda weight=weight: embed_rows(weight),  # type: ignore[misc]
                elements(64 * columns, packed, 2),
                quick=text == "nf3-b64",
            ),
            case(
                f"quantize/{text}/4096x4096",
                lambda quant_format=quant_format: quantize_once(quant_format, rows, columns),  # type: ignore[misc]
                lambda launch, quant_format=quant_format, packed=packed: quantize_work(  # type: ignore[misc]
                    launch, quant_format, size, packed
                ),
                quick=text == "int7-b64-asym",
            ),
        ]
    return found


def embed_rows(weight: TritonWeight) -> torch.Tensor:
    return embed.embed(weight, meta(64, dtype=torch.int64))


def quantize_once(quant_format: QuantFormat, rows: int, columns: int) -> Any:
    """Both kernels of quantize.quantize, without the checks of values between them."""
    x = meta(rows, columns)
    size, bits = quant_format.block_size, quant_format.bits
    scales, offsets = quantize.block_statistics(x, size, quant_format.asymmetric)
    borders, codes = quantize.tables(torch.from_numpy(codebook(quant_format, columns).copy()), bits)
    return quantize.encode(x, scales, offsets, borders, codes, bits, size, quantize.cell_table(borders, codes))


def quantize_work(launch: Launch, quant_format: QuantFormat, size: int, packed: float) -> Work:
    if launch.kernel == "encode_kernel":
        return Work(bytes=size * (2 + packed), units=size)
    span, block = launch.arguments["SPAN"], quant_format.block_size or 4096
    return Work(bytes=size * 2, units=size, steps=launch.programs * -(-block // span))
