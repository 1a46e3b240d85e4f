"""Gated delta nets: tokens in chunks against one by one, published layouts, states that are kept while text is made."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_cases import DictSource, saved_model, tame_tensors, tiny_config
from native_cases import exact, native, random_ids, reference, source_of
from recurrent_cases import assert_the_same_function, made
from safetensors.torch import load_file, save_file

from kbit.backends.reference.backend import ReferenceBackend
from kbit.backends.reference.gradients import KeepingBackend
from kbit.calibration.collected import CapturingOps
from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.kernels import reference_recurrent as recurrent
from kbit.models import blocks
from kbit.models.decoder import Decoder, DecoderDefinition
from kbit.models.families import spec_from_config
from kbit.models.load import load_decoder
from kbit.models.opening import open_model
from kbit.models.shard import shard

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 150])
def test_chunks_are_what_single_tokens_are(tokens: int) -> None:
    """And so are their gradients: solving for a chunk is the same function, in another order of sums."""
    heads, keys = (tokens, 6), (tokens, 2, 12)
    parts = made(keys, keys, (tokens, 6, 20), heads, heads, (6,))
    one_by_one, _ = recurrent.gated_delta(*parts, torch.zeros(6, 12, 20))
    together = recurrent.gated_delta_in_chunks(*(part[None] for part in parts[:-1]), parts[-1])[0]
    assert_the_same_function(together, one_by_one, parts)


def test_a_state_that_fades_at_once_and_one_that_stays() -> None:
    """Decays at both ends of what a float holds: nothing overflows where chunks divide by what is left."""
    q, k, v, decay, write, rates = made((1, 130, 1, 4), (1, 130, 1, 4), (1, 130, 2, 4), (1, 130, 2), (1, 130, 2), (2,))
    far = torch.stack([decay[..., 0] + 60.0, decay[..., 1] - 60.0], dim=-1)
    found = recurrent.gated_delta_in_chunks(q, k, v, far, write, rates + 3.0)
    wanted, _ = recurrent.gated_delta(q[0], k[0], v[0], far[0], write[0], rates + 3.0, torch.zeros(2, 4, 4))
    assert bool(torch.isfinite(found).all())
    assert float((found[0] - wanted).detach().abs().max()) <= 1e-5 * float(wanted.detach().abs().max())


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3-next"])
def test_layers_with_gradients_are_the_reference(name: str) -> None:
    """What calibration computes of 100 tokens is what the model computes of them."""
    source, ids = source_of(name), random_ids(2, 100)
    model = load_decoder(source, KeepingBackend())
    ops = CapturingOps(DecoderDefinition(model.spec, model.weights), 100)
    x = blocks.embedding(ops, model.spec, model.weights.embedding, model.weights.final, ids)
    for index, layer in enumerate(model.weights.layers):
        x = blocks.layer(ops, model.spec, layer, index, x)
    plain = reference(source)
    wanted = plain.hidden_states(ids, plain.new_cache(2, 100))
    assert float((x.detach() - wanted).abs().max() / wanted.abs().max()) <= 1e-4


def test_stacks_of_experts_as_they_are_released(tmp_path: Path) -> None:
    """Of Qwen3.5's mixtures: all experts of a layer in one tensor, whose name has no ending; and layers of no use here."""
    model = saved_model("qwen3_5-moe", tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    prefix = next(name for name in tensors if name.endswith("layers.0.input_layernorm.weight")).partition("layers.")[0]
    for layer in range(3):
        block = f"{prefix}layers.{layer}.mlp.experts"
        taken = [
            {part: tensors.pop(f"{block}.{expert}.{part}_proj.weight") for part in ("gate", "up", "down")}
            for expert in range(6)
        ]
        gates = torch.stack([torch.cat([each["gate"], each["up"]]) for each in taken])
        tensors |= {f"{block}.gate_up_proj": gates, f"{block}.down_proj": torch.stack([each["down"] for each in taken])}
    tensors |= {"mtp.fc.weight": torch.ones(48, 96), "mtp.layers.0.mlp.experts.down_proj": torch.ones(2, 3, 3)}
    tensors["model.visual.blocks.0.norm.bias"] = torch.ones(3)
    (tmp_path / "config.json").write_bytes((tmp_path / "saved" / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids = random_ids(1, 30)
    with open_model(str(tmp_path)) as source, torch.no_grad():
        ours = load_decoder(source, ReferenceBackend())
        found, wanted = ours.forward(ids, ours.new_cache(1, 30)), model(ids).logits
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-4


def test_rows_of_another_number(tmp_path: Path) -> None:
    saved_model("qwen3-next", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "linear_value_head_dim": 40}))
    with pytest.raises(
        CheckpointError, match=r"in_proj_qkvz.weight has shape \(480, 48\), but .* asks for \(528, 48\)"
    ):
        open_model(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear_num_value_heads": 5}, r"linear_num_value_heads is 5; it should be a multiple .* \(2\)"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1; it should be a whole number from 2 to 64"),
        (
            {"layer_types": ["sliding_attention"] * 3},
            "layer_types has 'sliding_attention', which kbit does not support",
        ),
        ({"layer_types": None, "full_attention_interval": 0}, "full_attention_interval is 0"),
        ({"attn_output_gate": False}, "attn_output_gate False is not supported for model_type 'qwen3_5_text'"),
    ],
)
def test_senseless_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        spec_from_config({**tiny_config("qwen3_5"), **changes})


