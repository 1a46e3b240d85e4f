"""What --nested and --anchor of `kbit quantize` ask for, and which flags say the rest of a format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kbit.host.errors import UsageError

if TYPE_CHECKING:
    from kbit.formats.codec import Codec


# What gives each field of a format.
FORMAT_FLAGS = {
    "dtype": "--dtype",
    "bits": "--bits",
    "block_size": "--block-size",
    "asymmetric": "--asym",
    "exponent_bits": "--exponent-bits",
    "grid": "--float-grid",
    "scale_dtype": "--scale-dtype",
    "double_quant": "--double-quant",
}


def nested_format(nested: str, fields: Mapping[str, Any], others: Mapping[str, object]) -> Codec:
    """The format that --nested asks for.

    Args:
        nested: its value, "2..8".
        fields: of a format, those that were given, by name.
        others: flags that have no meaning beside it.

    Raises:
        UsageError: widths that do not exist, or flags that have no meaning beside them.
    """
    from kbit.formats.nested import NestedFormat, parse_widths

    low, high = parse_widths(nested)
    taken = {key: fields[key] for key in ("block_size", "scale_dtype") if key in fields}
    left = {FORMAT_FLAGS[name]: value for name, value in fields.items() if name not in taken}
    flag = next((flag for flag, value in (*others.items(), *left.items()) if value is not None), None)
    if flag is not None:
        raise UsageError(f"{flag}: --nested {nested} has every width, and a data type of its own; drop one of the two")
    return NestedFormat(low, high, **taken)


def check_anchor(anchor: int, codec: Codec, named_by: str | None) -> None:
    """
    Args:
        anchor: the value of --anchor.
        codec: the format of linear weights.
        named_by: the flag that names a format, if one does.

    Raises:
        UsageError: --anchor is none of the format's widths.
    """
    from kbit.formats.nested import NestedFormat

    if not isinstance(codec, NestedFormat):
        other = "" if named_by is None else f" in place of {named_by}"
        raise UsageError(f"--anchor {anchor}: is a width of a nested file; add --nested 2..8{other}")
    if not codec.low <= anchor <= codec.bits:
        raise UsageError(f"--anchor {anchor}: {codec} has {codec.low} to {codec.bits} bits; choose one")
