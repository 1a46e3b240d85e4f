"""A nested checkpoint read at one of its widths: only what that width needs, and as if there were no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from kbit.checkpoint.source import CheckpointSource, StoredSource, TensorInfo
from kbit.formats.codec import Codec
from kbit.formats.nested import NestedFormat
from kbit.formats.registry import parse_format
from kbit.host.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from kbit.formats.quant_tensor import QuantTensor
    from kbit.formats.stored import AnyStored, StoredMatrix


def widths_of(source: CheckpointSource) -> tuple[int, ...]:
    """The widths that all nested tensors of a checkpoint serve, widest first; none where there are no such tensors."""
    texts = {info.stored_as for info in source.tensors.values()}
    served = [set(parse_format(text).widths) for text in texts if NestedFormat.claims(text)]
    return tuple(sorted(set.intersection(*served), reverse=True)) if served else ()


def narrow_check(model: str, widths: Sequence[int], bits: int) -> None:
    """
    Args:
        model: what to call it.
        widths: those it serves, widest first.
        bits: the one that is asked for.

    Raises:
        UsageError: the model does not serve this width.
    """
    if not widths:
        raise UsageError(
            f"--bits {bits}: {model} has one width; drop --bits, or make a model of several with kbit quantize "
            "--nested 2..8"
        )
    if bits not in widths:
        raise UsageError(f"--bits {bits}: {model} serves {widths[-1]} to {widths[0]} bits; choose one of these")


def narrowed_info(info: TensorInfo, bits: int) -> TensorInfo:
    """A tensor at a width."""
    if not NestedFormat.claims(info.stored_as):
        return info
    format = parse_format(info.stored_as)
    rows, columns = info.shape
    return replace(info, stored_as=str(format.narrowed(bits)), nbytes=format.nbytes(rows, columns, bits))


def narrowed(source: CheckpointSource, bits: int) -> NarrowedSource:
    """A checkpoint at a width.

    Raises:
        UsageError: it does not serve this width.
    """
    narrow_check(str(source.path), widths_of(source), bits)
    return NarrowedSource(source, bits)


@runtime_checkable
class ReadsNarrowed(Protocol):
    """A reader of files that hold nested matrices."""

    def read_narrowed(self, name: str, width: int) -> StoredMatrix:
        """What is stored of a matrix up to a width, and no more."""


class NarrowedSource(StoredSource):
    """A nested checkpoint at a width that it serves.

    Args:
        source: the whole: a `StoredSource`, as kbit's folders are.
        bits: the width.
    """

    def __init__(self, source: CheckpointSource, bits: int) -> None:
        assert isinstance(source, StoredSource)
        assert isinstance(source, ReadsNarrowed)
        self.path, self.config = source.path, source.config
        self._source: StoredSource = source
        self._narrowed: ReadsNarrowed = source
        self._bits = bits
        self._infos = {name: narrowed_info(info, bits) for name, info in source.tensors.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def _nested(self, name: str) -> Codec | None:
        text = self._source.tensors[name].stored_as
        return parse_format(text) if NestedFormat.claims(text) else None

    def read_stored(self, name: str) -> AnyStored:
        if self._nested(name) is None:
            return self._source.read_stored(name)
        return self._narrowed.read_narrowed(name, self._bits)

    def read_quantized(self, name: str) -> QuantTensor:
        """A nested tensor up to the width."""
        return self._narrowed.read_narrowed(name, self._bits).tensor()

    def read_weight(self, name: str) -> torch.Tensor | QuantTensor:
        return self._source.read_weight(name) if self._nested(name) is None else self.read_quantized(name)

    def read_array_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        if self._nested(name) is None:
            return self._source.read_array_rows(name, start, stop)
        rows: NDArray[np.float32] = self.read_quantized(name).dequantize()[start:stop].numpy()
        return rows

    def sidecar_files(self) -> Mapping[str, bytes]:
        return self._source.sidecar_files()

    def fingerprint(self) -> str:
        return f"{self._source.fingerprint()} at {self._bits} bits"

    def close(self) -> None:
        self._source.close()
