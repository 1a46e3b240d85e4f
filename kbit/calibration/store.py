"""Factors on disk: a folder that is filled layer by layer and serves every width, format and method afterwards.

A symmetric matrix is kept as its diagonal (float32) and the correlations below it (float16): for each layer of a model
with H features and an MLP of I about 3 I^2 + 9 H^2 bytes. A layer's file is whole or not there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from kbit.calibration.factors import Factors
from kbit.calibration.measure import LayerFactors
from kbit.calibration.place import MANIFEST, layer_file
from kbit.host.errors import KbitError
from kbit.host.files import write_durably

_IDS = "tokens.npy"
_BORROWED = " borrowed scalar"


class CalibrationFolder:
    """The factors of one model.

    Args:
        path: created if it is not there.
        identity: what is measured on what, plain JSON; a folder of another identity is refused.

    Raises:
        KbitError: the folder is another measurement's, or cannot be written.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, identity
        manifest = path / MANIFEST
        try:
            if manifest.exists():
                found = json.loads(manifest.read_text(encoding="utf-8"))
                if found != identity:
                    raise KbitError(f"{path}: holds another calibration ({_difference(found, identity)}); name another")
                return
            path.mkdir(parents=True, exist_ok=True)
            write_durably(manifest, json.dumps(identity, indent=1).encode())
        except ValueError:
            raise KbitError(f"{manifest}: damaged; remove the folder and calibrate again") from None
        except OSError as error:
            raise KbitError(f"{path}: cannot be written ({error.strerror})") from None

    def has(self, layer: int | None) -> bool:
        return self._file(layer).exists()

    def write(self, measured: LayerFactors) -> None:
        """Keep what was measured of a layer.

        Raises:
            KbitError: it cannot be written.
        """
        tensors: dict[str, torch.Tensor] = {}
        for name, factors in measured.factors.items():
            tensors[f"{name} coherence scalar"] = torch.tensor([factors.coherence], dtype=torch.float64)
            if factors.borrowed:
                tensors[f"{name}{_BORROWED}"] = torch.ones(1, dtype=torch.uint8)
            for side, factor in (("inputs", factors.inputs), ("outputs", factors.outputs)):
                if factor is None:
                    continue
                if factor.dim() == 1:
                    tensors[f"{name} {side} diagonal"] = factor
                else:
                    diagonal, below = _packed(factor)
                    tensors[f"{name} {side} diagonal"], tensors[f"{name} {side} below"] = diagonal, below
        try:
            write_durably(self._file(measured.layer), save(tensors))
        except OSError as error:
            raise KbitError(f"{self.path}: cannot be written ({error.strerror})") from None

    def read(self, layer: int | None) -> dict[str, Factors]:
        """The factors of a layer's matrices by name; of None, of embedding and head.

        Raises:
            KbitError: they were not measured, or the file is damaged.
        """
        file = self._file(layer)
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError):
            raise KbitError(f"{file}: missing or damaged; remove it and calibrate again") from None
        names = dict.fromkeys(key.rpartition(" ")[0].rpartition(" ")[0] for key in tensors)
        found = {}
        for name in names:
            inputs, outputs = (_unpacked(tensors, f"{name} {side}") for side in ("inputs", "outputs"))
            coherence = tensors.get(f"{name} coherence scalar")
            if inputs is None or coherence is None:
                raise KbitError(f"{file}: damaged; remove it and calibrate again")
            weighted = bool(self.identity["request"]["gradients"])
            borrowed = f"{name}{_BORROWED}" in tensors
            found[name] = Factors(inputs, outputs, float(coherence), weighted, borrowed)
        return found

    def borrowed(self) -> list[str]:
        """The experts' matrices that too few tokens went through to be measured (`Factors.borrowed`).

        Raises:
            KbitError: a file is damaged.
        """
        found = []
        for file in sorted(self.path.glob("layer-*.safetensors")):
            try:
                with safe_open(file, framework="numpy") as tensors:
                    keys = tensors.keys()
            except (OSError, SafetensorError):
                raise KbitError(f"{file}: damaged; remove it and calibrate again") from None
            found += [key.removesuffix(_BORROWED) for key in keys if key.endswith(_BORROWED)]
        return sorted(found)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.path.iterdir())

    def ids(self) -> NDArray[np.int64] | None:
        """The text, int64 (S, T), if it was put here."""
        try:
            found: NDArray[np.int64] = np.load(self.path / _IDS, allow_pickle=False)
        except (OSError, ValueError):
            return None
        return found

    def write_ids(self, ids: NDArray[np.int64]) -> None:
        from io import BytesIO

        buffer = BytesIO()
        np.save(buffer, ids)
        write_durably(self.path / _IDS, buffer.getvalue())

    def _file(self, layer: int | None) -> Path:
        return layer_file(self.path, layer)


def _difference(found: Any, wanted: Any) -> str:
    if not isinstance(found, dict):
        return "damaged"
    return ", ".join(key for key in wanted if found.get(key) != wanted[key]) or "more than is asked for"


def _packed(factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Diagonal float32 (N,), and the correlations below it row by row, float16 (N (N - 1) / 2,)."""
    diagonal = factor.diagonal().clone()
    inverse = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
    pieces = [(factor[row, :row] * inverse[:row] * inverse[row]).half() for row in range(1, len(factor))]
    return diagonal, torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.float16)


def _unpacked(tensors: dict[str, torch.Tensor], key: str) -> torch.Tensor | None:
    diagonal, below = tensors.get(f"{key} diagonal"), tensors.get(f"{key} below")
    if diagonal is None or below is None:
        return diagonal
    size, start = len(diagonal), 0
    factor = torch.zeros(size, size)
    root = diagonal.sqrt()
    for row in range(1, size):
        factor[row, :row] = below[start : start + row].float() * root[:row] * root[row]
        start += row
    factor += factor.T.clone()
    factor.diagonal().copy_(diagonal)
    return factor
