"""LoRA adapters with random factors, as PEFT saves them, for tests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from decoder_cases import saved_model
from safetensors import safe_open
from safetensors.torch import save_file

# What is in a layer and two-dimensional, but no matrix that PEFT adapts.
_NOT_ADAPTED = ("norm", "ln_", "embed", "wte", "wpe", "lm_head", "embed_out", "conv1d", "router", ".gate.weight")


def shapes_of(model: Path, *, experts: bool = False) -> dict[str, tuple[int, int]]:
    """The matrices of a published model's layers, without `.weight`."""
    with safe_open(model / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    wanted = {name: shape for name, shape in shapes.items() if len(shape) == 2 and name.endswith(".weight")}
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in wanted.items()
        if not any(part in name for part in _NOT_ADAPTED) and (experts or ".experts." not in name)
    }


def write_adapter(
    folder: Path,
    base: Path | str,
    shapes: Mapping[str, tuple[int, int]],
    rank: int = 3,
    *,
    seed: int = 1,
    size: float = 1.0,
    dtype: torch.dtype = torch.float32,
    extra: Mapping[str, torch.Tensor] | None = None,
    **settings: Any,
) -> Path:
    """An adapter of some matrices (outputs, inputs), or the other way round with `fan_in_fan_out`."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(extra or {})
    for name, shape in shapes.items():
        rows, columns = reversed(shape) if settings.get("fan_in_fan_out") else shape
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        up = size * torch.randn(rows, rank, generator=generator) / rank**0.5
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = up.to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    written = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": rank, "lora_alpha": 2 * rank}
    (folder / "adapter_config.json").write_text(json.dumps({**written, **settings}))
    return folder


def saved_case(name: str, folder: Path, **changes: Any) -> Path:
    """One of the tiny models of `decoder_configs`, published."""
    saved_model(name, folder, **changes)
    return folder


def some(shapes: Mapping[str, tuple[int, int]], parts: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Those whose names have one of these in them."""
    return {name: shape for name, shape in shapes.items() if any(part in name for part in parts)}
