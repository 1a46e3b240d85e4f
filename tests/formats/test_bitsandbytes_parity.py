"""The same weights give the same codes and scales here and in bitsandbytes.

bitsandbytes cuts the flattened tensor into blocks and kbit every row; with rows of whole blocks that is the same.
Its scales are float32, hence the fp32 in the formats here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.codebooks import dynamic_codebook, float_codebook, int_codebook, normal_float_codebook
from kbit.formats.quant_format import QuantFormat

functional: Any  # of bitsandbytes, see below

BLOCK_SIZES = [64, 128, 256, 512, 1024, 2048, 4096]
FP4_MINUS_ZERO = 8


@pytest.fixture(scope="module", autouse=True)
def _bitsandbytes() -> None:
    """Imported where these tests run and not by every process that collects them: it takes seconds."""
    global functional
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def weights() -> torch.Tensor:
    """Normal weights, with rows of very different size, among them a block of zeros."""
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(11))
    x *= torch.logspace(-6, 4, 64)[:, None]
    x[7, :64] = 0
    return x


@pytest.fixture(scope="module")
def real_weights(data_dir: Path) -> dict[str, torch.Tensor]:
    """The matrices of one layer of a real model, and its embeddings: fp16, rows of 256 or more."""
    from safetensors.torch import load_file

    tensors = load_file(data_dir / "models" / "novels-2m" / "model.safetensors")
    chosen = {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and (".layers.1." in name or "embed" in name)
    }
    assert len(chosen) == 8
    return chosen


def their_4bit(x: torch.Tensor, block_size: int, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bitsandbytes' codes (N, K), scales (N, blocks) and dequantized weights (N, K)."""
    packed, state = functional.quantize_4bit(x, blocksize=block_size, quant_type=kind)
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).view(x.shape)
    return codes, state.absmax.view(x.shape[0], -1), functional.dequantize_4bit(packed, state)


def assert_4bit_parity(x: torch.Tensor, block_size: int, kind: str) -> None:
    q = quantize_blockwise(x, QuantFormat.parse(f"{kind}-b{block_size}-fp32"))
    codes, absmax, values = their_4bit(x, block_size, kind)
    if kind == "fp4":
        # FP4 has two zeros. bitsandbytes sorts its table, and with it codes 0 and 8, by an argsort that is not
        # stable; numbers next to zero get one or the other depending on their sign. kbit writes 0 for both.
        codes = torch.where(codes == FP4_MINUS_ZERO, 0, codes)
    assert torch.equal(q.codes(), codes)
    assert torch.equal(q.scales, absmax)
    assert torch.equal(q.dequantize(x.dtype), values)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4bit_on_normal_weights(kind: str, block_size: int, weights: torch.Tensor) -> None:
    assert_4bit_parity(weights, block_size, kind)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4bit_on_16_bit_weights(kind: str, dtype: torch.dtype, weights: torch.Tensor) -> None:
    assert_4bit_parity(weights[20:40].to(dtype), 64, kind)


@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4bit_on_a_real_model(kind: str, block_size: int, real_weights: dict[str, torch.Tensor]) -> None:
    for x in real_weights.values():
        assert_4bit_parity(x, block_size, kind)
        assert_4bit_parity(x.float(), block_size, kind)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4bit_on_every_border(kind: str) -> None:
    """Values on the midpoints between levels, and one float32 step to either side of them."""
    fmt = QuantFormat.parse(f"{kind}-b64-fp32")
    table = np.unique(quantize_blockwise(torch.ones(1, 64), fmt).codebook.numpy())
    middle = ((table[1:] + table[:-1]) / 2).astype(np.float32)
    one = np.float32(1)
    values = np.concatenate([middle, np.nextafter(middle, -one), np.nextafter(middle, one), -one[None], [one]])
    x = torch.from_numpy(np.resize(values, 64).astype(np.float32))[None]
    assert x.abs().max() == 1
    assert_4bit_parity(x, 64, kind)


# --- 8-bit dynamic --------------------------------------------------------------------------------------------------


