"""Factors of layers of several kinds: state spaces beside attention, and layers that are one thing each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kbit.backends.reference.backend import ReferenceBackend
from kbit.backends.reference.weight import ReferenceWeight
from kbit.calibration.measure import measure_factors
from kbit.evaluate.compare import compare
from kbit.models.load import load_decoder
from kbit.models.opening import open_model
from kbit.models.params import parameters
from kbit.text.windows import Windows

# Layer and slot of matrices of every kind. An expert without a gate is one matrix, which is multiplied once.
PLACES = {
    "falcon-h1": [(1, "scan_z"), (1, "scan_x"), (0, "scan_out"), (1, "q"), (2, "o"), (1, "gate"), (1, "down")],
    "nemotron-h": [(4, "scan_x"), (4, "scan_out"), (1, "up"), (2, "q"), (3, "down"), (4, "scan_z")],
    # (Of the last layer: an error before it changes which experts are chosen, of which factors know nothing.)
    "nemotron-h-moe": [(3, "shared_up"), (3, "experts.0.up"), (3, "experts.2.down")],
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", PLACES)
def test_divergence_is_what_an_error_costs(published: Callable[[str], Path], name: str) -> None:
    """Noise in one matrix at a time, as in test_measure_families.py."""
    draws = np.random.default_rng(5)
    tokens = draws.integers(0, 260, (16, 33))
    windows = Windows("gptq", tokens, 0, tokens.size)
    with open_model(str(published(name))) as source:
        factors = {}
        for layer in measure_factors(source, draws.integers(0, 260, (48, 32)), threads=2):
            factors |= layer.factors
        original = load_decoder(source, ReferenceBackend())
        names = {(p.layer, p.slot): p.name for p in parameters(original.spec) if p.role == "linear"}
        assert set(names.values()) <= set(factors)
        for place in PLACES[name]:
            noisy = load_decoder(source, ReferenceBackend())
            weight = noisy.weights.layers[place[0]].matrices[place[1]]
            assert isinstance(weight, ReferenceWeight)
            assert isinstance(weight.data, torch.Tensor)
            generator = torch.Generator().manual_seed(len(place[1]))
            error = torch.randn(weight.data.shape, generator=generator) * weight.data.std() * 1e-3
            weight.data.add_(error)
            tried = compare(noisy, original, windows).kl_mean
            told = factors[names[place]].divergence(error)
            assert 0.4 * tried <= told <= 2.5 * tried, (place, told, tried)
