"""A model whose keys have biases of 300: quantized keys must not feel them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kbit.engine.loader import load_model

BIAS = 300.0
TEXT = (
    "It was a bright morning, and the two of them walked down to the shore before anyone in the house was awake. " * 8
)


@pytest.fixture(scope="module")
def biased(novels_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model, its projections with biases: zeros, but for those of keys in the six slowest pairs of every head."""
    folder = tmp_path_factory.mktemp("biased") / "model"
    shutil.copytree(novels_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    dim, heads = config["head_dim"], config["num_key_value_heads"]
    bias = torch.zeros(heads, dim)
    bias[:, dim // 2 - 6 : dim // 2] = BIAS
    bias[:, dim - 6 :] = -BIAS
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}.self_attn."
        for part in "qvo":
            tensors[f"{name}{part}_proj.bias"] = torch.zeros(tensors[f"{name}{part}_proj.weight"].shape[0])
        tensors[f"{name}k_proj.bias"] = bias.flatten().clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    return str(folder)


def divergence(folder: str, kv_bits: str) -> float:
    """Mean KL of a text's predictions to those with a cache of float32."""
    rows = []
    for kv in ("32", kv_bits):
        loaded = load_model(folder, backend="native", threads=1, compute="fp32", kv_bits=kv)
        ids = torch.tensor(loaded.tokenizer.encode(TEXT))[None, :200]
        assert ids.shape[1] == 200
        rows.append(loaded.decoder.forward(ids, loaded.decoder.new_cache(1, 200))[0].log_softmax(-1))
    return float((rows[0].exp() * (rows[0] - rows[1])).sum(-1).mean())


@pytest.mark.parametrize("kv_bits", ["8", "4", "8,4"])
def test_biases_cost_nothing(novels_folder: str, biased: str, kv_bits: str) -> None:
    """.22 against .0026 at 4 bits, where codes had the biases in them."""
    plain, found = divergence(novels_folder, kv_bits), divergence(biased, kv_bits)
    assert found <= 1.5 * plain + 1e-4
