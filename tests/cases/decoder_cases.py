"""Tiny decoders of every family and switch, and checkpoints in memory, for the tests that run models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from decoder_config_parts import FULL, SLIDING, TEMPERED
from decoder_configs import CASES, CLASSES, CONFIGS, MODEL_TYPES, PAD, TINY

from kbit.checkpoint.source import CheckpointSource, TensorInfo
from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.models.canonical import MARK
from kbit.models.families import FAMILIES, spec_from_config

__all__ = ["CASES", "CLASSES", "CONFIGS", "FULL", "PAD", "SLIDING", "TEMPERED", "TINY"]


def tiny_config(name: str) -> dict[str, Any]:
    """One of CASES as a config.json of canonical tensors."""
    family, changes = CASES[name]
    model_type = MODEL_TYPES.get(family, family.lower())
    marked = {MARK: True} if FAMILIES[model_type].layout.changes else {}
    return {
        **TINY,
        **changes,
        **marked,
        "architectures": [CLASSES.get(family, f"{family}ForCausalLM")],
        "model_type": model_type,
    }


def saved_model(name: str, folder: Path, **changes: Any) -> Any:
    """One of CASES with random weights, written by transformers, which has it too.

    Args:
        name: the case.
        folder: where to.
        changes: to its configuration.
    """
    import transformers

    family, own = CASES[name]
    entries = {**TINY, **own, **changes}
    if "vocab_size_per_layer_input" in entries:
        entries["vocab_size_per_layer_input"] = entries["vocab_size"]
    config = getattr(transformers, f"{CONFIGS.get(family, family)}Config")(**entries)
    config._experts_implementation = "eager"  # others ask for sizes that are multiples of 4
    model = getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))(config).eval()
    generator = torch.Generator().manual_seed(17)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Weights large enough that attention is far from uniform and logits are far apart.
            is_norm = any(part in parameter_name for part in ("norm", ".ln_", "scale"))
            parameter.copy_(1.0 + 0.2 * noise if is_norm else 0.25 * noise)
            if family == "Gemma4" and parameter_name.endswith("q_norm.weight"):
                parameter.mul_(0.3)  # dot products are not scaled: with 1, attention would be to one token alone
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif buffer_name.endswith("layer_scalar"):
                buffer.copy_(1.0 + 0.2 * torch.randn(buffer.shape, generator=generator))
    model.save_pretrained(folder)
    return model


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
        values = x.dequantize() if isinstance(x, QuantTensor) else x
        return (values[start:stop] if values.ndim else values).clone()

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
        tensors[name] = 1.0 + 0.2 * noise if "norm" in name or "scal" in name else 0.25 * noise
        if name.endswith("act_fn.eps"):  # of xIELU
            tensors[name] = torch.tensor(-1e-6)
    return tensors


def quantized(tensors: Mapping[str, torch.Tensor | QuantTensor], format: str) -> dict[str, torch.Tensor | QuantTensor]:
    """The same weights with every matrix in a format."""
    parsed = QuantFormat.parse(format)
    return {
        name: quantize_blockwise(x, parsed) if isinstance(x, torch.Tensor) and x.ndim == 2 else x
        for name, x in tensors.items()
    }
