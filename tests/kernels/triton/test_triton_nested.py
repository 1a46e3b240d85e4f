"""Products with nested widths against the reference: every width and type, odd shapes, what follows a product; where bits
lie, and that a width reads no plane above its own."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from format_cases import normal
from triton_cases import DTYPES, HALF

triton = pytest.importorskip("triton")

from kbit.formats.nested_codec import codes_at, narrowed, scales_at  # noqa: E402
from kbit.formats.quant_tensor import QuantTensor  # noqa: E402
from kbit.formats.registry import parse_format  # noqa: E402
from kbit.gpu_check.products import check_gated, check_grouped, check_product  # noqa: E402
from kbit.gpu_check.rows import check_embed, check_nested_values  # noqa: E402
from kbit.host.errors import UnsupportedError, UsageError  # noqa: E402
from kbit.kernels.triton import library  # noqa: E402
from kbit.kernels.triton.codecs.joined import joined  # noqa: E402
from kbit.kernels.triton.codecs.layout import TritonWeight, prepare_weight  # noqa: E402
from kbit.kernels.triton.codecs.nested_planes import NestedScales, pack_planes  # noqa: E402
from kbit.kernels.triton.codecs.sizes import nested_bytes  # noqa: E402
from kbit.kernels.triton.product.configs import (  # noqa: E402  # noqa: E402
    GemmConfig,
    GemvConfig,
    Problem,
    gemm_candidates,
    gemm_config,
    gemv_candidates,
)
from kbit.kernels.triton.product.gemm import gemm  # noqa: E402
from kbit.kernels.triton.product.gemv import gemv  # noqa: E402
from kbit.kernels.triton.product.matmul import matmul  # noqa: E402
from kbit.kernels.triton.product.rounded import with_activations  # noqa: E402

WIDTHS = range(2, 9)


@lru_cache
def nested(text: str, rows: int, columns: int) -> QuantTensor:
    weight = normal(rows, columns, 0, 0.05)
    weight[0] *= 1e3  # and a row of which nothing is left
    weight[-1] = 0.0
    return parse_format(text).encode(lambda start, stop: weight[start:stop], (rows, columns))


@pytest.mark.parametrize("run", [gemv, gemm])
@pytest.mark.parametrize("text", ["nested2..8-b64", "nested2..8-row-bf16"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(device: str, width: int, text: str, run: object) -> None:
    tokens = 2 if run is gemv else 5
    check_product(device, narrowed(nested(text, 20, 333), width), tokens, torch.float16, run=run)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 3, 7])
def test_every_activation_type(device: str, width: int, dtype: torch.dtype) -> None:
    check_product(device, narrowed(nested("nested2..8-b48-fp32", 17, 272), width), 1, dtype)


@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 16, 256), (20, 33, 520)])
@pytest.mark.parametrize("width", [2, 5])
def test_odd_shapes(device: str, width: int, shape: tuple[int, int, int]) -> None:
    tokens, rows, columns = shape
    check_product(device, narrowed(nested("nested2..5-b32", rows, columns), width), tokens)


@pytest.mark.parametrize(
    "config", [GemvConfig(4, 256, 2), GemvConfig(2, 256), GemmConfig(2, 16, 256, 2, 4, 2)], ids=str
)
def test_other_divisions_of_the_columns(device: str, config: GemvConfig | GemmConfig) -> None:
    run = gemv if isinstance(config, GemvConfig) else gemm
    weight = narrowed(nested("nested2..6-b64", 40, 1024), 6)
    check_product(device, weight, 3, run=lambda x, w: run(x, w, config=config))  # type: ignore[operator]


def test_scaled_weights(device: str) -> None:
    """With more than 64 tokens of a program scales multiply weights, not sums."""
    weight = narrowed(nested("nested2..6-b64", 40, 300), 3)
    config = GemmConfig(2, 128, 256, 1, 4, 2)
    for dtype in HALF:
        check_product(device, weight, 70, dtype, run=lambda x, w: gemm(x, w, config=config))


def test_what_follows_a_product(device: str) -> None:
    """A gate in one kernel and in two, experts, and the torch operator."""
    for tokens in (2, 6):
        check_gated(device, "nested2..4-b64", tokens, "silu")
    check_grouped(device, "nested2..3-b64", 5, 2, 3)
    weight = prepare_weight(narrowed(nested("nested2..6-b64", 20, 333), 5), device)
    x = normal(2, 333).half().to(device)
    assert torch.equal(torch.ops.kbit.matmul(x, *library.pack(weight)), matmul(x, weight))


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_looked_up(device: str, width: int) -> None:
    check_embed(device, f"nested2..{width}-b32", HALF[width % 2])


@pytest.mark.parametrize("text", ["nested2..8-b64", "nested3..6-row-bf16"])
def test_values_are_those_of_the_cpu(device: str, text: str) -> None:
    check_nested_values(device, text)


def codes_of(weight: TritonWeight) -> torch.Tensor:
    """The codes of a prepared width, (N', K'), a bit field at a time as the layout's docstring says."""
    rows, columns = weight.padded
    n, k = torch.arange(rows)[:, None], torch.arange(columns)[None]
    codes = torch.zeros(rows, columns, dtype=torch.int64)
    for index, plane in enumerate(weight.planes):
        bits = 1 if index else 2
        step, k8, t, k0, n8, g = k % (256 // bits) // 16, k % 16 // 8, k % 8 // 2, k % 2, n % 16 // 8, n % 8
        words = plane[n // 16, k // (256 // bits), g * 4 + t, step // 2 if bits == 2 else step // 4].long()
        bit = 16 * k8 + 8 * n8 + 4 * (step % 2) + 2 * k0 + (0 if bits == 2 else step // 2 % 2)
        codes |= ((words >> bit) & (2**bits - 1)) << (index + 1 if index else 0)
    return codes.to(torch.uint8)


@pytest.mark.parametrize("shape", [(1, 16), (17, 256), (40, 333)])
def test_codes_and_scales_are_where_the_layout_says(shape: tuple[int, int]) -> None:
    matrix = nested("nested2..8-b48", *shape)
    planes = pack_planes(matrix, "cpu")
    for width in WIDTHS:
        found = NestedScales.of(matrix).at_width(width, planes, torch.float16)
        codes = codes_of(found)
        assert torch.equal(codes[: shape[0], : shape[1]], codes_at(matrix.format, matrix.stored, shape[1], width))  # type: ignore[arg-type]
        assert not codes[shape[0] :].any()
        assert not codes[:, shape[1] :].any()
        scales = scales_at(matrix.format, matrix.stored, width)  # type: ignore[arg-type]
        assert found.scales is not None
        assert found.scales.dtype == torch.float16
        assert torch.equal(
            found.scales.transpose(1, 2).reshape(-1, found.padded_blocks)[: shape[0], : found.blocks], scales
        )
        assert all(ours.data_ptr() == plane.data_ptr() for ours, plane in zip(found.planes, planes, strict=False))
        alone = prepare_weight(narrowed(matrix, width), "cpu")
        assert all(torch.equal(*pair) for pair in zip(alone.planes, found.planes, strict=True))
        assert found.table is not None
        plain = matrix.format.plain(width)  # type: ignore[attr-defined]
        assert alone.nbytes == found.nbytes == nested_bytes(plain, *shape) + found.table.nbytes
        assert found.format == f"nested2..{width}-b48"


def test_planes_are_added_to_those_that_are_there() -> None:
    matrix = nested("nested2..8-b48", 17, 256)
    three = pack_planes(narrowed(matrix, 3), "cpu")
    eight = pack_planes(matrix, "cpu", three)
    assert [plane.data_ptr() for plane in eight[:2]] == [plane.data_ptr() for plane in three]
    assert all(torch.equal(*pair) for pair in zip(eight, pack_planes(matrix, "cpu"), strict=True))
    with pytest.raises(UsageError, match="3"):
        NestedScales.of(narrowed(matrix, 3)).at_width(4, eight, torch.float16)


def test_joined_tensors_are_not_moved() -> None:
    whole = torch.arange(60).view(5, 3, 4)
    parts = [whole[:2], whole[2:3], whole[3:]]
    assert joined(parts).data_ptr() == whole.data_ptr()
    assert torch.equal(joined(parts), whole)
    assert joined(parts[1:]).data_ptr() == whole[2:].data_ptr()
    for others in ([parts[1], parts[0]], [parts[0], parts[2]], [parts[0], parts[1].clone()]):
        assert torch.equal(joined(others), torch.cat(others))
        assert joined(others).data_ptr() not in {part.data_ptr() for part in others}


def test_configurations_fit_the_planes() -> None:
    for width in WIDTHS:
        for tokens in (1, 5, 64, 300):
            problem = Problem(tokens, 4096, 11008, width, 64, format=f"nested2..{width}-b64")
            for config in [*gemv_candidates("sm_90", problem), *gemm_candidates("sm_90", problem)]:
                assert config.columns >= (128 if width == 2 else 256)
                assert problem.columns % config.columns == 0
            assert gemm_config("sm_90", problem).columns >= (128 if width == 2 else 256)


def test_what_has_no_kernel_is_refused() -> None:
    weight = prepare_weight(nested("nested2..4-b64", 16, 64), "cpu")
    for kind in ("int8", "fp8"):
        with pytest.raises(UnsupportedError, match="does not run nested2..4-b64: its planes lie apart"):
            with_activations(weight, kind)
