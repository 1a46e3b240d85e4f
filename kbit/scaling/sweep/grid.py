"""The configurations of a sweep: widths x data types x block sizes x methods, less what does not exist.

A data type is named as in a format string without its width and blocks: "nf", "int", "int-asym", "float-paper",
"nf-dq" (double-quantized scales). "float-e3" is a float with three exponent bits at every width. "trellis",
"trellis-sum4-l12" are trellis codes, which have no blocks; methods that are named after them have no other data type.
"nested" is one store of all the widths, from the narrowest to the widest, and a configuration for each. Imports no
torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias, TypeVar

from kbit.formats.nested import NestedFormat
from kbit.formats.quant_format import MAX_BITS, MIN_BITS, QuantFormat
from kbit.formats.trellis import TrellisFormat
from kbit.host.errors import UsageError
from kbit.quantizers.calibrated import CalibratedRounding
from kbit.quantizers.methods import get_method
from kbit.scaling.points import ORIGINAL

T = TypeVar("T")
AnyFormat: TypeAlias = QuantFormat | TrellisFormat | NestedFormat

# Data types that are stores of several widths.
NESTED = "nested"

_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_EXPONENT = re.compile(r"e(\d+)")


@dataclass(frozen=True)
class Cell:
    """One configuration: a method and a format, or the model as it is.

    Attributes:
        method: a name of kbit.quantizers.methods, or ORIGINAL.
        format: None for the model as it is.
        width: of a nested format, the one that is read.
    """

    method: str
    format: AnyFormat | None
    width: int | None = None

    @property
    def format_name(self) -> str:
        """The format as a string, at a width of it ("nested2..8-b64@3"), or ORIGINAL."""
        if self.format is None:
            return ORIGINAL
        return str(self.format) if self.width is None else f"{self.format}@{self.width}"

    @property
    def label(self) -> str:
        """`format_name`; the method too unless it is rounding to nearest."""
        return self.format_name if self.method in ("rtn", ORIGINAL) else f"{self.format_name} {self.method}"

    @property
    def bits(self) -> int:
        """Of a code; not of the model as it is."""
        assert self.format is not None
        return self.width or self.format.bits

    @property
    def block_size(self) -> int:
        """Weights that share a scale; 0 for one scale per row, and for the model as it is."""
        return self.format.block_size if isinstance(self.format, QuantFormat | NestedFormat) else 0


@dataclass(frozen=True)
class LeftOut:
    """A combination that does not exist.

    Attributes:
        what: the combination ("float-e3, 3 bits, blocks of 64").
        why: the reason.
    """

    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


BASELINE = Cell(ORIGINAL, None)


def expand(
    bits: Sequence[int], dtypes: Sequence[str], block_sizes: Sequence[int], methods: Sequence[str]
) -> tuple[list[Cell], list[LeftOut]]:
    """All combinations, wide ones first, and those that cannot be with their reasons. No format comes twice.

    Args:
        bits: widths (parse_bits).
        dtypes: names of data types, checked here.
        block_sizes: weights that share a scale; 0 for one scale per row.
        methods: names of kbit.quantizers.methods.

    Raises:
        UsageError: a name is unknown, a list is empty, or a data type, block size or method fits no combination.
    """
    axes: dict[str, Sequence[object]] = {
        "--bits": bits, "--dtypes": dtypes, "--block-sizes": block_sizes, "--methods": methods
    }  # fmt: skip
    for flag, given in axes.items():
        if not given:
            raise UsageError(f"{flag} is empty: name at least one")
    for block in block_sizes:
        try:
            QuantFormat(block_size=block)
        except UsageError as error:
            raise UsageError(f"--block-sizes {block}: {error}") from None
    cells: dict[Cell, None] = {}
    left_out: dict[LeftOut, None] = {}
    used: set[tuple[str, object]] = set()  # values that occur in a combination that exists
    reasons: dict[tuple[str, object], str] = {}  # why a value's first impossible combination is impossible
    for method, width, dtype, block in product(methods, sorted(bits, reverse=True), dtypes, block_sizes):
        values: list[tuple[str, object]] = list(zip(axes, (width, dtype, block, method), strict=True))
        found = _format_or_reason(method, width, dtype, block, bits)
        if not isinstance(found, str):
            cells[Cell(method, found, width if isinstance(found, NestedFormat) else None)] = None
            used.update(values)
            continue
        blocks = f"blocks of {block}" if block else "one scale per row"
        left_out[LeftOut(f"{method}, {dtype}, {width} bits, {blocks}", found)] = None
        for pair in values:
            reasons.setdefault(pair, found)
    for flag in ("--dtypes", "--methods"):  # a width that no data type has is left out, no error
        for value in axes[flag]:
            if (flag, value) not in used:
                raise UsageError(f"{flag} {value}: {reasons[flag, value]}")
    # A store's widths one after another: whoever has rounded it reads all of them.
    ladders = sorted((c for c in cells if c.width is not None), key=lambda cell: (cell.method, str(cell.format)))
    return [*(cell for cell in cells if cell.width is None), *ladders], list(left_out)


def _format_or_reason(method: str, bits: int, dtype: str, block_size: int, widths: Sequence[int]) -> AnyFormat | str:
    chosen = get_method(method)
    own = chosen.format(bits, fast=False) if isinstance(chosen, CalibratedRounding) else None
    if isinstance(own, TrellisFormat) and not TrellisFormat.claims(dtype):
        return own
    try:
        format = make_format(dtype, bits, block_size, widths)
    except UsageError as error:
        return str(error)
    return chosen.refuses(format) or format


def make_format(dtype: str, bits: int, block_size: int, widths: Sequence[int] = ()) -> AnyFormat:
    """The format of a data type's name at a width and a block size.

    Args:
        dtype: see above.
        bits: the width.
        block_size: weights that share a scale; 0 for one scale per row; trellises have none.
        widths: all of them, for one store; none: the one.

    Raises:
        UsageError: there is none.
    """
    base, *flags = dtype.strip().lower().split("-")
    if base == TrellisFormat.family:
        return TrellisFormat.parse("-".join([f"{base}{bits}", *flags]))
    if base == NESTED:
        low, high = min((bits, *widths)), max((bits, *widths))
        blocks = f"b{block_size}" if block_size else "row"
        return NestedFormat.parse("-".join([f"{base}{low}..{high}", blocks, *flags]))
    split = [match for match in map(_EXPONENT.fullmatch, flags) if match]
    text = f"{base}{bits}"
    if split:
        exponent = int(split[0][1])
        if base != "float" or len(split) > 1:
            raise UsageError(f"{dtype!r} is no data type: exponent bits are said once, and of floats")
        if not 1 <= exponent <= bits - 1:
            raise UsageError(f"{exponent} exponent bits do not fit a {bits}-bit float (one bit is the sign)")
        text += f"e{exponent}m{bits - 1 - exponent}"
        flags.remove(split[0][0])
    text += f"-b{block_size}" if block_size else "-row"
    return QuantFormat.parse("-".join([text, *flags]))


def dtype_label(format: AnyFormat) -> str:
    """The name under which a format's data type stands in a table: what `make_format` takes."""
    if isinstance(format, TrellisFormat):
        return str(format).replace(f"{format.width:g}", "", 1)
    if isinstance(format, NestedFormat):
        return NESTED if format.scale_dtype == "fp16" else f"{NESTED}-{format.scale_dtype}"
    parts = [format.dtype]
    if format.dtype == "float" and format.exponent_bits != min(2, format.bits - 1):
        parts.append(f"e{format.exponent_bits}")
    if format.asymmetric:
        parts.append("asym")
    if format.grid not in (None, "ocp"):
        parts.append(str(format.grid))
    if format.scale_dtype != "fp16":
        parts.append(format.scale_dtype)
    if format.double_quant:
        parts.append("dq")
    return "-".join(parts)