def test_keys_of_released_configurations() -> None:
    """What they say beside sizes changes nothing, or is what is computed; and the whole, which also takes pictures."""
    text = {
        "attention_bias": False,
        "attn_output_gate": True,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 6,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 8,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "tie_word_embeddings": True,
        "vocab_size": 248320,
    }
    spec = spec_from_config(text)
    assert (spec.attention_layers, spec.rope.dim, spec.rope.theta) == ((3, 7, 11, 15, 19, 23), 64, 1e7)
    assert spec.state_bytes == 18 * 4 * (16 * 128 * 128 + 3 * 3 * 16 * 128)
    # 0.75 billion weights, of which a third are the embedding.
    assert round(sum(math.prod(shape) for shape in spec.expected_tensors().values()) / 1e9, 2) == 0.75


def test_which_layers_attend() -> None:
    by_interval = {**tiny_config("qwen3_5"), "num_hidden_layers": 9, "layer_types": None}
    spec = spec_from_config(by_interval)
    assert spec.attention_layers == (3, 7)
    assert [spec.cache_layer(layer) for layer in spec.attention_layers] == [0, 1]
    assert (spec.cache_layers, len(spec.states)) == (2, 14)
    # 6 heads of 12 x 36, and 3 tokens of 2 (2 x 12) + 6 x 36 features, in float32.
    assert spec.state_bytes == 7 * 4 * (6 * 12 * 36 + 3 * (48 + 216))
    alone = spec_from_config({**tiny_config("qwen3_5"), "layer_types": ["linear_attention"] * 3})
    assert (alone.attention_layers, alone.cache_layers) == ((), 1)


@pytest.mark.parametrize("build", [reference, exact], ids=["reference", "native"])
def test_a_model_without_attention(build: Callable[[DictSource], Decoder]) -> None:
    config = {**tiny_config("qwen3_5"), "layer_types": ["linear_attention"] * 3}
    model, ids = build(DictSource(config, tame_tensors(config))), random_ids(1, 9)
    whole = model.forward(ids, model.new_cache(1, 9))
    cache = model.new_cache(1, 9)
    pieces = torch.cat([model.forward(part, cache) for part in ids.split([4, 5], dim=1)], dim=1)
    assert float((pieces - whole).abs().max() / whole.abs().max()) <= 1e-5


def test_processes_share_its_heads() -> None:
    delta = spec_from_config(shard(source_of("qwen3_5"), 1, 2).config).delta
    assert delta is not None
    assert (delta.key_heads, delta.heads, delta.key_dim, delta.value_dim) == (1, 3, 12, 36)


def test_quantized_weights_leave_what_decides_alone(published: Callable[[str], Path]) -> None:
    from kbit.formats.quant_format import QuantFormat
    from kbit.quantizers.plan import make_plan

    with open_model(str(published("qwen3-next"))) as source:
        plan = make_plan(source, QuantFormat.parse("int4-b16"))
    kept = {
        t.source.name.rpartition("layers.0.")[2]
        for t in plan.tensors
        if t.format is None and "layers.0." in t.source.name
    }
    inside = {
        f"linear_attn.{name}" for name in ("in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias", "norm.weight")
    }
    assert inside | {"linear_attn.conv1d.weight"} <= kept
    assert not any("in_proj_qkv" in name or "in_proj_z" in name or "out_proj" in name for name in kept)


def test_int8_compute_stays_close() -> None:
    source, ids = source_of("qwen3_5", "int8-b16"), random_ids(1, 60)
    found, wanted = (
        model.forward(ids, model.new_cache(1, 60)) for model in (native(source, compute="int8"), reference(source))
    )
    assert float((found - wanted).norm() / wanted.norm()) < 0.15  # (mostly of gates)
