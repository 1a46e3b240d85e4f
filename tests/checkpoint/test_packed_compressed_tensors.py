"""compressed-tensors' folders open with the weights that the library decompresses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_cases import (
    Packed,
    assert_weights,
    draw,
    draw_scales,
    edit_section,
    edit_tensors,
    refused,
    stream_words,
    write_layer,
)

from kbit.host.errors import UnsupportedError

Pack = Callable[[torch.Size, torch.Generator], Packed]


def section(**weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


def padded_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """As the library packed before 2026: 32 // bits codes a word."""
    per_word = 32 // bits
    spare = -codes.shape[1] % per_word
    runs = np.pad(codes.numpy(), ((0, 0), (0, spare))).reshape(len(codes), -1, per_word)
    return torch.from_numpy((runs << (bits * np.arange(per_word))).sum(axis=2).astype(np.uint32).view(np.int32))


def packed_integers(
    bits: int, group: int, *, zeros: bool, dtype: torch.dtype = torch.bfloat16, old: bool = False, ordered: bool = False
) -> Pack:
    words = padded_words if old else stream_words

    def pack(shape: torch.Size, generator: torch.Generator) -> Packed:
        rows, columns = shape
        groups = columns // group
        codes = draw((rows, columns), 2**bits, generator)
        scales = draw_scales((rows, groups), dtype, generator)
        zero = draw((rows, groups), 2**bits, generator) if zeros else torch.full((rows, groups), 2 ** (bits - 1))
        order = torch.arange(columns) // group
        tensors = {"weight_packed": words(codes, bits), "weight_scale": scales, "weight_shape": torch.tensor(shape)}
        if zeros:
            tensors["weight_zero_point"] = words(zero.T, bits).T
        if ordered:
            order = order[torch.randperm(columns, generator=generator)]
            tensors["weight_g_idx"] = order.to(torch.int32)
        return Packed(tensors, (codes - zero[:, order]).to(dtype) * scales[:, order])

    return pack


