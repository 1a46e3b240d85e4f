"""GGUF files of given metadata and tensors, written by the gguf package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Encoded: TypeAlias = tuple[Array, "gguf.GGMLQuantizationType | None"]  # bytes of a type; None: an array as it is


def write_gguf(
    path: Path, arch: str, metadata: Mapping[str, Any], tensors: Mapping[str, Array | Encoded], **options: Any
) -> Path:
    """A GGUF file.

    Args:
        path: of it.
        arch: general.architecture.
        metadata: by whole key (`of_architecture`); integers are stored in the narrowest of 32 and 64 bits.
        tensors: by name.
        options: of gguf.GGUFWriter.
    """
    writer = gguf.GGUFWriter(path, arch, **options)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            low, high = (writer.add_uint32, writer.add_uint64) if value >= 0 else (writer.add_int32, writer.add_int64)
            (low if -(1 << 31) <= value < 1 << 32 else high)(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, stored in tensors.items():
        values, kind = stored if isinstance(stored, tuple) else (stored, None)
        writer.add_tensor(name, np.ascontiguousarray(values), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def of_architecture(arch: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Keys as they stand in a file of this architecture."""
    return {f"{arch}.{key}": value for key, value in keys.items()}


def encoded(values: Array, kind: str | None) -> Array | Encoded:
    """A tensor in a type of blocks, by its name; None: as it is."""
    if kind is None:
        return values
    found = gguf.GGMLQuantizationType[kind]
    return gguf.quants.quantize(values, found), found


def matrices_encoded(tensors: Mapping[str, Array], kind: str | None) -> dict[str, Array | Encoded]:
    """The same for those whose rows are whole blocks of 32."""
    return {
        name: encoded(values, kind if values.ndim == 2 and values.shape[1] % 32 == 0 else None)
        for name, values in tensors.items()
    }
