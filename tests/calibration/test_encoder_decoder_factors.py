"""What goes into the matrices of both stacks, measured for methods that need no gradients, is what transformers' do."""

from __future__ import annotations

from pathlib import Path

import encoder_decoder_cases as cases
import numpy as np
import pytest
import torch
from piece_cases import save_marian

from kbit.calibration.measure_both import measure_both, written_texts
from kbit.models.opening import open_model

# The hidden states between the encoder's layers are kept in bfloat16: 2^-9 of each number, in both factors of a product,
# after each of its three layers; two of the decoder's make it twice as much at most, each.
RELATIVE = 4 * 3 * 2.0**-8

# Modules whose input is measured: of every kind of block in both stacks.
MODULES = {
    "t5": [
        "encoder.block.2.layer.1.DenseReluDense.wo",
        "decoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.1.layer.1.EncDecAttention.q",
        "decoder.block.1.layer.1.EncDecAttention.k",
        "decoder.block.1.layer.1.EncDecAttention.o",
        "decoder.block.1.layer.2.DenseReluDense.wo",
    ],
    "marian": [
        "model.encoder.layers.1.self_attn.q_proj",
        "model.decoder.layers.1.encoder_attn.v_proj",
        "model.decoder.layers.1.encoder_attn.out_proj",
        "model.decoder.layers.1.fc2",
    ],
}


@pytest.mark.parametrize("name", MODULES)
def test_second_moments_of_inputs(name: str, tmp_path: Path) -> None:
    """Of texts of different lengths; a layer that is at hand is passed through."""
    model = cases.model_of(name)
    cases.saved(model, tmp_path)
    ids, written = np.array(cases.ids_of(60, 60, 60), dtype=np.int64), cases.ids_of(9, 1, 40, seed=5)
    seen: dict[str, list[torch.Tensor]] = {module: [] for module in MODULES[name]}
    modules = dict(model.named_modules())
    for module in seen:
        modules[module].register_forward_pre_hook(lambda _, x, module=module: seen[module].append(x[0].flatten(0, -2)))
    for row, text in zip(ids.tolist(), written, strict=True):
        cases.theirs(model, row, text)
    with open_model(str(tmp_path)) as source:
        layers = list(measure_both(source, ids, written, threads=2))
        left = list(measure_both(source, ids, written, threads=1, skip=lambda layer: layer in (1, 3)))
    assert [layer.layer for layer in layers] == [0, 1, 2, 3, 4]
    assert [layer.layer for layer in left] == [0, 2, 4]
    found = {name: factors for layer in layers for name, factors in layer.factors.items()}
    again = {name: factors for layer in left for name, factors in layer.factors.items()}
    assert all(torch.equal(again[name].inputs, found[name].inputs) for name in again)
    for module, inputs in seen.items():
        x = torch.cat(inputs)
        # (All are per token that is written, whoever reads them.)
        wanted = x.T @ x / 50 if not module.startswith(("encoder", "model.encoder")) else x.T @ x / 180
        factors = found[f"{module}.weight"]
        assert not factors.weighted
        assert float((factors.inputs - wanted).abs().max() / wanted.abs().max()) <= RELATIVE


def test_what_is_written_is_drawn_by_the_model(tmp_path: Path) -> None:
    """The same at every time, of different texts, and each as it would be alone."""
    cases.saved(cases.model_of("marian"), tmp_path)
    save_marian(tmp_path)
    ids = np.array(cases.ids_of(*[12] * 20), dtype=np.int64)
    with open_model(str(tmp_path)) as source:
        found = written_texts(source, ids)
        assert found == written_texts(source, ids, threads=1)
        first = written_texts(source, ids[:1])
    assert found[:1] == first
    assert all(text[0] == 98 and 0 not in text[1:] and len(text) <= 12 for text in found)
    assert len({tuple(text) for text in found}) > 15
