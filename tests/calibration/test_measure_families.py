"""Factors of models with caps, factors, norms of heads and several rotations: what an error in a matrix then costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from decoder_cases import DictSource, tame_tensors, tiny_config
from numpy.typing import NDArray

from kbit.backends.reference.backend import ReferenceBackend
from kbit.backends.reference.weight import ReferenceWeight
from kbit.calibration.factors import Factors
from kbit.calibration.measure import measure_factors
from kbit.calibration.store import CalibrationFolder
from kbit.checkpoint.source import CheckpointSource
from kbit.evaluate.compare import compare
from kbit.models.decoder import Decoder
from kbit.models.load import load_decoder
from kbit.models.opening import open_model
from kbit.models.params import parameters
from kbit.text.windows import Windows


def ids(count: int, length: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 260, (count, length))


def factors_of(source: CheckpointSource) -> dict[str, Factors]:
    found: dict[str, Factors] = {}
    for layer in measure_factors(source, ids(48, 32, seed=0), threads=2):
        found |= layer.factors
    return found


def assert_told(
    source: CheckpointSource,
    original: Decoder,
    factors: Mapping[str, Factors],
    place: tuple[int | None, str],
    *,
    texts: int = 16,
    seed: int | None = None,
    size: float = 1e-3,
) -> str:
    """Noise in one matrix costs what its factors say, tried on other tokens; both sides are estimates.

    Args:
        source: the model.
        original: it.
        factors: of its matrices.
        place: layer (None: the embedding) and slot of the matrix.
        texts: of 33 tokens.
        seed: of the noise; None: the slot's length.
        size: of the noise, in those of the matrix.

    Returns:
        The matrix's name.
    """
    layer, slot = place
    noisy = load_decoder(source, ReferenceBackend())
    weight = noisy.weights.embedding if layer is None else noisy.weights.layers[layer].matrices[slot]
    assert isinstance(weight, ReferenceWeight)
    assert isinstance(weight.data, torch.Tensor)
    generator = torch.Generator().manual_seed(len(slot) if seed is None else seed)
    error = torch.randn(weight.data.shape, generator=generator) * weight.data.std() * size
    weight.data.add_(error)
    tokens = ids(texts, 33, seed=5)
    tried = compare(noisy, original, Windows("gptq", tokens, 0, tokens.size)).kl_mean
    name = next(p.name for p in parameters(original.spec) if (p.layer, p.slot) == place)
    told = factors[name].divergence(error)
    assert 0.4 * tried <= told <= 2.5 * tried, (slot, told, tried)
    return name


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "name", ["gemma2", "granite", "hunyuan", "smollm3", "ministral3", "qwen3_5", "opt-350m", "apertus", "bitnet"]
)
def test_divergence_is_what_an_error_costs(published: Callable[[str], Path], name: str) -> None:
    """Noise in one matrix at a time, as for a Llama (test_measure.py): in a tied or untied embedding, and two of a layer."""
    with open_model(str(published(name))) as source:
        factors, original = factors_of(source), load_decoder(source, ReferenceBackend())
        places: list[tuple[int | None, str]] = [(None, "embedding"), (1, "q"), (1, "down")]
        if name == "qwen3_5":
            places = [(0, "delta_qkv"), (0, "delta_z"), (0, "delta_out"), (1, "q")]
        for place in places:
            assert_told(source, original, factors, place)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["gemma4-e", "gemma4-dense"])
def test_divergence_where_layers_differ(published: Callable[[str], Path], name: str) -> None:
    """Keys that several layers attend to cost what all of them make of an error; keys may be values, too."""
    with open_model(str(published(name))) as source:
        factors, original = factors_of(source), load_decoder(source, ReferenceBackend())
        full = next(at for at, window in enumerate(original.spec.windows) if window is None)
        others = {p.name for p in parameters(original.spec) if p.role == "linear"}
        assert others < factors.keys()
        for slot in ("k", "v", "o", "layer_up", "layer_gate", "down"):
            if slot in original.weights.layers[full].matrices:
                assert_told(source, original, factors, (full, slot))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "size"),
    [("qwen3-moe", 1e-3), ("gpt-oss", 1e-3), ("gemma4-moe", 1e-3), ("llama4", 1e-4), ("phimoe", 1e-4)],
)
def test_divergence_of_experts(published: Callable[[str], Path], name: str, size: float) -> None:
    """Factors are of the tokens that went to an expert, per token of the text: noise in one costs what they say.

    (Where a token goes to one expert, or weights have steps, noise of 1e-3 in one layer tips who is chosen in the next.)
    """
    with open_model(str(published(name))) as source:
        factors, original = factors_of(source), load_decoder(source, ReferenceBackend())
        for slot in ("experts.0.gate", "experts.1.up", "experts.2.down"):
            matrix = assert_told(source, original, factors, (1, slot), texts=24, seed=3, size=size)
            assert not factors[matrix].borrowed


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("gradients", [False, True])
def test_an_expert_without_tokens_borrows_from_the_others(tmp_path: Path, gradients: bool) -> None:
    """Its factors are the mean of those of its layer's experts, and the folder names it."""
    config = tiny_config("gpt-oss")
    tensors = tame_tensors(config)
    bias = "model.layers.1.mlp.router.bias"
    tensors[bias] = tensors[bias] - torch.tensor([0.0, 0.0, 0.0, 1e4, 0.0])  # type: ignore[operator]
    source = DictSource(config, tensors)
    # A vocabulary of 131, and enough texts that all others are chosen.
    text = np.random.default_rng(1).integers(0, 131, (16, 32))
    folder = CalibrationFolder(tmp_path / "kept", {"request": {"gradients": gradients}})
    for layer in measure_factors(source, text, gradients=gradients, threads=2):
        folder.write(layer)
    missing = [f"model.layers.1.mlp.experts.3.{slot}_proj.weight" for slot in ("down", "gate", "up")]
    assert [name for name in folder.borrowed() if ".1.mlp." in name] == missing
    found = folder.read(1)
    for name in missing:
        others = [found[name.replace("experts.3", f"experts.{other}")] for other in (0, 1, 2, 4)]
        assert found[name].borrowed
        assert not any(other.borrowed for other in others)
        mean = torch.stack([other.inputs for other in others]).mean(0)
        # Kept in 16 bits, relative to the roots of diagonals.
        assert float((found[name].inputs - mean).norm() / mean.norm()) < 2e-3
        assert (found[name].outputs is not None) == gradients
