"""What a person sees while a model loads: nothing, unless it takes a while."""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import perf_counter

# Mapping a model takes less; preparing one of a billion weights for the first time takes seconds.
_PATIENCE = 0.7


def loading_line() -> Callable[[int, int], None] | None:
    """A `progress` for `load_model`: one line on standard error that rewrites itself; None where that is no terminal.

    Plain, since rich takes a tenth of a second to import, which is what loading should take.
    """
    if not sys.stderr.isatty():
        return None
    start = perf_counter()
    shown = False

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if done < total and perf_counter() - start > _PATIENCE:
            shown = True
            sys.stderr.write(f"\rloading weights: {done * 100 // total:3d} %")
            sys.stderr.flush()
        elif shown and done >= total:
            sys.stderr.write("\r" + " " * 24 + "\r")
            sys.stderr.flush()
            shown = False

    return progress
