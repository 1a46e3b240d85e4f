"""What stands in the place of a weight inside vLLM, and does not need vLLM itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch

from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.quant_format import QuantFormat
from kbit.host.errors import CheckpointError
from kbit.modules.linear import KbitLinear
from kbit.vllm.weight import KbitWeight, carrying, kbit_weights

COLUMNS = 96
CPU = torch.device("cpu")


def matrix(rows: int, format: str = "nf4-b32", seed: int = 0, order: torch.Tensor | None = None) -> KbitLinear:
    values = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed))
    return KbitLinear([quantize_blockwise(values, QuantFormat.parse(format))], order=order)


def weight(parts: Sequence[tuple[object, torch.Tensor]], rows: list[int]) -> KbitWeight:
    made = KbitWeight("layer", torch.float32)
    for shard, values in parts:
        made.weight_loader(made, values, shard)
    made.complete(rows, COLUMNS, CPU)
    return made


def test_queries_keys_and_values_in_any_order() -> None:
    q, k, v = matrix(64, "nf4-b32", 1), matrix(32, "int3-b32", 2), matrix(32, "nf2-b32", 3)
    parts = [(name, carrying(each, torch.float32)) for name, each in (("v", v), ("q", q), ("k", k))]
    made = weight(parts, [64, 32, 32])
    assert list(made.parts) == ["q", "k", "v"]
    assert made.plain == 0
    x = torch.randn(5, COLUMNS)
    # The very products of each matrix: nothing else is computed.
    assert torch.equal(made.product(x), torch.cat([each.products(x) for each in (q, k, v)], dim=-1))
    assert made.product(x.view(5, 1, COLUMNS)).shape == (5, 1, 128)


def test_a_fused_matrix_is_one_part() -> None:
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    whole = matrix(48, order=order)
    made = weight([(None, carrying(whole, torch.float32))], [16, 16, 16])
    x = torch.randn(3, COLUMNS)
    close = 64 * COLUMNS * torch.finfo(torch.float32).eps * x.abs().sum()
    assert (made.product(x) - x @ whole.weight.T).abs().max() <= close


def test_what_a_model_changes_while_it_loads_is_plain() -> None:
    gate = matrix(32)
    made = weight([(0, carrying(gate, torch.float32)), (1, carrying(gate, torch.float32) * 2)], [32, 32])
    assert made.plain == 1
    x = torch.randn(4, COLUMNS)
    y = made.product(x)
    close = 64 * COLUMNS * torch.finfo(torch.float32).eps * x.abs().sum()
    assert (y[:, 32:] - 2 * y[:, :32]).abs().max() <= close


def test_16_bit_activations_keep_their_type() -> None:
    made = weight([(None, carrying(matrix(32), torch.bfloat16))], [32])
    x = torch.randn(4, COLUMNS, dtype=torch.bfloat16)
    y = made.product(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, made.product(x.float()).to(torch.bfloat16))


def test_rows_of_a_table_and_a_head_tied_to_it() -> None:
    table = matrix(50)
    made = weight([(None, carrying(table, torch.float32))], [64])  # vLLM fills vocabularies up to a multiple of 64
    ids = torch.tensor([[3, 49], [0, 3]])
    assert torch.equal(made.rows(ids, torch.float32), table.weight[ids])
    plain = weight([(None, table.weight)], [64])
    assert torch.equal(plain.rows(ids, torch.float32), table.weight[ids])
    both = torch.nn.ModuleDict({"embedding": torch.nn.Module(), "head": torch.nn.Module()})
    for module in both.values():
        module.register_parameter("weight", made)
    assert list(kbit_weights(both).values()) == [made]


@pytest.mark.parametrize(
    ("parts", "rows", "said"),
    [
        ([], [32], "was given none"),
        ([(0, torch.zeros(32, COLUMNS)), (1, torch.zeros(64, COLUMNS))], [32, 32], "32 x 96 and 64 x 96"),
        ([(None, torch.zeros(32, COLUMNS - 1))], [32], "32 x 95"),
        ([(None, torch.zeros(COLUMNS))], [32], "given 96"),
    ],
)
def test_a_folder_of_another_model(parts: list[tuple[object, torch.Tensor]], rows: list[int], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        weight(parts, rows)


def test_values_alone_are_those_of_the_codes() -> None:
    found = matrix(32)
    values = carrying(found, torch.float32)
    assert torch.equal(values, found.weight)
    assert getattr(copy.copy(values) * 1, "kbit_matrix", None) is None  # of another tensor nothing is claimed
