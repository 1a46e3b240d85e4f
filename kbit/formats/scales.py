"""Storing the scales (and offsets) of blocks: rounded to 16 bits, or double-quantized to 8."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kbit.formats.quant_format import SUPERBLOCK, QuantFormat
from kbit.host.errors import KbitError

TORCH_SCALE_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def store_scales(scales: torch.Tensor, offsets: torch.Tensor | None, format: QuantFormat) -> dict[str, torch.Tensor]:
    """Round scales and offsets (N, blocks) float32 to what the format stores.

    Returns:
        The arrays by part name: "scales" [and "scales_super"], "offsets" [and "offsets_super"].

    Raises:
        KbitError: a value does not fit the stored type.
    """
    stored: dict[str, torch.Tensor] = {}
    for name, values in (("scales", scales), ("offsets", offsets)):
        if values is None:
            continue
        if format.double_quant:
            stored[name], stored[f"{name}_super"] = _double_quantize(values, signed=name == "offsets")
        else:
            stored[name] = _round(values, format.scale_dtype, name)
    return stored


def load_scales(
    stored: Mapping[str, torch.Tensor], name: str, format: QuantFormat, rows: slice | torch.Tensor = slice(None)
) -> torch.Tensor | None:
    """Decode "scales" or "offsets", float32 (N, blocks), or of some rows only (a slice, or int64 (R,)).

    None where there are none.
    """
    values = stored.get(name)
    if values is None:
        return None
    decoded = values[rows].float()
    if format.double_quant:
        blocks = values.shape[1]
        if isinstance(rows, slice):
            rows = torch.arange(values.shape[0], device=values.device)[rows]
        position = rows[:, None] * blocks + torch.arange(blocks, device=values.device)  # of a block in the matrix
        decoded *= stored[f"{name}_super"][position // SUPERBLOCK]
    return decoded


def _round(values: torch.Tensor, scale_dtype: str, name: str) -> torch.Tensor:
    dtype = TORCH_SCALE_DTYPE[scale_dtype]
    largest = values.abs().max().item() if values.numel() else 0.0
    limits = torch.finfo(dtype)
    if largest > limits.max:
        wider = "bf16" if scale_dtype == "fp16" else "fp32"
        raise KbitError(f"{name} up to {largest:.3g} do not fit {scale_dtype}: use --scale-dtype {wider}")
    if name == "scales" and 0 < largest < limits.tiny:
        # All blocks would fall among the subnormals and lose their bits one by one, without a word.
        keep = "leave this tensor unquantized: --override NAME=keep"
        remedy = "use --scale-dtype bf16" if scale_dtype == "fp16" else keep
        raise KbitError(f"scales of at most {largest:.3g} are below the normal {scale_dtype} range: {remedy}")
    return values.to(dtype)


def _double_quantize(values: torch.Tensor, *, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit linear codes with one float32 factor per superblock of 256 consecutive blocks (row-major).

    value = code * factor. Scales are not negative and use 0..255; offsets use -127..127. A scale that is not zero
    never rounds to zero: its block would vanish, while one step costs at most 1/255 of the largest scale nearby.
    """
    top = 127 if signed else 255
    flat = values.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % SUPERBLOCK)).view(-1, SUPERBLOCK)
    factors = padded.abs().amax(dim=1) / top
    codes = torch.round(padded / factors.clamp(min=torch.finfo(torch.float32).tiny)[:, None])
    if not signed:
        codes = torch.where(padded > 0, codes.clamp(min=1), codes)
    codes = codes.clamp(-top if signed else 0, top).to(torch.int8 if signed else torch.uint8)
    return codes.flatten()[: flat.numel()].view(values.shape), factors
