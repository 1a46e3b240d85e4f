"""Weights that are kept apart: which, how they are stored and cut, and what a damaged file has in their place."""

from __future__ import annotations

import re

import pytest
import torch
from matmul_cases import weights
from trellis_cases import trellis_tensor

from kbit.formats.codec import Cut
from kbit.formats.outlier_weights import (
    PLACES,
    VALUES,
    add_outliers,
    largest,
    outlier_parts,
    ratios,
    scaled_outliers,
    worthwhile,
)
from kbit.formats.quant_tensor import QuantTensor, join_rows
from kbit.formats.registry import parse_format
from kbit.formats.stored import StoredMatrix
from kbit.formats.trellis import TrellisFormat
from kbit.host.errors import CheckpointError


def with_giants(rows: int = 40, columns: int = 256) -> torch.Tensor:
    """Normal numbers, rows of all sizes, and three weights that are far beyond theirs."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-3, 2, rows)[:, None]
    for row, column, times in ((3, 7, 50.0), (3, 8, -9.0), (20, 255, 400.0)):
        weight[row, column] = times * weight[row].square().mean().sqrt()
    return weight


def test_weights_are_measured_by_their_rows_without_others() -> None:
    weight = with_giants()
    found = ratios(weight)
    own = torch.cat([weight[3, :7], weight[3, 9:]]).square().sum() / 256  # as many as there are columns
    assert float(found[3, 7]) == pytest.approx(float(weight[3, 7] ** 2 / own), rel=1e-4)
    assert float(found[3, 8]) == pytest.approx(float(weight[3, 8] ** 2 / own), rel=1e-4)
    assert int((found > 40).sum()) == 3
    assert not ratios(torch.zeros(2, 64)).any()
    alone = torch.zeros(1, 64)
    alone[0, 5] = 1e-3
    assert float(ratios(alone)[0, 5]) == float("inf")


def test_as_many_are_kept_as_pay() -> None:
    weight = with_giants()
    assert worthwhile(lambda start, stop: weight[start:stop], (40, 256)) == 4  # the power of two next to three
    plain = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    assert worthwhile(lambda start, stop: plain[start:stop], (64, 512)) == 0
    many = plain.clone()
    many[:, ::64] *= 30
    assert worthwhile(lambda start, stop: many[start:stop], (64, 512)) == 512


def test_the_largest_are_kept_in_order() -> None:
    weight = with_giants()
    stored = largest(lambda start, stop: weight[start:stop], (40, 256), 4)
    places = stored[PLACES].tolist()
    assert places == sorted(places)
    assert {3 * 256 + 7, 3 * 256 + 8, 20 * 256 + 255} < set(places)
    assert torch.equal(stored[VALUES], weight.flatten()[stored[PLACES].long()].half())
    few = largest(lambda start, stop: weight[start:stop][:, :2], (40, 2), 100)  # of more than there are, zeros remain
    assert few[VALUES].shape == (100,)
    assert int((few[VALUES] != 0).sum()) == 80


def test_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = with_giants()
    weight[5] = weight[30, 0]  # equal ones
    whole = largest(lambda start, stop: weight[start:stop], (40, 256), 64)
    monkeypatch.setattr("kbit.formats.outlier_weights._ROWS_AT_ONCE", 3 * 256)
    pieces = largest(lambda start, stop: weight[start:stop], (40, 256), 64)
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_rows_get_theirs_in_any_order_and_more_than_once() -> None:
    stored = {VALUES: torch.tensor([1.0, 2.0, 4.0]).half(), PLACES: torch.tensor([1, 3, 11]).int()}
    index = torch.tensor([2, 0, 0, 1])
    found = add_outliers(torch.zeros(4, 4), stored, 4, index)
    assert found.tolist() == [[0, 0, 0, 4], [0, 1, 0, 2], [0, 1, 0, 2], [0, 0, 0, 0]]
    assert not add_outliers(found, stored, 4, index, -1).any()
    assert scaled_outliers(stored, 4, torch.tensor([2.0, 1.0, 0.5]))[VALUES].tolist() == [2, 4, 2]
    assert scaled_outliers({}, 4, torch.ones(3)) == {}


@pytest.mark.parametrize(
    "text", ["trellis2-l12", "trellis4-l12", "trellis8", "nf3-row", "lloyd2-b256", "int4-b128-asym"]
)
def test_what_is_left_is_rounded_as_if_they_were_not_there(text: str) -> None:
    """One giant is 0.999 of its row: with it in its column's block, others are lost; apart, it is exact."""
    weight = with_giants()
    plain = parse_format(text).encode(lambda start, stop: weight[start:stop], (40, 256)).dequantize()
    apart = parse_format(f"{text}-o4").encode(lambda start, stop: weight[start:stop], (40, 256))
    kept = apart.dequantize()
    assert float(kept[20, 255]) == pytest.approx(float(weight[20, 255]), rel=2e-3)
    others = [float((found[20, :255] - weight[20, :255]).norm() / weight[20, :255].norm()) for found in (plain, kept)]
    assert others[1] < (0.1 if text.startswith("trellis") else 0.6) * others[0]
    assert apart.nbytes == apart.format.nbytes(40, 256) == parse_format(text).nbytes(40, 256) + 4 * 6


