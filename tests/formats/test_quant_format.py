"""QuantFormat: its string, its checks, and the bytes it promises."""

from __future__ import annotations

import subprocess
import sys
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.quant_format import DTYPES, FLOAT_GRIDS, SCALE_DTYPES, QuantFormat, default_dtype, plane_widths
from kbit.formats.quant_tensor import SAFETENSORS_TO_TORCH, QuantTensor
from kbit.host.errors import CheckpointError, UsageError


@st.composite
def formats(draw: st.DrawFn) -> QuantFormat:
    """Any valid format."""
    dtype = draw(st.sampled_from(DTYPES))
    bits = draw(st.integers(2, 8))
    block_size = draw(st.one_of(st.just(0), st.integers(1, 256).map(lambda n: 16 * n)))
    exponent_bits = grid = None
    if dtype == "float":
        exponent_bits = draw(st.one_of(st.none(), st.integers(1, bits - 1)))
        grid = draw(st.one_of(st.none(), st.sampled_from(FLOAT_GRIDS)))
    double_quant = draw(st.booleans())
    return QuantFormat(
        dtype=dtype,
        bits=bits,
        block_size=block_size,
        asymmetric=dtype == "int" and draw(st.booleans()),
        exponent_bits=exponent_bits,
        grid=grid,
        scale_dtype="fp16" if double_quant else draw(st.sampled_from(SCALE_DTYPES)),
        double_quant=double_quant,
    )


@given(formats())
def test_print_then_parse_gives_the_same_format(fmt: QuantFormat) -> None:
    again = QuantFormat.parse(str(fmt))
    assert again == fmt
    assert hash(again) == hash(fmt)
    assert str(again) == str(fmt)


@given(formats(), st.randoms(use_true_random=False))
def test_flags_come_in_any_order_and_case(fmt: QuantFormat, random: Random) -> None:
    base, *flags = str(fmt).split("-")
    random.shuffle(flags)
    assert QuantFormat.parse(f"  {'-'.join([base, *flags]).upper()} ") == fmt


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("nf4", "nf4-b64"),
        ("nf4-b64-dq", "nf4-b64-dq"),
        ("int3-b128-asym", "int3-b128-asym"),
        ("int3-asym-b128", "int3-b128-asym"),
        ("int8-fp32-row", "int8-row-fp32"),
        ("float4e2m1-b32", "float4e2m1-b32"),
        ("float4e2m1-ocp", "float4e2m1-b64"),
        ("float4", "float4e2m1-b64"),
        ("float2", "float2e1m0-b64"),
        ("float8e4m3-paper-bf16", "float8e4m3-b64-paper-bf16"),
        ("fp4-b64", "float4e2m1-b64-bnb"),
        ("fp4-bnb", "float4e2m1-b64-bnb"),
        ("fp4-dq-b4096", "float4e2m1-b4096-bnb-dq"),
        ("lloyd2-b16", "lloyd2-b16"),
        ("dynamic8-b4096", "dynamic8-b4096"),
        ("quantile5-row-fp16", "quantile5-row"),
        ("nf4-b064", "nf4-b64"),
        ("nf4-b64\n", "nf4-b64"),
    ],
)
def test_printed_form(text: str, printed: str) -> None:
    assert str(QuantFormat.parse(text)) == printed


