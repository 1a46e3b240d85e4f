"""bitsandbytes' folders open with the weights that it dequantizes; the library itself writes and judges them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_cases import Packed, assert_weights, edit_tensors, refused, write_layer, write_packed

from kbit.checkpoint.resolve import open_model
from kbit.host.errors import UnsupportedError
from kbit.host.notes import KbitNote

functional: Any  # of bitsandbytes

SECTION = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.fixture(scope="module", autouse=True)
def _bitsandbytes() -> None:
    """Imported where these tests run and not by every process that collects them: it takes seconds."""
    global functional
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")


def four_bits(
    kind: str,
    block: int,
    *,
    nested: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    storage: torch.dtype = torch.uint8,
) -> Callable[[torch.Size, torch.Generator], Packed]:
    def pack(shape: torch.Size, generator: torch.Generator) -> Packed:
        weight = (0.1 * torch.randn(shape, generator=generator)).to(dtype)
        packed, state = functional.quantize_4bit(
            weight, blocksize=block, quant_type=kind, compress_statistics=nested, quant_storage=storage
        )
        parts = {f"weight.{end}": part for end, part in state.as_dict(packed=True).items()}
        return Packed({"weight": packed, **parts}, their_weight(packed, state))

    return pack


def their_weight(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """As bitsandbytes dequantizes it; by its plain implementation, where a block goes on in the next row.

    There its CPU kernel (0.50, AVX-512) takes the scale of the row's first block: its values are further from the
    weights that were quantized than those of the other implementations are.
    """
    if state.shape[1] % state.blocksize == 0:
        return torch.as_tensor(functional.dequantize_4bit(packed, state))
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    scales = (
        functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    )
    codes = packed.view(torch.uint8).reshape(-1)
    return torch.as_tensor(
        _dequantize_4bit_compute(codes, scales, state.code, state.blocksize, state.shape, state.dtype)
    )


def int8(shape: torch.Size, generator: torch.Generator) -> Packed:
    codes, scales, _ = functional.int8_vectorwise_quant(torch.randn(shape, generator=generator).half())
    layout = torch.zeros((), dtype=torch.uint8)
    return Packed(
        {"weight": codes, "SCB": scales, "weight_format": layout}, functional.int8_vectorwise_dequant(codes, scales)
    )


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "nf4": ({"kind": "nf4", "block": 64}, "nf4-b64-fp32"),
    "fp4": ({"kind": "fp4", "block": 64, "dtype": torch.float16}, "float4e2m1-b64-bnb-fp32"),
    "nested scales": ({"kind": "nf4", "block": 64, "nested": True}, "nf4-b64-fp32"),
    "nested scales, float32": (
        {"kind": "fp4", "block": 64, "nested": True, "dtype": torch.float32},
        "float4e2m1-b64-bnb-fp32",
    ),
    "stored as bf16": ({"kind": "nf4", "block": 64, "storage": torch.bfloat16}, "nf4-b64-fp32"),
    "blocks across rows": ({"kind": "nf4", "block": 512, "nested": True}, "nf4-b128-fp32"),
}


@pytest.mark.parametrize("case", CASES)
def test_4bit(tmp_path: Path, case: str) -> None:
    settings, held = CASES[case]
    weights = write_layer(tmp_path / "m", SECTION, four_bits(**settings))
    label = f"bitsandbytes {settings['kind']}" + (", scales in 8 bits" if settings.get("nested") else "")
    assert_weights(tmp_path / "m", weights, held, label)


def test_4bit_rows_that_no_format_divides(tmp_path: Path) -> None:
    """Rows of 40 weights in blocks of 64 share 8, of which there are no blocks: dequantized, as bitsandbytes does."""
    weights = write_layer(tmp_path / "m", SECTION, four_bits("nf4", 64, nested=True), (56, 40))
    assert_weights(tmp_path / "m", weights, "BF16", "bitsandbytes nf4, scales in 8 bits")


def test_int8(tmp_path: Path) -> None:
    weights = write_layer(tmp_path / "m", {"load_in_8bit": True}, int8)
    assert_weights(tmp_path / "m", weights, "F32", "bitsandbytes int8")
    edit_tensors(tmp_path / "m", lambda tensors: [t.fill_(2) for name, t in tensors.items() if "_format" in name])
    refused(tmp_path / "m", "weight_format: the codes are rearranged for one kind of GPU", UnsupportedError)


@pytest.mark.parametrize(
    ("end", "part", "message"),
    [
        (".absmax", None, r"absmax is missing, which belongs to a packed weight"),
        (".quant_map", None, r"quant_map is missing"),
        (
            ".quant_state.bitsandbytes__nf4",
            None,
            r"absmax belongs to a packed weight, but its other tensors are missing",
        ),
        (".absmax", torch.ones(3), "do not hold .* codes in blocks of 64"),
        (".quant_map", torch.ones(8), "quant_map is F32 .* but should be F32 .16,."),
        (".quant_state.bitsandbytes__nf4", torch.ones(3, dtype=torch.uint8), "is no JSON object"),
        (
            ".quant_state.bitsandbytes__nf4",
            torch.tensor(list(b'{"shape": [1], "blocksize": 64, "dtype": "float16"}'), dtype=torch.uint8),
            "which describe no matrix",
        ),
    ],
)
def test_4bit_tensors_that_do_not_fit(tmp_path: Path, end: str, part: torch.Tensor | None, message: str) -> None:
    write_layer(tmp_path / "m", SECTION, four_bits("nf4", 64))

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith(end))
        tensors.pop(name)
        if part is not None:
            tensors[name] = part

    edit_tensors(tmp_path / "m", edit)
    refused(tmp_path / "m", message)


def test_plain_weights_are_used(tmp_path: Path, packable_model: Path) -> None:
    """bitsandbytes packs as it loads: many folders name it and hold plain weights."""
    write_packed(packable_model, tmp_path / "m", SECTION, four_bits("nf4", 64), only="no layer's name holds this")
    said = "bitsandbytes is named as the quantizer, but the weights are plain numbers"
    with pytest.warns(KbitNote, match=said):
        source = open_model(str(tmp_path / "m"))
    with source:
        assert not any(info.packed_as for info in source.tensors.values())
        assert "quantization_config" not in source.config
