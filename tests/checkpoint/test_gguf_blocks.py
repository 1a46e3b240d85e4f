"""GGUF blocks as codes and scales: equal to the gguf package's dequantization, bit for bit."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_model_cases import Model

from kbit.checkpoint.gguf.blocks import BLOCK_TYPES
from kbit.checkpoint.gguf.types import GGML_TYPES
from kbit.checkpoint.resolve import open_model
from kbit.formats.quant_tensor import QuantTensor
from kbit.formats.stored import widened

NUMBERS = {t.name: number for number, t in GGML_TYPES.items()}
TYPES = {t.name: t for t in GGML_TYPES.values() if t.name in BLOCK_TYPES}


@pytest.mark.parametrize("name", [name for name in BLOCK_TYPES if name not in ("Q1_0", "Q2_0")])  # gguf has no such
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # random bytes hold infinite and NaN scales
def test_blocks_equal_gguf(name: str) -> None:
    kind, block_type = TYPES[name], BLOCK_TYPES[name]
    raw = np.random.default_rng(0).integers(0, 256, (5, 6 * kind.block_bytes), dtype=np.uint8)
    if name == "MXFP4":  # 255 is no number, and gguf takes it for one; it refuses nothing
        raw[:, :: kind.block_bytes] = np.minimum(raw[:, :: kind.block_bytes], 254)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    blocks = block_type.decode(raw.tobytes(), 5, kind.block_bytes)
    number = lambda x: widened(x, "bf16") if x.dtype == np.uint16 else x.astype(np.float32)  # noqa: E731
    spread = lambda x: np.repeat(number(x), block_type.format.block_size, axis=1)  # noqa: E731
    values = block_type.codebook[blocks.codes] * spread(blocks.scales)
    if blocks.offsets is not None:
        values += spread(blocks.offsets)
    np.testing.assert_array_equal(values, block_type.values(blocks))
    assert blocks.codes.max() < 2**block_type.format.bits
    finite = np.isfinite(expected)
    assert finite.mean() > 0.5
    np.testing.assert_array_equal(values[finite], expected[finite])
    assert not np.isfinite(values[~finite]).any()


def test_real_matrices_read_packed_as_they_read_dense(smollm2_gguf: Path) -> None:
    with open_model(str(smollm2_gguf)) as source:
        for name in (
            "model.embed_tokens.weight",  # Q8_0
            "model.layers.0.self_attn.q_proj.weight",  # rows reordered
            "model.layers.0.self_attn.k_proj.weight",
            "model.layers.3.mlp.down_proj.weight",
        ):
            packed = source.read_weight(name)
            assert isinstance(packed, QuantTensor), name
            assert torch.equal(packed.dequantize(), source.read(name))
        assert isinstance(source.read_weight("model.norm.weight"), torch.Tensor)


def test_types_that_gguf_does_not_decode() -> None:
    """Q1_0: a sign, the lowest bit first; Q2_0: two bits less 1 (dequantize_row_q1_0, dequantize_row_q2_0)."""
    rng = np.random.default_rng(0)
    scales = rng.normal(size=(6, 1)).astype(np.float16)
    for name, width in (("Q1_0", 1), ("Q2_0", 2)):
        kind = TYPES[name]
        codes = rng.integers(0, 2**width, (6, kind.block), dtype=np.uint8)
        bits = (codes[..., None] >> np.arange(width) & 1).astype(np.uint8).reshape(6, -1)
        raw = np.concatenate([scales.view(np.uint8), np.packbits(bits, axis=1, bitorder="little")], axis=1)
        assert raw.shape[1] == kind.block_bytes
        found = BLOCK_TYPES[name].values(BLOCK_TYPES[name].decode(raw.tobytes(), 3, kind.block_bytes))
        expected = scales.astype(np.float32) * (codes.astype(np.float32) * 2 - 1 if width == 1 else codes - 1.0)
        np.testing.assert_array_equal(found.reshape(6, -1), expected.astype(np.float32))


@pytest.mark.parametrize("name", ["IQ1_S", "IQ2_XXS", "IQ3_S", "TQ2_0", "NVFP4", "Q1_0"])
def test_a_file_of_a_type_reads_packed_as_it_reads_dense(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(2)
    kind, model = TYPES[name], Model()
    model.keys["feed_forward_length"] = 256
    for layer in range(2):
        for part, shape in (("ffn_gate", (256, 32)), ("ffn_up", (256, 32)), ("ffn_down", (32, 256))):
            model.stored[f"blk.{layer}.{part}.weight"] = (rng.standard_normal(shape).astype(np.float32), None)
    raw = rng.integers(0, 60, (32, 256 // kind.block * kind.block_bytes), dtype=np.uint8)  # no infinite scales
    model.stored["blk.1.ffn_down.weight"] = (raw, NUMBERS[name])
    with open_model(str(model.write(tmp_path / "m.gguf"))) as source:
        packed = source.read_weight("model.layers.1.mlp.down_proj.weight")
        assert isinstance(packed, QuantTensor)
        assert torch.equal(packed.dequantize(), source.read("model.layers.1.mlp.down_proj.weight"))
