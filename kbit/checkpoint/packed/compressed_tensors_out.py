"""Matrices on a grid as compressed-tensors stores them: what `compressed_tensors` reads, written.

Integers are pack-quantized (all widths as dense streams, as the library packs since 2026; 2, 4 and 8 bits are the same
in older versions), E2M1 is nvfp4- or mxfp4-pack-quantized by its block, E4M3 float-quantized. Layouts: there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.packed.bits import stream_words
from kbit.checkpoint.packed.weight import KIND_NAMES
from kbit.formats.codec import Part
from kbit.formats.grids import Grid, NotOnGrid, Terms, mx_scales, nvfp4_scales
from kbit.formats.stored import rounded

_NVFP4_BLOCK, _MX_BLOCK = 16, 32


def check_grid(grid: Grid, columns: int) -> None:
    """Raise where the library has no format for a grid.

    Raises:
        NotOnGrid: it has none.
    """
    grid.groups(columns)
    if grid.kind == "e2m1" and grid.block not in (_NVFP4_BLOCK, _MX_BLOCK):
        raise NotOnGrid(f"has E2M1 codes in blocks of {grid.block or columns}, not of {_NVFP4_BLOCK} or {_MX_BLOCK}")


def check_scales(terms: Terms) -> None:
    """Raise where the library's format for a grid has no such scales.

    Raises:
        NotOnGrid: it has not.
    """
    if terms.grid.kind == "e2m1":
        (nvfp4_scales if terms.grid.block == _NVFP4_BLOCK else mx_scales)(terms.scales)


def format_of(grid: Grid) -> str:
    """The library's name of a format."""
    if grid.kind == "int":
        return "pack-quantized"
    if grid.kind == "e4m3":
        return "float-quantized"
    return "nvfp4-pack-quantized" if grid.block == _NVFP4_BLOCK else "mxfp4-pack-quantized"


def parts(module: str, grid: Grid, shape: tuple[int, int]) -> dict[str, Part]:
    """The tensors of a matrix, by name.

    Args:
        module: name of the layer.
        grid: of the matrix.
        shape: (N, K).
    """
    rows, columns = shape
    groups = grid.groups(columns)
    if grid.kind == "e4m3":
        found = {"weight": Part("F8_E4M3", shape), "weight_scale": Part(KIND_NAMES[grid.scale_kind], (rows, groups))}
    elif grid.kind == "e2m1":
        found = {"weight_packed": Part("U8", (rows, columns // 2))}
        if grid.block == _NVFP4_BLOCK:
            found |= {"weight_scale": Part("F8_E4M3", (rows, groups)), "weight_global_scale": Part("F32", (1,))}
        else:
            found["weight_scale"] = Part("U8", (rows, groups))
    else:
        found = {
            "weight_packed": Part("I32", (rows, -(-columns * grid.bits // 32))),
            "weight_scale": Part(KIND_NAMES[grid.scale_kind], (rows, groups)),
            "weight_shape": Part("I64", (2,)),
        }
        if grid.asymmetric:
            found["weight_zero_point"] = Part("I32", (-(-rows * grid.bits // 32), groups))
    return {f"{module}.{end}": part for end, part in found.items()}


def arrays(module: str, terms: Terms, codes: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """What is in them.

    Args:
        module: name of the layer.
        terms: scales; those of integers and E4M3 are rounded to the grid's kind.
        codes: (N, K).

    Raises:
        NotOnGrid: scales that the format does not have.
    """
    grid = terms.grid
    found: dict[str, NDArray[Any]]
    if grid.kind == "e4m3":
        if bool(((codes & 127) == 127).any()):
            raise NotOnGrid("has codes that are NaN in E4M3")
        found = {"weight": codes, "weight_scale": rounded(terms.scales, grid.scale_kind)}
    elif grid.kind == "e2m1":
        found = {"weight_packed": codes[:, ::2] | (codes[:, 1::2] << np.uint8(4))}
        if grid.block == _NVFP4_BLOCK:
            scales, divisor = nvfp4_scales(terms.scales)
            found |= {"weight_scale": scales, "weight_global_scale": np.array([divisor], dtype=np.float32)}
        else:
            found["weight_scale"] = mx_scales(terms.scales)
    else:
        found = {
            "weight_packed": stream_words(codes, grid.bits),
            "weight_scale": rounded(terms.scales, grid.scale_kind),
            "weight_shape": np.array(codes.shape, dtype=np.int64),
        }
        if terms.zeros is not None:
            found["weight_zero_point"] = stream_words(terms.zeros.T, grid.bits).T
    return {f"{module}.{end}": np.ascontiguousarray(values) for end, values in found.items()}


def section(grids: Mapping[str, Grid], ignored: Sequence[str]) -> dict[str, Any]:
    """`quantization_config`.

    Args:
        grids: of every packed layer, by its name.
        ignored: linear layers that are not packed.
    """
    groups: dict[tuple[object, ...], tuple[Grid, list[str]]] = {}
    for module, grid in grids.items():
        groups.setdefault((grid.kind, grid.bits, grid.block, grid.asymmetric), (grid, []))[1].append(module)
    formats = {format_of(grid) for grid, _ in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(ignored),
        "config_groups": {
            f"group_{index}": {
                # One scheme is every linear layer's; of several each names its own.
                "targets": ["Linear"] if len(groups) == 1 else modules,
                "format": format_of(grid),
                "weights": _weights(grid),
                "input_activations": None,
                "output_activations": None,
            }
            for index, (grid, modules) in enumerate(groups.values())
        },
    }


def _weights(grid: Grid) -> dict[str, Any]:
    strategy = "group" if grid.block else "channel"
    if grid.kind == "e2m1" and grid.block == _NVFP4_BLOCK:
        strategy = "tensor_group"
    found: dict[str, Any] = {
        "num_bits": grid.bits,
        "type": "int" if grid.kind == "int" else "float",
        "symmetric": not grid.asymmetric,
        "strategy": strategy,
        "dynamic": False,
    }
    return {**found, "group_size": grid.block} if grid.block else found