def their_exact_codes(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """bitsandbytes' 8-bit codes by its search through all 256 levels, which its operator uses for float64 input."""
    table = functional.create_dynamic_map(signed=True, max_exponent_bits=7, total_bits=8)
    codes, _ = torch.ops.bitsandbytes.quantize_blockwise.default(x.double(), table, block_size)
    return torch.as_tensor(codes)


@pytest.mark.parametrize("block_size", [64, 256, 4096])
def test_8bit_dynamic_equals_the_exact_search(block_size: int, weights: torch.Tensor) -> None:
    x = weights[8:24]  # without the block of zeros, on which that path divides by zero
    q = quantize_blockwise(x, QuantFormat.parse(f"dynamic8-b{block_size}-fp32"))
    assert torch.equal(q.codes(), their_exact_codes(x, block_size))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_8bit_dynamic_against_the_quick_search(block_size: int, weights: torch.Tensor) -> None:
    """bitsandbytes' float32 path finds the level through a lookup table of cells over [-1, 1].

    Every weight in a cell gets the code of the cell's point, so a code may differ from the nearest where a border
    between two levels runs through the cell: about one weight in 700. Near zero, levels lie closer together than
    cells are wide, and several borders may run through one (zero itself is not kept: hence no zeros here).
    """
    x = weights[8:]
    q = quantize_blockwise(x, QuantFormat.parse(f"dynamic8-b{block_size}-fp32"))
    theirs, state = functional.quantize_blockwise(x, blocksize=block_size)
    assert torch.equal(q.scales, state.absmax.view(x.shape[0], -1))
    assert torch.equal(q.codebook, state.code)

    ours = q.codes()
    differ = ours != theirs
    assert 0 < differ.float().mean() < 0.003
    scales = q.scales.repeat_interleave(block_size, 1)
    normalised = (x[differ].double() / scales[differ].double()).numpy()
    our_code, their_code = ours[differ].long().numpy(), theirs[differ].long().numpy()
    levels = q.codebook.double().numpy()
    borders = (levels[1:] + levels[:-1]) / 2  # border i lies between codes i and i + 1
    low, high = np.minimum(our_code, their_code), np.maximum(our_code, their_code)
    # The outermost of the borders between the two codes bound the others: both within a cell (2 / 2^16 wide).
    cell = 2.0**-15
    assert np.abs(normalised - borders[low]).max() <= cell
    assert np.abs(normalised - borders[high - 1]).max() <= cell
    # Not adjacent only where all of the levels from one to the other fit in a cell.
    apart = high - low > 1
    assert apart.mean() < 0.02
    assert np.all(levels[high[apart]] - levels[low[apart]] <= 2 * cell)
    # kbit's is the nearer one, up to float32's rounding of a normalised value (4 units of 2^-24) and of a border.
    distance = np.abs(normalised - levels[our_code])
    assert np.all(distance <= np.abs(normalised - levels[their_code]) + 2 * 5 * 2.0**-24)


@pytest.mark.parametrize("block_size", [64, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_8bit_dequantized_values(block_size: int, dtype: torch.dtype, weights: torch.Tensor) -> None:
    """From kbit's codes bitsandbytes makes kbit's values."""
    x = weights[20:40]
    q = quantize_blockwise(x, QuantFormat.parse(f"dynamic8-b{block_size}-fp32"))
    _, state = functional.quantize_blockwise(x.to(dtype), blocksize=block_size)
    state.absmax = q.scales.flatten()
    assert state.dtype == dtype
    assert torch.equal(functional.dequantize_blockwise(q.codes(), state), q.dequantize(dtype))


def test_8bit_on_a_real_model(real_weights: dict[str, torch.Tensor]) -> None:
    fmt = QuantFormat.parse("dynamic8-b256-fp32")
    for x in real_weights.values():
        q = quantize_blockwise(x, fmt)
        _, state = functional.quantize_blockwise(x.float(), blocksize=256)
        assert torch.equal(q.scales.flatten(), state.absmax)
        # fp16 weights over an fp16 scale hit borders to the last float32 bit now and then. A tie is then decided by
        # how a float32 was rounded: the border here, the two distances there.
        ours, theirs = q.codes(), their_exact_codes(x, 256)
        differ = ours != theirs
        assert differ.float().mean() < 1e-4
        assert ((ours.int() - theirs.int())[differ].abs() == 1).all()
        levels = q.codebook.double()
        borders = (levels[ours[differ].long()] + levels[theirs[differ].long()]) / 2
        normalised = (x.double() / q.scales.double().repeat_interleave(256, 1))[differ]
        assert ((normalised - borders).abs() <= 4 * 2.0**-24 * normalised.abs()).all()


# --- codebooks ------------------------------------------------------------------------------------------------------


def test_4bit_tables() -> None:
    assert normal_float_codebook(4).tolist() == functional.get_4bit_type("nf4", device="cpu").tolist()
    assert float_codebook(4, 2, "bnb").tolist() == functional.get_4bit_type("fp4", device="cpu").tolist()


@pytest.mark.parametrize("bits", range(2, 9))
def test_dynamic_maps(bits: int) -> None:
    """Bit for bit. Below 8 bits bitsandbytes fills its table of 256 up with zeros."""
    theirs = functional.create_dynamic_map(signed=True, max_exponent_bits=bits - 1, total_bits=bits).numpy()
    assert dynamic_codebook(bits).tolist() == np.unique(theirs).tolist()


@pytest.mark.parametrize("bits", range(2, 9))
def test_linear_maps(bits: int) -> None:
    theirs = functional.create_linear_map(signed=True, total_bits=bits).numpy()
    # torch's float32 linspace adds steps up (its middle is not quite zero); kbit divides in float64.
    theirs = np.unique(np.where(np.abs(theirs) < 2.0**-23, 0, theirs))
    np.testing.assert_allclose(int_codebook(bits, asymmetric=False)[1:], theirs, rtol=0, atol=2.0**-23)


# Without E2M1 at 4 bits: quantize_4bit's FP4 table is not the float map; see test_4bit_tables.
@pytest.mark.parametrize(("bits", "exponent"), [(k, e) for k in range(3, 9) for e in range(1, k) if (k, e) != (4, 2)])
def test_float_maps(bits: int, exponent: int) -> None:
    theirs = functional.create_fp8_map(
        signed=True, exponent_bits=exponent, precision_bits=bits - 1 - exponent, total_bits=bits
    )
    ours = np.unique(float_codebook(bits, exponent, "bnb"))
    np.testing.assert_allclose(ours, np.unique(theirs.numpy()), rtol=2.0**-23)
