"""Weights that nobody trained, made where they are wanted: random codes in any format, and whole models of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kbit.checkpoint.source import CheckpointSource, TensorInfo
from kbit.formats.codec import Codec
from kbit.formats.nested import NestedFormat
from kbit.formats.outlier_weights import PLACES, VALUES
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import SAFETENSORS_TO_TORCH, QuantTensor
from kbit.formats.registry import parse_format
from kbit.models.families import spec_from_config


def llama_config(
    hidden: int, middle: int, layers: int, heads: int, kv_heads: int, vocabulary: int, context: int
) -> dict[str, Any]:
    """config.json of a Llama of some size, head and embedding apart."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": middle,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


EIGHT_BILLION = llama_config(4096, 14336, 32, 32, 8, 128_256, 8192)  # Llama 3 8B's sizes
TINY = llama_config(64, 96, 2, 4, 2, 96, 512)


def random_codes(format: Codec | str, rows: int, columns: int, seed: int, device: str = "cpu") -> QuantTensor:
    """A matrix whose codes are random bytes: every code, or every window of a trellis, can occur.

    Args:
        format: with one scale a block; nested; a trellis.
        rows, columns: N and K.
        seed: of the device's generator.
        device: where it is made; nothing is sent there but a codebook.
    """
    codec = parse_format(format) if isinstance(format, str) else format
    generator = torch.Generator(device).manual_seed(seed)
    stored = {}
    for name, part in codec.parts(rows, columns).items():
        if name == "scales":
            # Products of unit size: codes of a codebook in [-1, 1] have a variance of about a third.
            spread = 0.5 + torch.rand(part.shape, generator=generator, device=device)
            stored[name] = ((3.0 / columns) ** 0.5 * spread).to(SAFETENSORS_TO_TORCH[part.dtype])
        elif name == PLACES:
            chosen = torch.randperm(rows * columns, generator=generator, device=device)[: part.shape[0]]
            stored[name] = chosen.sort().values.int()
        elif name == VALUES:
            stored[name] = torch.randn(part.shape, generator=generator, device=device).half()
        elif name.startswith("factor"):
            stored[name] = torch.empty(part.shape, device=device).uniform_(0.8, 1.2, generator=generator).half()
        else:
            stored[name] = torch.randint(0, 256, part.shape, dtype=torch.uint8, generator=generator, device=device)
    codebook = torch.zeros(0)
    if isinstance(codec, NestedFormat):
        codebook = torch.from_numpy(codec.codebook(columns).copy())
    elif isinstance(codec, QuantFormat):
        from kbit.formats.codebooks import codebook as codebook_of

        codebook = torch.from_numpy(codebook_of(codec, columns).copy())
    return QuantTensor(codec, (rows, columns), stored, codebook.to(device))


class RandomModel(CheckpointSource):
    """A checkpoint that is nowhere: every matrix is made, in codes, when it is read. Norms are ones.

    Args:
        config: config.json.
        format: of all matrices, with fp16 scales and no offsets.
        device: where they are made.
        seed: of the first; each has its own.
    """

    def __init__(self, config: Mapping[str, Any], format: str, device: str, seed: int = 0) -> None:
        self.path, self.config = Path("random-model"), dict(config)
        self._format, self._device = parse_format(format), device
        shapes = spec_from_config(self.config).expected_tensors()
        self._infos = {name: TensorInfo(name, shape, "F32", 0, self.path) for name, shape in shapes.items()}
        self._seeds = {name: seed + index for index, name in enumerate(shapes)}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if len(self._infos[name].shape) == 1:
            return torch.ones(stop - start)
        weight = self.read_weight(name)
        return (weight.dequantize() if isinstance(weight, QuantTensor) else weight)[start:stop]

    def read_weight(self, name: str) -> torch.Tensor | QuantTensor:
        shape = self._infos[name].shape
        if len(shape) == 1:
            return torch.ones(shape)
        return random_codes(self._format, shape[0], shape[1], self._seeds[name], self._device)

    def sidecar_files(self) -> Mapping[str, bytes]:
        return {}

    def fingerprint(self) -> str:
        return f"random {self._format} {sorted(self.config.items())}"
