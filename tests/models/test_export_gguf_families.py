"""Families as GGUF files: llama.cpp's tensors and keys; and what cannot be said refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import gguf_older_cases as older
import numpy as np
import pytest
import torch
from decoder_cases import saved_model
from gguf_export_cases import byte_tokenizer, export, opened, stored
from gguf_family_cases import CASES, keys_of, tensors_of

from kbit.checkpoint.gguf.header import read_header
from kbit.host.errors import UnsupportedError
from kbit.models.families import spec_from_config
from kbit.models.opening import open_model

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


# llama.cpp has no windows for EXAONE 4 but in models of 64 layers, and reads DeepSeek-V2-Lite in 26 or 27.
FAMILIES = tuple(case for case in CASES if case not in ("exaone4", "deepseek-v2-lite"))


@pytest.mark.parametrize("case", FAMILIES)
def test_tensors_and_keys_are_those_of_llama_cpps_converter(tmp_path: Path, case: str) -> None:
    """As `gguf_family_cases` has them, which were compared with its files; some keys that it writes of others more."""
    arch, _, changes = CASES[case]
    saved_model(case, tmp_path / "m", **{"max_position_embeddings": 64, **changes})
    done = export(tmp_path / "m", tmp_path / "m.gguf")
    found, expected = stored(tmp_path / "m.gguf"), tensors_of(case, tmp_path / "m")
    assert (
        found.keys() - {"rope_factors_short.weight", "rope_factors_long.weight", "rope_freqs.weight"} == expected.keys()
    )
    for name, values in expected.items():
        assert found[name] == ("F32", values.astype("<f4").tobytes()), name
    assert (done.error, done.types) == (0.0, {"F32": len(found)})
    if arch == "gemma4":  # the first quarter of 16 pairs turns
        factors = np.frombuffer(found["rope_freqs.weight"][1], "<f4").tolist()
        assert factors == [1.0] * 4 + [float(np.float32(1e30))] * 12
    header = read_header(tmp_path / "m.gguf")
    assert header.value("general.architecture") == arch
    for key, value in keys_of(case, tmp_path / "m").items():
        if (
            key == "rope.scaling.original_context_length"
            and f"{arch}.rope.scaling.type" not in header
            and arch == "phi3"
        ):
            continue  # the converter writes it of models without scaling, too, for which it says nothing
        if key == "rope.dimension_sections":  # (of heads of 256 features; the tiny ones' have 2 pairs)
            assert header.value(f"{arch}.{key}") == [1, 1, 0, 0]
            continue
        found_value = header.value(f"{arch}.{key}")
        assert found_value == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key


@pytest.mark.parametrize("case", older.CASES)
def test_older_families_are_written_as_llama_cpps_converter_does(tmp_path: Path, case: str) -> None:
    """As `gguf_older_cases` has them; they are read back as the same tensors."""
    arch, changes = older.CASES[case]
    saved_model(case, tmp_path / "m", **{"max_position_embeddings": 64, **changes})
    export(tmp_path / "m", tmp_path / "m.gguf")
    found, expected = stored(tmp_path / "m.gguf"), older.tensors_of(arch, tmp_path / "m")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == ("F32", values.astype("<f4").tobytes()), name
    header = read_header(tmp_path / "m.gguf")
    for key, value in older.keys_of(arch, tmp_path / "m").items():
        if (key, value) == ("rope.scaling.type", "none"):
            continue
        found_value = header.value(f"{arch}.{key}")
        assert found_value == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key
    with open_model(str(tmp_path / "m.gguf")) as file, open_model(str(tmp_path / "m")) as folder:
        assert file.tensors.keys() == folder.tensors.keys()
        for name in file.tensors:
            assert torch.equal(file.read(name), folder.read(name)), name


def test_blocks_of_delta_nets_and_latent_keys(tmp_path: Path) -> None:
    """Heads of values in another order, by row and by column, whole blocks at a time; keys lie down, and are rounded so."""
    type_ = gguf.GGMLQuantizationType.Q8_0

    def rounded(values: Any) -> Any:
        return gguf.quants.dequantize(gguf.quants.quantize(values, type_), type_)

    sizes = {"hidden_size": 64, "intermediate_size": 64, "linear_num_value_heads": 6, "linear_value_head_dim": 32}
    saved_model("qwen3_5", tmp_path / "m", max_position_embeddings=64, **sizes)
    export(tmp_path / "m", tmp_path / "m.gguf", requantize="Q8_0")
    with opened(tmp_path / "m.gguf") as file, opened(tmp_path / "m") as folder:
        for name in folder.tensors:
            plain = folder.read_array(name)
            small = plain.ndim != 2 or "embed" in name or "lm_head" in name
            if "A_log" in name:
                assert np.allclose(file.read_array(name), plain, rtol=1e-6)  # there it is -exp of it
            else:
                assert np.array_equal(file.read_array(name), plain if small else rounded(plain)), name
    sizes = {"hidden_size": 96, "qk_nope_head_dim": 32, "v_head_dim": 32, "kv_lora_rank": 32, "q_lora_rank": 32}
    sizes |= {"intermediate_size": 64, "moe_intermediate_size": 32, "head_dim": 4, "qk_rope_head_dim": 4}
    saved_model("deepseek-v2", tmp_path / "d", max_position_embeddings=64, attention_bias=False, **sizes)
    export(tmp_path / "d", tmp_path / "d.gguf", requantize="Q8_0")
    with opened(tmp_path / "d.gguf") as file, opened(tmp_path / "d") as folder:
        for part in ("k_b_proj", "v_b_proj", "q_b_proj"):
            name = f"model.layers.1.self_attn.{part}.weight"
            plain = folder.read_array(name)
            if part == "k_b_proj":
                lying = np.ascontiguousarray(plain.reshape(6, 32, 32).swapaxes(1, 2))
                wanted = rounded(lying).swapaxes(1, 2).reshape(plain.shape)
            else:
                wanted = rounded(plain)
            assert np.array_equal(file.read_array(name), wanted), name


def test_factors_that_are_the_same_for_all_texts_are_a_tensor_of_any_architecture(tmp_path: Path) -> None:
    """As llama3's are, and read back."""
    factors = [1.5, 2.0, 3.0, 7.5]
    settings = {"rope_type": "longrope", "rope_theta": 1000.0, "short_factor": factors, "long_factor": factors}
    settings |= {"factor": 1.0, "attention_factor": 1.0, "original_max_position_embeddings": 64}
    saved_model("llama", tmp_path / "m", max_position_embeddings=64, rope_parameters=settings)
    export(tmp_path / "m", tmp_path / "m.gguf")
    kind, written = stored(tmp_path / "m.gguf")["rope_freqs.weight"]
    assert (kind, np.frombuffer(written, "<f4").tolist()) == ("F32", factors)
    with open_model(str(tmp_path / "m.gguf")) as file, open_model(str(tmp_path / "m")) as folder:
        specs = [spec_from_config(source.config).rope for source in (file, folder)]
    assert specs[0] == specs[1]


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("exaone4", {}, "no sliding windows for its exaone4 architecture"),
        ("mistral-window", {}, "no sliding windows for its llama architecture"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "gemma2 architecture cannot say that score_scale is 0.204"),
        ("llama-gelu", {}, "llama architecture cannot say that activation is gelu .it would be silu."),
        ("llama-longrope", {}, "kbit writes no LongRoPE for llama.cpp's llama architecture"),
        ("llama-dynamic", {}, "llama architecture cannot say that rope.kind is dynamic"),
        ("qwen3-moe", {"norm_topk_prob": False}, "qwen3moe architecture cannot say that experts.routing.normalise is False"),
        ("gpt_neo", {}, "kbit writes no GGUF file of a gpt_neo model, but of .*qwen3"),
        ("deepseek-v2-lite", {}, r"llama.cpp reads queries without a rank .q_lora_rank. in deepseek2 models of 26 or 27 layers"),
        ("gemma4-dense", {}, "llama.cpp caps a gemma4 model's logits at 30 where there is no cap"),
        ("deepseek-v2", {"attention_bias": True}, "biases, or none, where GGUF files of the deepseek2 architecture"),
        ("gpt_neox", {"tie_word_embeddings": True}, "llama.cpp reads no gptneox model whose head is its embedding"),
        ("gpt_neox-sequential", {}, "have biases, or none, where GGUF files of the gptneox architecture have biases"),
        ("falcon", {"bias": True}, "have biases, or none, where GGUF files of the falcon architecture have none"),
        ("falcon-rw", {}, "have biases, or none, where GGUF files of the falcon architecture have none"),
        ("gpt_neox", {"hidden_act": "gelu_new"}, "gptneox architecture cannot say that activation is gelu_tanh"),
        ("starcoder2", {}, "no sliding windows for its starcoder2 architecture"),
    ],
)  # fmt: skip
def test_what_the_architecture_cannot_say(tmp_path: Path, case: str, changes: dict[str, Any], message: str) -> None:
    saved_model(case, tmp_path / "m", **{"max_position_embeddings": 64, **changes})
    with pytest.raises(UnsupportedError, match=message + ".*--to safetensors"):
        export(tmp_path / "m", tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_llama3_scaling_is_a_tensor(tmp_path: Path) -> None:
    saved_model("llama-llama3", tmp_path / "m", head_dim=32, max_position_embeddings=64)
    export(tmp_path / "m", tmp_path / "m.gguf", dtype="bf16")
    with opened(tmp_path / "m.gguf") as source:
        scaling = source.config["rope_scaling"]
    assert scaling == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }


