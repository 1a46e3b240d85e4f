"""Nothing of a text is left once it went back through a layer: not until garbage is collected, but at once."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np

from kbit.backends.reference.gradients import GradientOps
from kbit.calibration.measure import measure_factors
from kbit.checkpoint.resolve import open_model


def test_operations_are_let_go(tiny_model: Path) -> None:
    """They hold keys and values, which are part of the graph; the graph must not hold them."""
    ids = np.random.default_rng(0).integers(0, 64, (4, 16))
    gc.collect()
    gc.disable()
    try:
        with open_model(str(tiny_model)) as source:
            for _ in measure_factors(source, ids, threads=1):
                pass
        assert not [found for found in gc.get_objects() if issubclass(type(found), GradientOps)]
    finally:
        gc.enable()
