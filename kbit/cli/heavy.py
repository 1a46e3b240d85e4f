"""What a command does once it knows that it will compute."""

from __future__ import annotations

import gc


def import_torch() -> None:
    """Imports torch, and exempts all there is by then from garbage collection.

    Importing torch makes some 170,000 objects that live as long as the process. Every full collection would visit them
    all: 0.08 s, once while a model loads (0.3 s) and then now and then between two tokens; and 0.4 s at the end, when
    the interpreter collects what is left. (What comes later must be collected then: matrices that an exception's
    traceback holds, for example, which nanobind would report as leaked.)
    """
    import torch  # noqa: F401

    gc.freeze()
