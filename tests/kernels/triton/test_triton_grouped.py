"""Products of a mixture of experts against one product per token."""

from __future__ import annotations

import pytest
import torch
from format_cases import normal, parse
from trellis_cases import trellis_tensor
from triton_cases import assert_within, product_bound, unit

triton = pytest.importorskip("triton")

from kbit.formats.blockwise import quantize_blockwise  # noqa: E402
from kbit.formats.quant_tensor import QuantTensor  # noqa: E402
from kbit.gpu_check.products import check_grouped, trellis_product_and_bound  # noqa: E402
from kbit.host.errors import UnsupportedError  # noqa: E402
from kbit.kernels import reference  # noqa: E402
from kbit.kernels.triton.codecs.layout import TritonWeight, prepare_weight  # noqa: E402
from kbit.kernels.triton.product.grouped import group_tokens, grouped_config, grouped_matmul, stack_experts  # noqa: E402


def experts_of(text: str, count: int, rows: int, columns: int, seed: int = 0) -> list[QuantTensor]:
    # sizes differ, so that one expert's scales are not another's
    return [quantize_blockwise(normal(rows, columns, seed + e, 0.05 * (1 + e)), parse(text)) for e in range(count)]


def routing(tokens: int, top: int, count: int) -> torch.Tensor:
    scores = torch.rand(tokens, count, generator=torch.Generator().manual_seed(3))
    return scores.topk(top, dim=1).indices


@pytest.mark.parametrize(
    ("tokens", "top", "count", "tile"), [(1, 1, 1, 16), (7, 2, 4, 16), (100, 2, 8, 16), (3, 4, 64, 32)]
)
def test_every_entry_is_in_a_tile_of_its_expert(tokens: int, top: int, count: int, tile: int) -> None:
    ids = routing(tokens, top, count)
    groups = group_tokens(ids, count, tile)
    order = groups.order.view(-1, tile)
    assert len(order) == len(groups.experts)
    seen = []
    for expert, entries in zip(groups.experts.tolist(), order, strict=True):
        real = entries[entries < tokens * top].long()
        assert (expert >= 0) == bool(len(real))
        assert (ids.reshape(-1)[real] == expert).all()
        seen += real.tolist()
    assert sorted(seen) == list(range(tokens * top))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", ["nf4-b64", "int4-b32-asym-dq", "nf3-b64-dq", "int8-row", "lloyd2-b64"])
