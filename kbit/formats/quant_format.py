"""QuantFormat: everything that defines a format of the planes codec, as one short string.

    nf4-b64               4-bit normal float, blocks of 64, fp16 scales
    int3-b128-asym        3-bit integer with an offset per block
    float4e2m1-b32        4-bit float, 2 exponent and 1 mantissa bit, OCP grid
    float4e2m1-b64-bnb    the same bits on bitsandbytes' FP4 grid ("fp4-b64" for short)
    nf4-b64-dq            double-quantized scales
    int8-row-fp32         one fp32 scale per row
    nf4-b64-o128          128 single weights kept apart, in 16 bits each with their places
    levels4-b32-asym      levels that came with the tensor (a GGUF file's Q4_1), kept as they were

A format fixes what is stored for a matrix, to the byte (`parts`), so sizes are known before any tensor is read.
This module imports neither torch nor numpy: `kbit info` and planning stay quick.
"""

from __future__ import annotations

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
from kbit.host.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from kbit.formats.quant_tensor import QuantTensor

DTYPES = ("int", "float", "dynamic", "quantile", "nf", "lloyd")
# Levels that another quantizer chose, kept with the tensor: weights are not rounded to them.
LEVELS = "levels"
FLOAT_GRIDS = ("ocp", "paper", "bnb")
SCALE_DTYPES = ("fp16", "bf16", "fp32")
MIN_BITS, MAX_BITS = 2, 8
MIN_BLOCK, MAX_BLOCK = 16, 4096

# Blocks whose scales share one fp32 factor under double quantization. 256 is bitsandbytes' (and QLoRA's) choice:
# the factor then costs 32/256 = 0.125 bits per scale, 0.002 bits per weight at block size 64.
SUPERBLOCK = 256

_SAFETENSORS_NAME = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}

_BASE = re.compile(r"(?P<dtype>[a-z]+?)(?P<bits>[0-9]+)(?:e(?P<exponent>[0-9]+)m(?P<mantissa>[0-9]+))?")

# No format's name comes near this; a longer string (from a hostile config.json, say) is not looked at.
_MAX_TEXT = 80


def default_dtype(bits: int) -> str:
    """The data type to use at a width unless the user names one.

    From KL divergence on SmolLM2-135M and novels-2m (README, benchmarks/accuracy_table.py): nf is best at 3 and 4 bits
    where outliers matter (SmolLM2, 3 bits: 1.28 against lloyd's 4.39), lloyd at 2 and from 5 on. At 8 bits all but
    nf and quantile are below 0.003, and integers are what kernels multiply fastest.
    """
    if bits in (3, 4):
        return "nf"
    return "int" if bits == 8 else "lloyd"


