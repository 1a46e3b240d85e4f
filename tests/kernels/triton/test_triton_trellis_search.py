"""The search for trellis codes on a GPU: the CPU's rings, byte for byte."""

from __future__ import annotations

import pytest
import torch
from triton_cases import assert_within as assert_within  # sets the interpreter first

triton = pytest.importorskip("triton")

from kbit.formats.trellis import TrellisFormat  # noqa: E402
from kbit.formats.trellis_code import TileFactors, levels, search  # noqa: E402
from kbit.host.errors import UnsupportedError  # noqa: E402
from kbit.kernels.reference_trellis import in_units, search_symbols, to_strings  # noqa: E402
from kbit.kernels.triton.codecs.trellis_search import search_on_gpu  # noqa: E402

WHOLE = ("trellis2-sum4-l13", "trellis3-l8", "trellis4-l10")
HALF = ("trellis2.5-l13", "trellis3.5-l9", "trellis4.5-l10", "trellis5.5-l11")


@pytest.mark.parametrize("text", [*WHOLE, *HALF])
def test_the_same_rings(device: str, text: str) -> None:
    """Two blocks of overlaps; short windows; numbers beyond all values. (The longest window is among the checks of
    kbit.gpu_check.)"""
    format = TrellisFormat.parse(text)
    tiles = torch.randn(1, 256, generator=torch.Generator().manual_seed(format.window))
    tiles[0, ::32] = 9.0
    assert torch.equal(search_on_gpu(format, tiles, device), search(format, tiles, 1))


@pytest.mark.parametrize("text", ["trellis2-l8", "trellis2.5-l8"])
def test_the_same_rings_where_errors_are_passed_on(device: str, text: str) -> None:
    format = TrellisFormat.parse(text)
    generator = torch.Generator().manual_seed(2)
    tiles = torch.randn(1, 256, generator=generator)
    tiles[0, ::32] = 9.0
    factors = TileFactors.of(*(torch.randn(1, 16, 16, generator=generator) * 0.2 for _ in range(2)))
    expected = search(format, tiles, 1, factors)
    assert not torch.equal(expected, search(format, tiles, 1))
    assert torch.equal(search_on_gpu(format, tiles, device, factors), expected)


@pytest.mark.parametrize("text", ["trellis3-l12", "trellis3.5-l10"])
def test_the_reference(text: str) -> None:
    """What the definition finds is what the CPU's kernel finds, too."""
    format = TrellisFormat.parse(text)
    tiles = torch.randn(2, 256, generator=torch.Generator().manual_seed(8))
    tiles[1, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    values = in_units(levels(format, torch.arange(1 << format.window)).float() * format.step)
    symbols = torch.stack([search_symbols(numbers, values, 3, half=format.half) for numbers in in_units(tiles)])
    assert torch.equal(to_strings(symbols, 3, format.half), search(format, tiles, 1))


def test_symbols_one_after_another() -> None:
    """Of two and three bits in turn: 01 110 makes 01110 again and again."""
    symbols = torch.tensor([[1, 6] * 128], dtype=torch.uint8)
    bits = "".join(f"{byte:08b}" for byte in to_strings(symbols, 2, True)[0].tolist())
    assert bits == "01110" * 128


def test_numbers_that_say_little(device: str) -> None:
    """NaN and infinity; ties everywhere."""
    format = TrellisFormat.parse("trellis2-l8")
    tiles = torch.zeros(2, 256)
    tiles[1] = torch.tensor([1e30, -1e30, torch.nan, torch.inf]).repeat(64)
    assert torch.equal(search_on_gpu(format, tiles, device), search(format, tiles, 1))


def test_other_gpus_are_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kbit.kernels.triton.codecs.trellis_search.current_arch", lambda: "gfx942")
    with pytest.raises(UnsupportedError, match="not on gfx942; use --device cpu"):
        search_on_gpu(TrellisFormat(3), torch.zeros(1, 256), device)