def test_parts_that_are_put_together_hold_the_same_values() -> None:
    weight = trellis_tensor("trellis3-o64", 64, 192)
    whole = weight.dequantize()
    joined = join_rows([weight.cut(Cut(0, 16, 32)), weight.cut(Cut(0, 48, 64)), weight.cut(Cut(0, 0, 16))])
    assert torch.equal(joined.dequantize(), torch.cat([whole[16:32], whole[48:], whole[:16]]))
    assert joined.nbytes == joined.format.nbytes(48, 192)
    for text in ("nf4-b64-o32", "nf3-b64-dq-o32", "quantile3-b32-o4"):
        packed = weights(text, 64, 192)
        joined = join_rows([packed.cut(Cut(0, 16, 32)), packed.cut(Cut(0, 0, 16))])
        assert torch.equal(joined.dequantize(), torch.cat([packed.dequantize()[16:32], packed.dequantize()[:16]]))
        part = packed.cut(Cut(1, 64, 192))
        assert torch.equal(part.dequantize(), packed.dequantize()[:, 64:])
    plain = trellis_tensor("trellis3", 64, 192)
    joined = join_rows([plain.cut(Cut(0, 16, 32)), plain.cut(Cut(0, 0, 16))])
    assert torch.equal(joined.dequantize(), torch.cat([plain.dequantize()[16:32], plain.dequantize()[:16]]))


@pytest.mark.parametrize("places", [[-1, 0, 5, 9], [0, 0, 9, 5], [0, 5, 5, 9], [0, 1, 2, 100 * 64]])
def test_places_that_are_not_there_are_refused(places: list[int]) -> None:
    weight = trellis_tensor("trellis3-o4", 100, 64)
    stored = {**weight.stored, PLACES: torch.tensor(places).int()}
    said = re.escape("w.outlier_places: not places of a 100 x 64 matrix")
    with pytest.raises(CheckpointError, match=said):
        QuantTensor.checked("w", weight.format, weight.shape, stored, weight.codebook)
    as_numpy = {
        name: array.view(torch.uint16).numpy() if array.dtype == torch.float16 else array.numpy()
        for name, array in stored.items()
    }
    with pytest.raises(CheckpointError, match=said):
        StoredMatrix.checked("w", weight.format, weight.shape, as_numpy, weight.codebook.numpy())


def test_bytes_are_told_without_weights() -> None:
    assert outlier_parts(0) == {}
    assert TrellisFormat(3, outliers=64).nbytes(64, 64) == TrellisFormat(3).nbytes(64, 64) + 64 * 6