BAD_STRINGS = [
    # (string, what the message must name)
    ("", "''"),
    ("   ", "not a format"),
    ("-", "'-'"),
    ("4", "'4'"),
    ("nf", "'nf'"),
    ("nf-4", "'nf-4'"),
    ("4nf", "'4nf'"),
    ("nf4.5", "'nf4.5'"),
    ("nf٤", "not a format"),
    ("nf4 b64", "'nf4 b64'"),
    ("nf4_b64", "'nf4_b64'"),
    ("b64-nf4", "nf4"),
    ("nf4\0", "\\x00"),
    ("nf1", "1 bits"),
    ("nf0", "0 bits"),
    ("nf9", "9 bits"),
    ("int16", "16 bits"),
    ("float4e2", "float4e2"),
    ("float4e2m", "float4e2m"),
    ("float4m1e2", "float4m1e2"),
    ("float4e2m2", "add up to 4"),
    ("float4e4m0", "add up to 4"),
    ("float4e0m3", "0 exponent bits"),
    ("nf4e2m1", "float only"),
    ("fp4e2m1", "'fp'"),
    ("fp8", "'fp'"),
    ("uint4", "'uint'"),
    ("q4_k", "'q4_k'"),
    ("nf4-b", "'b'"),
    ("nf4-b0", "-row"),
    ("nf4-b00", "-row"),
    ("nf4-b-64", "'b'"),
    ("nf4-b8", "block size 8"),
    ("nf4-b17", "block size 17"),
    ("nf4-b4112", "block size 4112"),
    ("nf4-b99999999999999999999", "block size 99999999999999999999"),
    ("nf4-b6٤", "'b6٤'"),
    ("nf4-b64-b64", "block size"),
    ("nf4-b64-row", "block size"),
    ("nf4-dq-dq", "double quant"),
    ("nf4-fp16-bf16", "scale dtype"),
    ("int4-asym-asym", "asymmetric"),
    ("float4-ocp-paper", "grid"),
    ("fp4-paper", "grid"),
    ("fp4-bnb-bnb", "grid"),
    ("nf4-asym", "not for nf"),
    ("float4-asym", "not for float"),
    ("int4-ocp", "not for int"),
    ("nf4-bnb", "not for nf"),
    ("nf4-fp8", "'fp8'"),
    ("nf4-", "''"),
    ("nf4--dq", "''"),
    ("nf4-dq-bf16", "'bf16'"),
    ("nf4-dq-fp32", "'fp32'"),
    ("nf4-b64-zero", "'zero'"),
    ("nf" + "9" * 5000, "5002 characters"),
    ("nf4-b" + "9" * 5000, "5005 characters"),
    ("nf4" + "-dq" * 5000, "15003 characters"),
]


@pytest.mark.parametrize(("text", "named"), BAD_STRINGS, ids=[repr(text[:24]) for text, _ in BAD_STRINGS])
def test_bad_string_is_a_usage_error_that_names_the_part(text: str, named: str) -> None:
    with pytest.raises(UsageError) as caught:
        QuantFormat.parse(text)
    message = str(caught.value)
    assert named in message
    assert "\n" not in message
    assert len(message) < 250


