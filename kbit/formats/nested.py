"""NestedFormat: one store for several widths, each of which reads its own bytes only.

    nested2..8-b64        2 to 8 bits, blocks of 64, fp16 scales
    nested3..6-row-bf16   3 to 6 bits, one bf16 scale per row

A code of k bits begins with a plane of 2 bits, and a plane of 1 bit goes on for each further one: the lowest w bits of
a code are its code at width w. Every width has a codebook of its own, of cells that are those of the width below cut in
two (`kbit.formats.nested_codebooks`), and a factor for the scales of every row:

    weight at width w [n, k] = codebook_w[code[n, k] mod 2^w] * round(scale[n, k // block] * factor_w[n])

where round is to the scales' type. What is stored up to a width is a store of that format itself ("nested2..3-b64" of
"nested2..8-b64", `narrowed`). This module imports neither torch nor numpy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from kbit.formats.codec import Array, Codec, Cut, Part, ReadRows
from kbit.formats.quant_format import MAX_BITS, MIN_BITS, MIN_BLOCK, QuantFormat, default_dtype
from kbit.host.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from kbit.formats.quant_tensor import QuantTensor

_TEXT = re.compile(r"nested(?P<low>[0-9])\.\.(?P<bits>[0-9])(?:-(?:b(?P<block>[0-9]{1,4})|row))?(?:-(?P<scale>\w+))?")
_SAFETENSORS_NAME = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}


@dataclass(frozen=True)
class NestedFormat(Codec):
    """A format of the nested codec. Parts: plane2, bit3 .. up to `bits`, scales, and factor<w> for each width.

    Attributes:
        low, bits: narrowest and widest of the widths, 2 to 8.
        block_size: as in QuantFormat; 0 means one scale per row.
        scale_dtype: as in QuantFormat.

    Raises:
        UsageError: a value is out of range.
    """

    family: ClassVar[str] = "nested"

    low: int = 2
    bits: int = 8
    block_size: int = 64
    scale_dtype: str = "fp16"

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.low <= self.bits <= MAX_BITS:
            raise UsageError(
                f"nested widths {self.low}..{self.bits}: write the narrowest and the widest of {MIN_BITS} to "
                f"{MAX_BITS}, as in 2..8"
            )
        self.plain(self.bits)  # checks block size and scale type

    def plain(self, width: int) -> QuantFormat:
        """The plain format with the same blocks and scales, lloyd at a width."""
        return QuantFormat("lloyd", width, self.block_size, scale_dtype=self.scale_dtype)

    @classmethod
    def claims(cls, text: str) -> bool:
        return text.strip().lower().startswith("nested")

    @classmethod
    def parse(cls, text: str) -> NestedFormat:
        found = _TEXT.fullmatch(text.strip().lower())
        if found is None:
            raise UsageError(f"{text[:40]!r} is not a format: nested ones are written as in nested2..8-b64")
        block = 64 if "-" not in text else 0
        if found["block"] is not None:
            block = int(found["block"])
            if block == 0:
                raise UsageError(f"{text!r}: write -row for one scale per row")
        return cls(int(found["low"]), int(found["bits"]), block, found["scale"] or "fp16")

    def __str__(self) -> str:
        text = f"nested{self.low}..{self.bits}" + (f"-b{self.block_size}" if self.block_size else "-row")
        return text if self.scale_dtype == "fp16" else f"{text}-{self.scale_dtype}"

    def at_width(self, bits: int) -> Codec:
        """The plain format with the same blocks and scales: embeddings and head are the same at every width."""
        return QuantFormat(default_dtype(bits), bits, self.block_size, scale_dtype=self.scale_dtype)

    # ---- what is stored

    def blocks_per_row(self, columns: int) -> int:
        """Blocks in a row of `columns` weights; the last one may be short."""
        return -(-columns // self.block_size) if self.block_size else 1

    def parts(self, rows: int, columns: int) -> Mapping[str, Part]:
        parts = {"plane2": Part("U8", (rows, -(-columns * 2 // 8)))}
        parts |= {f"bit{width}": Part("U8", (rows, -(-columns // 8))) for width in range(3, self.bits + 1)}
        parts["scales"] = Part(_SAFETENSORS_NAME[self.scale_dtype], (rows, self.blocks_per_row(columns)))
        return parts | {f"factor{width}": Part("F16", (rows, 1)) for width in reversed(self.widths)}

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(range(self.bits, self.low - 1, -1))

    def parts_read(self, rows: int, columns: int, width: int) -> Mapping[str, Part]:
        parts = super().parts_read(rows, columns, width)
        read = {*self.planes_at(width), "scales", f"factor{width}"}
        return {name: part for name, part in parts.items() if name in read}

    @staticmethod
    def planes_at(width: int) -> list[str]:
        """The planes of a code of this width, from its lowest bits up."""
        return ["plane2", *(f"bit{bit}" for bit in range(3, width + 1))]

    def narrowed(self, width: int) -> NestedFormat:
        """What is stored up to a width, as a format: its parts are some of this one's, its codebook begins this one's.

        Raises:
            UsageError: the store does not serve this width.
        """
        self.parts_read(1, 1, width)
        return replace(self, bits=width)

    # ---- codebooks

    @property
    def codebook_size(self) -> int:
        """Of all widths, one after another, the narrowest first."""
        return sum(2**width for width in self.widths)

    def codebook_key(self, columns: int) -> str | None:
        return str(self) if self.block_size else f"{self}@{columns}"

    def codebook(self, columns: int) -> npt.NDArray[np.float32]:
        from kbit.formats.nested_codebooks import nested_codebook

        # (Of rows of a few weights nothing is to be gained, and of one there is no distribution.)
        return nested_codebook(self.low, self.bits, self.block_size or max(MIN_BLOCK, columns))

    def levels_at(self, width: int) -> slice:
        """Where a width's codebook lies in that of all; the codes are its places."""
        first = sum(2**narrower for narrower in range(self.low, width))
        return slice(first, first + 2**width)

    # ---- decoding, encoding, cutting

    def decode(self, matrix: QuantTensor, rows: slice | torch.Tensor, width: int | None = None) -> torch.Tensor:
        from kbit.formats.nested_codec import decode_rows

        return decode_rows(self, matrix, rows, width or self.bits)

    def encode(self, read_rows: ReadRows, shape: tuple[int, int], *, name: str = "tensor") -> QuantTensor:
        from kbit.formats.nested_codec import encode_nearest

        return encode_nearest(self, read_rows, shape, name)

    def column_unit(self, columns: int) -> int:
        """Whole blocks, and whole bytes of every plane."""
        return 8 if self.blocks_per_row(columns) == 1 else self.block_size

    def cut(
        self, stored: Mapping[str, Array], shape: tuple[int, int], cut: Cut
    ) -> tuple[NestedFormat, Mapping[str, Array]]:
        arrays: dict[str, Any] = dict(stored)
        if cut.dim == 0:
            return self, {name: array[cut.start : cut.stop] for name, array in arrays.items()}
        for name, array in arrays.items():
            if name.startswith(("plane", "bit")):
                per_byte = 4 if name == "plane2" else 8
                arrays[name] = array[:, cut.start // per_byte : -(-cut.stop // per_byte)]
            elif name == "scales" and self.blocks_per_row(shape[1]) > 1:
                arrays[name] = array[:, cut.start // self.block_size : -(-cut.stop // self.block_size)]
        return self, arrays


def parse_widths(text: str) -> tuple[int, int]:
    """The value of --nested, "2..8", as (2, 8).

    Raises:
        UsageError: it is not written so, or the widths do not exist.
    """
    found = re.fullmatch(r"([0-9])\.\.([0-9])", text.strip())
    if found is None:
        raise UsageError(f"--nested {text}: write the narrowest and the widest width, as in --nested 2..8")
    low, high = int(found[1]), int(found[2])
    NestedFormat(low, high)
    return low, high
