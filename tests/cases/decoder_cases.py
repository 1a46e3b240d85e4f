"""Tiny decoders of every family and switch, and checkpoints in memory, for the tests that run models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kbit.checkpoint.source import CheckpointSource, TensorInfo
from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.models.families import spec_from_config

PAD = 0

# 6 heads of 8 with 2 key/value heads; a vocabulary and an MLP that are no multiple of anything.
TINY: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 77,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 14, "num_key_value_heads": 3}),
    "llama-multi-query": ("Llama", {"num_key_value_heads": 1}),
    "llama-every-head": ("Llama", {"num_key_value_heads": 6, "rms_norm_eps": 1e-2}),
    "llama-gelu": ("Llama", {"hidden_act": "gelu"}),
    "llama-gelu-tanh": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama-gelu-new": ("Llama", {"hidden_act": "gelu_new"}),
    "llama-relu": ("Llama", {"hidden_act": "relu"}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}}),
    "llama-dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.5, "rope_theta": 1000.0}}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "qwen2-yarn-mscale": ("Qwen2", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3}}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    # 2, not 1: with a window of 1 transformers' own cache keeps everything (it slices [-0:]).
    "mistral-window-2": ("Mistral", {"sliding_window": 2}),
    "mistral-no-window": ("Mistral", {"sliding_window": None, "head_dim": 10}),
    "mistral-dynamic-window": (
        "Mistral",
        {"sliding_window": 9, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-some-windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2-layer-types": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def tiny_config(name: str) -> dict[str, Any]:
    """One of CASES as a config.json."""
    family, changes = CASES[name]
    return {**TINY, **changes, "architectures": [f"{family}ForCausalLM"], "model_type": family.lower()}


class DictSource(CheckpointSource):
    """A checkpoint in memory."""

    def __init__(
        self, config: dict[str, Any], tensors: Mapping[str, torch.Tensor | QuantTensor], stored_as: str = "F32"
    ) -> None:
        self.path = Path("some-model")
        self.config = config
        self.stored_as = stored_as
        self.data = tensors
        self.reads: list[str] = []

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(name, tuple(x.shape), self.stored_as, 0, self.path) for name, x in self.data.items()}

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        self.reads.append(name)
        x = self.data[name]
        return (x.dequantize() if isinstance(x, QuantTensor) else x)[start:stop].clone()

    def read_weight(self, name: str) -> torch.Tensor | QuantTensor:
        x = self.data[name]
        return x if isinstance(x, QuantTensor) else self.read(name)

    def sidecar_files(self) -> Mapping[str, bytes]:
        return {}

    def fingerprint(self) -> str:
        return ""


def tensors_for(config: dict[str, Any]) -> dict[str, torch.Tensor | QuantTensor]:
    """Random weights for a configuration."""
    generator = torch.Generator().manual_seed(3)
    shapes = spec_from_config(config).expected_tensors()
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def tame_tensors(config: dict[str, Any], seed: int = 17) -> dict[str, torch.Tensor | QuantTensor]:
    """Random weights, large enough that attention is far from uniform and logits are far apart, and no larger."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor | QuantTensor] = {}
    for name, shape in spec_from_config(config).expected_tensors().items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = 1.0 + 0.2 * noise if "norm" in name else 0.25 * noise
    return tensors


def quantized(tensors: Mapping[str, torch.Tensor | QuantTensor], format: str) -> dict[str, torch.Tensor | QuantTensor]:
    """The same weights with every matrix in a format."""
    parsed = QuantFormat.parse(format)
    return {
        name: quantize_blockwise(x, parsed) if isinstance(x, torch.Tensor) and x.ndim == 2 else x
        for name, x in tensors.items()
    }
