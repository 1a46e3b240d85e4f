"""A packed model computes what the same model does with its weights written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decoder_cases import saved_model
from error_cases import run_command
from packed_cases import awq, gptq, write_packed
from safetensors.torch import save_file

from kbit.backends.reference.backend import ReferenceBackend
from kbit.checkpoint.resolve import open_model
from kbit.formats.quant_tensor import QuantTensor
from kbit.models.canonical import canonical
from kbit.models.load import load_decoder

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "AWQ, packed": ({"quant_method": "awq", "bits": 4, "group_size": 32}, awq(32)),
    "GPTQ, packed": ({**GPTQ, "desc_act": False}, gptq(4, 32, symmetric=False, layout=1)),
    "GPTQ, dequantized": ({**GPTQ, "desc_act": True}, gptq(4, 32, symmetric=False, layout=1, ordered=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_logits(tmp_path: Path, packable_model: Path, case: str) -> None:
    """On the reference, whose products are of float32 numbers: the same numbers give the same bits."""
    section, pack = CASES[case]
    write_packed(packable_model, tmp_path / "m", section, pack)
    compare_logits(tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_packed_rows_that_are_taken_apart(tmp_path: Path, case: str) -> None:
    """Queries and gates of Qwen3.5 are in one matrix, by head: of one that is packed each gets its rows, packed."""
    section, pack = CASES[case]
    saved_model("qwen3_5", tmp_path / "model", hidden_size=64)
    write_packed(tmp_path / "model", tmp_path / "m", section, pack, only="q_proj")
    compare_logits(tmp_path)
    with canonical(open_model(str(tmp_path / "m"))) as source:
        for name in ("q_proj", "gate_proj"):
            weight = source.read_weight(f"model.layers.1.self_attn.{name}.weight")
            assert isinstance(weight, QuantTensor) == ("dequantized" not in case)
            assert weight.shape == (96, 64)


@pytest.mark.parametrize(
    ("family", "published", "parts"),
    [
        ("youtu", "kv_a_proj_with_mqa", {"kv_a_proj": 32, "k_shared_proj": 8}),
        ("youtu", "kv_b_proj", {"k_b_proj": 6 * 8, "v_b_proj": 6 * 12}),
        ("youtu", "q_proj", {"q_proj": 6 * 16}),
        ("lfm2", "conv.in_proj", {"b_proj": 64, "c_proj": 64, "x_proj": 64}),
    ],
)
def test_packed_rows_of_other_layouts(tmp_path: Path, family: str, published: str, parts: dict[str, int]) -> None:
    """Rows that follow one another, by head, and in another order within a head."""
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 6, "head_dim": 8}
    if family == "youtu":
        sizes |= {"kv_lora_rank": 32, "q_lora_rank": None, "v_head_dim": 12, "attention_bias": False}
        sizes |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
    section, pack = CASES["AWQ, packed"]
    saved_model(family, tmp_path / "model", **sizes)
    write_packed(tmp_path / "model", tmp_path / "m", section, pack, only=published)
    compare_logits(tmp_path)
    layer = {"youtu": "model.layers.0.self_attn", "lfm2": "model.layers.0.conv"}[family]
    with canonical(open_model(str(tmp_path / "m"))) as source:
        for name, rows in parts.items():
            weight = source.read_weight(f"{layer}.{name}.weight")
            assert isinstance(weight, QuantTensor)
            assert weight.shape[0] == rows


def compare_logits(tmp_path: Path) -> None:
    """Of the packed model in a folder `m`, and of the same written out."""
    with open_model(str(tmp_path / "m")) as source:
        plain = {name: source.read(name) for name in source.tensors}
    (tmp_path / "plain").mkdir()
    save_file(plain, tmp_path / "plain" / "model.safetensors")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    found = []
    for folder in ("m", "plain"):
        with canonical(open_model(str(tmp_path / folder))) as source:
            decoder = load_decoder(source, ReferenceBackend())
            found.append(decoder.extend(list(range(20)), decoder.new_cache(1, 20), last_only=False))
    assert np.array_equal(found[0], found[1])


def test_commands(tmp_path: Path, packable_model: Path) -> None:
    """info says who packed it and how it is held; run runs it; quantize says that it was rounded before."""
    section, pack = CASES["AWQ, packed"]
    write_packed(packable_model, tmp_path / "m", section, pack)
    model = str(tmp_path / "m")
    code, said, _ = run_command(["info", model])
    assert code == 0
    assert "AWQ 4-bit: 14 packed, exactly, as int4-b32-asym-fp32" in said
    code, said, error = run_command(["run", "abc", "--model", model, "--max-tokens", "3"])
    assert code == 0, error
    code, said, error = run_command(["quantize", model, "--method", "rtn", "-o", str(tmp_path / "out")])
    assert code == 0, error
    assert "the source is quantized already (AWQ 4-bit): its errors stay" in error
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "kbit"
