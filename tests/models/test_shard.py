"""What each of several processes has of a model: a checkpoint of its own, and together the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from conversion_cases import quantize
from gguf_model_cases import Model
from tensor_parallel_cases import (
    WORLD,
    source_of,
)

from kbit.checkpoint.gguf.source import GGUFSource
from kbit.checkpoint.resolve import open_model
from kbit.checkpoint.source import CheckpointSource
from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.models.check import check_tensors
from kbit.models.families import spec_from_config
from kbit.models.shard import shard

pytestmark = pytest.mark.usefixtures("one_thread")


def folder_source(tmp_path: Path, write_model: Callable[..., Path], format: str | None) -> CheckpointSource:
    model = write_model(tmp_path / "model", attention_bias=True, mlp_bias=True, intermediate_size=104)
    if format is not None:
        quantize(model, tmp_path / "out", format)
    return open_model(str(tmp_path / ("model" if format is None else "out")))


def gguf_source(tmp_path: Path) -> CheckpointSource:
    """Q and K rows that GGUF stores in another order, packed and not; a packed down projection."""
    model = Model(biases=("attn_q", "attn_k", "attn_v", "attn_output"))
    kinds = {"attn_q": gguf.GGMLQuantizationType.Q8_0, "ffn_down": gguf.GGMLQuantizationType.Q4_1}
    for name, (values, _) in list(model.stored.items()):
        kind = kinds.get(name.split(".")[-2])
        if kind is not None and values.ndim == 2:
            model.stored[name] = (gguf.quants.quantize(values, kind), kind)
    return GGUFSource(model.write(tmp_path / "m.gguf"))


class TestShares:
    @pytest.mark.parametrize("kind", ["float", "int3-b16-asym-dq", "nf4-row", "gguf"])
    def test_together_they_are_the_whole(self, tmp_path: Path, write_model: Callable[..., Path], kind: str) -> None:
        """Every share passes as a checkpoint, stays packed, and what is cut can be put together again."""
        if kind == "gguf":
            whole = gguf_source(tmp_path)
        else:
            whole = folder_source(tmp_path, write_model, None if kind == "float" else kind)
        parts = [shard(whole, rank, WORLD) for rank in range(WORLD)]
        for part in parts:
            spec = spec_from_config(part.config)
            check_tensors(part, spec)
            assert (spec.heads, spec.kv_heads, spec.head_dim) == (2, 1, 8)
            assert part.sidecar_files() == whole.sidecar_files()
        assert len({whole.fingerprint(), *(part.fingerprint() for part in parts)}) == 1 + WORLD
        assert sum(part.config["intermediate_size"] for part in parts) == whole.config["intermediate_size"]
        packed = 0
        for name, info in whole.tensors.items():
            values = [part.read(name) for part in parts]
            weights = [part.read_weight(name) for part in parts]
            packed += isinstance(weights[0], QuantTensor)
            assert isinstance(whole.read_weight(name), QuantTensor) == isinstance(weights[0], QuantTensor)
            for part, value, weight in zip(parts, values, weights, strict=True):
                assert part.tensors[name].shape == tuple(value.shape) == tuple(weight.shape)
                assert torch.equal(value, weight.dequantize() if isinstance(weight, QuantTensor) else weight)
                assert torch.equal(part.read_rows(name, 1, 3), value[1:3])
            cut = next((dim for dim, size in enumerate(values[0].shape) if size != info.shape[dim]), None)
            assert torch.equal(whole.read(name), values[0] if cut is None else torch.cat(values, dim=cut))
            columns = name.endswith(("o_proj.weight", "down_proj.weight"))
            rows = any(f"{part}_proj" in name for part in ("q", "k", "v", "gate", "up"))
            assert cut == (1 if columns else 0 if rows else None), name
        assert packed == {"float": 0, "gguf": 4}.get(kind, packed)
        assert kind == "float" or packed

    def test_more_processes_than_key_heads_share_them(self) -> None:
        source = source_of("llama", None, num_attention_heads=8, num_key_value_heads=2)
        parts = [shard(source, rank, 4) for rank in range(4)]
        keys = [part.read("model.layers.0.self_attn.k_proj.weight") for part in parts]
        assert [part.config["num_key_value_heads"] for part in parts] == [1] * 4
        assert torch.equal(torch.cat([keys[0], keys[2]]), source.read("model.layers.0.self_attn.k_proj.weight"))
        assert torch.equal(keys[0], keys[1])
        assert torch.equal(keys[2], keys[3])

    @pytest.mark.parametrize(
        ("format", "world", "message"),
        [
            (None, 4, "it has 6 attention heads and 2 key/value heads; use 2 or 6$"),
            (
                "nf4-b32",
                2,
                "o_proj.weight has 48 columns for each, which are no whole blocks of 32 .nf4-b32.; use fewer",
            ),
            ("nf4-b48", 6, "layers.0.self_attn.o_proj.weight has 16 columns for each"),
        ],
    )
    def test_what_cannot_be_split(self, format: str | None, world: int, message: str) -> None:
        with pytest.raises(UnsupportedError, match=f"some-model: cannot be split among {world} processes: .*{message}"):
            shard(source_of("llama", format), 0, world)

    def test_a_norm_of_all_heads_together(self) -> None:
        """Where several processes have the same key head, which its mean would count twice."""
        with pytest.raises(UnsupportedError, match="6 attention heads and 2 key/value heads; use 2$"):
            shard(source_of("olmo2", None), 0, 6)
        assert shard(source_of("olmo2", None), 0, 2).config["num_attention_heads"] == 3

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("bamba", "2 key/value heads, and state spaces of 6 heads; use 2 or 6$"),
            ("lfm2", "it has 6 attention heads and 2 key/value heads; use 2 or 6$"),
            ("qwen3_5", "2 key/value heads, and delta nets of 2 heads of keys; use 2$"),
        ],
    )
    def test_layers_that_are_not_dealt_out(self, name: str, message: str) -> None:
        world = 4 if name in ("bamba", "lfm2") else 3
        with pytest.raises(UnsupportedError, match=f"cannot be split among {world} processes: .*{message}"):
            shard(source_of(name, None), 0, world)
        assert shard(source_of(name, None), 0, 1).config["num_attention_heads"] == 6

    def test_a_bias_that_is_added_before_the_sum_is_the_first_process_s(self) -> None:
        source = source_of("gpt-oss", None)
        first, second = (shard(source, rank, 2) for rank in range(2))
        name = "model.layers.0.mlp.experts.1.down_proj.bias"
        assert torch.equal(first.read(name), source.read(name))
        assert not second.read(name).any()
        gate = "model.layers.0.mlp.experts.1.gate_proj.bias"
        assert torch.equal(torch.cat([first.read(gate), second.read(gate)]), source.read(gate))

    @pytest.mark.parametrize("format", [None, "nf4-b16", "int4-b16-asym-dq", "lloyd3-row"])
    def test_queries_keys_and_values_of_delta_nets(self, format: str | None) -> None:
        """Three runs of rows of one matrix, put together, with the values of the whole."""
        source = source_of("qwen3_5", format, linear_value_head_dim=32)
        parts = [shard(source, rank, 2) for rank in range(2)]
        name, sizes = "model.layers.0.linear_attn.in_proj_qkv.weight", [12, 12, 96]
        whole = source.read(name).split([2 * size for size in sizes])
        for rank, part in enumerate(parts):
            weight = part.read_weight(name)
            values = weight.dequantize() if isinstance(weight, QuantTensor) else weight
            if isinstance(weight, QuantTensor):
                QuantTensor.checked("part", weight.format, weight.shape, weight.stored, weight.codebook)
            expected = torch.cat([x[rank * size : (rank + 1) * size] for x, size in zip(whole, sizes, strict=True)])
            assert torch.equal(values, expected)
            assert torch.equal(part.read_rows(name, 5, 40), expected[5:40])

    def test_an_mlp_of_too_few_blocks(self) -> None:
        tensors = source_of("llama", None, num_attention_heads=2)
        name = "model.layers.1.mlp.down_proj.weight"
        weight = tensors.data[name]
        assert isinstance(weight, torch.Tensor)
        tensors.data = {**tensors.data, name: quantize_blockwise(weight[:, :64], QuantFormat.parse("nf4-b64"))}
        with pytest.raises(CheckpointError, match=r"has shape \(48, 64\), but config.json asks for \(48, 77\)"):
            shard(tensors, 0, 2)
        narrow = source_of("llama", "nf4-b80", num_attention_heads=10, num_key_value_heads=10, intermediate_size=81)
        assert [shard(narrow, rank, 2).config["intermediate_size"] for rank in range(2)] == [80, 1]
        with pytest.raises(UnsupportedError, match="the 81 columns of .*down_proj.weight are 2 blocks of 80"):
            shard(
                source_of("llama", "nf4-b80", num_attention_heads=15, num_key_value_heads=15, intermediate_size=81),
                0,
                3,
            )
