"""What goes into an encoder's matrices, measured for methods that need no gradients, is what transformers' do."""

from __future__ import annotations

from pathlib import Path

import encoder_cases as cases
import numpy as np
import pytest
import torch

from kbit.calibration.measure import measure_factors
from kbit.calibration.request import CalibrationRequest
from kbit.calibration.run import calibration_tokens
from kbit.models.opening import open_model
from kbit.text.datasets import TextData

# The hidden states between layers are kept in bfloat16: 2^-9 of each number, in both factors of a product.
RELATIVE = 2 * 2.0**-8

# The matrix whose input is measured, and the module that has it.
INPUTS = {
    "Bert": {
        "encoder.layer.1.attention.self.query.weight": "encoder.layer.1.attention.self.query",
        "encoder.layer.1.output.dense.weight": "encoder.layer.1.output.dense",
    },
    "MPNet": {
        "encoder.layer.1.attention.attn.o.weight": "encoder.layer.1.attention.attn.o",
        "encoder.layer.1.output.dense.weight": "encoder.layer.1.output.dense",
    },
    "ModernBert": {
        "layers.2.attn.q.weight": "layers.2.attn.Wqkv",
        "layers.1.attn.Wo.weight": "layers.1.attn.Wo",
        "layers.3.mlp.Wo.weight": "layers.3.mlp.Wo",
    },
}


@pytest.mark.parametrize("family", INPUTS)
def test_second_moments_of_inputs(family: str, tmp_path: Path) -> None:
    model = cases.model_of(family)
    cases.saved(model, tmp_path)
    ids = np.array(cases.ids_of(150, 150, 150), dtype=np.int64)
    seen: dict[str, torch.Tensor] = {}
    modules = dict(model.named_modules())
    for name, module in INPUTS[family].items():
        modules[module].register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0].flatten(0, -2)}))
    with torch.no_grad():
        model(torch.from_numpy(ids))
    with open_model(str(tmp_path)) as source:
        layers = list(measure_factors(source, ids, gradients=False, threads=2))
    found = {name: factors for layer in layers for name, factors in layer.factors.items()}
    for name, x in seen.items():
        wanted = x.T @ x / len(x)
        assert float((found[name].inputs - wanted).abs().max() / wanted.abs().max()) <= RELATIVE


def test_texts_are_cut_with_special_tokens_around_each(tmp_path: Path) -> None:
    cases.saved(cases.model_of("Bert"), tmp_path)
    text = TextData("words", "the cat sat on the mat . " * 20, "plain", "", ())
    with open_model(str(tmp_path)) as source:
        found = calibration_tokens(source, CalibrationRequest((text,), 36, False), 3, 12)
    assert found.shape == (3, 12)
    assert (found[:, 0] == 2).all()
    assert (found[:, -1] == 3).all()
    assert not np.isin(found[:, 1:-1], [2, 3]).any()
