"""ModelOpt's and FBGEMM's folders open with the products of their codes and scales."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_cases import Packed, assert_weights, draw, edit_section, edit_tensors, refused, write_layer

from kbit.checkpoint.resolve import open_model
from kbit.host.errors import UnsupportedError

Pack = Callable[[torch.Size, torch.Generator], Packed]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def fp8(*scale: int) -> Pack:
    def pack(shape: torch.Size, generator: torch.Generator) -> Packed:
        codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
        scales = torch.rand(scale, generator=generator)
        return Packed({"weight": codes, "weight_scale": scales}, codes.float() * scales)

    return pack


def nvfp4(shape: torch.Size, generator: torch.Generator) -> Packed:
    codes = draw(tuple(shape), 16, generator)
    scales = (100 * torch.rand((shape[0], shape[1] // 16), generator=generator)).to(torch.float8_e4m3fn)
    whole = torch.tensor(0.00123)
    tensors = {
        "weight": (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8),
        "weight_scale": scales,
        "weight_scale_2": whole,
        "input_scale": torch.tensor(0.5),
    }
    return Packed(tensors, E2M1[codes] * (scales.float() * whole).repeat_interleave(16, 1))


CASES: dict[str, tuple[dict[str, Any], Pack, str, str]] = {
    "FBGEMM": ({"quant_method": "fbgemm_fp8"}, fp8(96, 1), "float8e4m3-row-fp32", "FBGEMM fp8"),
    "FP8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8(), "float8e4m3-row-fp32", "ModelOpt fp8"),
    "NVFP4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4, "float4e2m1-b16-fp32", "ModelOpt nvfp4"),
}


@pytest.mark.parametrize("case", CASES)
def test_weights(tmp_path: Path, case: str) -> None:
    section, pack, held, label = CASES[case]
    weights = write_layer(tmp_path / "m", section, pack)
    assert_weights(tmp_path / "m", weights, held, label)


def test_a_configuration_of_its_own(tmp_path: Path) -> None:
    """ModelOpt's first exports have hf_quant_config.json beside a config.json that says nothing."""
    weights = write_layer(tmp_path / "m", {}, nvfp4, key="unused")
    (tmp_path / "m" / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    with open_model(str(tmp_path / "m")) as source:
        assert torch.equal(source.read("a.weight"), weights["a.weight"])


def test_what_is_not_read_is_refused(tmp_path: Path) -> None:
    write_layer(tmp_path / "m", CASES["NVFP4"][0], nvfp4)
    edit_section(tmp_path / "m", quant_algo="W4A8_AWQ")
    refused(tmp_path / "m", "quant_algo 'W4A8_AWQ': of ModelOpt's kbit reads FP8 and NVFP4", UnsupportedError)
    edit_section(tmp_path / "m", quant_algo="NVFP4")
    edit_tensors(tmp_path / "m", lambda tensors: tensors.pop("a.weight_scale_2"))
    refused(tmp_path / "m", "weight_scale_2 is missing, which belongs to a packed weight")
