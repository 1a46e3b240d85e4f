"""Stored numbers as float32, and the scales of weights in fp8."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbit.host.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def to_float32(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Stored numbers as float32: exact, but for F64, which is rounded.

    Args:
        values: as `SafetensorsFile.read_array` gives them.
        dtype: their safetensors name.
    """
    shape, values = values.shape, values.reshape(-1)  # (numpy makes numbers of what it computes with no dimension)
    return _widened(values, dtype).reshape(shape)


def _widened(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    import numpy as np

    from kbit.formats.stored import KINDS, widened

    if dtype in KINDS:
        return widened(values, KINDS[dtype])
    if dtype == "F8_E5M2":  # the upper half of an fp16 number
        return widened(values.astype(np.uint16) << np.uint16(8), "fp16")
    if dtype == "F8_E4M3":
        found: NDArray[np.float32] = _e4m3_values()[values]
        return found
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, which those who load refuse
        return values.astype(np.float32)


@lru_cache(maxsize=1)
def _e4m3_values() -> NDArray[np.float32]:
    """The number behind every code of OCP's E4M3 (FN: no infinity, NaN where all other bits are set): (256,)."""
    import numpy as np

    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    normal = np.ldexp(1.0 + mantissa / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    values[codes & 127 == 127] = np.nan
    signed: NDArray[np.float32] = np.where(codes & 128, -values, values).astype(np.float32)
    return signed


def fp8_block_size(path: Path, config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns per fp8 scale."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return 128, 128
    block = quantization.get("weight_block_size") or [128, 128]
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise CheckpointError(f"{path}/config.json: weight_block_size {block!r} is not a pair of positive numbers")
    return block[0], block[1]
