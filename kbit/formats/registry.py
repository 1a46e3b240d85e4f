"""The codecs there are, and formats by their strings."""

from __future__ import annotations

import re

from kbit.formats.codec import Codec
from kbit.formats.nested import NestedFormat
from kbit.formats.quant_format import QuantFormat
from kbit.formats.trellis import TrellisFormat

_APART = re.compile(r"-o[0-9]+$")

# By family. The first that claims a format's string reads it; what none claims goes to the planes codec.
CODECS: dict[str, type[Codec]] = {codec.family: codec for codec in (QuantFormat, TrellisFormat, NestedFormat)}


def parse_format(text: str) -> Codec:
    """A format by its string, whatever its codec.

    Raises:
        UsageError: no codec reads it.
    """
    claiming = (codec for codec in CODECS.values() if codec is not QuantFormat and codec.claims(text))
    return next(claiming, QuantFormat).parse(text)


def kind_of(name: str) -> str:
    """A format's name without how many weights it keeps apart, which differs from matrix to matrix."""
    return _APART.sub("", name)
