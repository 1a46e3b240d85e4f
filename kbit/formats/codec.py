"""Codec: how a k-bit matrix is stored, behind one interface.

A codec with its settings is what users call a format ("nf4-b64"): a value whose string says everything about what is
stored for a matrix. Planes + codebook + scales (`kbit.formats.quant_format`) is the first; others stand beside it:

    kbit/formats/<codec>.py        the class: parts, decoding, encoding, cutting; and a line in kbit.formats.registry
    kernels/{cpu,triton}/codecs/   what unpacks it, if it is to run there; and a line in the backend's table of codecs

Nothing else looks into what a codec stores. Readers, writers, plans and methods see named arrays of known types and
shapes (`Part`); the reference backend sees decoded rows; a backend without kernels for a codec refuses it by name.

This module imports neither torch nor numpy: sizes are known, and a folder is described, without them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

from kbit.host.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from kbit.formats.quant_tensor import QuantTensor

_DTYPE_BYTES = {"U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4}
_DTYPE_BYTES |= {"F8_E4M3": 1, "I64": 8}  # of other programs' formats

# A stored array: numpy's (16-bit floats as uint16) or torch's. Codecs only slice them where both can come.
Array = TypeVar("Array")
C = TypeVar("C", bound="Codec")
# (start, stop) -> rows of a matrix, float32 (stop - start, K).
ReadRows: TypeAlias = "Callable[[int, int], torch.Tensor]"


@dataclass(frozen=True)
class Part:
    """One stored array of a matrix: its safetensors dtype and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = _DTYPE_BYTES[self.dtype]
        for dim in self.shape:
            count *= dim
        return count


