"""A codec that kbit does not have, as an author of one would write it: nested bits, one scale per row.

A weight is a k-bit code c for (c + 1/2) / 2^(k-1) - 1 times its row's scale. Each bit of the codes is an array of its
own, so one store serves every width from 2 to k: the first w bits of a code are the code of the w-bit format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from kbit.formats.codec import Array, Codec, Cut, Part, ReadRows
from kbit.host.errors import KbitError, UsageError

if TYPE_CHECKING:
    import torch

    from kbit.formats.quant_tensor import QuantTensor


@dataclass(frozen=True)
class NestedBits(Codec):
    """The format "bitwise<k>", k from 2 to 8. Parts: first (of the code's bits), .., eighth at most; scale."""

    family: ClassVar[str] = "bitwise"

    bits: int = 4

    @classmethod
    def claims(cls, text: str) -> bool:
        return text.startswith("bitwise")

    @classmethod
    def parse(cls, text: str) -> NestedBits:
        found = re.fullmatch(r"bitwise([2-8])", text)
        if found is None:
            raise UsageError(f"{text!r} is not a format: write bitwise2 to bitwise8")
        return cls(int(found[1]))

    def __str__(self) -> str:
        return f"bitwise{self.bits}"

    def at_width(self, bits: int) -> NestedBits:
        return NestedBits(bits)

    def parts(self, rows: int, columns: int) -> Mapping[str, Part]:
        bits = {f"bit{place}": Part("U8", (rows, -(-columns // 8))) for place in range(self.bits)}
        return {**bits, "scale": Part("F32", (rows, 1))}

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(range(self.bits, 1, -1))

    def parts_read(self, rows: int, columns: int, width: int) -> Mapping[str, Part]:
        parts = super().parts_read(rows, columns, width)
        return {name: part for name, part in parts.items() if name == "scale" or int(name[3:]) < width}

    def decode(self, matrix: QuantTensor, rows: slice | torch.Tensor, width: int | None = None) -> torch.Tensor:
        import torch

        width = width or self.bits
        read = self.parts_read(*matrix.shape, width)
        scale = matrix.stored["scale"][rows]
        code = torch.zeros((len(scale), matrix.shape[1]), device=scale.device)
        for name in (name for name in read if name != "scale"):
            packed = matrix.stored[name][rows]
            bit = (packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=scale.device)) & 1
            code = 2 * code + bit.flatten(1)[:, : matrix.shape[1]]
        return ((code + 0.5) / 2 ** (width - 1) - 1) * scale

    def encode(self, read_rows: ReadRows, shape: tuple[int, int], *, name: str = "tensor") -> QuantTensor:
        import torch

        from kbit.formats.quant_tensor import QuantTensor

        x = read_rows(0, shape[0])
        if not bool(torch.isfinite(x).all()):
            raise KbitError(f"{name}: weights are NaN or infinite")
        scale = x.abs().amax(dim=1, keepdim=True).float()
        unit = torch.where(scale > 0, x / scale.clamp(min=1e-38), 0.0)
        codes = ((unit + 1) * 2 ** (self.bits - 1)).floor().clamp(0, 2**self.bits - 1).to(torch.uint8)
        codes = torch.nn.functional.pad(codes, (0, -shape[1] % 8)).view(shape[0], -1, 8)
        places = torch.arange(8, dtype=torch.uint8)
        stored = {
            f"bit{place}": (((codes >> (self.bits - 1 - place)) & 1) << places).sum(dim=-1, dtype=torch.uint8)
            for place in range(self.bits)
        }
        return QuantTensor(self, shape, {**stored, "scale": scale}, torch.zeros(0))

    def column_unit(self, columns: int) -> int:
        return 8

    def cut(self, stored: Mapping[str, Array], shape: tuple[int, int], cut: Cut) -> tuple[Codec, Mapping[str, Array]]:
        arrays: dict[str, Any] = dict(stored)
        if cut.dim == 0:
            return self, {name: array[cut.start : cut.stop] for name, array in arrays.items()}
        columns = slice(cut.start // 8, -(-cut.stop // 8))
        return self, {name: array if name == "scale" else array[:, columns] for name, array in arrays.items()}
