"""GGUF files of older families: what they mean is what transformers makes of the folder they were converted from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from decoder_cases import saved_model
from gguf_older_cases import CASES, tensors_of, write

from kbit.backends.reference.backend import ReferenceBackend
from kbit.checkpoint.gguf.source import GGUFSource
from kbit.formats.quant_tensor import QuantTensor
from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.models.load import load_decoder
from kbit.models.opening import open_model

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(1, 131, (1, 30), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    """To float32's rounding (test_decoder_parity)."""
    theirs = saved_model(case, tmp_path / "folder", **{"max_position_embeddings": 64, **CASES[case][1]})
    with torch.no_grad():
        expected = theirs(IDS).logits
    with open_model(str(write(case, tmp_path / "folder", tmp_path / "m.gguf"))) as source:
        ours = load_decoder(source, ReferenceBackend())
    found = ours.forward(IDS, ours.new_cache(1, 30))
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-4


@pytest.mark.parametrize("case", ["gpt2", "starcoder2", "glm"])
def test_queries_keys_and_values_in_one_tensor(tmp_path: Path, case: str) -> None:
    """As published, or as the converter's --fuse-qkv has it: codes as they are, and biases."""
    arch, changes = CASES[case]
    sizes = {"max_position_embeddings": 64, "hidden_size": 96, "head_dim": 16}
    saved_model(case, tmp_path / "folder", **sizes, **changes)
    tensors = tensors_of(arch, tmp_path / "folder")
    for layer in range(3 if case != "gpt2" else 0):
        for kind in ("weight", "bias"):
            parts = [tensors.pop(f"blk.{layer}.attn_{part}.{kind}") for part in "qkv"]
            tensors[f"blk.{layer}.attn_qkv.{kind}"] = np.concatenate(parts)
    plain = write(case, tmp_path / "folder", tmp_path / "p.gguf", tensors)
    packed = write(case, tmp_path / "folder", tmp_path / "q.gguf", tensors, kind="Q8_0")
    with open_model(str(plain)) as source, open_model(str(packed)) as codes:
        load_decoder(codes, ReferenceBackend())
        original = open_model(str(tmp_path / "folder"))
        found = 0
        for name in original.tensors:
            values = original.read(name)
            assert torch.equal(source.read(name), values), name
            weight = codes.read_weight(name)
            if isinstance(weight, QuantTensor):
                type_ = gguf.GGMLQuantizationType.Q8_0
                wanted = gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), type_), type_)
                assert torch.equal(weight.dequantize(), torch.from_numpy(wanted)), name
                found += 1
        assert found >= 3 * 5


def _without(tensors: dict[str, Any], *parts: str) -> dict[str, Any]:
    return {name: values for name, values in tensors.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("case", "keys", "message"),
    [
        ("mpt", {"attention__max_alibi_bias": 0.0}, "'mpt.attention.max_alibi_bias' is 0; kbit runs MPT models"),
        ("mpt", {"attention__clamp_kqv": 6.0}, "'mpt.attention.clamp_kqv' is 6; kbit runs MPT models"),
        ("gpt2", {"attention__max_alibi_bias": 8.0}, "'gpt2.attention.max_alibi_bias' is unknown to kbit"),
        ("gpt2", {"context_length": 65}, r"'position_embd.weight' has the shape \(64, 48\), the metadata says \(65"),
        ("gpt2", {"tensor_data_layout": "jploski"}, "tensor_data_layout 'jploski' is not supported"),
        ("granitemoe-shared", {"expert_shared_feed_forward_length": 39}, r"ffn_gate_shexp.weight' has the shape"),
    ],
)
def test_what_would_change_the_model_is_refused(tmp_path: Path, case: str, keys: dict[str, Any], message: str) -> None:
    saved_model(case, tmp_path / "folder", **{"max_position_embeddings": 64, **CASES[case][1]})
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        GGUFSource(write(case, tmp_path / "folder", tmp_path / "m.gguf", **keys))


def test_a_stablelm_with_attention_and_mlp_side_by_side(tmp_path: Path) -> None:
    saved_model("stablelm", tmp_path / "folder", **CASES["stablelm"][1])
    tensors = _without(tensors_of("stablelm", tmp_path / "folder"), "ffn_norm")
    with pytest.raises(UnsupportedError, match="attention and MLP side by side"):
        GGUFSource(write("stablelm", tmp_path / "folder", tmp_path / "m.gguf", tensors))
