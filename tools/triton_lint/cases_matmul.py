"""Products with k-bit weights: launches of the GEMV, the GEMM and those with activations in 8 bits, and what their
machine code must satisfy."""

from __future__ import annotations

from typing import Any

import torch

from kbit.formats.trellis import TrellisFormat
from kbit.formats.trellis_code import TileFactors
from kbit.kernels.triton.codecs.layout import ROW_TILE, TritonWeight
from kbit.kernels.triton.codecs.trellis_search import search_symbols
from kbit.kernels.triton.product.configs import (
    gemm_candidates,
    gemm_config,
    gemv_candidates,
    gemv_config,
    rounded_config,
)
from kbit.kernels.triton.product.gemm import gemm
from kbit.kernels.triton.product.gemm_rounded import gemm_rounded
from kbit.kernels.triton.product.gemv import gemv, problem_of
from kbit.kernels.triton.product.outliers import add_outliers
from kbit.kernels.triton.product.rounded import FP8_ARCHES, segment_of
from kbit.kernels.triton.product.trellis import trellis_product
from triton_lint.cases import Case, Gate
from triton_lint.chips import TARGETS
from triton_lint.driver import Launch
from triton_lint.model import Work
from triton_lint.prepared import meta_weight

# Gates on thread instructions per weight. At 4 bits an H100 that reads codes at full speed has 4.4 instructions for
# each; a width's budget is in proportion.
BUDGET = 4.4 / 4


def _bytes(weight: TritonWeight, tokens: int) -> float:
    return weight.nbytes + 2 * tokens * sum(weight.shape)


