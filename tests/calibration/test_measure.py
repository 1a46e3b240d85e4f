"""Factors against what they stand for: gradients of the whole model, and divergences of errors that are tried."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kbit.backends.reference.backend import ReferenceBackend
from kbit.backends.reference.weight import ReferenceWeight
from kbit.calibration.factors import Factors
from kbit.calibration.measure import LayerFactors, measure_factors
from kbit.calibration.store import CalibrationFolder
from kbit.checkpoint.resolve import open_model
from kbit.evaluate.compare import compare
from kbit.evaluate.sensitivity import matrix_names
from kbit.host.errors import KbitError
from kbit.models.load import load_decoder
from kbit.text.windows import Windows

EMBEDDING = "model.embed_tokens.weight"


def ids(count: int, length: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 260, (count, length))


def measured(model: Path, tokens: NDArray[np.int64], **options: object) -> dict[str, Factors]:
    found: dict[str, Factors] = {}
    with open_model(str(model)) as source:
        for layer in measure_factors(source, tokens, **{"threads": 2, **options}):  # type: ignore[arg-type]
            found |= layer.factors
    return found


@pytest.fixture(scope="module")
def factors(tiny_model: Path) -> dict[str, Factors]:
    return measured(tiny_model, ids(64, 32))


def test_every_matrix_is_measured(tiny_model: Path, factors: dict[str, Factors]) -> None:
    with open_model(str(tiny_model)) as source:
        matrices = {name: info.shape for name, info in source.tensors.items() if len(info.shape) == 2}
    assert factors.keys() == matrices.keys()
    for name, (rows, columns) in matrices.items():
        own = factors[name]
        assert own.inputs.shape == (columns, columns)
        assert torch.equal(own.inputs, own.inputs.T)
        assert float(own.inputs.diagonal().min()) >= 0
        assert own.outputs is not None
        if name != EMBEDDING:  # H_O has less of the heavy tokens
            assert own.outputs.shape == (rows, rows)
            assert 0.7 * float(own.inputs.trace()) <= own.trace <= float(own.inputs.trace()) * (1 + 1e-4)


def test_divergence_of_a_tied_embedding(tiny_model: Path, factors: dict[str, Factors]) -> None:
    """Both uses of it together."""
    tokens = ids(16, 33, seed=5)
    with open_model(str(tiny_model)) as source:
        original, noisy = (load_decoder(source, ReferenceBackend()) for _ in range(2))
    weight = original.weights.embedding
    assert isinstance(weight, ReferenceWeight)
    values = weight.data
    assert isinstance(values, torch.Tensor)
    error = torch.randn(values.shape, generator=torch.Generator().manual_seed(9)) * values.std() * 0.03
    both = noisy.weights.embedding
    assert both is noisy.weights.head
    assert isinstance(both, ReferenceWeight)
    assert isinstance(both.data, torch.Tensor)
    both.data.add_(error)
    tried = compare(noisy, original, Windows("gptq", tokens, 0, tokens.size)).kl_mean
    assert 0.6 * tried <= factors[EMBEDDING].divergence(error) <= 1.5 * tried


def test_divergence_is_what_an_error_costs(tiny_model: Path, factors: dict[str, Factors]) -> None:
    """Noise in one matrix at a time, tried on other tokens; both sides are estimates from some thousand tokens."""
    tokens = ids(16, 33, seed=5)
    windows = Windows("gptq", tokens, 0, tokens.size)
    with open_model(str(tiny_model)) as source:
        original = load_decoder(source, ReferenceBackend())
        for place, (name, weight) in enumerate(matrix_names(original)):
            assert isinstance(weight, ReferenceWeight)
            values = weight.data
            assert isinstance(values, torch.Tensor)
            error = torch.randn(values.shape, generator=torch.Generator().manual_seed(place)) * values.std() * 0.03
            noisy = load_decoder(source, ReferenceBackend())
            layer, slot = divmod(place, len(matrix_names(original)) // 2)
            slots = list(noisy.weights.layers[layer].matrices)
            noisy.weights.layers[layer].matrices[slots[slot]] = ReferenceWeight(values + error)  # type: ignore[index]
            tried = compare(noisy, original, windows).kl_mean
            told = factors[name].divergence(error)
            assert 0.6 * tried <= told <= 1.5 * tried, name


def test_threads_and_pieces_do_not_show(tiny_model: Path, factors: dict[str, Factors]) -> None:
    again = measured(tiny_model, ids(64, 32), threads=3)
    for name, own in factors.items():
        assert torch.equal(own.inputs, again[name].inputs)
        assert own.outputs is not None
        assert torch.equal(own.outputs, again[name].outputs)


def test_layers_at_hand_are_passed_through(tiny_model: Path, factors: dict[str, Factors]) -> None:
    found = measured(tiny_model, ids(64, 32), skip=lambda layer: layer != 0)
    assert {name.split(".")[2] for name in found} == {"0"}
    assert all(torch.equal(own.inputs, factors[name].inputs) for name, own in found.items())


def test_without_gradients_inputs_count_alike(tiny_model: Path) -> None:
    found = measured(tiny_model, ids(8, 16), gradients=False)
    assert EMBEDDING not in found
    own = found["model.layers.0.self_attn.q_proj.weight"]
    assert (own.weighted, own.outputs) == (False, None)
    # RMS norms leave features of mean square w^2 = 1 or so: E x x' has a trace of the width.
    assert own.trace == pytest.approx(32, rel=0.3)


def test_broken_activations_are_refused(tmp_path: Path, write_model: object) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_model(tmp_path / "m", dtype=torch.float32)  # type: ignore[operator]
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(3e38)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(KbitError, match="layer 1 are not finite"):
        measured(folder, ids(2, 8))


def test_a_folder_keeps_what_was_measured(tmp_path: Path, factors: dict[str, Factors]) -> None:
    identity = {"model": "m", "request": {"gradients": True}}
    folder = CalibrationFolder(tmp_path / "c", identity)
    assert not folder.has(1)
    folder.write(LayerFactors(1, factors))
    found = CalibrationFolder(tmp_path / "c", identity).read(1)
    assert found.keys() == factors.keys()
    for name, own in factors.items():
        again = found[name]
        assert again.coherence == own.coherence
        assert torch.equal(again.inputs.diagonal(), own.inputs.diagonal())
        scale = own.inputs.diagonal().sqrt()
        assert ((again.inputs - own.inputs).abs() <= 2**-11 * scale * scale[:, None] + 1e-30).all()
    with pytest.raises(KbitError, match="another calibration"):
        CalibrationFolder(tmp_path / "c", {**identity, "model": "n"})
    (tmp_path / "c" / "layer-00001.safetensors").write_bytes(b"damaged")
    with pytest.raises(KbitError, match="damaged"):
        folder.read(1)