def plane_widths(bits: int) -> tuple[int, ...]:
    """Widths of the bit planes of a k-bit code, widest first: 3 -> (2, 1), 7 -> (4, 2, 1), 8 -> (8,)."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


@dataclass(frozen=True)
class QuantFormat(Codec):
    """A format of the planes codec: codes as bit planes, a scale (and perhaps an offset) per block, a codebook.

    Attributes:
        dtype: family of the codebook: "int", "float", "dynamic", "quantile", "nf" or "lloyd"; or "levels".
        bits: k, 2 to 8.
        block_size: weights along a row that share a scale (16 to 4096, a multiple of 16); 0 means one per row.
        asymmetric: int only: blocks span [min, max] and store an offset (the midpoint) beside the scale. Of levels:
            blocks store an offset.
        exponent_bits: float only: bits of the exponent; the mantissa has bits - 1 - exponent_bits.
        grid: float only: "ocp" (IEEE-style with subnormals, all codes finite: OCP's E2M1), "paper" (Dettmers and
            Zettlemoyer, appendix A) or "bnb" (bitsandbytes: its FP4 table at 4 bits, create_fp8_map elsewhere).
        scale_dtype: stored type of the scales: "fp16", "bf16" or "fp32".
        double_quant: store scales in 8 bits with one fp32 factor per 256 blocks.
        outliers: weights that are kept apart, in 16 bits each with their places.

    Raises:
        UsageError: a value is out of range or two fields contradict each other.
    """

    family: ClassVar[str] = "planes"

    dtype: str = "nf"
    bits: int = 4
    block_size: int = 64
    asymmetric: bool = False
    exponent_bits: int | None = None
    grid: str | None = None
    scale_dtype: str = "fp16"
    double_quant: bool = False
    outliers: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in (*DTYPES, LEVELS):
            raise UsageError(f"data type {self.dtype!r} is unknown: use one of {', '.join(DTYPES)}")
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise UsageError(f"{self.bits} bits: kbit formats have {MIN_BITS} to {MAX_BITS} bits")
        block_ok = MIN_BLOCK <= self.block_size <= MAX_BLOCK and self.block_size % 16 == 0
        if self.block_size != 0 and not block_ok:
            raise UsageError(
                f"block size {self.block_size}: use a multiple of 16 from {MIN_BLOCK} to {MAX_BLOCK}, or 0 for one "
                "scale per row"
            )
        if self.asymmetric and self.dtype not in ("int", LEVELS):
            raise UsageError(f"an offset per block (asym) exists for int only, not for {self.dtype}: choose int")
        if self.scale_dtype not in SCALE_DTYPES:
            raise UsageError(f"scale type {self.scale_dtype!r} is unknown: use one of {', '.join(SCALE_DTYPES)}")
        if self.dtype == "float":
            self._complete_float()
        elif self.exponent_bits is not None or self.grid is not None:
            raise UsageError(f"exponent bits and grid exist for float only, not for {self.dtype}")
        if self.double_quant and self.scale_dtype != "fp16":
            raise UsageError(f"double-quantized scales are 8 bits wide: drop the scale type {self.scale_dtype!r}")
        check_count(self.outliers, f"{self.dtype}{self.bits}")

    def _complete_float(self) -> None:
        # Two exponent bits: on Gaussian blocks E2 has the lowest error of all splits at 3 to 8 bits, and the
        # paper's "half the bits" rule is worse than int (research table: k=4 E2 .0112, int .0116, E3 .0354).
        exponent = self.exponent_bits if self.exponent_bits is not None else min(2, self.bits - 1)
        if not 1 <= exponent <= self.bits - 1:
            raise UsageError(
                f"{exponent} exponent bits do not fit a {self.bits}-bit float: use 1 to {self.bits - 1} "
                "(one bit is the sign)"
            )
        object.__setattr__(self, "exponent_bits", exponent)
        grid = self.grid or "ocp"
        if grid not in FLOAT_GRIDS:
            raise UsageError(f"float grid {grid!r} is unknown: use one of {', '.join(FLOAT_GRIDS)}")
        object.__setattr__(self, "grid", grid)

    @property
    def mantissa_bits(self) -> int:
        """Mantissa bits of a float format (0 for the other data types)."""
        return self.bits - 1 - self.exponent_bits if self.exponent_bits is not None else 0

    @property
    def has_own_codebook(self) -> bool:
        """Whether every tensor carries a codebook of its own (quantile: estimated from the tensor)."""
        return self.dtype in ("quantile", LEVELS)

    def at_width(self, bits: int) -> QuantFormat:
        """The format to use beside this one at another width: the default data type there, same blocks and scales, no
        weights kept apart."""
        if bits == self.bits:
            return self.keeping(0)
        return QuantFormat(
            default_dtype(bits),
            bits,
            self.block_size,
            scale_dtype=self.scale_dtype,
            double_quant=self.double_quant,
        )

    @classmethod
    def claims(cls, text: str) -> bool:
        return True  # what no other codec reads is taken for a format of this one, misspelt

    @classmethod
    def parse(cls, text: str) -> QuantFormat:
        """Read a format string such as "nf4-b64-dq"; flags may come in any order.

        Raises:
            UsageError: the string is not a format; the message says which part.
        """
        if len(text) > _MAX_TEXT:
            raise UsageError(f"{text[:20]!r}... ({len(text)} characters) is not a format: write it as in nf4-b64")
        base, *flags = text.strip().lower().split("-")
        values: dict[str, object] = {}
        if base == "fp4":
            values.update(dtype="float", bits=4, exponent_bits=2, grid="bnb")
        else:
            match = _BASE.fullmatch(base)
            if match is None:
                raise UsageError(f"{text!r} is not a format: it starts with a data type and bits, as in nf4-b64")
            values.update(dtype=match["dtype"], bits=int(match["bits"]))
            if match["exponent"] is not None:
                values["exponent_bits"] = int(match["exponent"])
                if int(match["exponent"]) + int(match["mantissa"]) + 1 != int(match["bits"]):
                    raise UsageError(f"{text!r}: sign, exponent and mantissa bits do not add up to {match['bits']}")
        seen: set[str] = set()
        for flag in flags:
            key, value = _parse_flag(flag, text)
            if key in seen or values.get(key, value) != value:  # fp4 names its grid already; fp4-bnb agrees with it
                raise UsageError(f"{text!r}: {flag!r} says twice what the {key.replace('_', ' ')} is")
            seen.add(key)
            values[key] = value
        return cls(**values)  # type: ignore[arg-type]

    def __str__(self) -> str:
        text = f"{self.dtype}{self.bits}"
        if self.dtype == "float":
            text += f"e{self.exponent_bits}m{self.mantissa_bits}"
        text += f"-b{self.block_size}" if self.block_size else "-row"
        if self.asymmetric:
            text += "-asym"
        if self.grid not in (None, "ocp"):
            text += f"-{self.grid}"
        if self.scale_dtype != "fp16":
            text += f"-{self.scale_dtype}"
        if self.double_quant:
            text += "-dq"
        if self.outliers:
            text += f"-o{self.outliers}"
        return text

    def blocks_per_row(self, columns: int) -> int:
        """Blocks in a row of `columns` weights; the last one may be short."""
        return -(-columns // self.block_size) if self.block_size else 1

    def parts(self, rows: int, columns: int) -> Mapping[str, Part]:
        """Every array stored for a (rows, columns) matrix, by its name's suffix, in file order."""
        parts: dict[str, Part] = {}
        for width in plane_widths(self.bits):
            parts[f"plane{width}"] = Part("U8", (rows, -(-columns * width // 8)))
        blocks = self.blocks_per_row(columns)
        factors = -(-rows * blocks // SUPERBLOCK)
        for suffix, code_dtype in (("scales", "U8"), ("offsets", "I8")):
            if suffix == "offsets" and not self.asymmetric:
                continue
            if self.double_quant:
                parts[suffix] = Part(code_dtype, (rows, blocks))
                parts[f"{suffix}_super"] = Part("F32", (factors,))
            else:
                parts[suffix] = Part(_SAFETENSORS_NAME[self.scale_dtype], (rows, blocks))
        if self.has_own_codebook:
            parts["codebook"] = Part("F32", (2**self.bits,))
        return parts | outlier_parts(self.outliers)

    @property
    def codebook_size(self) -> int:
        return int(2**self.bits)

    def codebook_key(self, columns: int) -> str | None:
        if self.dtype == "int" or self.has_own_codebook:
            return None
        # lloyd's levels follow from the block's length, with one scale per row from the row's
        name = str(self.keeping(0))
        return f"{name}@{columns}" if self.dtype == "lloyd" and not self.block_size else name

    def codebook(self, columns: int) -> npt.NDArray[np.float32]:
        from kbit.formats.codebooks import codebook

        return codebook(self, columns)

    def decode(self, matrix: QuantTensor, rows: slice | torch.Tensor, width: int | None = None) -> torch.Tensor:
        from kbit.formats.planes_codec import PlanesTensor

        if width is not None:
            self.parts_read(*matrix.shape, width)  # refuses a width that is not the format's
        found = PlanesTensor.of(matrix).decode(rows)
        return add_outliers(found, matrix.stored, matrix.shape[1], matrix.row_indices(rows)) if self.outliers else found

    def encode(self, read_rows: ReadRows, shape: tuple[int, int], *, name: str = "tensor") -> QuantTensor:
        from kbit.formats.blockwise import quantize_rows

        if self.dtype == LEVELS:
            raise UsageError(
                f"{name}: nothing is rounded to {self}, whose levels come with a tensor that is quantized already; "
                f'"stored" keeps such a tensor as it is'
            )
        if self.outliers:
            return encode_apart(self, read_rows, shape, lambda plain, others: plain.encode(others, shape, name=name))
        return quantize_rows(read_rows, shape, self, name=name)

    def column_unit(self, columns: int) -> int:
        """Whole blocks and whole bytes."""
        if self.blocks_per_row(columns) == 1:  # its scale is every part's
            return 8 // min(plane_widths(self.bits))
        return self.block_size  # a multiple of 16 codes, so of whole bytes at every width

    def joinable(self, stored: Mapping[str, Array], shape: tuple[int, int]) -> tuple[QuantFormat, Mapping[str, Array]]:
        """See Codec.joinable. Double-quantized scales become float32 scales of the same values."""
        if not self.double_quant:
            return self, stored
        import numpy as np

        arrays: dict[str, Any] = dict(stored)
        blocks = self.blocks_per_row(shape[1])
        run = np.arange(shape[0] * blocks).reshape(shape[0], blocks) // SUPERBLOCK
        for kind in ("scales", "offsets"):
            if kind in arrays:  # 8-bit integers times float32: exact in float32, in numpy as in torch
                arrays[kind] = arrays[kind] * arrays.pop(f"{kind}_super")[run]
        return replace(self, double_quant=False, scale_dtype="fp32"), arrays

    def cut(
        self, stored: Mapping[str, Array], shape: tuple[int, int], cut: Cut
    ) -> tuple[QuantFormat, Mapping[str, Array]]:
        """See Codec.cut. Double-quantized scales stay as they are where the part begins with a run of 256 blocks of its
        own; elsewhere, since these runs go on from row to row, they become float32 scales of the same values (3 bytes
        a block more).
        """
        arrays: Mapping[str, Any] = dict(stored)
        format, blocks = self, self.blocks_per_row(shape[1])
        if self.double_quant and (cut.dim == 1 or cut.start * blocks % SUPERBLOCK):
            format, arrays = self.joinable(stored, shape)
        parts = {}
        for suffix in format.keeping(0).parts(*cut.shape(shape)):
            array = arrays[suffix]
            if suffix.startswith("plane") and cut.dim == 1:
                per_byte = 8 // int(suffix.removeprefix("plane"))
                array = array[:, cut.start // per_byte : -(-cut.stop // per_byte)]
            elif suffix.endswith("_super"):  # only where rows are cut between two of them
                array = array[cut.start * blocks // SUPERBLOCK : -(-cut.stop * blocks // SUPERBLOCK)]
            elif cut.dim == 0 and suffix != "codebook":
                array = array[cut.start : cut.stop]
            elif suffix in ("scales", "offsets") and blocks > 1:
                array = array[:, cut.start // self.block_size : -(-cut.stop // self.block_size)]
            parts[suffix] = array
        return format, parts | (cut_outliers(stored, shape, cut) if self.outliers else {})

    def join(
        self, stored: Sequence[Mapping[str, torch.Tensor]], shapes: Sequence[tuple[int, int]]
    ) -> tuple[Codec, Mapping[str, torch.Tensor]]:
        _, joined = super().join(stored, shapes)
        return self.keeping(self.outliers * len(stored)), {**joined, **join_outliers(stored, shapes)}


def _parse_flag(flag: str, text: str) -> tuple[str, object]:
    if flag == "asym":
        return "asymmetric", True
    if flag == "dq":
        return "double_quant", True
    if flag == "row":
        return "block_size", 0
    if flag in SCALE_DTYPES:
        return "scale_dtype", flag
    if flag in FLOAT_GRIDS:
        return "grid", flag
    if re.fullmatch(r"b[0-9]+", flag):
        if int(flag[1:]) == 0:
            raise UsageError(f"{text!r}: write -row for one scale per row")
        return "block_size", int(flag[1:])
    if re.fullmatch(r"o[1-9][0-9]{0,4}", flag):
        return "outliers", int(flag[1:])
    raise UsageError(
        f"{text!r}: {flag!r} is unknown: use b<block size> or row, asym, dq, {', '.join(SCALE_DTYPES)}, "
        f"{', '.join(FLOAT_GRIDS)}, o<weights kept apart>"
    )
