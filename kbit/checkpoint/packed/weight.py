"""A weight that another quantizer has packed, as kbit reads it.

Two ways to hold one, chosen by what is exact:

- packed (`BlockWeight`): where the values are code x scale (+ offset) in blocks along the rows, exactly, in float32;
- dequantized (`DenseWeight`): in the type that the library which wrote the file computes in, with its roundings.

Either way `rows` gives just the numbers that `stored` holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kbit.formats.quant_format import MAX_BLOCK, MIN_BLOCK, QuantFormat
from kbit.formats.stored import AnyStored, DenseMatrix, StoredMatrix, rounded, widened
from kbit.host.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kbit.checkpoint.readers.safetensors_file import SafetensorsFile, StoredTensor

KIND_NAMES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
FLOAT_KINDS = {name: kind for kind, name in KIND_NAMES.items()}
# Weights that are decoded at once: what is between a file's numbers and the result stays in the processor's cache.
CHUNK_WEIGHTS = 1 << 18


class PackedTensors:
    """The tensors of a folder, for those who unpack them.

    Args:
        path: the folder.
        where: the file of every tensor.
        section: what the configuration says of the quantizer.
        config: the whole configuration.
    """

    def __init__(
        self, path: Path, where: Mapping[str, SafetensorsFile], section: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        self.path, self.section, self.config = path, section, config
        self._where = where
        self._owner = ""
        self._held: dict[str, NDArray[Any]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._where

    @property
    def names(self) -> list[str]:
        return list(self._where)

    def info(self, name: str) -> StoredTensor:
        """The header entry of a tensor.

        Raises:
            CheckpointError: there is none.
        """
        if name not in self._where:
            raise CheckpointError(
                f"{self.path}: {name} is missing, which belongs to a packed weight; download the model again"
            )
        return self._where[name].tensors[name]

    def file(self, name: str) -> Path:
        return self._where[name].path

    def metadata(self, name: str) -> Mapping[str, str]:
        """What the header of a tensor's file says besides the tensors."""
        return self._where[name].metadata

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows of a tensor; 16-bit and 8-bit floats come as patterns."""
        return self._where[name].read_array(name, start, stop)

    def whole(self, owner: str, name: str) -> NDArray[Any]:
        """A tensor of a weight whose rows are not together in the file: kept until another weight is read."""
        return self.kept(owner, name, lambda: self.read(name))

    def kept(self, owner: str, key: str, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """What is made of a weight's tensors once and needed for all of its rows: kept as `whole` is."""
        if self._owner != owner:
            self._owner, self._held = owner, {}
        if key not in self._held:
            self._held[key] = make()
        return self._held[key]

    def floats(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows of a tensor of floats, exactly."""
        return self.widened(name, self.read(name, start, stop))

    def widened(self, name: str, values: NDArray[Any]) -> NDArray[np.float32]:
        """What was read of a tensor of floats, in float32.

        Raises:
            CheckpointError: it holds no floats of 16 or 32 bits.
        """
        return widened(values, self.kind(name))

    def kind(self, name: str) -> str:
        """fp16, bf16 or fp32.

        Raises:
            CheckpointError: the tensor holds something else.
        """
        dtype = self.info(name).dtype
        if dtype not in FLOAT_KINDS:
            raise CheckpointError(f"{self.file(name)}: {name} is {dtype}, but should be F16, BF16 or F32")
        return FLOAT_KINDS[dtype]

    def expect(self, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> StoredTensor:
        """The header entry of a tensor that has one of these types and, if any are given, of these shapes.

        Raises:
            CheckpointError: it has not.
        """
        info = self.info(name)
        if info.dtype not in dtypes or (shapes and info.shape not in shapes):
            wanted = " or ".join(map(str, dict.fromkeys(shapes))) if shapes else "of any shape"
            raise CheckpointError(
                f"{self.file(name)}: {name} is {info.dtype} {info.shape}, but should be {' or '.join(dtypes)} "
                f"{wanted}: config.json is another model's, or the file is damaged"
            )
        return info

    def integer(self, key: str, default: int | None = None, *, allowed: tuple[int, ...] | None = None) -> int:
        """A whole number of the quantizer's configuration.

        Raises:
            CheckpointError: it is missing, or no number.
            UnsupportedError: it is none of those allowed.
        """
        value = self.section.get(key, default)
        if type(value) is not int:
            raise CheckpointError(f"{self.path}/config.json: {key} of the quantizer is {str(value)[:20]!r}, no number")
        if allowed is not None and value not in allowed:
            raise UnsupportedError(
                f"{self.path}/config.json: {key} of the quantizer is {value}; kbit reads "
                f"{', '.join(map(str, allowed))}; use the original 16-bit checkpoint"
            )
        return value

    def refuse(self, key: str, why: str) -> UnsupportedError:
        """What to raise where the quantizer's configuration asks for something that kbit does not do."""
        shown = str(self.section.get(key))[:80]
        return UnsupportedError(
            f"{self.path}/config.json: {key} of the quantizer is {shown!r}: {why}; use the original 16-bit checkpoint"
        )


class PackedWeight(ABC):
    """One of them.

    Attributes:
        name: that of the weight it stands for.
        shape: (N, K) of that weight.
        parts: names of the tensors it is made of.
        label: how it was packed, for people ("GPTQ 4-bit").
    """

    name: str
    shape: tuple[int, int]
    parts: tuple[str, ...]
    label: str

    @property
    @abstractmethod
    def held_as(self) -> str:
        """ "F16", "BF16" or "F32", or the kbit format that holds the values."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows of the weight, (stop - start, K)."""

    @abstractmethod
    def stored(self) -> AnyStored:
        """The weight as kbit holds it."""


@dataclass
class DequantizedWeight(PackedWeight):
    """A weight that is held dequantized.

    Attributes:
        kind: the type that the library computes in: its values are rounded to it.
    """

    name: str
    shape: tuple[int, int]
    parts: tuple[str, ...]
    label: str
    kind: str

    @abstractmethod
    def read_into(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Some rows, (stop - start, K), as `kind` stores them: float32, or patterns of 16 bits."""

    @property
    def held_as(self) -> str:
        return KIND_NAMES[self.kind]

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        return widened(self._patterns(start, stop), self.kind)

    def stored(self) -> DenseMatrix:
        return DenseMatrix(self._patterns(0, self.shape[0]), self.kind)

    def _patterns(self, start: int, stop: int) -> NDArray[Any]:
        columns = self.shape[1]
        out = np.empty((stop - start, columns), dtype=np.float32 if self.kind == "fp32" else np.uint16)
        for begin, end in chunks(start, stop, columns):
            self.read_into(begin, end, out[begin - start : end - start])
        return out


@dataclass
class DenseWeight(DequantizedWeight):
    """A weight whose rows are values.

    Attributes:
        decode: rows (start, stop) -> values in float32, which are then rounded to `kind`.
    """

    decode: Callable[[int, int], NDArray[np.float32]]

    def read_into(self, start: int, stop: int, out: NDArray[Any]) -> None:
        out[:] = rounded(self.decode(start, stop), self.kind)


@dataclass(frozen=True)
class Blocks:
    """Some rows of a `BlockWeight`: value = codebook[code] * scale (+ offset), exact in float32.

    Attributes:
        codes: uint8 (R, K).
        scales: (R, blocks): patterns of fp16 or bf16, or float32, as the format says.
        offsets: the same, where the format has them.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[Any]
    offsets: NDArray[Any] | None = None


@dataclass
class BlockWeight(PackedWeight):
    """A weight that is held packed.

    Attributes:
        format: bits, block size, offsets and type of the scales; the codebook is the one below, not the format's own.
        codebook: float32 (2^bits,).
        read: rows (start, stop) -> their blocks.
    """

    name: str
    shape: tuple[int, int]
    parts: tuple[str, ...]
    label: str
    format: QuantFormat
    codebook: NDArray[np.float32]
    read: Callable[[int, int], Blocks]

    @property
    def held_as(self) -> str:
        return str(self.format)

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        columns, kind = self.shape[1], self.format.scale_dtype
        out = np.empty((stop - start, columns), dtype=np.float32)
        block = self.format.block_size or columns
        for begin, end in chunks(start, stop, columns):
            blocks = self.read(begin, end)
            part = out[begin - start : end - start]
            np.take(self.codebook, blocks.codes, out=part, mode="clip")
            part *= widened(blocks.scales, kind).repeat(block, axis=1)[:, :columns]
            if blocks.offsets is not None:
                part += widened(blocks.offsets, kind).repeat(block, axis=1)[:, :columns]
        return out

    def stored(self) -> StoredMatrix:
        from kbit.formats.stored_planes import RowsPacker

        packer = RowsPacker(self.format, self.shape)
        for begin, end in chunks(0, self.shape[0], self.shape[1]):
            blocks = self.read(begin, end)
            packer.put(begin, np.ascontiguousarray(blocks.codes), blocks.scales, blocks.offsets)
        return packer.matrix(self.codebook)


def chunks(start: int, stop: int, columns: int) -> list[tuple[int, int]]:
    """Rows a few at a time."""
    step = max(1, CHUNK_WEIGHTS // max(1, columns))
    return [(begin, min(begin + step, stop)) for begin in range(start, stop, step)]


def can_block(block: int, columns: int) -> bool:
    """Whether a kbit format has such blocks: `block` weights of rows of `columns`, 0 for whole rows."""
    return block == 0 or (MIN_BLOCK <= block <= MAX_BLOCK and block % 16 == 0 and columns % block == 0)


def integers(bits: int, zero: int) -> NDArray[np.float32]:
    """The codebook of whole numbers: code - zero."""
    values: NDArray[np.float32] = np.arange(2**bits, dtype=np.float32) - np.float32(zero)
    return values