def gemv_case(
    text: str,
    *,
    tokens: int = 1,
    size: int = 4096,
    gate: Gate | None = None,
    quick: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Case:
    weight = meta_weight(text, (size, size), dtype)
    x = torch.empty(tokens, size, dtype=dtype, device="meta")

    def work(launch: Launch, config: Any) -> Work | None:
        if launch.kernel != "gemv_kernel":
            return None
        chosen = config or gemv_config(launch.arch, problem_of(x, weight))
        turns = -(-(weight.padded[1] // chosen.columns) // (chosen.warps * chosen.split))
        steps = turns * chosen.split * weight.padded[0] // ROW_TILE
        return Work(bytes=_bytes(weight, tokens), units=size * size, steps=steps)

    name = "" if dtype == torch.float16 else "/bf16"
    return Case(
        f"gemv/{text}/{tokens}x{size}x{size}{name}",
        launch=lambda arch, config: gemv(x, weight, config=config),
        configs=lambda arch: (None, *gemv_candidates(arch, problem_of(x, weight))),
        work=work,
        gates={} if gate is None else {"sm_90": gate},
        gated="gemv_kernel",
        quick=quick,
    )


def gemm_case(text: str, tokens: int, *, size: int = 4096, gate: Gate | None = None, quick: bool = False) -> Case:
    weight = meta_weight(text, (size, size), torch.float16)
    x = torch.empty(tokens, size, dtype=torch.float16, device="meta")

    def work(launch: Launch, config: Any) -> Work | None:
        if launch.kernel != "gemm_kernel":
            return None
        chosen = config or gemm_config(launch.arch, problem_of(x, weight))
        tiles = -(-weight.padded[0] // (ROW_TILE * chosen.tiles)) * -(-tokens // chosen.tokens)
        steps = tiles * (weight.padded[1] // chosen.columns)
        return Work(bytes=_bytes(weight, tokens), units=size * size, flops=2 * tokens * size * size, steps=steps)

    return Case(
        f"gemm/{text}/{tokens}x{size}x{size}",
        launch=lambda arch, config: gemm(x, weight, config=config),
        configs=lambda arch: (None, *gemm_candidates(arch, problem_of(x, weight))),
        work=work,
        # AMD's have 64 KB of shared memory, which no check here but this one would miss.
        gates={"gfx90a": Gate(), "gfx942": Gate()} | ({} if gate is None else {"sm_90": gate}),
        gated="gemm_kernel",
        quick=quick,
    )


# Tensor-core instructions of each target that take int8 and e4m3 operands.
INT8_MMA = dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_100", "sm_120"), "IMMA.16832.S8.S8")
INT8_MMA |= {"sm_90": "IGMMA", "gfx90a": "v_mfma_i32", "gfx942": "v_mfma_i32"}
INT8_MMA |= {"gfx1100": "v_wmma_i32", "gfx1201": "v_wmma_i32"}
FP8_MMA = {"sm_89": "QMMA", "sm_90": "QGMMA", "sm_100": "UTCQMMA", "sm_120": "QMMA"}


def _rounded(kind: str, text: str, tokens: int, *, size: int = 4096, quick: bool = False) -> Case:
    """Gated on every target: no spills, 128-bit loads of codes, tensor cores on 8-bit operands."""
    weight = meta_weight(text, (size, size), torch.float16, kind)
    x = torch.empty(tokens, size, dtype=torch.float16, device="meta")

    def work(launch: Launch, config: Any) -> Work | None:
        if launch.kernel != "gemm_rounded_kernel":
            return None
        chosen = rounded_config(launch.arch, problem_of(x, weight), kind, segment_of(weight))
        tiles = -(-weight.padded[0] // (ROW_TILE * chosen.tiles)) * -(-tokens // chosen.tokens)
        steps = tiles * (weight.padded[1] // chosen.columns)
        moved = weight.nbytes + tokens * (size + 2 * size)  # activations of a byte, results of two
        return Work(bytes=moved, units=size * size, flops=2 * tokens * size * size, steps=steps)

    names = INT8_MMA if kind == "int8" else FP8_MMA
    return Case(
        f"gemm_{kind}/{text}/{tokens}x{size}x{size}",
        launch=lambda arch, config: gemm_rounded(x, weight),
        work=work,
        # AMD's loads carry no mark, and codes come among loads of scales: only NVIDIA's are asked for their width.
        gates={arch: Gate(load_bits=128 if arch.startswith("sm_") else 0, mma=(name,)) for arch, name in names.items()},
        gated="gemm_rounded_kernel",
        quick=quick,
        targets=TARGETS if kind == "int8" else tuple(arch for arch in TARGETS if arch in FP8_ARCHES),
    )


def trellis_case(text: str, tokens: int, *, size: int = 4096, quick: bool = False) -> Case:
    """Gated where it matters: no spills, tensor cores."""
    weight = meta_weight(text, (size, size), torch.float16)
    x = torch.empty(tokens, size, dtype=torch.float16, device="meta")

    def work(launch: Launch, config: Any) -> Work | None:
        if launch.kernel != "trellis_kernel":
            return None
        steps = weight.padded[0] // ROW_TILE * -(-tokens // 64) * (size // 64)
        return Work(bytes=_bytes(weight, tokens), units=size * size, flops=2 * tokens * size * size, steps=steps)

    mma = {"sm_80": "HMMA", "sm_90": "HMMA", "gfx942": "v_mfma_f32"}
    return Case(
        f"trellis/{text}/{tokens}x{size}x{size}",
        launch=lambda arch, config: trellis_product(x, weight),
        work=work,
        gates={arch: Gate(mma=(name,)) for arch, name in mma.items()},
        gated="trellis_kernel",
        quick=quick,
    )


def outliers_case(text: str, tokens: int, *, size: int = 4096) -> Case:
    """What is kept apart from codes in planes: no spills. A few loads a weight, which no floor of memory measures."""
    weight = meta_weight(text, (size, size), torch.float16)
    x = torch.empty(tokens, size, dtype=torch.float16, device="meta")
    return Case(
        f"outliers/{text}/{tokens}x{size}x{size}",
        launch=lambda arch, config: add_outliers(x, weight, torch.empty(tokens, size, dtype=x.dtype, device="meta")),
        gates=dict.fromkeys(TARGETS, Gate()),
    )


def search_case(text: str, tiles: int = 512, passed_on: bool = False) -> Case:
    """The search for a trellis's codes: no spills; what it costs is integers, which no floor of memory measures."""
    format = TrellisFormat.parse(text)
    wanted = torch.empty(tiles, 256, dtype=torch.int16, device="meta")
    values = torch.empty(1 << format.window, dtype=torch.int16, device="meta")
    factors = None
    if passed_on:  # within tiles
        columns, rows = (torch.empty(tiles, 16, 16, dtype=dtype, device="meta") for dtype in (torch.int16, torch.int32))
        factors = TileFactors(columns, rows)
    return Case(
        f"trellis_search/{text}/{tiles}" + ("/within" if passed_on else ""),
        launch=lambda arch, config: search_symbols(format, wanted, values, factors),
        gates=dict.fromkeys(TARGETS, Gate()),
        targets=tuple(arch for arch in TARGETS if arch.startswith("sm_")),  # others are refused (trellis_search)
    )


def cases() -> list[Case]:
    """All products, and a trellis's search. Gates are for sm_90: the widths' budgets, no shuffle, 128-bit loads, tensor
    cores. Products with activations in 8 bits have theirs for every target."""

    def read(bits: int, over: float, mma: tuple[str, ...] = ("HMMA",)) -> Gate:
        return Gate(load_bits=128, mma=mma, per_unit=max(BUDGET * bits, 2.2) * over, shuffles=0)

    return [
        gemv_case(
            "int4-b64", gate=Gate(load_bits=128, mma=("HMMA",), per_unit=4.4, over_floor=1.15, shuffles=0), quick=True
        ),
        gemv_case("nf4-b64", gate=read(4, 1.0), quick=True),
        gemv_case("int2-b64", gate=Gate(load_bits=128, mma=("HMMA",), over_floor=1.25, shuffles=0)),
        gemv_case("lloyd2-b64", gate=read(2, 1.25), quick=True),
        gemv_case("int3-b64", gate=Gate(load_bits=128, mma=("HMMA",), over_floor=1.25, shuffles=0)),
        gemv_case("nf3-b64", gate=read(3, 1.25)),
        gemv_case("int8-b64", gate=Gate(load_bits=128, mma=("HMMA",), over_floor=1.25, shuffles=0)),
        gemv_case("lloyd5-b64"),
        gemv_case("lloyd6-b64"),
        gemv_case("lloyd7-b64"),
        gemv_case("lloyd8-b64"),
        gemv_case("nf4-b64-dq"),
        gemv_case("int4-b128-asym"),
        gemv_case("int4-b64", tokens=4),
        gemv_case("int4-b64", dtype=torch.bfloat16),
        gemv_case("nf4-b64", size=8192),
        *(gemv_case(f"nested2..{bits}-b64", gate=read(bits, 1.25)) for bits in (2, 3)),
        gemv_case("nested2..4-b64", gate=Gate(load_bits=128, mma=("HMMA",), per_unit=5, shuffles=0), quick=True),
        *(gemv_case(f"nested2..{bits}-b64", gate=read(bits, 1.1)) for bits in range(5, 9)),
        gemm_case("nested2..3-b64", 16),
        gemm_case("nested2..4-b64", 256, gate=Gate(load_bits=128, mma=("HGMMA",), tensor_share=0.7, shuffles=0)),
        gemm_case("nested2..8-b64", 256),
        gemm_case("int4-b64", 16),
        gemm_case("nf4-b64", 16, gate=Gate(load_bits=128, mma=("HGMMA",), shuffles=0)),
        gemm_case("nf4-b64", 64),
        gemm_case("int4-b64", 256, gate=Gate(load_bits=128, mma=("HGMMA",), tensor_share=0.7, shuffles=0), quick=True),
        gemm_case("nf4-b64", 256, gate=Gate(load_bits=128, mma=("HGMMA",), tensor_share=0.7, shuffles=0)),
        gemm_case("nf3-b64", 256),
        gemm_case("int8-b64", 256),
        trellis_case("trellis2", 1, quick=True),
        trellis_case("trellis2.5", 1),
        trellis_case("trellis3", 1),
        trellis_case("trellis3.5", 1),
        trellis_case("trellis4", 1),
        trellis_case("trellis3", 64),
        outliers_case("nf4-b64-o1024", 1),
        outliers_case("nf4-b64-o1024", 64),
        trellis_case("trellis3-o1024", 1),
        trellis_case("trellis3-o1024", 64),
        *(
            search_case(f"trellis{width}", passed_on=passed_on)
            for passed_on in (False, True)
            for width in (2, 2.5, 3, 3.5, 4.5, 5.5, 6)
        ),
        _rounded("int8", "int4-b64", 256),
        _rounded("int8", "int4-b64", 1024),
        _rounded("int8", "int4-b128", 256, quick=True),
        _rounded("int8", "nf4-b64", 256),
        _rounded("int8", "int3-b64", 256),
        _rounded("int8", "lloyd5-b64", 256),
        _rounded("int8", "int8-b64", 256),
        _rounded("fp8", "int4-b64", 256, quick=True),
        _rounded("fp8", "int4-b64", 1024),
        _rounded("fp8", "int4-b128", 256),
        _rounded("fp8", "nf4-b64", 256),
        _rounded("fp8", "int3-b64", 256),
    ]
