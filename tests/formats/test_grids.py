"""Other libraries' grids: what lies on one, and rounding to one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.grids import Grid, NotOnGrid, mx_scales, nvfp4_scales, rounded_to, terms_of
from kbit.formats.microscaling import E2M1, e4m3, nearest_code
from kbit.formats.quant_format import QuantFormat
from kbit.formats.stored import StoredMatrix
from kbit.host.errors import UsageError


def drawn(rows: int = 24, columns: int = 128, seed: int = 0) -> np.ndarray[Any, Any]:
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    values[3, 32:64] = 0  # a block without anything
    values[5] *= 1e-3
    return values


def stored(format: str, values: np.ndarray[Any, Any]) -> StoredMatrix:
    packed = quantize_blockwise(torch.from_numpy(values), QuantFormat.parse(format))
    parts = {
        key: (part.view(torch.uint16) if part.dtype == torch.bfloat16 else part).numpy()
        for key, part in packed.stored.items()
    }
    parts = {key: part.view(np.uint16) if part.dtype == np.float16 else part for key, part in parts.items()}
    return StoredMatrix(packed.format, packed.shape, parts, packed.codebook.numpy())


def test_e4m3_is_torchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0.0)
    assert torch.equal(torch.from_numpy(e4m3()), codes)


def test_nearest_of_floats_is_torchs_rounding() -> None:
    values = np.concatenate([np.abs(drawn()).reshape(-1) * 100, (e4m3()[:126] + e4m3()[1:127]) / 2]).astype(np.float32)
    values = np.minimum(values, 448)
    expected = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(nearest_code(e4m3()[:127], values), expected)


@pytest.mark.parametrize(
    ("text", "reach"),
    [
        ("int4-b32", 0.5),
        ("int2-b16", 0.5),
        ("int8-row-bf16", 0.5),
        ("int3-b64-asym", 0.5),
        ("int6-row-asym-fp32", 0.5),
        ("mxfp4", 1.0),
        ("nvfp4", 1.0),
        ("fp8", 16.0),
    ],
)
def test_rounding_goes_to_the_nearest(text: str, reach: float) -> None:
    """No farther than half the widest gap between levels (in steps; of MXFP4 beyond 6 there is nothing up to 8), and half
    a level's rounding of the scale."""
    grid, values = Grid.parse(text), drawn()
    terms, codes = rounded_to(values, grid)
    found = terms.values(codes)
    step = terms.scales.repeat(values.shape[1] // terms.scales.shape[1], axis=1)
    slack = 2 if text == "mxfp4" else 1
    top = np.abs(values) * (2.0**-8 if grid.kind == "int" else 2.0**-4 if text == "nvfp4" else 0)
    assert bool((np.abs(found - values) <= slack * reach * step * 1.001 + top).all())
    assert bool((found[3, 32:64] == 0).all())
    again, codes_again = rounded_to(found, grid)
    if grid.kind == "int" and grid.scale_kind == "fp32" and not grid.asymmetric:
        assert np.array_equal(again.values(codes_again), found)


def test_rounding_to_e2m1_is_nearest_given_its_scales() -> None:
    for name in ("mxfp4", "nvfp4"):
        values = drawn()
        terms, codes = rounded_to(values, Grid.parse(name))
        step = terms.scales.repeat(values.shape[1] // terms.scales.shape[1], axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = np.abs(np.where(step > 0, values / step, 0)[..., None] - E2M1).min(axis=-1)
            found = np.abs(np.where(step > 0, values / step, 0) - E2M1[codes])
        assert np.allclose(found, wanted, rtol=0, atol=1e-6)
        if name == "mxfp4":
            assert np.array_equal(2.0 ** (mx_scales(terms.scales).astype(float) - 127), terms.scales)
        else:
            own, divisor = nvfp4_scales(terms.scales)
            assert np.array_equal(e4m3()[own] / divisor, terms.scales)


@pytest.mark.parametrize("seed", range(5))
def test_nvfp4_scales_are_found_again(seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 127, (7, 9)).astype(np.uint8)
    divisor = np.float32(np.exp(rng.uniform(-5, 12)))
    scales = e4m3()[codes] / divisor
    found, other = nvfp4_scales(scales)
    assert np.array_equal(e4m3()[found] / other, scales)


def test_scales_of_no_grid() -> None:
    with pytest.raises(NotOnGrid, match="no powers of two"):
        mx_scales(np.array([[1.0, 0.75]], dtype=np.float32))
    with pytest.raises(NotOnGrid, match="no numbers of E4M3 over one divisor"):
        nvfp4_scales(np.array([[1.0, 0.7123]], dtype=np.float32))


@pytest.mark.parametrize("format", ["int4-b32", "int8-row", "int2-b16-bf16", "int6-b64-dq"])
def test_kbits_integers_are_on_a_grid(format: str) -> None:
    from kbit.formats.stored_planes import StoredPlanes

    matrix = stored(format, drawn())
    terms = terms_of(matrix)
    found = terms.values(StoredPlanes.of(matrix).codes())
    values = matrix.tensor().dequantize().numpy()
    assert np.allclose(found, values, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("nf4-b32", "levels that are neither"),
        ("int4-b32-asym", "offsets that are no whole numbers of steps"),
        ("float4e2m1-b32", "levels that are neither"),
    ],
)
def test_others_are_on_none(format: str, message: str) -> None:
    with pytest.raises(NotOnGrid, match=message):
        terms_of(stored(format, drawn()))


@pytest.mark.parametrize("text", ["nf4-b64", "int4-b64-dq", "Q4_K_M", "float4e2m1-b32"])
def test_names_of_no_grid(text: str) -> None:
    with pytest.raises(UsageError):
        Grid.parse(text)
