"""Models that do not attend in all layers, or not alone, as GGUF files: llama.cpp's tensors and keys, and the same model.

What its converter writes of the same tiny models is in `gguf_hybrid_cases`; of Falcon-H1 kbit puts the factors on other
matrices than it does, and of Bamba it turns the rows of the part of a head that rotates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoder_cases import saved_model
from gguf_export_cases import export, opened, stored
from gguf_hybrid_cases import CASES, keys_of, tensors_of

from kbit.backends.reference.backend import ReferenceBackend
from kbit.checkpoint.gguf.header import read_header
from kbit.formats.registry import parse_format
from kbit.host.errors import UnsupportedError
from kbit.models.load import load_decoder
from kbit.models.opening import open_model
from kbit.quantizers.convert import convert
from kbit.quantizers.plan import make_plan

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(1, 131, (1, 45), generator=torch.Generator().manual_seed(1))
BAMBA = {"mlp_bias": False, "attn_layer_indices": [1]}
ROTATING = {"attention_bias": False, "mamba_conv_bias": True}
# -exp of the logarithm of a rate, and back: exp within two of float32's steps, which a logarithm makes absolute.
RATES = 2.0**-22
# Layers that attend, of models whose layers have other names now than the converter knows, so that it writes zeros.
_UNSAID = {
    "granite-hybrid": (0, 1, 0),
    "granite-hybrid-moe": (0, 0, 1),
    "nemotron-h": (0, 0, 1, 0, 0),
    "nemotron-h-moe": (0, 0, 1, 0),
}


def logits(model: Path) -> torch.Tensor:
    with open_model(str(model)) as source:
        decoder = load_decoder(source, ReferenceBackend())
    return torch.as_tensor(decoder.forward(IDS, decoder.new_cache(1, IDS.shape[1])))


@pytest.mark.parametrize(
    ("case", "changes"),
    [("bamba", BAMBA), ("granite-hybrid-moe", ROTATING), *((case, CASES[case][1]) for case in CASES)],
)
def test_it_is_the_same_model(tmp_path: Path, case: str, changes: dict[str, Any]) -> None:
    """For llama.cpp's converter, which writes the same; and read back: tensors but rates are equal, except where factors
    are in them, and so is what is computed."""
    saved_model(case, tmp_path / "m", **{"max_position_embeddings": 64, **changes})
    done = export(tmp_path / "m", tmp_path / "m.gguf")
    assert done.error == 0.0
    if case not in ("bamba", "falcon-h1") and changes is not ROTATING:
        assert_as_converted(case, tmp_path)
    with opened(tmp_path / "m.gguf") as file, opened(tmp_path / "m") as folder:
        assert file.tensors.keys() == folder.tensors.keys()
        for name in folder.tensors if case != "falcon-h1" else ():
            ours, theirs = file.read(name), folder.read(name)
            assert (
                torch.equal(ours, theirs)
                if "A_log" not in name
                else torch.allclose(ours, theirs, rtol=RATES, atol=RATES)
            ), name
    ours, theirs = logits(tmp_path / "m.gguf"), logits(tmp_path / "m")
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5


def assert_as_converted(case: str, folder: Path) -> None:
    """Names, shapes, values and keys."""
    arch = CASES[case][0]
    found, expected = stored(folder / "m.gguf"), tensors_of(folder / "m")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name][0] == "F32"
        if name.endswith("ssm_a"):
            assert np.allclose(np.frombuffer(found[name][1], "<f4").reshape(values.shape), values, rtol=RATES)
        else:
            assert found[name][1] == values.astype("<f4").tobytes(), name
    header = read_header(folder / "m.gguf")
    assert header.value("general.architecture") == arch
    # What says nothing: Nemotron-H's length, which has no positions; how many experts there would be of none.
    said_by_none = {"context_length", "attention.layer_norm_epsilon"} if arch.startswith("nemotron") else set()
    if case == "granite-hybrid":
        said_by_none = {
            "expert_count", "expert_used_count", "expert_shared_feed_forward_length", "feed_forward_length",
        }  # fmt: skip
    wanted = {key: value for key, value in keys_of(arch, folder / "m").items() if key not in said_by_none}
    if case in _UNSAID:
        wanted["attention.head_count_kv"] = [2 if attends else 0 for attends in _UNSAID[case]]
    for key, value in wanted.items():
        found_value = header.value(f"{arch}.{key}")
        assert found_value == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key


def test_factors_are_in_the_weights(tmp_path: Path) -> None:
    """And a head that is the embedding, and is multiplied otherwise, becomes one of its own."""
    saved_model("falcon-h1", tmp_path / "m", max_position_embeddings=64, tie_word_embeddings=True)
    export(tmp_path / "m", tmp_path / "m.gguf", dtype="fp32")
    with opened(tmp_path / "m.gguf") as file, opened(tmp_path / "m") as folder:
        assert (folder.config["tie_word_embeddings"], file.config["tie_word_embeddings"]) == (True, False)
        words = folder.read_array("model.embed_tokens.weight")
        assert np.array_equal(file.read_array("model.embed_tokens.weight"), words * np.float32(3.0))
        assert np.array_equal(file.read_array("lm_head.weight"), words * np.float32(0.4))
        down = "model.layers.1.feed_forward.down_proj.weight"
        assert np.array_equal(file.read_array(down), folder.read_array(down) * np.float32(0.6))
    ours, theirs = logits(tmp_path / "m.gguf"), logits(tmp_path / "m")
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5


@pytest.mark.parametrize("case", ["granite-hybrid", "falcon-h1"])
def test_codes_stay_or_are_rounded(tmp_path: Path, case: str) -> None:
    """What is whole in the file, and in part quantized here, is rounded; so is what a factor goes into."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "mamba_d_head": 32,
        "mamba_n_heads": 4,
        "num_attention_heads": 8,
    }
    sizes |= {"mamba_d_ssm": 128} if case == "falcon-h1" else {"shared_intermediate_size": 64, "mamba_expand": 2}
    saved_model(case, tmp_path / "m", **{"max_position_embeddings": 64, **sizes})
    with open_model(str(tmp_path / "m")) as source:
        convert(source, make_plan(source, parse_format("int8-b32")), tmp_path / "q")
    with pytest.raises(UnsupportedError, match=r"GGUF has no type for .*: round them with --requantize Q8_0"):
        export(tmp_path / "q", tmp_path / "m.gguf")
    done = export(tmp_path / "q", tmp_path / "m.gguf", requantize="Q8_0")
    assert done.rounded > 0
    assert 0 < done.error < 2.0**-7  # (what is rounded twice to 8 bits: 127 steps to the largest of 32)
    with opened(tmp_path / "m.gguf") as file:
        names = {info.stored_as for info in file.tensors.values()}
    assert "Q8_0" in names


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("lfm2-biases", {}, "lfm2 architecture has no biases of convolutions"),
        ("lfm2-moe", {"routed_scaling_factor": 2.5}, "lfm2moe architecture has no experts whose weights do not sum to 1"),
        ("granite-hybrid-moe", {"mamba_conv_bias": True}, "have biases, or none, where GGUF files of the granitehybrid architecture have none"),
        ("falcon-h1-norm", {"mlp_bias": False}, "falcon-h1 architecture has no convolutions without biases"),
        ("bamba", {}, "have biases, or none, where GGUF files of the granitehybrid architecture have none"),
        ("bamba", {**BAMBA, "attn_layer_indices": []}, "has no files of models in which no layer attends"),
        ("granite-hybrid", {"mamba_expand": 3, "mamba_d_head": 24, "mamba_n_heads": 6}, "no state spaces of another width .144. than twice"),
        ("falcon-h1-norm", {"mamba_conv_bias": True}, "have biases, or none, where GGUF files of the falcon-h1 architecture have none"),
        ("nemotron-h-mixed", {"mlp_bias": False, "use_conv_bias": True}, "nemotron_h_moe architecture has no MLPs in models with experts"),
    ],
)  # fmt: skip
def test_what_the_architecture_cannot_say(tmp_path: Path, case: str, changes: dict[str, Any], message: str) -> None:
    saved_model(case, tmp_path / "m", **{"max_position_embeddings": 64, **changes})
    with pytest.raises(UnsupportedError, match=message + ".*--to safetensors"):
        export(tmp_path / "m", tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf*"))
