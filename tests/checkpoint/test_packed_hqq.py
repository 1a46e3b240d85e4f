"""HQQ's folders open with the weights that it dequantizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_cases import Packed, assert_weights, draw, draw_scales, edit_tensors, refused, write_layer

from kbit.host.errors import UnsupportedError

SECTION = {"quant_method": "hqq"}
# Bits -> slices of the table, type of the words, name.
PACKINGS = {
    8: (1, torch.uint8, "8bit_u8"),
    4: (2, torch.uint8, "4bit_u8"),
    3: (10, torch.int32, "3bit_32"),
    2: (4, torch.uint8, "2bit_u8"),
    1: (8, torch.uint8, "1bit_u8"),
}


def text(value: str) -> torch.Tensor:
    return torch.tensor([ord(letter) for letter in value], dtype=torch.uint8)


def hqq(bits: int, group: int, dtype: torch.dtype) -> Callable[[torch.Size, torch.Generator], Packed]:
    """A layer as HQQLinear.state_dict has it."""
    slices, words, packing = PACKINGS[bits]

    def pack(shape: torch.Size, generator: torch.Generator) -> Packed:
        groups = shape[0] * shape[1] // group
        codes = draw((groups, group), 2**bits, generator)
        table = torch.nn.functional.pad(codes, (0, 0, 0, -groups % slices)).reshape(slices, -1, group)
        packed = torch.zeros_like(table[0])
        for index, part in enumerate(table):
            packed |= part << (bits * (slices - 1 - index))
        scale = draw_scales((groups, 1), dtype, generator)
        zero = (2 ** (bits - 1) + torch.randn((groups, 1), generator=generator)).to(dtype)
        weight = ((codes.to(dtype) - zero) * scale).reshape(shape)
        tensors = {
            "W_q": packed.to(words),
            "scale": scale,
            "zero": zero,
            "nbits": torch.tensor(bits, dtype=torch.int32),
            "group_size": torch.tensor(group, dtype=torch.int32),
            "axis": torch.tensor(1, dtype=torch.int32),
            "shape": torch.tensor(shape),
            "packing": text(packing),
            "compute_dtype": text(str(dtype)),
            "view_as_float": torch.tensor(0, dtype=torch.uint8),
            "quant_scale": torch.tensor(0, dtype=torch.uint8),
            "stores_quant_config": torch.tensor(1, dtype=torch.uint8),
        }
        return Packed(tensors, weight)

    return pack


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", PACKINGS)
def test_weights(tmp_path: Path, bits: int, dtype: torch.dtype) -> None:
    weights = write_layer(tmp_path / "m", SECTION, hqq(bits, 32, dtype))
    held = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    assert_weights(tmp_path / "m", weights, held, f"HQQ {bits}-bit")


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_against_the_library(tmp_path: Path, bits: int) -> None:
    """HQQ quantizes and dequantizes."""
    quantize = pytest.importorskip("hqq.core.quantize", reason="HQQ is not installed")

    def pack(shape: torch.Size, generator: torch.Generator) -> Packed:
        layer = torch.nn.Linear(shape[1], shape[0], bias=False)
        layer.weight.data = torch.randn(shape, generator=generator)
        config = quantize.BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
        found = quantize.HQQLinear(layer, config, compute_dtype=torch.float16, device="cpu")
        return Packed({name: part for name, part in found.state_dict().items() if part is not None}, found.dequantize())

    weights = write_layer(tmp_path / "m", SECTION, pack)
    assert_weights(tmp_path / "m", weights, "F16", f"HQQ {bits}-bit")


def put(name: str, value: torch.Tensor) -> Any:
    return lambda tensors: tensors.update({f"a.{name}": value})


@pytest.mark.parametrize(
    ("edit", "message", "kind"),
    [
        (put("axis", torch.tensor(0, dtype=torch.int32)), "a.axis is 0: groups across rows", UnsupportedError),
        (put("quant_scale", torch.tensor(1, dtype=torch.uint8)), "a.quant_scale is set", UnsupportedError),
        (put("packing", text("5bit_u8")), "a.packing is '5bit_u8'", UnsupportedError),
        (put("compute_dtype", text("torch.float64")), "a.compute_dtype is 'torch.float64'", UnsupportedError),
        (put("shape", torch.tensor([96, 100])), "describe no matrix of whole groups a row", None),
        (put("W_q", torch.zeros(8, 8, dtype=torch.uint8)), "W_q is U8 .8, 8., but should be U8", None),
        (put("scale", torch.ones(3, 1)), "scale is F32 .3, 1., but should be", None),
        (lambda t: t.pop("a.zero"), "a.zero is missing", None),
        (lambda t: t.pop("a.W_q"), "neither a plain weight nor part of a packed one", None),
    ],
)
def test_what_does_not_fit(tmp_path: Path, edit: Any, message: str, kind: Any) -> None:
    write_layer(tmp_path / "m", SECTION, hqq(4, 32, torch.float16))
    edit_tensors(tmp_path / "m", edit)
    refused(tmp_path / "m", message, **({"kind": kind} if kind else {}))