@dataclass(frozen=True)
class Cut:
    """The part [start, stop) of a tensor along a dimension: 0 for rows, 1 for columns."""

    dim: int
    start: int
    stop: int

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The part's shape."""
        return tuple(self.stop - self.start if dim == self.dim else size for dim, size in enumerate(whole))

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part, in memory of its own."""
        return tensor.narrow(self.dim, self.start, self.stop - self.start).clone()


class Codec(ABC):
    """How matrices (N, K) are stored, settings included. Immutable, hashable, and equal where all settings are.

    `str(codec)` names it in files and on command lines, and `parse` reads that back.

    Attributes:
        family: what the codec is called in messages and in the tables of backends.
        bits: width of a code; what `--bits` means.
        outliers: weights that are kept apart from codes (`kbit.formats.outlier_weights`); of codecs that keep any, a
            setting.
    """

    family: ClassVar[str]
    bits: int
    outliers: int = 0

    # ---- its name

    @classmethod
    @abstractmethod
    def claims(cls, text: str) -> bool:
        """Whether a format's string is this codec's to read (and to complain about)."""

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Codec:
        """Read a format's string.

        Raises:
            UsageError: the string is no format of this codec; the message says which part.
        """

    @abstractmethod
    def __str__(self) -> str: ...

    def at_width(self, bits: int) -> Codec:
        """The format to use beside this one at another width (for embeddings, say).

        Raises:
            UsageError: the codec has no such width.
        """
        if bits == self.bits:
            return self
        raise UsageError(f"{self}: has no {bits}-bit format beside it; name one with --override")

    def keeping(self: C, outliers: int) -> C:
        """The same with so many weights kept apart: 0 of a codec that keeps none."""
        return self if outliers == self.outliers else replace(self, outliers=outliers)  # type: ignore[type-var]

    # ---- what is stored

    @abstractmethod
    def parts(self, rows: int, columns: int) -> Mapping[str, Part]:
        """Every array stored for a (rows, columns) matrix, by its name's suffix, in file order."""

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths one store serves, widest first. More than one where codes are nested: fewer bits are then read."""
        return (self.bits,)

    def parts_read(self, rows: int, columns: int, width: int) -> Mapping[str, Part]:
        """What of `parts` is read at one of `widths`: fewer arrays, or shorter ones.

        Raises:
            UsageError: the store does not serve this width.
        """
        if width not in self.widths:
            served = ", ".join(str(served) for served in self.widths)
            raise UsageError(f"{self} serves {served} bits, not {width}")
        return self.parts(rows, columns)

    def narrowed(self, width: int) -> Codec:
        """What is stored up to one of `widths`, as a format: its parts are some of this one's, and its codebook the
        beginning of this one's.

        Raises:
            UsageError: the store does not serve this width.
        """
        self.parts_read(1, 1, width)
        return self

    def nbytes(self, rows: int, columns: int, width: int | None = None) -> int:
        """Bytes stored for a (rows, columns) matrix, everything counted; with a width, bytes read at that width."""
        parts = self.parts(rows, columns) if width is None else self.parts_read(rows, columns, width)
        return sum(part.nbytes for part in parts.values())

    def bits_per_weight(self, rows: int, columns: int, width: int | None = None) -> float:
        """`nbytes` as bits per weight."""
        return 8 * self.nbytes(rows, columns, width) / (rows * columns)

    # ---- values that many matrices share

    @property
    def codebook_size(self) -> int:
        """Values of a matrix's codebook; 0 for a codec without."""
        return 0

    def codebook_key(self, columns: int) -> str | None:
        """Under which name config.json keeps the codebook of matrices with rows of this length.

        None where it need not be kept: there is none, it is one of the parts ("codebook"), or it follows from the
        format without rounding.
        """
        return None

    def codebook(self, columns: int) -> npt.NDArray[np.float32]:
        """The codebook where it does not depend on the weights: float32 (codebook_size,)."""
        import numpy as np

        return np.zeros(0, dtype=np.float32)

    # ---- decoding and encoding

    @abstractmethod
    def decode(self, matrix: QuantTensor, rows: slice | torch.Tensor, width: int | None = None) -> torch.Tensor:
        """The weights of some rows: what the codes mean.

        Args:
            matrix: stored in this format.
            rows: a slice without step, or indices int64 (R,).
            width: one of `widths`; None: the widest.

        Returns:
            float32 (R, K), on the matrix's device.
        """

    @abstractmethod
    def encode(self, read_rows: ReadRows, shape: tuple[int, int], *, name: str = "tensor") -> QuantTensor:
        """The plainest way into the format: each weight to the nearest value it can have.

        Args:
            read_rows: may be called more than once for a row.
            shape: (N, K).
            name: what to call the matrix in errors.

        Raises:
            KbitError: the matrix is empty, holds NaN or infinity, or values that the format cannot hold.
        """

    # ---- cutting, for several processes

    @abstractmethod
    def column_unit(self, columns: int) -> int:
        """Columns of a row of `columns` weights can be cut at multiples of this."""

    @abstractmethod
    def cut(self, stored: Mapping[str, Array], shape: tuple[int, int], cut: Cut) -> tuple[Codec, Mapping[str, Array]]:
        """A part of a matrix, with the same values: its format, and views of the arrays (or arrays of its own).

        Args:
            stored: arrays by part, numpy's or torch's.
            shape: of the whole matrix.
            cut: rows anywhere; columns at multiples of `column_unit` (or at the end), see `check_cut`.
        """

    def joinable(self, stored: Mapping[str, Array], shape: tuple[int, int]) -> tuple[Codec, Mapping[str, Array]]:
        """The same values as arrays that `join` can put below those of other rows of the matrix."""
        return self, stored

    def join(
        self, stored: Sequence[Mapping[str, torch.Tensor]], shapes: Sequence[tuple[int, int]]
    ) -> tuple[Codec, Mapping[str, torch.Tensor]]:
        """Parts of a matrix, one below the other, as one: its format and arrays.

        Args:
            stored: `joinable` arrays of each, in this format.
            shapes: of each.
        """
        import torch

        rows = {name: torch.cat([arrays[name] for arrays in stored]) for name in stored[0] if name != "codebook"}
        return self, {name: rows.get(name, stored[0][name]) for name in stored[0]}

    def check_stored(self, name: str, stored: Mapping[str, Any], shape: tuple[int, int]) -> None:
        """Looks at what arrays from a file (numpy's or torch's), of the right types and shapes, must hold besides.

        Raises:
            CheckpointError: they do not.
        """
        from kbit.formats.outlier_weights import check_places

        check_places(name, stored, shape)

    def check_cut(self, shape: tuple[int, int], cut: Cut, name: str = "tensor") -> None:
        """
        Raises:
            UnsupportedError: a cut of columns that goes through a unit.
        """
        unit = self.column_unit(shape[1])
        if cut.dim == 1 and (cut.start % unit or (cut.stop % unit and cut.stop != shape[1])):
            raise UnsupportedError(
                f"{name}: columns {cut.start} to {cut.stop} of {shape[1]} are no whole blocks of {unit} ({self}): "
                "split it among fewer processes, or convert the model with a smaller block size"
            )


def no_kernel(backend: str, format: Codec, supported: Mapping[str, Any]) -> UnsupportedError:
    """What a backend raises for a codec that is not in its table of codecs."""
    return UnsupportedError(
        f"the {backend} backend has no kernel for {format}: its kernels read {', '.join(supported)}, not "
        f"{format.family}; use --backend reference, or convert the model to another format"
    )
