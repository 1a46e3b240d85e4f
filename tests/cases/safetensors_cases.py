"""Safetensors files byte by byte, right or wrong."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch


def file_bytes(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with any header: an object, or its JSON text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def written(folder: Path, content: bytes) -> Path:
    """A file of these bytes."""
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random bits of a dtype (NaN and infinity among them, for floats)."""
    generator = torch.Generator().manual_seed(seed)
    count = 1
    for dim in shape:
        count *= dim
    size = torch.empty((), dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 256
    data = torch.randint(0, high, (count * size,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).view(shape)
