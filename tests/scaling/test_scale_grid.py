"""The configurations of a sweep: what flags mean, which combinations exist, how data types are called."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kbit.checkpoint.resolve import open_model
from kbit.formats.blockwise import Encoder, quantize_blockwise
from kbit.formats.codebooks import codebook
from kbit.formats.nested import NestedFormat
from kbit.formats.quant_format import DTYPES, FLOAT_GRIDS, SCALE_DTYPES, QuantFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.formats.trellis import TrellisFormat
from kbit.host.errors import UsageError
from kbit.quantizers.method import Method, MethodInput
from kbit.quantizers.methods import METHODS, get_method
from kbit.quantizers.plan import make_plan
from kbit.scaling.sweep.grid import Cell, dtype_label, expand, make_format, parse_bits, parse_blocks, split_list


@pytest.mark.parametrize(
    ("text", "bits"),
    [("2..8", [2, 3, 4, 5, 6, 7, 8]), ("4", [4]), ("4,2", [2, 4]), ("3..4, 8,4", [3, 4, 8]), ("8..8", [8])],
)
def test_bits(text: str, bits: list[int]) -> None:
    assert parse_bits(text) == bits


@pytest.mark.parametrize("text", ["", ",", "2..", "..8", "1..4", "4..9", "8..2", "3-5", "4.5", "four", "4,,5", "٤"])
def test_bits_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--bits"):
        parse_bits(text)


def test_blocks() -> None:
    assert parse_blocks("64,128,row,64") == [64, 128, 0]
    for text in ("", "0", "-64", "6x", "64,,", "9999999"):
        with pytest.raises(UsageError, match="--block-sizes"):
            parse_blocks(text)


def test_lists() -> None:
    assert split_list(" NF, int ,nf", "--dtypes") == ["nf", "int"]


def test_the_whole_grid() -> None:
    cells, left_out = expand(range(2, 9), ["nf", "int", "float"], [64, 128], ["rtn"])
    assert len(cells) == 7 * 3 * 2
    assert not left_out
    assert cells[0] == Cell("rtn", QuantFormat("nf", 8, 64))
    assert [cell.format.bits for cell in cells if cell.format] == sorted(
        (k for k in range(2, 9) for _ in range(6)), reverse=True
    )


def test_impossible_combinations_are_left_out_with_a_reason() -> None:
    cells, left_out = expand([3, 4], ["int", "float-e3"], [64], ["rtn"])
    assert [str(cell.format) for cell in cells] == ["int4-b64", "float4e3m0-b64", "int3-b64"]
    assert len(left_out) == 1
    assert left_out[0].what == "rtn, float-e3, 3 bits, blocks of 64"
    assert "3 exponent bits" in left_out[0].why


def test_a_format_comes_once() -> None:
    cells, _ = expand([4], ["float", "float-e2", "float-ocp"], [64], ["rtn"])
    assert [str(cell.format) for cell in cells] == ["float4e2m1-b64"]


def test_methods_of_trellises_have_formats_of_their_own() -> None:
    """Whatever the data types and blocks; other methods take trellises as a data type."""
    cells, left_out = expand([2, 8], ["nf", "int"], [64, 32], ["trellis", "trellis-plain"])
    assert [cell.label for cell in cells] == [
        "trellis8 trellis",
        "trellis2 trellis",
        "trellis8-h128 trellis-plain",
        "trellis2-sum4-h128 trellis-plain",
    ]
    assert not left_out
    assert [cell.block_size for cell in cells] == [0] * 4
    cells, _ = expand([3], ["trellis-l12"], [64, 32], ["rtn", "trellis", "ldlq2"])
    assert [cell.label for cell in cells] == ["trellis3-l12", "trellis3-l12 trellis", "trellis3-l12 ldlq2"]
    with pytest.raises(UsageError, match="--methods hqq"):
        expand([3], ["trellis"], [64], ["rtn", "hqq"])


def test_a_store_of_all_widths_comes_last_and_width_by_width() -> None:
    cells, left_out = expand([2, 3, 4], ["nested", "nf"], [64], ["rtn", "search", "ldlq2"])
    store = NestedFormat(2, 4, 64)
    ladders = [Cell(method, store, width) for method in ("ldlq2", "rtn") for width in (4, 3, 2)]
    assert cells[-6:] == ladders
    assert [cell.label for cell in ladders[2:4]] == ["nested2..4-b64@2 ldlq2", "nested2..4-b64@4"]
    assert [cell.bits for cell in ladders] == [4, 3, 2, 4, 3, 2]
    assert {str(item).split(":")[0].split(",")[0] for item in left_out} == {"search"}


@pytest.mark.parametrize(
    ("flag", "grid"),
    [
        ("--dtypes posit", ([4], ["nf", "posit"], [64], ["rtn"])),
        ("--dtypes nf-asym", ([4], ["int", "nf-asym"], [64], ["rtn"])),
        ("--dtypes float-e9", ([4, 8], ["float-e9"], [64], ["rtn"])),
        ("--dtypes nf-e3", ([4], ["nf-e3"], [64], ["rtn"])),
        ("--dtypes float-e3", ([2, 3], ["float-e3"], [64], ["rtn"])),
        ("--block-sizes 63", ([4], ["nf"], [63, 64], ["rtn"])),
        ("--block-sizes 8192", ([4], ["nf"], [8192], ["rtn"])),
        ("magic", ([4], ["nf"], [64], ["rtn", "magic"])),
        ("--bits is empty", ([], ["nf"], [64], ["rtn"])),
    ],
)
def test_a_value_that_never_fits_is_an_error(
    flag: str, grid: tuple[list[int], list[str], list[int], list[str]]
) -> None:
    with pytest.raises(UsageError, match=flag):
        expand(*grid)


FORMATS = st.builds(
    lambda dtype, bits, block, asym, exponent, grid, scales, dq: QuantFormat(
        dtype,
        bits,
        block,
        asymmetric=asym and dtype == "int",
        exponent_bits=min(exponent, bits - 1) if dtype == "float" else None,
        grid=grid if dtype == "float" else None,
        scale_dtype="fp16" if dq else scales,
        double_quant=dq,
    ),
    st.sampled_from(DTYPES),
    st.integers(2, 8),
    st.sampled_from((0, 16, 64, 4096)),
    st.booleans(),
    st.integers(1, 7),
    st.sampled_from(FLOAT_GRIDS),
    st.sampled_from(SCALE_DTYPES),
    st.booleans(),
)


@given(FORMATS)
def test_the_name_of_a_data_type_gives_the_format_back(format: QuantFormat) -> None:
    assert make_format(dtype_label(format), format.bits, format.block_size) == format


@pytest.mark.parametrize("name", ["trellis3", "trellis2-sum4-l12", "trellis8-h128", "trellis4-l12"])
def test_the_name_of_a_trellis_does_too(name: str) -> None:
    format = TrellisFormat.parse(name)
    assert make_format(dtype_label(format), format.bits, 64) == format


def test_labels() -> None:
    names = ["int4-b64-asym", "float4e2m1-b64-paper", "float8e4m3-row", "nf4-b64-dq", "int8-row-fp32"]
    assert [dtype_label(QuantFormat.parse(name)) for name in names] == [
        "int-asym",
        "float-paper",
        "float-e4",
        "nf-dq",
        "int-fp32",
    ]


class TestMethods:
    def test_names(self) -> None:
        assert all(METHODS[name].name == name and METHODS[name].version >= 1 for name in METHODS)
        with pytest.raises(UsageError, match="rtn"):
            get_method("rnt")

    def test_rtn_gives_what_a_conversion_writes(self, tiny_model: object) -> None:
        with open_model(str(tiny_model)) as source:
            plan = make_plan(source, QuantFormat.parse("int3-b32"), embedding_bits=8)
            view = get_method("rtn").apply(MethodInput(source, plan, source.read))
            for tensor in plan.tensors:
                name = tensor.source.name
                weight = view.read_weight(name)
                assert torch.equal(view.target(name), source.read(name))
                if tensor.format is None:
                    assert isinstance(weight, torch.Tensor)
                    assert torch.equal(weight, source.read(name))
                    continue
                assert isinstance(weight, QuantTensor)
                expected = quantize_blockwise(source.read(name), tensor.format)
                assert all(torch.equal(weight.stored[part], expected.stored[part]) for part in expected.stored)
                assert view.extra_bits(name) == 0

    def test_a_method_may_refuse_formats(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Picky(type(METHODS["rtn"])):  # type: ignore[misc]
            name = "picky"

            def refuses(self, format: QuantFormat) -> str | None:
                return "only integers" if format.dtype != "int" else None

        picky: Method = Picky()
        monkeypatch.setitem(METHODS, "picky", picky)
        cells, left_out = expand([4], ["int", "nf"], [64], ["rtn", "picky"])
        assert [(cell.method, str(cell.format)) for cell in cells] == [
            ("rtn", "int4-b64"),
            ("rtn", "nf4-b64"),
            ("picky", "int4-b64"),
        ]
        assert [str(item) for item in left_out] == ["picky, nf, 4 bits, blocks of 64: only integers"]
        with pytest.raises(UsageError, match="only integers"):
            expand([4], ["nf"], [64], ["picky"])


class TestEncoder:
    """Quantizing looks levels up in a table; it must find what a search finds, also right at the borders."""

    @pytest.mark.parametrize(
        "name",
        [f"{dtype}{bits}-b64" for dtype in ("int", "nf", "lloyd", "float", "dynamic") for bits in (2, 3, 4, 5, 6, 7, 8)]
        + ["int4-b64-asym", "float4e2m1-b64-paper", "float8e4m3-b64", "float8e6m1-b64", "nf4-row"],
    )
    def test_equals_a_search(self, name: str) -> None:
        encoder = Encoder.for_codebook(torch.from_numpy(codebook(QuantFormat.parse(name), 512).copy()))
        borders = encoder.borders
        ends = torch.tensor([-torch.inf, -1e30, -1.5, -1.0, -0.0, 0.0, 1e-30, 1.0, 1.5, 1e30, torch.inf])
        close = [torch.nextafter(borders, torch.full_like(borders, end)) for end in (-2.0, 2.0)]
        even = torch.linspace(-1.01, 1.01, 150_001)
        values = torch.cat([borders, *close, ends, even])[None]
        expected = encoder.codes[torch.bucketize(values, borders)]
        assert torch.equal(encoder.encode(values), expected)

    def test_uses_the_table_where_it_can(self) -> None:
        tables = {
            name: Encoder.for_codebook(torch.from_numpy(codebook(QuantFormat.parse(name), 512).copy())).cells
            is not None
            for name in ("nf2-b64", "nf4-b64", "int8-b64", "lloyd8-b64", "dynamic8-b64")
        }
        assert tables == {"nf2-b64": True, "nf4-b64": True, "int8-b64": True, "lloyd8-b64": True, "dynamic8-b64": False}

    def test_levels_too_close_for_a_table(self) -> None:
        levels = torch.tensor([-1.0, 0.0, 1e-7, 2e-7, 1.0])
        encoder = Encoder.for_codebook(levels)
        assert encoder.cells is None
        assert encoder.encode(torch.tensor([[-0.6, -0.4, 4e-8, 6e-8, 1.6e-7, 0.6]])).tolist() == [[0, 1, 1, 2, 3, 4]]
