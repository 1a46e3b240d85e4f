"""GGUF files of newer families: what they mean is what transformers makes of the folder they were converted from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from decoder_cases import saved_model
from gguf_family_cases import CASES, keys_of, tensors_of, write
from gguf_file_cases import of_architecture, write_gguf
from safetensors.numpy import load_file

from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.reference.backend import ReferenceBackend
from kbit.checkpoint.gguf.source import GGUFSource
from kbit.formats.quant_tensor import QuantTensor
from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.models.load import load_decoder
from kbit.models.opening import open_model

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(1, 131, (1, 45), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    """45 tokens: past every window and, of LongRoPE, past the original length. To float32's rounding (test_decoder_parity)."""
    theirs = saved_model(case, tmp_path / "folder", **{"max_position_embeddings": 64, **CASES[case][2]})
    with torch.no_grad():
        expected = theirs(IDS).logits
    with open_model(str(write(case, tmp_path / "folder", tmp_path / "m.gguf"))) as source:
        ours = load_decoder(source, ReferenceBackend())
    found = ours.forward(IDS, ours.new_cache(1, 45))
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-4


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q6_K"])
@pytest.mark.parametrize("case", ["phi3", "glm4"])
def test_packed_matrices_are_taken_apart_as_they_are(tmp_path: Path, case: str, kind: str) -> None:
    """Rows of fused and of interleaved matrices, where the file holds codes."""
    heads = {"num_attention_heads": 8} if case == "phi3" else {"num_attention_heads": 8, "head_dim": 16}
    saved_model(case, tmp_path / "folder", hidden_size=256, num_hidden_layers=1, **heads)
    stored = tensors_of(case, tmp_path / "folder")
    type_ = gguf.GGMLQuantizationType[kind]
    matrices = {
        name for name, values in stored.items() if values.ndim == 2 and "blk" in name and values.shape[1] == 256
    }
    if kind == "Q6_K":  # gguf writes none: codes of any kind are as good
        rng = np.random.default_rng(0)
        packed = {name: _random_q6_k(stored[name].shape, rng) for name in matrices}
        path = _write_packed(case, tmp_path / "folder", tmp_path / "m.gguf", packed)
        values = {name: gguf.quants.dequantize(packed[name], type_) for name in matrices}
    else:
        path = write(case, tmp_path / "folder", tmp_path / "m.gguf", dict.fromkeys(matrices, kind))
        values = {name: gguf.quants.dequantize(gguf.quants.quantize(stored[name], type_), type_) for name in matrices}
    layer = "model.layers.0."
    with GGUFSource(path) as source:
        up = torch.from_numpy(values["blk.0.ffn_up.weight"])
        parts = [source.read_weight(f"{layer}mlp.{name}_proj.weight") for name in ("gate", "up")]
        assert all(isinstance(part, QuantTensor) for part in parts)
        assert torch.equal(torch.cat([part.dequantize() for part in parts]), up)  # type: ignore[union-attr]
        assert torch.equal(source.read_rows(f"{layer}mlp.up_proj.weight", 3, 9), up[len(up) // 2 :][3:9])
        queries = source.read_weight(f"{layer}self_attn.q_proj.weight")
        assert isinstance(queries, QuantTensor)
        if case == "phi3":
            assert torch.equal(queries.dequantize(), torch.from_numpy(values["blk.0.attn_qkv.weight"])[:256])
        else:
            order = [0, 2, 4, 6, 1, 3, 5, 7, *range(8, 16)]
            rows = torch.tensor([16 * head + i for head in range(8) for i in order])
            assert torch.equal(queries.dequantize(), torch.from_numpy(values["blk.0.attn_q.weight"])[rows])


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_packed_delta_nets_are_put_in_order(tmp_path: Path, kind: str) -> None:
    """Rows and columns of heads that the file has in another order, queries between their gates: codes as they are."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "linear_num_value_heads": 6, "linear_value_head_dim": 32}
    saved_model("qwen3_5", tmp_path / "folder", **sizes)
    stored, type_ = tensors_of("qwen3_5", tmp_path / "folder"), gguf.GGMLQuantizationType[kind]
    names = [name for name, x in stored.items() if x.ndim == 2 and x.shape[1] % 32 == 0 and "ssm_conv" not in name]
    path = write("qwen3_5", tmp_path / "folder", tmp_path / "m.gguf", dict.fromkeys(names, kind))
    with open_model(str(path)) as source, open_model(str(tmp_path / "folder")) as original:
        found = 0
        for name in original.tensors:
            weight = source.read_weight(name)
            if isinstance(weight, QuantTensor):
                # Blocks of 32 are along rows and within heads, so that order and rounding do not matter to each other.
                plain = original.read(name).numpy()
                wanted = gguf.quants.dequantize(gguf.quants.quantize(plain, type_), type_)
                assert torch.equal(weight.dequantize(), torch.from_numpy(wanted)), name
                assert torch.equal(source.read_rows(name, 2, 5), weight.dequantize()[2:5]), name
                found += any(part in name for part in ("in_proj_qkv", "in_proj_z", "out_proj", "q_proj", "gate_proj"))
            else:
                assert torch.allclose(weight, original.read(name), rtol=1e-6), name
        assert found == 3 * 2 + 2 + 3
        native = load_decoder(source, NativeBackend(1, compute="fp32", kv="fp32"))
        reference = load_decoder(source, ReferenceBackend())
    logits = [torch.as_tensor(model.forward(IDS, model.new_cache(1, 45))) for model in (native, reference)]
    assert float((logits[0] - logits[1]).abs().max() / logits[1].abs().max()) <= 1e-4


def test_heads_that_blocks_do_not_respect(tmp_path: Path) -> None:
    """Columns of heads of 16 in blocks of 32: no other order of blocks puts these right."""
    sizes = {"linear_num_value_heads": 6, "linear_value_head_dim": 16}
    saved_model("qwen3_5", tmp_path / "folder", **sizes)
    kinds = {"blk.0.ssm_out.weight": "Q8_0"}
    with (
        GGUFSource(write("qwen3_5", tmp_path / "folder", tmp_path / "m.gguf", kinds)) as source,
        pytest.raises(UnsupportedError, match="blk.0.ssm_out.weight has blocks of 32 columns across heads"),
    ):
        source.read_weight("model.layers.0.linear_attn.out_proj.weight")


@pytest.mark.parametrize("kind", ["Q4_0", "MXFP4"])
def test_packed_experts_are_parts_of_their_stack(tmp_path: Path, kind: str) -> None:
    """An expert's codes are where they are in the file, whichever it is."""
    saved_model("gpt-oss", tmp_path / "folder", hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    stored = tensors_of("gpt-oss", tmp_path / "folder")
    type_ = gguf.GGMLQuantizationType[kind]
    names = [name for name in stored if name.endswith("_exps.weight")]
    path = write("gpt-oss", tmp_path / "folder", tmp_path / "m.gguf", dict.fromkeys(names, kind))
    with open_model(str(path)) as source:
        for part in ("gate", "down"):
            stack = stored[f"blk.1.ffn_{part}_exps.weight"]
            wanted = gguf.quants.dequantize(gguf.quants.quantize(stack, type_), type_)
            for expert in (0, 4):
                weight = source.read_weight(f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight")
                assert isinstance(weight, QuantTensor)
                assert torch.equal(weight.dequantize(), torch.from_numpy(wanted[expert]))
                rows = source.read_rows(f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight", 3, 9)
                assert torch.equal(rows, torch.from_numpy(wanted[expert][3:9]))
        load_decoder(source, ReferenceBackend())


def test_a_shared_experts_gate_may_be_a_vector(tmp_path: Path) -> None:
    gate = "blk.0.ffn_gate_inp_shexp.weight"
    path = edited(tmp_path, "qwen2-moe", tensors={gate: np.arange(48, dtype=np.float32)})
    with open_model(str(path)) as source:
        assert source.read("model.layers.0.mlp.shared_expert_gate.weight").tolist() == [list(range(48))]


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    """They are counted, and last."""
    more = {"blk.3.nextn.eh_proj.weight": np.ones((4, 4), dtype=np.float32)}
    more["blk.3.attn_q.weight"] = np.ones((48, 48), dtype=np.float32)
    path = edited(tmp_path, "glm4-moe", tensors=more, block_count=4, nextn_predict_layers=1)
    with open_model(str(path)) as source:
        assert source.config["num_hidden_layers"] == 3
        load_decoder(source, ReferenceBackend())


def test_latent_keys_and_values_in_one_tensor(tmp_path: Path) -> None:
    """Files of before April 2025: the matrix as it is published, and the sizes of attention itself."""
    saved_model("deepseek-v2", tmp_path / "folder", **CASES["deepseek-v2"][2])
    more, sizes = dict[str, Any](), {"attention.key_length": 12, "attention.value_length": 10}
    for name, values in load_file(tmp_path / "folder" / "model.safetensors").items():
        if "kv_b_proj" in name:
            more[f"blk.{name.split('.')[2]}.attn_kv_b.weight"] = values
    gone = ("attn_k_b", "attn_v_b", "_length_mla")
    path = edited(tmp_path, "deepseek-v2", without=gone, tensors=more, **sizes)
    with open_model(str(path)) as source, open_model(str(tmp_path / "folder")) as folder:
        assert source.tensors.keys() == folder.tensors.keys()
        for name in folder.tensors:
            assert torch.equal(source.read(name), folder.read(name)), name
        load_decoder(source, ReferenceBackend())


def _random_q6_k(shape: tuple[int, ...], rng: np.random.Generator) -> Any:
    """Codes and scales at random: blocks of 256 are 210 bytes, the last two a half-precision scale."""
    blocks = rng.integers(0, 256, (shape[0], shape[1] // 256, 210), dtype=np.uint8)
    blocks[..., 208:] = np.frombuffer(np.float16(0.01).tobytes(), dtype=np.uint8)
    return blocks.reshape(shape[0], -1)


def _write_packed(case: str, folder: Path, path: Path, packed: dict[str, Any]) -> Path:
    arch = CASES[case][0]
    whole = tensors_of(case, folder)
    tensors = {
        name: (packed[name], gguf.GGMLQuantizationType.Q6_K) if name in packed else whole[name] for name in whole
    }
    return write_gguf(path, arch, of_architecture(arch, keys_of(case, folder)), tensors)


def edited(
    tmp_path: Path,
    case: str,
    *,
    without: str | tuple[str, ...] = (),
    tensors: Mapping[str, Any] | None = None,
    **keys: Any,
) -> Path:
    """A file with other metadata, with more tensors, or without some of either, by the end or a part of a name."""
    saved_model(case, tmp_path / "folder", **CASES[case][2])
    arch = CASES[case][0]
    metadata = {**keys_of(case, tmp_path / "folder"), **keys}
    without = (without,) if isinstance(without, str) else without
    metadata = {key: value for key, value in metadata.items() if not key.endswith(without)}
    whole = {**tensors_of(case, tmp_path / "folder"), **(tensors or {})}
    kept = {name: values for name, values in whole.items() if not any(part in name for part in without)}
    return write_gguf(tmp_path / "m.gguf", arch, of_architecture(arch, metadata), kept)


@pytest.mark.parametrize(
    ("case", "keys", "message"),
    [
        ("qwen3", {"attention.sliding_window": 5}, "'qwen3.attention.sliding_window' is not supported"),
        ("qwen3", {"attention.scale": 0.5}, "metadata key 'qwen3.attention.scale' is unknown to kbit"),
        ("qwen3", {"rope.dimension_count": 4}, "'qwen3.rope.dimension_count' is 4 while heads have 10 values"),
        ("gemma2", {"rope.freq_base_swa": 5.0}, "'gemma2.rope.freq_base_swa' is 5.0, another base"),
        ("gemma3", {"attention.sliding_window_pattern": [True]}, "is not 7 booleans, one for each layer"),
        ("glm4", {"rope.dimension_count": 18}, "rope.dimension_count is 18, expected an even number of at most 16"),
        ("glm4", {"rope.scaling.attn_factor": 1.2}, "attn_factor=1.2"),
        ("qwen3-moe", {"expert_gating_func": 2}, "'qwen3moe.expert_gating_func' 2 is not supported"),
        ("mixtral", {"expert_weights_norm": False}, "'llama.expert_weights_norm' False is not supported"),
        ("minimax-m2", {"expert_weights_scale": 2.0}, "'minimax-m2.expert_weights_scale' 2.0 is not supported"),
        ("olmoe", {"leading_dense_block_count": 1}, "'olmoe.leading_dense_block_count' 1 is not supported"),
        ("gpt-oss", {"expert_used_count": 9}, "expert_used_count is more than the 5 experts there are"),
        ("qwen2-moe", {"expert_count": 7}, r"has the shape \(6, 48\), the metadata says \(7, 48\)"),
        ("qwen3_5", {"ssm.time_step_rank": 5}, "ssm.time_step_rank 5 is not a multiple of ssm.group_count 2"),
        ("qwen3_5", {"ssm.conv_kernel": 1}, "ssm.conv_kernel is 1, expected 2 or more"),
        ("qwen3_5", {"ssm.inner_size": 100}, "ssm.inner_size 100 is not that of 6 heads"),
        ("qwen3_5", {"ssm.dt_b_c_rms": True}, "metadata key 'qwen35.ssm.dt_b_c_rms' is unknown to kbit"),
        ("qwen3", {"expert_count": 7}, "'qwen3.expert_count' says that there are experts"),
    ],
)
def test_what_would_change_the_model_is_refused(tmp_path: Path, case: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        GGUFSource(edited(tmp_path, case, **keys))


def test_exaone_with_a_window_and_no_pattern(tmp_path: Path) -> None:
    """llama.cpp knows the pattern of models of 64 layers alone."""
    with pytest.raises(UnsupportedError, match="without a pattern is known of models of 64 layers alone"):
        GGUFSource(edited(tmp_path, "exaone4", without="attention.sliding_window_pattern"))


def test_a_factor_without_the_other(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tensor 'rope_factors_short.weight' is missing"):
        GGUFSource(
            edited(tmp_path, "phi3-longrope", tensors={"rope_factors_long.weight": np.ones(4, dtype=np.float32)})
        )


def test_factors_that_are_too_few(tmp_path: Path) -> None:
    few = {f"rope_factors_{length}.weight": np.ones(3, dtype=np.float32) for length in ("short", "long")}
    with pytest.raises(CheckpointError, match="tensor 'rope_factors_short.weight' has 3 values, expected 4"):
        GGUFSource(edited(tmp_path, "phi3-longrope", tensors=few))
