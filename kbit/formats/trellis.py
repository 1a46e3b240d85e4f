"""Trellis codes: a codec whose weights overlap in their bits, so that k bits choose among far more than 2^k values.

Tiles of 16 x 16 weights, row by row, are rings of 256 k bits. A weight stands for the L bits that end with its own k
(`kbit.formats.trellis_code` says which number), in units of its row's scale: neighbours share L - k bits, and a search
over all paths (kernels/cpu/rounding/trellis.h) finds the ring that is nearest to all of them. Half widths take k and
k + 1 bits in turn, which costs as much as the mean width should: between whole ones, mixed widths find more to choose
from. For normal numbers that
is within 8 to 12 % of what any code of k bits can do (QTIP, Tseng et al., arXiv 2406.11235), where a codebook of 2^k
values is off by 90 to 140 %. So that weights are like normal numbers, columns are rotated first: random signs, then
Hadamard matrices over blocks of columns. With 7 and 8 bits there is little left to win, and codes are integers.
Weights that are too large for that can be kept apart (`kbit.formats.outlier_weights`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from kbit.formats.codec import Array, Codec, Cut, Part, ReadRows
from kbit.formats.outlier_weights import (
    add_outliers,
    check_count,
    cut_outliers,
    encode_apart,
    join_outliers,
    outlier_parts,
)
from kbit.formats.quant_format import QuantFormat, default_dtype
from kbit.host.errors import KbitError, UnsupportedError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from kbit.formats.quant_tensor import QuantTensor

TILE = 16  # rows, and columns, of a tile
# Columns that one Hadamard matrix mixes, unless a format says fewer: wider ones buy about 1 % of divergence, and a
# matrix can be cut among processes between them.
MOST_MIXED = 512
WINDOW, FAST_WINDOW = 16, 12  # bits of a window; with 12 the search takes a fifteenth of the time
_LEAST_WINDOW = 8
CODES = ("sum2", "sum4")
# A level in units of a row's scale: levels of a product's bytes then have unit variance. Of integers: what costs least
# for normal numbers.
_STEPS = {"sum4": 0.00677, "sum2": 0.00957}
_INTEGER_STEPS = {7: 0.0569, 8: 0.0308}
# How much of a row's spread the code's is to be: what costs least for normal numbers. Wider codes have room for tails.
_SHARES: dict[float, float] = {2.5: 0.98, 3: 0.96, 3.5: 0.94, 4: 0.92, 4.5: 0.91, 5: 0.9, 5.5: 0.89, 6: 0.88}
INTEGER_BITS = 7  # from this width on, codes are integers
HALF_WIDTHS = (2.5, 3.5, 4.5, 5.5)


@dataclass(frozen=True)
class TrellisFormat(Codec):
    """The format "trellis<k>", with its settings where they are not the default: "trellis2-sum4-l12-h128-o64". Half
    widths are "trellis2.5" to "trellis5.5".

    Parts: codes, uint8 (N / 16, K / 16, 32 w), w the width, of each tile its ring, the first bit in a byte's highest;
    scales, fp16 (N, 1); signs, uint8 (K / 8), a bit for each column, from a byte's lowest on: 1 for -1; and where
    single weights are kept apart, those of `kbit.formats.outlier_weights`. Rows and columns are filled up to whole
    tiles.

    Attributes:
        bits: k, 2 to 8: whole bits of a weight.
        code: which number a window stands for, "sum2" or "sum4" (`kbit.formats.trellis_code`); "int" at 7 and 8 bits.
        window: L, bits of a window; k for integers.
        mixed: the most columns that one Hadamard matrix mixes, a power of two, 16 to 512.
        half: half a bit more: weights in even columns have k bits, in odd ones k + 1.
        outliers: weights that are kept apart, in 16 bits each with their places.
    """

    family: ClassVar[str] = "trellis"

    bits: int = 3
    code: str = ""
    window: int = 0
    mixed: int = MOST_MIXED
    half: bool = False
    outliers: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"trellis{self.bits}: use trellis2 to trellis8")
        integers = self.bits >= INTEGER_BITS
        if self.half and self.width not in HALF_WIDTHS:
            raise UsageError(f"trellis{self.width:g}: half widths are trellis2.5 to trellis5.5")
        if not self.code:
            object.__setattr__(self, "code", _default_code(self.width))
        if not self.window:
            object.__setattr__(self, "window", self.bits if integers else WINDOW)
        if integers and (self.code, self.window) != ("int", self.bits):
            raise UsageError(f"trellis{self.bits}: codes of {self.bits} bits are integers; it has no code or window")
        if not integers and self.code not in CODES:
            raise UsageError(f"trellis{self.bits}: its code is one of {', '.join(CODES)}, not {self.code!r}")
        if self.code == "sum2" and self.width != 2:
            name = f"trellis{self.width:g}"
            raise UsageError(f"{name}-sum2: only 2 bits have the code sum2; write {name}")
        least = least_window(self.width)
        if not integers and not least <= self.window <= WINDOW:
            raise UsageError(f"trellis{self.width:g}: a window has {least} to {WINDOW} bits, not {self.window}")
        if not TILE <= self.mixed <= MOST_MIXED or self.mixed & (self.mixed - 1):
            raise UsageError(
                f"trellis{self.width:g}: {self.mixed} columns cannot be mixed; use a power of two, {TILE} to "
                f"{MOST_MIXED}"
            )
        check_count(self.outliers, f"trellis{self.width:g}")

    # ---- its name

    @classmethod
    def claims(cls, text: str) -> bool:
        return text.startswith("trellis")

    @classmethod
    def parse(cls, text: str) -> TrellisFormat:
        found = re.fullmatch(
            r"trellis(\d{1,3})(\.5)?(?:-(sum\d))?(?:-l(\d{1,3}))?(?:-h(\d{1,4}))?(?:-o(\d{1,5}))?", text
        )
        if found is None:
            raise UsageError(
                f"{text!r} is not a format: write trellis2 to trellis8, or trellis2.5 to trellis5.5, and then, in "
                "this order, -sum2 or -sum4 (the code), -l12 (bits of a window), -h128 (columns mixed), -o64 (weights "
                "kept apart)"
            )
        bits, half, code, window, mixed, outliers = found.groups()
        if window == "0" or mixed == "0" or outliers == "0":
            raise UsageError(f"{text!r}: a window of no bits, no columns to mix, or no weights apart, is no format")
        return cls(
            int(bits), code or "", int(window or 0), int(mixed or MOST_MIXED), half is not None, int(outliers or 0)
        )

    def __str__(self) -> str:
        code = "" if self.code == _default_code(self.width) else f"-{self.code}"
        window = "" if self.window in (WINDOW, self.bits) else f"-l{self.window}"
        mixed = "" if self.mixed == MOST_MIXED else f"-h{self.mixed}"
        return f"trellis{self.width:g}{code}{window}{mixed}" + (f"-o{self.outliers}" if self.outliers else "")

    def at_width(self, bits: int) -> Codec:
        """For embeddings and heads: bit planes, which can be looked up row by row."""
        return QuantFormat(default_dtype(bits), bits)

    def with_short_windows(self) -> TrellisFormat:
        """The same with windows of `FAST_WINDOW` bits, or as it is: integers, and what has shorter ones."""
        return self if self.code == "int" else replace(self, window=min(self.window, FAST_WINDOW))

    def with_bits(self, bits: float) -> TrellisFormat:
        """The trellis of another width, whole or a half, with the same window, columns mixed and weights apart."""
        integers = bits >= INTEGER_BITS or self.bits >= INTEGER_BITS
        window = 0 if integers else max(self.window, least_window(bits))
        return TrellisFormat(int(bits), "", window, self.mixed, bits != int(bits), self.outliers)

    # ---- what is stored

    def parts(self, rows: int, columns: int) -> Mapping[str, Part]:
        tiles = (-(-rows // TILE), -(-columns // TILE))
        return {
            "codes": Part("U8", (*tiles, self.tile_bytes)),
            "scales": Part("F16", (rows, 1)),
            "signs": Part("U8", (tiles[1] * TILE // 8,)),
            **outlier_parts(self.outliers),
        }

    @property
    def width(self) -> float:
        """Bits of a weight, whole or a half more."""
        return self.bits + self.half / 2

    @property
    def tile_bytes(self) -> int:
        """Of a tile's ring."""
        return TILE * (2 * self.bits + self.half)

    def columns_mixed(self, columns: int) -> int:
        """Columns that one Hadamard matrix mixes: the largest power of two that divides a row of whole tiles."""
        padded = -(-columns // TILE) * TILE
        return min(padded & -padded, self.mixed)

    @property
    def step(self) -> float:
        """What a level counts, in units of a row's scale: levels have about unit variance then."""
        return _STEPS.get(self.code, _INTEGER_STEPS.get(self.bits, 0.0))

    @property
    def share(self) -> float:
        """How much of a row's spread the code's is to be, where nothing better is known."""
        return _SHARES.get(self.width, 1.0)

    # ---- decoding and encoding

    def decode(self, matrix: QuantTensor, rows: slice | torch.Tensor, width: int | None = None) -> torch.Tensor:
        from kbit.formats.rotation import unrotate

        self.parts_read(*matrix.shape, width or self.bits)
        columns = matrix.shape[1]
        found = unrotate(self.decode_rotated(matrix, rows), matrix.stored["signs"], self.columns_mixed(columns))
        return add_outliers(found[:, :columns], matrix.stored, columns, matrix.row_indices(rows))

    def decode_rotated(self, matrix: QuantTensor, rows: slice | torch.Tensor) -> torch.Tensor:
        """The weights of some rows as they are stored, rotated, without those that are kept apart: float32 (R, K in
        whole tiles)."""
        from kbit.formats.trellis_code import levels, row_windows

        scales, codes = matrix.stored["scales"], matrix.stored["codes"]
        index = matrix.row_indices(rows)
        level = levels(self, row_windows(self, codes, index))
        return level.float() * (self.step * scales[index].float())

    def encode(self, read_rows: ReadRows, shape: tuple[int, int], *, name: str = "tensor") -> QuantTensor:
        import torch

        from kbit.formats.blockwise import check_finite
        from kbit.formats.quant_tensor import QuantTensor
        from kbit.formats.rotation import new_signs, rotate
        from kbit.formats.trellis_code import search, to_tiles

        rows, columns = shape
        if rows < 1 or columns < 1:
            raise KbitError(f"{name}: shape {shape}: there are no weights")
        if self.outliers:
            return encode_apart(self, read_rows, shape, lambda plain, others: plain.encode(others, shape, name=name))
        signs = new_signs(columns)
        codes, scales = [], []
        step = max(TILE, (1 << 22) // columns // TILE * TILE)
        for start in range(0, rows, step):
            some = check_finite(read_rows(start, min(start + step, rows)).float(), start, min(start + step, rows), name)
            rotated = rotate(some, signs, self.columns_mixed(columns))
            spread = rotated.square().mean(dim=1, keepdim=True).sqrt()
            scale = self.stored_scales(spread / self.share, name)
            unit = rotated / torch.where(scale > 0, scale, 1).float()
            codes.append(search(self, to_tiles(unit), torch.get_num_threads()))
            scales.append(scale)
        tiles = -(-columns // TILE)
        stored = {
            "codes": torch.cat(codes).view(-1, tiles, self.tile_bytes),
            "scales": torch.cat(scales),
            "signs": signs,
        }
        return QuantTensor(self, shape, stored, torch.zeros(0))

    def stored_scales(self, scales: torch.Tensor, name: str = "tensor") -> torch.Tensor:
        """Scales of rows (N, 1) as they are stored, fp16.

        Raises:
            KbitError: they do not fit.
        """
        from kbit.formats.scales import store_scales

        try:
            return store_scales(scales, None, QuantFormat("int", 8, 0))["scales"]
        except KbitError as error:
            said = str(error).partition(": ")[0]
            raise KbitError(f"{name}: {said}: leave this tensor unquantized: --override '{name}=keep'") from None

    # ---- cutting, for several processes

    def column_unit(self, columns: int) -> int:
        return self.columns_mixed(columns)

    def check_cut(self, shape: tuple[int, int], cut: Cut, name: str = "tensor") -> None:
        super().check_cut(shape, cut, name)
        if cut.dim == 0 and (cut.start % TILE or (cut.stop % TILE and cut.stop != shape[0])):
            raise UnsupportedError(
                f"{name}: rows {cut.start} to {cut.stop} of {shape[0]} are no whole tiles of {TILE} ({self}): split it "
                "among fewer processes, or convert the model to another format"
            )

    def cut(self, stored: Mapping[str, Array], shape: tuple[int, int], cut: Cut) -> tuple[Codec, Mapping[str, Array]]:
        arrays: dict[str, Any] = dict(stored)
        tiles = slice(cut.start // TILE, -(-cut.stop // TILE))
        apart = cut_outliers(stored, shape, cut) if self.outliers else {}
        if cut.dim == 0:
            parts = {"codes": arrays["codes"][tiles], "scales": arrays["scales"][cut.start : cut.stop]}
            return self, {**parts, "signs": arrays["signs"], **apart}
        signs = arrays["signs"][cut.start // 8 : tiles.stop * (TILE // 8)]
        parts = {"codes": arrays["codes"][:, tiles], "scales": arrays["scales"], "signs": signs}
        return replace(self, mixed=self.columns_mixed(shape[1])), {**parts, **apart}

    def join(
        self, stored: Sequence[Mapping[str, torch.Tensor]], shapes: Sequence[tuple[int, int]]
    ) -> tuple[Codec, Mapping[str, torch.Tensor]]:
        import torch

        rows = {name: torch.cat([arrays[name] for arrays in stored]) for name in ("codes", "scales")}
        joined = {**rows, "signs": stored[0]["signs"], **join_outliers(stored, shapes)}
        return self.keeping(self.outliers * len(stored)), joined


def integer_codes(codes: npt.NDArray[np.uint8], bits: int, rows: int) -> npt.NDArray[np.uint8]:
    """Codes of 7 or 8 bits, taken out of their tiles.

    Args:
        codes: uint8 (N / 16, K / 16, 32 bits).
        bits: of a code.
        rows: N.

    Returns:
        uint8 (N, K in whole tiles).
    """
    import numpy as np

    high, wide = codes.shape[:2]
    found = np.empty((high * TILE, wide * TILE), dtype=np.uint8)
    places = 1 << np.arange(bits - 1, -1, -1, dtype=np.uint8)
    for tile in range(high):
        each = codes[tile] if bits == 8 else np.unpackbits(codes[tile], axis=-1).reshape(wide, -1, bits) @ places
        square = each.astype(np.uint8).reshape(wide, TILE, TILE).transpose(1, 0, 2)
        found[tile * TILE : (tile + 1) * TILE] = square.reshape(TILE, wide * TILE)
    return np.ascontiguousarray(found[:rows])


def least_window(width: float) -> int:
    """Bits of the shortest window: what two weights bring, and no fewer than the search takes (trellis.h)."""
    return max(_LEAST_WINDOW, math.ceil(width) + 5, int(2 * width))


def _default_code(width: float) -> str:
    """At 2 bits the cheaper one to decode, as decoding is what decides there."""
    return "int" if width >= INTEGER_BITS else "sum2" if width == 2 else "sum4"