def parse_bits(text: str) -> list[int]:
    """ "2..8" or "2,3,4" or a mixture, as widths in ascending order.

    Raises:
        UsageError: not widths, or not from 2 to 8.
    """
    found: set[int] = set()
    for part in split_list(text, "--bits"):
        match = _RANGE.fullmatch(part)
        if match is None and not (part.isdigit() and part.isascii()):
            raise UsageError(f"--bits {text}: {part!r} is not a width: write 2..8 or 2,3,4")
        low, high = (int(match[1]), int(match[2])) if match else (int(part), int(part))
        if not MIN_BITS <= low <= high <= MAX_BITS:
            raise UsageError(f"--bits {text}: {part} is not within {MIN_BITS}..{MAX_BITS}")
        found |= set(range(low, high + 1))
    return sorted(found)


def parse_blocks(text: str) -> list[int]:
    """ "64,128,row" as numbers; "row" is 0.

    Raises:
        UsageError: something is neither a number nor "row".
    """
    return _each(text, "--block-sizes", _block)


def _block(part: str) -> int:
    if part == "row":
        return 0
    if not (part.isdigit() and part.isascii()) or len(part) > 6 or int(part) == 0:
        raise UsageError(f"--block-sizes: {part!r} is neither a number of weights nor row: write 64,128,row")
    return int(part)


def split_list(text: str, flag: str) -> list[str]:
    """The parts of a list with commas, lower case, each once.

    Raises:
        UsageError: there is none, or one is empty.
    """
    parts = [part.strip().lower() for part in text.split(",")]
    if not all(parts):
        raise UsageError(f"{flag} {text!r}: there is nothing between two commas: write a list like 64,128")
    return list(dict.fromkeys(parts))


def _each(text: str, flag: str, read: Callable[[str], T]) -> list[T]:
    return list(dict.fromkeys(read(part) for part in split_list(text, flag)))
