"""Widths as models: MODEL:3 is MODEL at 3 bits, read from a nested file or rounded when it is first asked for."""

from __future__ import annotations

from pathlib import Path

from kbit.checkpoint.local_models import widths_folder
from kbit.formats.quant_format import MAX_BITS, MIN_BITS
from kbit.host.errors import UsageError


def at_width(model: str, bits: float) -> tuple[str, float | None]:
    """What `load_model` is given for a model at a number of bits: (model, bits).

    A nested model is read at these, in memory that its rungs share; another one has a folder of its own.

    Raises:
        UsageError: a nested model that does not serve so many, or a fraction of another one.
        KbitError: as `rounded`.
    """
    from kbit.checkpoint.ladder import Ladder
    from kbit.models.opening import open_model

    with open_model(model) as source:
        ladder = Ladder.of(source)
    if not ladder:
        return str(rounded(model, whole_bits(model, bits))), None
    ladder.check(model, bits)
    return model, bits


def whole_bits(model: str, bits: float) -> int:
    """
    Raises:
        UsageError: no whole number of bits that a model can be rounded to.
    """
    if not MIN_BITS <= bits <= MAX_BITS or bits != int(bits):
        raise UsageError(
            f"{model} at {bits:g} bits: it is rounded to a whole number, {MIN_BITS} to {MAX_BITS}; kbit quantize makes "
            "files of other numbers (--bits 3.5), and of all numbers at once (--nested 2..8)"
        )
    return int(bits)


def rounded(model: str, bits: int) -> Path:
    """The folder of a model rounded to nearest, `nf` in blocks of 64, made where it is not there yet.

    A conversion that was interrupted goes on; one by another plan, or of another file, has another folder.

    Raises:
        KbitError: the model cannot be opened or quantized, or there is no room.
    """
    from filelock import FileLock

    from kbit.formats.quant_format import QuantFormat
    from kbit.models.opening import open_model
    from kbit.quantizers.convert import convert
    from kbit.quantizers.plan import make_plan

    with open_model(model) as source:
        plan = make_plan(source, QuantFormat.parse(f"nf{bits}-b64"))
        folder = widths_folder()
        folder.mkdir(parents=True, exist_ok=True)
        out = folder / f"{source.path.stem[:40]}-{bits}-{plan.plan_id[:16]}"
        with FileLock(f"{out}.lock"):
            convert(source, plan, out)
    return out
