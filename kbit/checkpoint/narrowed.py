"""A nested checkpoint read at one of its widths: only what that width needs, and as if there were no more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from kbit.checkpoint.ladder import ORDER, Ladder
from kbit.checkpoint.source import CheckpointSource, StoredSource, TensorInfo
from kbit.formats.registry import parse_format

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from kbit.formats.quant_tensor import QuantTensor
    from kbit.formats.stored import AnyStored, StoredMatrix


def widths_of(source: CheckpointSource) -> tuple[int, ...]:
    """The widths that all nested tensors of a checkpoint serve, widest first; none where there are no such tensors."""
    return Ladder.of(source).widths


def widths_below(source: CheckpointSource, bits: float | None) -> list[int]:
    """The whole numbers of bits, widest first, that a checkpoint serves below those it is opened at.

    Args:
        source: the checkpoint, narrowed to these bits or not.
        bits: None: the widest it serves.
    """
    return Ladder.of(source.whole if isinstance(source, NarrowedSource) else source).below(bits)


def narrowed_info(info: TensorInfo, widths: Mapping[str, int]) -> TensorInfo:
    """A tensor at its width, where it is nested.

    Args:
        info: the tensor.
        widths: of all nested tensors, by name (`Ladder.at`).
    """
    width = widths.get(info.name)
    if width is None:
        return info
    format = parse_format(info.stored_as)
    rows, columns = info.shape
    return replace(info, stored_as=str(format.narrowed(width)), nbytes=format.nbytes(rows, columns, width))


def narrowed(source: CheckpointSource, bits: float) -> NarrowedSource:
    """A checkpoint at a number of bits.

    Raises:
        UsageError: it does not serve so many.
    """
    ladder = Ladder.of(source)
    ladder.check(str(source.path), bits)
    return NarrowedSource(source, bits, ladder.at(bits))


@runtime_checkable
class ReadsNarrowed(Protocol):
    """A reader of files that hold nested matrices."""

    def read_narrowed(self, name: str, width: int) -> StoredMatrix:
        """What is stored of a matrix up to a width, and no more."""


class NarrowedSource(StoredSource):
    """A nested checkpoint at a number of bits that it serves.

    Args:
        source: the whole: a `StoredSource`, as kbit's folders are.
        bits: how many.
        widths: of each nested tensor, by name.
    """

    def __init__(self, source: CheckpointSource, bits: float, widths: Mapping[str, int]) -> None:
        assert isinstance(source, StoredSource)
        assert isinstance(source, ReadsNarrowed)
        self.path, self.config = source.path, _without_order(source.config)
        self._source: StoredSource = source
        self._narrowed: ReadsNarrowed = source
        self._bits, self._widths = bits, widths
        self._infos = {name: narrowed_info(info, widths) for name, info in source.tensors.items()}

    @property
    def whole(self) -> CheckpointSource:
        """The checkpoint with all its planes."""
        return self._source

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read_stored(self, name: str) -> AnyStored:
        if name not in self._widths:
            return self._source.read_stored(name)
        return self._narrowed.read_narrowed(name, self._widths[name])

    def read_quantized(self, name: str) -> QuantTensor:
        """A nested tensor up to its width."""
        return self._narrowed.read_narrowed(name, self._widths[name]).tensor()

    def read_weight(self, name: str) -> torch.Tensor | QuantTensor:
        return self.read_quantized(name) if name in self._widths else self._source.read_weight(name)

    def read_array_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        if name not in self._widths:
            return self._source.read_array_rows(name, start, stop)
        rows: NDArray[np.float32] = self.read_quantized(name).dequantize()[start:stop].numpy()
        return rows

    def sidecar_files(self) -> Mapping[str, bytes]:
        return self._source.sidecar_files()

    def fingerprint(self) -> str:
        return f"{self._source.fingerprint()} at {self._bits:g} bits"

    def close(self) -> None:
        self._source.close()


def _without_order(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of matrices that have their widths."""
    section = config.get("quantization_config") or {}
    if ORDER not in section:
        return config
    return {**config, "quantization_config": {key: value for key, value in section.items() if key != ORDER}}