@given(st.text(max_size=40) | st.text(alphabet="nfintloadqrwbmepcs0123456789-", max_size=24))
def test_any_text_parses_or_is_a_usage_error(text: str) -> None:
    try:
        fmt = QuantFormat.parse(text)
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert QuantFormat.parse(str(fmt)) == fmt


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"dtype": "NF"}, "'NF'"),
        ({"dtype": ""}, "''"),
        ({"bits": 1}, "1 bits"),
        ({"bits": 9}, "9 bits"),
        ({"bits": -4}, "-4 bits"),
        ({"block_size": -64}, "-64"),
        ({"block_size": 1}, "block size 1"),
        ({"block_size": 24}, "block size 24"),
        ({"block_size": 8192}, "8192"),
        ({"scale_dtype": "fp8"}, "'fp8'"),
        ({"asymmetric": True}, "nf"),
        ({"exponent_bits": 2}, "nf"),
        ({"grid": "ocp"}, "nf"),
        ({"dtype": "float", "grid": "ieee"}, "'ieee'"),
        ({"dtype": "float", "exponent_bits": 4}, "4 exponent bits"),
        ({"dtype": "float", "exponent_bits": 0}, "0 exponent bits"),
        ({"double_quant": True, "scale_dtype": "bf16"}, "'bf16'"),
    ],
)
def test_bad_field_is_a_usage_error_that_names_the_value(fields: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        QuantFormat(**fields)  # type: ignore[arg-type]
    assert named in str(caught.value)


@pytest.mark.parametrize("bits", range(2, 9))
def test_plane_widths_are_descending_powers_of_two_that_sum_to_k(bits: int) -> None:
    widths = plane_widths(bits)
    assert sum(widths) == bits
    assert set(widths) <= {1, 2, 4, 8}
    assert list(widths) == sorted(set(widths), reverse=True)


# Written out by hand from the layout's description, not from the code: (format, rows, columns, every array).
LAYOUTS = [
    ("nf4-b64", 3, 100, {"plane4": ("U8", (3, 50)), "scales": ("F16", (3, 2))}, 150 + 12),
    ("int3-b16-bf16", 2, 33, {"plane2": ("U8", (2, 9)), "plane1": ("U8", (2, 5)), "scales": ("BF16", (2, 3))}, 40),
    ("nf8-row-fp32", 5, 7, {"plane8": ("U8", (5, 7)), "scales": ("F32", (5, 1))}, 35 + 20),
    (
        "int7-b32-asym-fp32",
        1,
        65,
        {
            "plane4": ("U8", (1, 33)),
            "plane2": ("U8", (1, 17)),
            "plane1": ("U8", (1, 9)),
            "scales": ("F32", (1, 3)),
            "offsets": ("F32", (1, 3)),
        },
        59 + 24,
    ),
    (
        "int5-b16-asym-dq",
        257,
        16,
        {
            "plane4": ("U8", (257, 8)),
            "plane1": ("U8", (257, 2)),
            "scales": ("U8", (257, 1)),
            "scales_super": ("F32", (2,)),
            "offsets": ("I8", (257, 1)),
            "offsets_super": ("F32", (2,)),
        },
        257 * 10 + 2 * (257 + 8),
    ),
    (
        "quantile6-b4096",
        1,
        1,
        {"plane4": ("U8", (1, 1)), "plane2": ("U8", (1, 1)), "scales": ("F16", (1, 1)), "codebook": ("F32", (64,))},
        4 + 256,
    ),
]


@pytest.mark.parametrize(("text", "rows", "columns", "arrays", "nbytes"), LAYOUTS, ids=[row[0] for row in LAYOUTS])
def test_parts_written_out_by_hand(
    text: str, rows: int, columns: int, arrays: dict[str, tuple[str, tuple[int, ...]]], nbytes: int
) -> None:
    fmt = QuantFormat.parse(text)
    parts = fmt.parts(rows, columns)
    assert {suffix: (part.dtype, part.shape) for suffix, part in parts.items()} == arrays
    assert list(parts) == list(arrays)  # file order
    assert fmt.nbytes(rows, columns) == nbytes
    assert fmt.bits_per_weight(rows, columns) == pytest.approx(8 * nbytes / (rows * columns))


@given(formats(), st.integers(1, 3000), st.integers(1, 10000))
def test_size_counts_exactly_k_bits_per_code_plus_the_scales(fmt: QuantFormat, rows: int, columns: int) -> None:
    blocks = rows * (1 if fmt.block_size == 0 else (columns + fmt.block_size - 1) // fmt.block_size)
    per_scale = {"fp16": 2, "bf16": 2, "fp32": 4}[fmt.scale_dtype]
    scales = blocks + 4 * ((blocks + 255) // 256) if fmt.double_quant else blocks * per_scale
    rest = scales * (2 if fmt.asymmetric else 1) + (4 * 2**fmt.bits if fmt.dtype == "quantile" else 0)
    codes = fmt.nbytes(rows, columns) - rest
    # A row ends on a byte in each plane: at most 7 unused bits per plane, none where 8 codes fill whole bytes.
    unused = 8 * codes - fmt.bits * rows * columns
    assert 0 <= unused <= 7 * rows * len(plane_widths(fmt.bits))
    assert columns % 8 != 0 or unused == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nf4-b64", 4 + 16 / 64),
        ("int3-b128-asym", 3 + 2 * 16 / 128),
        ("nf4-b64-dq", 4 + 8 / 64 + 32 / (64 * 256)),
        ("nf3-b32-fp32", 3 + 32 / 32),
        ("int8-row", 8 + 16 / 4096),
    ],
)
def test_bits_per_weight_of_a_square_matrix(text: str, expected: float) -> None:
    assert QuantFormat.parse(text).bits_per_weight(4096, 4096) == expected


@given(formats(), st.integers(2, 8))
def test_another_width_keeps_blocks_and_scales(fmt: QuantFormat, bits: int) -> None:
    other = fmt.at_width(bits)
    assert other.bits == bits
    assert all(getattr(other, name) == getattr(fmt, name) for name in ("block_size", "scale_dtype", "double_quant"))
    assert other == fmt if bits == fmt.bits else other.dtype == default_dtype(bits)


def test_planning_imports_no_torch() -> None:
    code = "import sys, kbit.formats.quant_format; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the arrays themselves ------------------------------------------------------------------------------------------


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# Lloyd codebooks of many levels take a good part of a second for every block size.
quick_formats = formats().filter(lambda fmt: fmt.dtype != "lloyd" or fmt.bits <= 3)


@given(quick_formats, st.integers(1, 9), st.integers(1, 140), st.integers(0, 2**31))
@settings(deadline=None, max_examples=150)
def test_stored_arrays_are_the_ones_the_format_promises(fmt: QuantFormat, rows: int, columns: int, seed: int) -> None:
    q = quantize_blockwise(normal(rows, columns, seed), fmt)
    parts = fmt.parts(rows, columns)
    assert list(q.stored) == list(parts)
    for suffix, part in parts.items():
        array = q.stored[suffix]
        assert array.dtype == SAFETENSORS_TO_TORCH[part.dtype]
        assert tuple(array.shape) == part.shape
        assert array.is_contiguous()
        assert array.numel() * array.element_size() == part.nbytes
    assert q.nbytes == fmt.nbytes(rows, columns)
    assert q.bits_per_weight == fmt.bits_per_weight(rows, columns)
    assert QuantTensor.checked("w", fmt, (rows, columns), q.stored, q.codebook).nbytes == q.nbytes
    assert [plane.shape[1] for plane in q.planes] == [-(-columns * w // 8) for w in plane_widths(fmt.bits)]
    assert q.dequantize().shape == (rows, columns)
    assert torch.isfinite(q.dequantize()).all()


def test_meaning_of_a_code_written_out() -> None:
    """codebook[code] * scale + offset, by hand for a matrix of two rows and two blocks each."""
    fmt = QuantFormat.parse("int2-b16-asym-fp32")
    q = quantize_blockwise(torch.zeros(2, 20), fmt)
    codes = torch.arange(40).view(2, 20) % 4
    stored = dict(q.stored)
    stored["plane2"] = (codes.view(2, 5, 4) << torch.tensor([0, 2, 4, 6])).sum(dim=2).to(torch.uint8)
    stored["scales"] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    stored["offsets"] = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    made = QuantTensor.checked("w", fmt, (2, 20), stored, q.codebook)
    levels = [-1.0, -1 / 3, 1 / 3, 1.0]
    expected = [
        [levels[i % 4] * stored["scales"][r, i // 16] + stored["offsets"][r, i // 16] for i in range(20)]
        for r in range(2)
    ]
    torch.testing.assert_close(made.dequantize(), torch.tensor(expected), rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("text", ["nf4-b64", "int3-b16-asym-dq", "quantile7-row-bf16", "int8-b32-fp32"])
def test_untrusted_arrays_are_checked(text: str) -> None:
    fmt = QuantFormat.parse(text)
    q = quantize_blockwise(normal(4, 100), fmt)
    for suffix, array in q.stored.items():
        wrong: list[torch.Tensor | None] = [None, array[:-1], array[None], array.double(), array.flatten()[:0]]
        if array.dtype.is_floating_point:
            for value in (float("nan"), float("inf")):
                poisoned = array.clone()
                poisoned.view(-1)[-1] = value
                wrong.append(poisoned)
        for bad in wrong:
            stored = {key: value for key, value in q.stored.items() if key != suffix}
            if bad is not None:
                stored[suffix] = bad
            with pytest.raises(CheckpointError) as caught:
                QuantTensor.checked("model.w", fmt, (4, 100), stored, q.codebook)
            assert f"model.w.{suffix}" in str(caught.value)
            assert "\n" not in str(caught.value)
