"""The codecs there are, and formats by their strings."""

from __future__ import annotations

from kbit.formats.codec import Codec
from kbit.formats.quant_format import QuantFormat

# By family. The first that claims a format's string reads it; the planes codec, which claims all, comes last.
CODECS: dict[str, type[Codec]] = {}


def register(codec: type[Codec]) -> type[Codec]:
    """Make a codec's formats known; also usable as a class decorator.

    Raises:
        ValueError: another codec has this family's name.
    """
    if CODECS.setdefault(codec.family, codec) is not codec:
        raise ValueError(f"codec {codec.family!r} is registered already")
    return codec


def parse_format(text: str) -> Codec:
    """A format by its string, whatever its codec.

    Raises:
        UsageError: no codec reads it.
    """
    claiming = (codec for codec in CODECS.values() if codec is not QuantFormat and codec.claims(text))
    return next(claiming, QuantFormat).parse(text)


register(QuantFormat)
