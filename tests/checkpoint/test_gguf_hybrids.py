"""GGUF files of LFM2 and Granite 4: what they mean is what transformers makes of the folder they were converted from."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from decoder_cases import saved_model
from gguf_hybrid_cases import CASES, tensors_of, write

from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.reference.backend import ReferenceBackend
from kbit.formats.quant_tensor import QuantTensor
from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.models.load import load_decoder
from kbit.models.opening import open_model

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(1, 131, (1, 45), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    theirs = saved_model(case, tmp_path / "folder", **{"max_position_embeddings": 64, **CASES[case][1]})
    with torch.no_grad():
        expected = theirs(IDS).logits
    with open_model(str(write(case, tmp_path / "folder", tmp_path / "m.gguf"))) as source:
        for backend in (ReferenceBackend(), NativeBackend(1, compute="fp32", kv="fp32")):
            ours = load_decoder(source, backend)
            found = torch.as_tensor(ours.forward(IDS, ours.new_cache(1, 45)))
            assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-4


def test_layers_attend_where_their_tensors_say_so(tmp_path: Path) -> None:
    """Some files have no key/value heads in any layer, as their converter knew the layers by other names."""
    saved_model("granite-hybrid", tmp_path / "folder", max_position_embeddings=64)
    path = write("granite-hybrid", tmp_path / "folder", tmp_path / "m.gguf", attention__head_count_kv=[0, 0, 0])
    with open_model(str(path)) as source:
        assert source.config["layer_types"] == ["mamba", "attention", "mamba"]
        assert source.config["num_key_value_heads"] == 2


@pytest.mark.parametrize("case", ["lfm2", "granite-hybrid"])
def test_packed_matrices_are_taken_apart_as_they_are(tmp_path: Path, case: str) -> None:
    """What a convolution or a state space reads is several matrices in one, whose rows are codes."""
    sizes = {"hidden_size": 64, "num_attention_heads": 8} | ({"mamba_d_head": 64} if case != "lfm2" else {})
    saved_model(case, tmp_path / "folder", max_position_embeddings=64, **sizes)
    whole = "blk.0.shortconv.in_proj.weight" if case == "lfm2" else "blk.0.ssm_in.weight"
    path = write(case, tmp_path / "folder", tmp_path / "m.gguf", {whole: "Q8_0"})
    kind = gguf.GGMLQuantizationType.Q8_0
    stored = gguf.quants.dequantize(gguf.quants.quantize(tensors_of(tmp_path / "folder")[whole], kind), kind)
    names = ["conv.b_proj", "conv.c_proj", "conv.x_proj"] if case == "lfm2" else ["mamba.z_proj", "mamba.xbc_proj"]
    with open_model(str(path)) as source:
        parts = [source.read_weight(f"model.layers.0.{name}.weight") for name in names]
    assert all(isinstance(part, QuantTensor) for part in parts)
    found = torch.cat([part.dequantize() for part in parts])  # type: ignore[union-attr]
    assert torch.equal(found, torch.from_numpy(stored[: len(found)]))


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("lfm2", {"rope__scaling__type": "yarn"}, "rotations that are scaled are not supported for this architecture"),
        (
            "lfm2",
            {"shortconv__l_cache": 4},
            r"shortconv.conv.weight' has the shape \(48, 3\), the metadata says \(48, 4\)",
        ),
        ("lfm2", {"shortconv__other": 4}, "metadata key 'lfm2.shortconv.other' is unknown"),
        (
            "granite-hybrid",
            {"rope__scaling__finetuned": True, "rope__dimension_count": 4},
            "rope.dimension_count' is not the size of a head",
        ),
        ("granite-hybrid", {"ssm__inner_size": 97}, "ssm_in.weight' has the shape"),
        ("granite-hybrid", {"ssm__group_count": 5}, "inner_size 96 is not a multiple of ssm.group_count 5"),
    ],
)
def test_what_is_refused(tmp_path: Path, case: str, changes: dict[str, object], message: str) -> None:
    saved_model(case, tmp_path / "folder", max_position_embeddings=64)
    path = write(case, tmp_path / "folder", tmp_path / "m.gguf", **changes)
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        open_model(str(path))
