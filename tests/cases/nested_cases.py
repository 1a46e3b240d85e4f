"""Nested folders without a calibration; with mixed widths, of which any order is as good as another to who reads them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from error_cases import run_command

from kbit.checkpoint.ladder import Order
from kbit.formats.nested import NestedFormat
from kbit.models.opening import open_model
from kbit.quantizers.convert import convert
from kbit.quantizers.nested_order import NestedOrder
from kbit.quantizers.plan import make_plan


def some_order(names: Sequence[str], steps: int, seed: int = 0) -> Order:
    """Each matrix so many times, anyhow."""
    places = [place for place in range(len(names)) for _ in range(steps)]
    random.Random(seed).shuffle(places)
    return Order(tuple(names), tuple(places))


def write_nested(model: str | Path, out: Path, widths: str, *flags: str) -> Path:
    """What `kbit quantize --nested` leaves of a model, rounded to nearest; widths as "2..6"."""
    code, _, said = run_command(["quantize", str(model), "--nested", widths, "--method", "rtn", *flags, "-o", str(out)])
    assert code == 0, said
    return out


def write_mixed(model: Path, out: Path, format: NestedFormat, overrides: Sequence[tuple[str, str]] = ()) -> Path:
    """A model rounded to nearest, in a nested format with an order."""
    with open_model(str(model)) as source:
        plan = make_plan(source, format, overrides=overrides)
        names = [tensor.source.name for tensor in plan.tensors if tensor.format == format]
        order = some_order(names, format.bits - format.low)
        convert(source, replace(plan, nested=NestedOrder(order, {})), out)
    return out
