"""Widths as models: MODEL:3 is MODEL at 3 bits, read from a nested file or rounded when it is first asked for."""

from __future__ import annotations

from pathlib import Path

from kbit.checkpoint.local_models import widths_folder


def at_width(model: str, bits: int) -> tuple[str, int | None]:
    """What `load_model` is given for a model at a width: (model, bits).

    A nested model is read at the width, in memory that its widths share; another one has a folder of its own.

    Raises:
        UsageError: a nested model that does not serve this width.
        KbitError: as `rounded`.
    """
    from kbit.checkpoint.narrowed import narrow_check, widths_of
    from kbit.models.opening import open_model

    with open_model(model) as source:
        widths = widths_of(source)
    if not widths:
        return str(rounded(model, bits)), None
    narrow_check(model, widths, bits)
    return model, bits


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
