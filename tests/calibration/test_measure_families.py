"""Factors of models with caps, factors, norms of heads and several rotations: what an error in a matrix then costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kbit.backends.reference.backend import ReferenceBackend, ReferenceWeight
from kbit.calibration.measure import measure_factors
from kbit.evaluate.compare import compare
from kbit.models.load import load_decoder
from kbit.models.opening import open_model
from kbit.text.windows import Windows


def ids(count: int, length: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 260, (count, length))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["gemma2", "granite", "hunyuan", "smollm3", "ministral3"])
def test_divergence_is_what_an_error_costs(published: Callable[[str], Path], name: str) -> None:
    """Noise in one matrix at a time, as for a Llama (test_measure.py): in a tied or untied embedding, and two of a layer."""
    tokens = ids(16, 33, seed=5)
    windows = Windows("gptq", tokens, 0, tokens.size)
    with open_model(str(published(name))) as source:
        factors = {}
        for layer in measure_factors(source, ids(48, 32, seed=0), threads=2):
            factors |= layer.factors
        original = load_decoder(source, ReferenceBackend())
        for slot in ("embedding", "q", "down"):
            noisy = load_decoder(source, ReferenceBackend())
            weight = noisy.weights.embedding if slot == "embedding" else noisy.weights.layers[1].matrices[slot]
            assert isinstance(weight, ReferenceWeight)
            assert isinstance(weight.data, torch.Tensor)
            generator = torch.Generator().manual_seed(len(slot))
            error = torch.randn(weight.data.shape, generator=generator) * weight.data.std() * 1e-3
            weight.data.add_(error)
            tensor = "model.embed_tokens" if slot == "embedding" else f"model.layers.1.{PLACES[slot]}_proj"
            tried = compare(noisy, original, windows).kl_mean
            told = factors[f"{tensor}.weight"].divergence(error)
            assert 0.4 * tried <= told <= 2.5 * tried, (slot, told, tried)


PLACES = {"q": "self_attn.q", "down": "mlp.down"}
