"""The reference backend: its cache, its operations; and which backend is chosen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference_cases import assert_within, attention_bound, randn, sdpa

from kbit.backends.reference.backend import ReferenceBackend
from kbit.backends.reference.kv_cache import reference_pages
from kbit.backends.reference.row_ops import RowOps
from kbit.backends.reference.step_ops import StepOps
from kbit.backends.select import select_backend
from kbit.graph.batch import Batch
from kbit.graph.cache import Cache
from kbit.graph.ops import Attention
from kbit.graph.pages import PAGE
from kbit.host.errors import UnsupportedError, UsageError
from kbit.kernels import reference


def reference_cache(layers: int, batch: int, kv_heads: int, head_dim: int, capacity: int) -> Cache:
    return ReferenceBackend().new_cache(layers, batch, kv_heads, head_dim, capacity)


def append(cache: Cache, layer: int, counts: list[int], k: torch.Tensor, v: torch.Tensor) -> None:
    """The first counts[b] tokens of each row of k and v (B, T, H_kv, D)."""
    cache.reserve(counts)
    batch = Batch.packed(np.arange(sum(counts)), counts, cache.lengths)
    positions = batch.positions.astype(np.int64)
    slots = cache.tables[batch.sequences, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE
    real = [torch.cat([row[:count] for row, count in zip(x, counts, strict=True)]) for x in (k, v)]
    reference_pages(cache).append(layer, torch.from_numpy(slots), *real)


def contents(cache: Cache, layer: int, row: int, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    table = cache.rows[row]
    return reference_pages(cache).read(layer, table.pages, table.length if length is None else length)


def test_cache_append_uniform_and_ragged() -> None:
    cache = reference_cache(layers=2, batch=2, kv_heads=3, head_dim=4, capacity=64)
    assert cache.nbytes == 2 * 2 * 2 * 3 * 64 * 4 * 4
    first_k, first_v = randn(2, 3, 3, 4), randn(2, 3, 3, 4, seed=1)
    for layer in range(2):
        append(cache, layer, [3, 3], first_k + layer, first_v + layer)
    assert cache.lengths.tolist() == [0, 0]  # nothing counts before advance
    cache.advance([3, 3])
    # Row 0 adds 3, row 1 adds 1: what follows must not reach the cache.
    second = randn(2, 3, 3, 4, seed=2)
    append(cache, 1, [3, 1], second, -second)
    cache.advance([3, 1])
    assert cache.lengths.tolist() == [6, 4]
    assert torch.equal(contents(cache, 1, 0)[0], torch.cat([first_k[0] + 1, second[0]]).transpose(0, 1))
    assert torch.equal(contents(cache, 1, 1)[0], torch.cat([first_k[1] + 1, second[1, :1]]).transpose(0, 1))
    assert torch.equal(contents(cache, 1, 0)[1][:, 3:], -second[0].transpose(0, 1))
    assert not contents(cache, 1, 1, 64)[0][:, 4:].any()
    assert torch.equal(contents(cache, 0, 1)[1][:, :3], first_v[1].transpose(0, 1))


def test_cache_reserve() -> None:
    cache = reference_cache(1, 2, 1, 2, capacity=5)
    cache.reserve(torch.tensor([2, 4]))
    cache.advance(torch.tensor([2, 4]))
    cache.reserve(torch.tensor([3, 1]))
    with pytest.raises(UsageError, match="holds 5 tokens per row: row 1 has 4 and 2 more do not fit"):
        cache.reserve(torch.tensor([0, 2]))


def test_cache_grows_and_keeps_its_tokens() -> None:
    cache = reference_cache(2, 2, 3, 4, capacity=5)
    for layer in range(2):
        append(cache, layer, [5, 2], randn(2, 5, 3, 4, seed=layer), randn(2, 5, 3, 4, seed=layer))
    cache.advance(torch.tensor([5, 2]))
    keys = [contents(cache, layer, 0)[0] for layer in range(2)]
    cache.grow(4)
    assert cache.capacity == 5
    cache.grow(90)
    assert cache.lengths.tolist() == [5, 2]
    assert cache.nbytes == 2 * 2 * 2 * 3 * 128 * 4 * 4
    cache.reserve([85, 88])
    with pytest.raises(UsageError, match="holds 90 tokens per row: row 0 has 5 and 86 more"):
        cache.reserve([86, 88])
    for layer in range(2):
        assert torch.equal(contents(cache, layer, 0)[0], keys[layer])
        assert not contents(cache, layer, 0, 90)[0][:, 5:].any()


def test_cache_truncate_and_select() -> None:
    cache = reference_cache(2, 3, 1, 2, capacity=4)
    for layer in range(2):
        append(cache, layer, [4, 1, 3], randn(3, 4, 1, 2, seed=layer), randn(3, 4, 1, 2, seed=layer))
    cache.advance(torch.tensor([4, 1, 3]))
    keys = [[contents(cache, layer, row)[0] for row in range(3)] for layer in range(2)]
    cache.truncate(3)
    assert cache.lengths.tolist() == [3, 1, 3]
    cache.truncate(torch.tensor([9, 0, 2]))
    assert cache.lengths.tolist() == [3, 0, 2]
    cache.select(torch.tensor([2, 0, 2, 2]))
    assert cache.lengths.tolist() == [2, 3, 2, 2]
    assert cache.batch == 4
    for layer in range(2):
        for row, was in enumerate([2, 0, 2, 2]):
            length = int(cache.lengths[row])
            assert torch.equal(contents(cache, layer, row)[0], keys[layer][was][:, :length])
    cache.reserve([2, 1, 2, 2])
    with pytest.raises(UsageError, match="negative length"):
        cache.truncate(-1)
    for rows in ([4], [-1], []):
        with pytest.raises(UsageError, match="4 rows"):
            cache.select(torch.tensor(rows, dtype=torch.int64))


@pytest.mark.parametrize(("batch", "capacity"), [(0, 5), (1, 0), (1, -3)])
def test_cache_needs_room(batch: int, capacity: int) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        reference_cache(1, batch, 1, 1, capacity)


def test_step_ops_rotate_append_and_attend() -> None:
    """Two ragged steps equal one explicit computation over the real tokens of each row."""
    cache = ReferenceBackend().new_cache(layers=1, batch=2, kv_heads=1, head_dim=4, capacity=7)
    attention = Attention(layer=0, heads=2, kv_heads=1, head_dim=4, scale=0.5, window=None)
    angles = torch.arange(7)[None, :, None].expand(2, -1, -1) * torch.tensor([1.0, 0.1])
    q, k, v = randn(2, 7, 2, 4), randn(2, 7, 1, 4, seed=1), randn(2, 7, 1, 4, seed=2)
    turned_q, turned_k = (reference.rope(x, angles.cos(), angles.sin()) for x in (q, k))
    taken = torch.tensor([0, 0])
    for lengths in (torch.tensor([4, 2]), torch.tensor([3, 5])):
        cache.reserve(lengths)
        batch = Batch.packed(np.zeros(int(lengths.sum()), dtype=np.int64), lengths.tolist(), cache.lengths)
        rows, where = torch.from_numpy(batch.sequences).long(), torch.from_numpy(batch.positions).long()
        turns = angles[0, where]
        features = (x[rows, where].flatten(-2) for x in (q, k, v))
        packed = StepOps(batch, turns.cos(), turns.sin(), cache).self_attention(*features, attention).view(-1, 2, 4)
        out = [part[None] for part in torch.split(packed, lengths.tolist())]
        cache.advance(lengths)
        taken = taken + lengths
        for row in range(2):
            new = slice(int(taken[row] - lengths[row]), int(taken[row]))
            exact = sdpa(
                turned_q[row : row + 1, new],
                turned_k[row : row + 1].transpose(1, 2),
                v[row : row + 1].transpose(1, 2),
                torch.arange(new.start, new.stop)[None],
                taken[row : row + 1],
                0.5,
                None,
            )
            bound = attention_bound(q, k, v, 0.5)
            assert_within(out[row], exact, bound)
    assert cache.lengths.tolist() == [7, 7]


def test_ops_groups_residuals_and_foreign_weights() -> None:
    backend, ops = ReferenceBackend(), RowOps()
    weights = [backend.prepare(randn(n, 6, seed=n).half()) for n in (3, 5)]
    assert [weight.shape for weight in weights] == [(3, 6), (5, 6)]
    assert [weight.nbytes for weight in weights] == [72, 120]
    x, bias, residual = randn(2, 6), randn(5), randn(2, 5)
    first, second = ops.linear_group(weights, x, [None, bias])
    assert torch.equal(first, ops.linear(weights[0], x))
    assert torch.equal(second, ops.linear(weights[1], x, bias))
    assert torch.equal(ops.add(ops.linear(weights[1], x, bias), residual), residual + second)
    with pytest.raises(TypeError, match="prepared by another backend"):
        ops.linear(torch.zeros(3, 6), x)  # type: ignore[arg-type]


def test_select_backend() -> None:
    for device in ("auto", "cpu"):
        backend = select_backend(device, backend="reference")
        assert backend.name == "reference"
        assert backend.device == torch.device("cpu")
        assert "CPU" in backend.describe()
    assert "packed" in select_backend("cpu", backend="reference", expand=False).describe()
    select_backend("cpu", backend="reference", compute="fp32", kv_bits=32)
    with pytest.raises(UnsupportedError, match=r"--device cuda.*--device cpu"):
        select_backend("cuda")
    for choice, message in (
        ({"device": "tpu"}, r"--device tpu: .*auto, cpu, cuda"),
        ({"backend": "cutlass"}, r"--backend cutlass: .*auto, native, triton, reference"),
        ({"backend": "triton", "device": "cpu"}, r"--backend triton runs on GPUs: use --device cuda"),
        ({"backend": "native", "device": "cuda"}, r"--backend native runs on the CPU"),
        ({"device": "cuda", "compute": "fp32"}, r"--compute fp32: on a GPU use fp16, bf16, int8 or fp8"),
        ({"device": "cuda", "kv_bits": 32}, r"--kv-bits 32: on a GPU use 16, 8, 4, 3 or 2"),
        ({"compute": "fp16"}, r"--compute fp16: this is for GPUs"),
        ({"compute": "fp8"}, r"--compute fp8: this is for GPUs"),
        ({"compute": "int4"}, r"--compute int4: .*int8, fp8, fp16, bf16, fp32"),
        ({"kv_bits": 5}, r"--kv-bits 5: .*2, 3, 4, 8, 16, 32"),
        ({"kv_bits": "four"}, r"--kv-bits four: .*2, 3, 4, 8, 16, 32"),
        ({"kv_bits": "8,4,2"}, r"--kv-bits 8,4,2: .*2, 3, 4, 8, 16, 32"),
        ({"kv_bits": "16,4"}, r"--kv-bits 16,4: two widths, of keys and of values, are each one of 2, 3, 4, 8"),
        ({"threads": 0}, r"--threads 0: expected at least 1"),
        ({"backend": "reference", "compute": "int8"}, r"--compute int8: .*only fp32; use --backend native"),
        ({"backend": "reference", "kv_bits": 4}, r"--kv-bits 4: .*only 32; use --backend native"),
        ({"backend": "reference", "kv_bits": "8,4"}, r"--kv-bits 8,4: .*only 32; use --backend native"),
    ):
        with pytest.raises(UsageError, match=message):
            select_backend(**choice)  # type: ignore[arg-type]
