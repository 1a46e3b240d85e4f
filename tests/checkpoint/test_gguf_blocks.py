"""GGUF blocks as codes and scales: equal to the gguf package's dequantization, bit for bit."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from kbit.checkpoint.gguf.blocks import BLOCK_TYPES
from kbit.checkpoint.gguf.types import GGML_TYPES
from kbit.checkpoint.resolve import open_model
from kbit.formats.quant_tensor import QuantTensor
from kbit.formats.stored import widened

TYPES = {t.name: t for t in GGML_TYPES.values() if t.name in BLOCK_TYPES}


@pytest.mark.parametrize("name", list(BLOCK_TYPES))
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
