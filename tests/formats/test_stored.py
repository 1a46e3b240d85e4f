"""Stored matrices without torch mean what torch makes of the same bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kbit.checkpoint.readers.floats import to_float32
from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.planes import pack
from kbit.formats.quant_format import QuantFormat
from kbit.formats.scales import load_scales
from kbit.formats.stored import StoredMatrix, is_finite, narrowed, rounded, rounded_values, widened
from kbit.formats.stored_planes import StoredPlanes, pack_codes


@pytest.mark.parametrize(
    ("name", "dtype", "bits"),
    [
        ("F16", torch.float16, np.uint16),
        ("BF16", torch.bfloat16, np.uint16),
        ("F8_E4M3", torch.float8_e4m3fn, np.uint8),
        ("F8_E5M2", torch.float8_e5m2, np.uint8),
    ],
)
def test_every_pattern_widens_as_in_torch(name: str, dtype: torch.dtype, bits: type) -> None:
    patterns = np.arange(np.iinfo(bits).max + 1).astype(bits)
    expected = torch.from_numpy(patterns).view(dtype).float().numpy()
    found = to_float32(patterns, name)
    np.testing.assert_array_equal(found, expected)  # NaN equals NaN here
    np.testing.assert_array_equal(np.signbit(found[found == 0]), np.signbit(expected[expected == 0]))


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_narrowing_reverses_widening_and_finite_is_told_from_the_pattern(kind: str) -> None:
    patterns = np.arange(1 << 16).astype(np.uint16)
    values = widened(patterns, kind)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(narrowed(values[finite], kind), patterns[finite])
    assert is_finite(patterns[finite], kind)
    for bad in patterns[~finite]:
        assert not is_finite(np.array([0, bad], dtype=np.uint16), kind)


def test_float32_sums_that_overflow_are_finite_numbers() -> None:
    assert is_finite(np.full(4, 3e38, dtype=np.float32), "fp32")
    assert not is_finite(np.array([1, np.nan], dtype=np.float32), "fp32")


@pytest.mark.parametrize("text", ["int4-b32-asym-dq", "nf3-b64-dq", "quantile5-b64", "lloyd2-row", "int7-b16-bf16"])
def test_a_stored_matrix_is_the_same_tensor(text: str) -> None:
    tensor = quantize_blockwise(
        torch.randn(37, 200, generator=torch.Generator().manual_seed(1)), QuantFormat.parse(text)
    )

    def bits(values: torch.Tensor) -> np.ndarray:
        return (values.view(torch.uint16) if values.dtype in (torch.float16, torch.bfloat16) else values).numpy()

    parts = {name: bits(values) for name, values in tensor.stored.items()}
    stored = StoredMatrix.checked("x", tensor.format, tensor.shape, parts, tensor.codebook.numpy())
    assert torch.equal(stored.tensor().dequantize(), tensor.dequantize())
    for name in ("scales", "offsets"):
        values, kind = StoredPlanes.of(stored).kernel_scales(name)
        expected = load_scales(tensor.stored, name, tensor.format)
        assert (values is None) == (expected is None)
        if values is not None and expected is not None:
            np.testing.assert_array_equal(widened(values, kind), expected.numpy())


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_packed_alike(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 83), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    for found, expected in zip(pack_codes(codes.numpy(), bits), pack(codes, bits), strict=True):
        np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize("kind", ["fp16", "bf16", "fp32"])
def test_values_rounded_in_place_are_those_converted_there_and_back(kind: str) -> None:
    """Ties, the ends of float16's normal range, and beyond it, where numbers are converted."""
    rng = np.random.default_rng(0)
    edges = np.array([0.0, -0.0, 2.0**-14, 65504.0, 65519.0, 1 + 2.0**-11, 1 + 3 * 2.0**-11, -1 - 2.0**-8])
    drawn = np.exp(rng.uniform(-9, 11, 5000)) * rng.choice([-1, 1], 5000)
    for values in (
        np.concatenate([edges, drawn]),
        np.array([1e-6, 3.0]),
        np.array([7e4, 1.0]),
        np.array([np.inf, 1.0]),
    ):
        given = values.astype(np.float32)
        found, wanted = rounded_values(given.copy(), kind), widened(rounded(given, kind), kind)
        assert np.array_equal(found.view(np.uint32), wanted.view(np.uint32))