@pytest.mark.parametrize(
    "case", ["llama", "llama-llama3", "qwen3", "gemma3", "phi3-longrope", "granite", "olmo3", "qwen3-moe", "gpt-oss"]
)
def test_llama_cpp_computes_the_same(tmp_path: Path, case: str) -> None:
    """Log-probabilities after a text of the compiled llama.cpp in the xllamacpp wheel; its keys and values are fp16."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    changes = {**CASES[case][2]} if case in CASES else {"head_dim": 32} if case == "llama-llama3" else {}
    changes |= {"vocab_size": 266, "max_position_embeddings": 64, "tie_word_embeddings": case == "gemma3"}
    changes |= {"norm_topk_prob": True} if case == "qwen3-moe" else {}
    theirs = saved_model(case, tmp_path / "m", **changes)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" not in name:
                parameter *= 0.5  # logits that fp16 moves less
    theirs.save_pretrained(tmp_path / "m")
    byte_tokenizer(tmp_path / "m", 266)
    export(tmp_path / "m", tmp_path / "m.gguf")
    # More than LongRoPE's original length: llama.cpp chooses factors by the room that it makes for a text.
    ids = torch.randint(1, 250, (1, 45), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = torch.log_softmax(theirs(ids).logits[0, -1].double(), -1)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_gpu_layers, params.warmup = str(tmp_path / "m.gguf"), 64, 0, False
    server = xllamacpp.Server(params)
    request = {"prompt": ids[0].tolist(), "n_predict": 1, "logprobs": 300, "temperature": 0.0, "ignore_eos": True}
    answer = server.handle_completions(request)
    found = {each["id"]: each["logprob"] for each in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    assert len(found) == 266
    worst = max(abs(found[index] - float(expected[index])) for index in range(266) if math.isfinite(found[index]))
    assert worst <= 2.0**-8 * float(expected.max() - expected.min())  # eight of fp16's roundings, of the whole range
