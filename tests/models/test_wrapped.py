"""Language models inside checkpoints that also take pictures, against the whole in transformers, given text alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kbit.backends.reference.backend import ReferenceBackend
from kbit.host.errors import CheckpointError
from kbit.host.notes import KbitNote
from kbit.models.families import spec_from_config
from kbit.models.load import load_decoder
from kbit.models.opening import open_model

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def gemma3() -> Any:
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    text = {**TEXT, "num_hidden_layers": 6, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
    return transformers.Gemma3Config(
        text_config={**text, "rope_parameters": ropes}, vision_config=VISION, mm_tokens_per_image=4
    )


def gemma4() -> Any:
    ropes = {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    text = {**TEXT, "num_hidden_layers": 4, "head_dim": 16, "global_head_dim": 32, "sliding_window": 8}
    text |= {"vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2}
    types = ["sliding_attention", "full_attention"] * 2
    vision = {**VISION, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 16}
    return transformers.Gemma4Config(
        text_config={**text, "rope_parameters": ropes, "layer_types": types}, vision_config=vision, audio_config=None
    )


def mistral3() -> Any:
    text = {**TEXT, "model_type": "mistral", "num_hidden_layers": 2, "head_dim": 16, "sliding_window": None}
    return transformers.Mistral3Config(text_config=text, vision_config={"model_type": "pixtral", **VISION})


def llama4() -> Any:
    text = {**TEXT, "num_hidden_layers": 4, "head_dim": 8, "attention_chunk_size": 8, "floor_scale": 4}
    text |= {"intermediate_size_mlp": 48, "num_local_experts": 4, "interleave_moe_layer_step": 2}
    vision = {**VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    return transformers.Llama4Config(text_config=text, vision_config=vision)


def llava() -> Any:
    text = {**TEXT, "model_type": "llama", "num_hidden_layers": 2}
    vision = {"model_type": "clip_vision_model", **VISION, "projection_dim": 32}
    return transformers.LlavaConfig(text_config=text, vision_config=vision)


def qwen3_5() -> Any:
    text = {**TEXT, "num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "pad_token_id": None}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    return transformers.Qwen3_5Config(text_config=text, vision_config=vision)


def kimi_k25() -> Any:
    text = {**TEXT, "model_type": "deepseek_v3", "num_hidden_layers": 2, "num_key_value_heads": 4, "kv_lora_rank": 16}
    text |= {
        "q_lora_rank": 24,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
    }
    text |= {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
    }
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = {"projection_hidden_size": 32, "image_token_id": 1, "video_token_id": 2, "tie_word_embeddings": False}
    tokens = {"vision_start_token_id": 3, "vision_end_token_id": 4}
    return transformers.Kimi_K25Config(text_config=text, vision_config=vision, **whole, **tokens)


WHOLES: dict[str, tuple[Callable[[], Any], str]] = {
    "gemma3": (gemma3, "Gemma3ForConditionalGeneration"),
    "gemma4": (gemma4, "Gemma4ForConditionalGeneration"),
    "mistral3": (mistral3, "Mistral3ForConditionalGeneration"),
    "llama4": (llama4, "Llama4ForConditionalGeneration"),
    "llava": (llava, "LlavaForConditionalGeneration"),
    "qwen3_5": (qwen3_5, "Qwen3_5ForConditionalGeneration"),
    "kimi_k25": (kimi_k25, "Kimi_K25ForConditionalGeneration"),
}


@pytest.fixture(scope="module", params=WHOLES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    make, name = WHOLES[request.param]
    torch.manual_seed(3)
    model = getattr(transformers, name)(make()).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(
                (0.0 if request.param in ("gemma3", "qwen3_5") else 1.0) + 0.2 * noise if "norm" in key else 0.2 * noise
            )
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def assert_equal_logits(model: Any, folder: Path) -> None:
    ids = torch.randint(11, 99, (2, 24), generator=torch.Generator().manual_seed(5))
    with open_model(str(folder)) as source, torch.no_grad():
        ours = load_decoder(source, ReferenceBackend())
        theirs = model(ids).logits
        found = ours.forward(ids, ours.new_cache(2, 24))
    assert float((found - theirs).abs().max() / theirs.abs().max()) <= 1e-4


def test_text_alone_is_as_in_the_whole(whole: tuple[Any, Path]) -> None:
    with pytest.warns(KbitNote, match=r"[1-9]\d* tensors for pictures and sound are left out"):
        assert_equal_logits(*whole)


def test_names_of_other_versions(whole: tuple[Any, Path], tmp_path: Path) -> None:
    """transformers has called the same tensors `language_model.model.` and `model.language_model.`."""
    model, folder = whole
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    renamed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        new = name.replace("language_model.model.", "model.language_model.").replace(
            "language_model.lm_head", "lm_head"
        )
        renamed["model." + new if new.startswith(("vision_tower", "multi_modal")) else new] = tensor
    assert any(name.startswith("model.language_model.") for name in renamed)
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_equal_logits(model, tmp_path)


def test_what_is_no_part_stays_an_error(whole: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = whole
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = {**load_file(folder / "model.safetensors"), "language_model.model.layers.0.adapter.weight": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with open_model(str(tmp_path)) as source, pytest.raises(CheckpointError, match=r"layers\.0\.adapter\.weight"):
        load_decoder(source, ReferenceBackend())


def test_senseless_text_config(whole: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = whole
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": [1]}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="text_config should be an object"):
        open_model(str(tmp_path))


def test_a_published_configuration() -> None:
    """Of Gemma 3 4B, which leaves to the code what is as in the smallest model."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    spec = spec_from_config(text)
    assert (spec.vocab_size, spec.heads, spec.kv_heads, spec.head_dim) == (262208, 8, 4, 256)
    assert spec.windows[:6] == (1024,) * 5 + (None,)
