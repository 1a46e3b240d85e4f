"""A small model to be written as GGUF, which the tests of GGUF checkpoints share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf_file_cases import of_architecture, write_gguf

from kbit.checkpoint.gguf.source import GGUFSource

Array = npt.NDArray[Any]


Edit = Callable[["Model"], None]


HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB = 32, 64, 4, 2, 8, 2, 24


def permuted(weights: Array, heads: int) -> Array:
    """How llama.cpp's converter (convert_hf_to_gguf.py, LlamaModel.permute) reorders Q and K rows."""
    halves: Array = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    result: Array = halves.swapaxes(1, 2).reshape(weights.shape)
    return result


class Model:
    """A small model to be written as GGUF: Hugging Face tensors, and metadata that tests may change first."""

    def __init__(self, arch: str = "llama", *, tied: bool = True, biases: tuple[str, ...] = (), seed: int = 0) -> None:
        self.arch = arch
        self.rng = np.random.default_rng(seed)
        self.keys: dict[str, Any] = {
            "context_length": 128,
            "embedding_length": HIDDEN,
            "block_count": LAYERS,
            "feed_forward_length": MLP,
            "attention.head_count": HEADS,
            "attention.head_count_kv": KV_HEADS,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 10000.0,
            "vocab_size": VOCAB,
        }
        self.general: dict[str, Any] = {}
        self.hf: dict[str, Array] = {}
        self.stored: dict[str, tuple[Array, gguf.GGMLQuantizationType | None]] = {}
        self.add("token_embd.weight", "model.embed_tokens.weight", (VOCAB, HIDDEN))
        shapes = {
            "attn_q": ("self_attn.q_proj", (HEADS * HEAD_DIM, HIDDEN)),
            "attn_k": ("self_attn.k_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
            "attn_v": ("self_attn.v_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
            "attn_output": ("self_attn.o_proj", (HIDDEN, HEADS * HEAD_DIM)),
            "ffn_gate": ("mlp.gate_proj", (MLP, HIDDEN)),
            "ffn_up": ("mlp.up_proj", (MLP, HIDDEN)),
            "ffn_down": ("mlp.down_proj", (HIDDEN, MLP)),
        }
        for layer in range(LAYERS):
            prefix = f"model.layers.{layer}."
            self.add(f"blk.{layer}.attn_norm.weight", prefix + "input_layernorm.weight", (HIDDEN,))
            self.add(f"blk.{layer}.ffn_norm.weight", prefix + "post_attention_layernorm.weight", (HIDDEN,))
            for part, (name, shape) in shapes.items():
                self.add(f"blk.{layer}.{part}.weight", f"{prefix}{name}.weight", shape)
                if part in biases:
                    self.add(f"blk.{layer}.{part}.bias", f"{prefix}{name}.bias", shape[:1])
        self.add("output_norm.weight", "model.norm.weight", (HIDDEN,))
        if not tied:
            self.add("output.weight", "lm_head.weight", (VOCAB, HIDDEN))

    def add(self, name: str, hf_name: str, shape: tuple[int, ...]) -> None:
        values = self.rng.standard_normal(shape).astype(np.float32)
        self.hf[hf_name] = values
        part = name.split(".")[-2]
        if self.arch == "llama" and part in ("attn_q", "attn_k"):
            values = permuted(values, HEADS if part == "attn_q" else KV_HEADS)
        self.stored[name] = (values, None)

    def write(self, path: Path, **options: Any) -> Path:
        metadata = {**self.general, **of_architecture(self.arch, self.keys)}
        return write_gguf(path, self.arch, metadata, self.stored, **options)


def numpy(tensor: torch.Tensor) -> Array:
    result: Array = tensor.numpy()
    return result


def config_of(tmp_path: Path, arch: str = "llama", edit: Edit | None = None, **options: Any) -> dict[str, Any]:
    model = Model(arch, **options)
    if edit is not None:
        edit(model)
    return GGUFSource(model.write(tmp_path / "m.gguf")).config