def plain_codes(scale: tuple[int, ...], *, kind: torch.dtype, zeros: bool = False, dtype: torch.dtype) -> Pack:
    """int8 or e4m3, with scales of this shape (cut for blocks of 32 x 64)."""

    def pack(shape: torch.Size, generator: torch.Generator) -> Packed:
        scales = draw_scales(scale, dtype, generator)
        wide = scales.reshape(-1, 1) if scales.ndim == 1 else scales
        wide = wide.repeat_interleave(-(-shape[0] // wide.shape[0]), 0)[: shape[0]]
        repeat = -(-shape[1] // wide.shape[1])
        if kind is torch.int8:
            codes = (draw(tuple(shape), 256, generator) - 128).to(torch.int8)
        else:
            codes = (100 * torch.randn(shape, generator=generator)).clamp(-448, 448).to(kind)
        tensors = {"weight": codes, "weight_scale": scales}
        values = codes.to(dtype)
        if zeros:
            tensors["weight_zero_point"] = (draw(scale, 256, generator) - 128).to(torch.int8)
            values = values - tensors["weight_zero_point"].to(dtype).repeat_interleave(repeat, 1)
        return Packed(tensors, values * wide.repeat_interleave(repeat, 1)[:, : shape[1]])

    return pack


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def fp4(block: int) -> Pack:
    """NVFP4 (blocks of 16) and MXFP4 (32)."""

    def pack(shape: torch.Size, generator: torch.Generator) -> Packed:
        rows, columns = shape
        codes = draw((rows, columns), 16, generator)
        tensors = {"weight_packed": (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)}
        if block == 16:
            scales = (50 * torch.rand((rows, columns // 16), generator=generator)).to(torch.float8_e4m3fn)
            whole = torch.tensor([1234.5])
            tensors |= {"weight_scale": scales, "weight_global_scale": whole}
            wide = scales.float() / whole
        else:
            exponents = 110 + draw((rows, columns // 32), 20, generator)
            tensors["weight_scale"] = exponents.to(torch.uint8)
            wide = 2.0 ** (exponents - 127)
        return Packed(tensors, (E2M1[codes] * wide.repeat_interleave(block, 1)).to(torch.bfloat16))

    return pack


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CASES: dict[str, tuple[dict[str, Any], Pack, str, str]] = {
    **{
        f"{bits} bits": (
            {"num_bits": bits},
            packed_integers(bits, 32, zeros=bits % 2 == 0),
            f"int{bits}-b32-" + ("bf16" if bits % 2 else "asym-fp32"),
            f"int{bits}",
        )
        for bits in range(2, 9)
    },
    "fp16": ({"num_bits": 4}, packed_integers(4, 32, zeros=False, dtype=F16), "int4-b32", "int4"),
    "fp32 with zeros": ({"num_bits": 4}, packed_integers(4, 32, zeros=True, dtype=F32), "F32", "int4"),
    "rows": ({"num_bits": 4}, packed_integers(4, 128, zeros=True), "int4-row-asym-fp32", "int4"),
    "3 bits, old": ({"num_bits": 3}, packed_integers(3, 32, zeros=True, old=True), "int3-b32-asym-fp32", "int3"),
    "6 bits, old": ({"num_bits": 6}, packed_integers(6, 32, zeros=False, old=True), "int6-b32-bf16", "int6"),
    "act-order": (
        {"num_bits": 4, "actorder": "group"},
        packed_integers(4, 32, zeros=False, ordered=True),
        "BF16",
        "int4",
    ),
    "int8 by tensor": ({}, plain_codes((1,), kind=torch.int8, dtype=BF16), "int8-row-bf16", "int8"),
    "int8 by row": ({}, plain_codes((96, 1), kind=torch.int8, zeros=True, dtype=F16), "int8-row-asym-fp32", "int8"),
    "fp8 by tensor": ({}, plain_codes((1,), kind=torch.float8_e4m3fn, dtype=F32), "float8e4m3-row-fp32", "fp8"),
    "fp8 by row": ({}, plain_codes((96, 1), kind=torch.float8_e4m3fn, dtype=BF16), "float8e4m3-row-bf16", "fp8"),
    "fp8 by block": (
        {"block_structure": [32, 64]},
        plain_codes((3, 2), kind=torch.float8_e4m3fn, dtype=F16),
        "float8e4m3-b64",
        "fp8",
    ),
    "nvfp4": ({}, fp4(16), "float4e2m1-b16-fp32", "nvfp4"),
    "mxfp4": ({}, fp4(32), "float4e2m1-b32-bf16", "mxfp4"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_weights(tmp_path: Path, case: str) -> None:
    weights_section, pack, held, label = CASES[case]
    weights = write_layer(tmp_path / "m", section(**weights_section), pack)
    assert_weights(tmp_path / "m", weights, held, f"compressed-tensors {label}")


@pytest.mark.parametrize("scheme", [
    {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
    {"num_bits": 3, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32},
    {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
])  # fmt: skip
def test_against_the_library(tmp_path: Path, scheme: dict[str, Any]) -> None:
    """The library compresses and decompresses."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    whole = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**scheme))
    kind = BaseCompressor.get_value_from_registry("float-quantized" if scheme["type"] == "float" else "pack-quantized")

    def pack(shape: torch.Size, generator: torch.Generator) -> Packed:
        weight = (0.1 * torch.randn(shape, generator=generator)).to(torch.bfloat16)
        groups = shape[1] // scheme.get("group_size", shape[1])
        state = {"weight": weight, "weight_scale": draw_scales((shape[0], groups), torch.bfloat16, generator)}
        if not scheme["symmetric"]:
            state["weight_zero_point"] = (draw((shape[0], groups), 8, generator) - 4).to(torch.int8)
        compressed = kind.compress(state, whole)
        return Packed(compressed, kind.decompress(dict(compressed), whole)["weight"])

    weights = write_layer(tmp_path / "m", section(**scheme), pack)
    label = {"float": "fp8"}.get(scheme["type"], f"int{scheme['num_bits']}")
    assert_weights(tmp_path / "m", weights, "", f"compressed-tensors {label}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "marlin-24"}, "format .* 'marlin-24': of compressed-tensors' formats kbit reads pack-quantized"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "kbit reads no sparse weights"),
        ({"transform_config": {"config_groups": {"r": {}}}}, "the layers' inputs are transformed"),
    ],
)
def test_what_is_not_read_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_layer(tmp_path / "m", section(num_bits=4), packed_integers(4, 32, zeros=False))
    edit_section(tmp_path / "m", **changes)
    refused(tmp_path / "m", message + ".*use the original 16-bit checkpoint", UnsupportedError)


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["a.weight"].view(torch.uint8)[3, 4] = 0xFF


@pytest.mark.parametrize(
    ("case", "edit", "message"),
    [
        ("4 bits", lambda t: t.pop("a.weight_scale"), "weight_scale is missing"),
        ("4 bits", lambda t: t.pop("a.weight_shape"), "weight_shape is missing"),
        (
            "4 bits",
            lambda t: t.pop("a.weight_packed"),
            "a.weight_(scale belongs to|shape is I64: neither a plain weight nor part of) a packed",
        ),
        ("4 bits", lambda t: t.update({"a.weight_packed": torch.zeros(96, 11, dtype=torch.int32)}), "cannot be told"),
        ("4 bits", lambda t: t.update({"a.weight_scale": torch.ones(7, 3)}), r"of shape \(7, 3\) does not fit"),
        ("4 bits", lambda t: t.update({"a.weight_zero_point": torch.zeros(2, 4, dtype=torch.int32)}), "should be I32"),
        ("act-order", lambda t: t["a.weight_g_idx"].fill_(-1), "names groups from -1 to -1"),
        ("fp8 by row", nan, "weight holds NaN"),
        (
            "fp8 by row",
            lambda t: t.pop("a.weight_scale"),
            "a.weight is F8_E4M3: neither a plain weight nor part of a packed one",
        ),
        ("nvfp4", lambda t: t.pop("a.weight_scale"), "weight_scale is missing"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, case: str, edit: Any, message: str) -> None:
    weights_section, pack, _, _ = CASES[case]
    write_layer(tmp_path / "m", section(**weights_section), pack)
    edit_tensors(tmp_path / "m", edit)
    refused(tmp_path / "m", message)