@pytest.mark.parametrize(("tokens", "top", "count"), [(5, 2, 4), (40, 1, 3)])
def test_against_one_product_per_token(
    device: str, text: str, dtype: torch.dtype, tokens: int, top: int, count: int
) -> None:
    weights = experts_of(text, count, 40, 128)
    stacked = stack_experts([prepare_weight(weight, device, dtype) for weight in weights])
    x, ids = normal(tokens, 128, seed=9).to(dtype), routing(tokens, top, count)
    config = grouped_config(stacked, tokens * top, count)
    got = grouped_matmul(x.to(device), stacked, group_tokens(ids.to(device), count, config.tokens))
    assert got.dtype == dtype
    for entry, expert in enumerate(ids.reshape(-1).tolist()):
        row = x[entry // top : entry // top + 1]
        bound = product_bound(row, weights[expert].dequantize(), dtype, dtype, decoded=6)
        assert_within(got[entry : entry + 1].float(), reference.linear(row, weights[expert]), bound)


@pytest.mark.parametrize("text", ["trellis2-o8", "trellis5-l12-h16", "trellis3.5", "trellis8"])
@pytest.mark.parametrize(("tokens", "top", "count"), [(5, 2, 4), (40, 1, 3)])
def test_experts_of_trellises(device: str, text: str, tokens: int, top: int, count: int) -> None:
    check_grouped(device, text, tokens, top, count)


def test_a_trellis_layers_gate_and_second_product(device: str) -> None:
    """The gate's activation, rows per entry, entries that are left out."""
    rows, columns, top = 24, 48, 2
    weights = [trellis_tensor(text, rows, columns) for text in ("trellis3-o8", "trellis3", "trellis3-o32")]
    for index, weight in enumerate(weights):
        weight.stored["codes"] ^= index  # of other values each
    stacked = stack_experts([prepare_weight(weight, device, torch.float32) for weight in weights])
    ids = torch.tensor([[0, 2], [1, -1], [2, 0], [-1, 1]])
    x, gate = normal(4 * top, columns, seed=1), normal(4 * top, rows, seed=2)
    out = torch.full((4 * top, rows), torch.nan, device=device)
    groups = group_tokens(ids.to(device), 3, 16)
    grouped_matmul(x.to(device), stacked, groups, per_entry=True, gate=gate.to(device), kind="relu", out=out)
    for entry, expert in enumerate(ids.reshape(-1).tolist()):
        got = out[entry : entry + 1].cpu()
        if expert < 0:
            assert got.isnan().all()
            continue
        product, bound = trellis_product_and_bound(x[entry : entry + 1], weights[expert], torch.float32)
        factor = gate[entry : entry + 1].clamp(min=0).double()
        expected = factor * product
        assert_within(got.double(), expected, factor * bound + 4 * unit(torch.float32) * expected.abs())


def test_gate_up_and_down(device: str) -> None:
    """A whole expert layer: two products of the tokens, one of the entries."""
    count, top, tokens, kind = 4, 2, 6, "silu"
    gates, ups = experts_of("nf4-b64", count, 48, 128), experts_of("nf4-b64", count, 48, 128, 50)
    downs = experts_of("int8-b16", count, 20, 48, 90)
    x, ids = normal(tokens, 128, seed=9).half(), routing(tokens, top, count)
    groups = group_tokens(ids.to(device), count, 16)

    def stacked(weights: list[QuantTensor]) -> TritonWeight:
        return stack_experts([prepare_weight(weight, device) for weight in weights])

    gate = grouped_matmul(x.to(device), stacked(gates), groups, torch.float32)
    middle = grouped_matmul(x.to(device), stacked(ups), groups, gate=gate, kind=kind)
    got = grouped_matmul(middle, stacked(downs), groups, per_entry=True)
    for entry, expert in enumerate(ids.reshape(-1).tolist()):
        row = x[entry // top : entry // top + 1]
        g, u = reference.linear(row, gates[expert]), reference.linear(row, ups[expert])
        error_g = product_bound(row, gates[expert].dequantize(), torch.float32, torch.float16)
        error_u = product_bound(row, ups[expert].dequantize(), torch.float32, torch.float16)
        expected = reference.activate(g, u, kind)
        bound = (
            1.13 * error_g * (u.abs() + error_u) + g.abs() * error_u + 4 * unit(torch.float16) * expected.abs() + 1e-7
        )
        own = middle[entry : entry + 1].cpu()
        assert_within(own.float(), expected, bound)
        bound = product_bound(own, downs[expert].dequantize(), torch.float16, torch.float16)
        assert_within(got[entry : entry + 1].float(), reference.linear(own, downs[expert]), bound)


def test_entries_that_are_left_out(device: str) -> None:
    """Experts of two formats: each launch writes the rows of its own, and nothing else."""
    low, high = experts_of("nf3-b32", 2, 40, 96), experts_of("int8-b32", 3, 40, 96, 50)
    x, top = normal(9, 96, seed=9).half(), 2
    ids = torch.tensor([[0, 4], [1, 0], [3, 2], [2, 4], [4, 1], [0, 1], [3, 4], [2, 0], [1, 3]])
    out = torch.full((18, 40), torch.nan, dtype=torch.float16, device=device)
    for weights, place in ((low, [0, 1, -1, -1, -1]), (high, [-1, -1, 0, 1, 2])):
        before = out.clone()
        stacked = stack_experts([prepare_weight(weight, device, torch.float16) for weight in weights])
        groups = group_tokens(torch.tensor(place)[ids].to(device), len(weights), 16)
        grouped_matmul(x.to(device), stacked, groups, out=out)
        others = torch.tensor(place)[ids].reshape(-1) < 0
        assert torch.equal(out[others].cpu().view(torch.int16), before[others].cpu().view(torch.int16))
    for entry, expert in enumerate(ids.reshape(-1).tolist()):
        row, weight = x[entry // top : entry // top + 1], [*low, *high][expert]
        bound = product_bound(row, weight.dequantize(), torch.float16, torch.float16, decoded=6)
        assert_within(out[entry : entry + 1].float(), reference.linear(row, weight), bound)


def test_experts_that_differ_are_refused() -> None:
    a, b = (prepare_weight(quantize_blockwise(normal(16, 64), parse(text)), "cpu") for text in ("nf4-b64", "int4-b64"))
    with pytest.raises(UnsupportedError, match="differ"):
        stack_experts([a, b])
    own = [prepare_weight(quantize_blockwise(normal(16, 64, seed), parse("quantile4-b64")), "cpu") for seed in (0, 1)]
    with pytest.raises(UnsupportedError, match="differ"):
        stack_experts(own)  # a table each
    turned = [trellis_tensor("trellis3", 16, 64) for _ in range(2)]
    turned[1].stored["signs"] = ~turned[1].stored["signs"]
    with pytest.raises(UnsupportedError, match="differ"):
        stack_experts([prepare_weight(weight, "cpu") for weight in turned])
    with pytest.raises(UnsupportedError, match="no experts"):
        stack_experts([])


def test_a_routing_that_does_not_fit_is_refused() -> None:
    weight = stack_experts([prepare_weight(quantize_blockwise(normal(16, 64), parse("nf4-b64")), "cpu")])
    groups = group_tokens(torch.zeros(3, 1, dtype=torch.long), 1, 16)
    with pytest.raises(UnsupportedError, match="needs 3"):
        grouped_matmul(normal(4, 64).half(), weight, groups)
