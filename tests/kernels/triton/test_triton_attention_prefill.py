"""Attention of many new tokens against the reference: packed sequences, and paged caches with tokens already in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_attention_cases import Cache, Mask, attend, attention_bound
from triton_cases import DTYPES, HALF, assert_within

triton = pytest.importorskip("triton")

from kbit.kernels.triton.attention.configs import PrefillConfig  # noqa: E402
from kbit.kernels.triton.attention.prefill import attention_prefill, attention_prefill_paged  # noqa: E402

SMALL = PrefillConfig(rows=32, block=32)  # several tiles of few tokens


def bounds_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def check_paged(
    device: str,
    cache: Cache,
    heads: int,
    new: list[int],
    mask: Mask | None = None,
    *,
    dtype: torch.dtype = torch.float16,
    out: torch.dtype = torch.float32,
    config: PrefillConfig | None = SMALL,
) -> None:
    """The last new[b] tokens of row b."""
    mask, dim, bounds = mask or Mask(), cache.head_dim, bounds_of(new)
    q = torch.randn(sum(new), heads, dim, generator=torch.Generator().manual_seed(5)).to(dtype)
    got = attention_prefill_paged(
        q.to(device),
        bounds.to(device),
        cache.k_pages.to(device),
        cache.v_pages.to(device),
        cache.table.to(device),
        torch.tensor(cache.lengths, device=device),
        dim**-0.5,
        k_kind=cache.kinds[0],
        v_kind=cache.kinds[1],
        max_queries=max(new),
        out_dtype=out,
        config=config,
        **mask.options(device),  # type: ignore[arg-type]
    )
    assert got.dtype == out
    for row, (length, count) in enumerate(zip(cache.lengths, new, strict=True)):
        if count:
            part = slice(int(bounds[row]), int(bounds[row + 1]))
            k, v = cache.row(row)
            expected, weights, magnitudes = attend(q[part], k, v, torch.arange(length - count, length), dim**-0.5, mask)
            bound = attention_bound(v, weights, magnitudes, cache.kinds, out, mask, rounds_values=True)
            assert_within(got[part], expected, bound)


def check_packed(
    device: str,
    heads: tuple[int, int, int],
    queries: list[int],
    keys: list[int] | None = None,
    mask: Mask | None = None,
    *,
    dtype: torch.dtype = torch.float16,
    config: PrefillConfig | None = SMALL,
) -> None:
    mask, (count, kv_heads, dim) = mask or Mask(), heads
    bounds, key_bounds = bounds_of(queries), bounds_of(keys or queries)
    generator = torch.Generator().manual_seed(6)
    q = torch.randn(sum(queries), count, dim, generator=generator).to(dtype)
    kv = torch.randn(int(key_bounds[-1]), 2 * kv_heads, dim, generator=generator).to(dtype)
    k, v = kv[:, :kv_heads], kv[:, kv_heads:]  # slices: tokens lie apart
    got = attention_prefill(
        q.to(device),
        bounds.to(device),
        kv.to(device)[:, :kv_heads],
        kv.to(device)[:, kv_heads:],
        dim**-0.5,
        max_queries=max(queries) + 3,
        key_bounds=None if keys is None else key_bounds.to(device),
        causal=mask.causal,
        out_dtype=torch.float32,
        config=config,
        **mask.options(device),  # type: ignore[arg-type]
    )
    kind = "fp16" if dtype == torch.float16 else "bf16"
    for row in range(len(queries)):
        mine, theirs = (slice(int(x[row]), int(x[row + 1])) for x in (bounds, key_bounds))
        length = theirs.stop - theirs.start
        positions = torch.arange(length - queries[row], length)
        values = v[theirs].transpose(0, 1)
        expected, weights, magnitudes = attend(q[mine], k[theirs].transpose(0, 1), values, positions, dim**-0.5, mask)
        bound = attention_bound(values, weights, magnitudes, (kind, kind), torch.float32, mask, rounds_values=True)
        assert_within(got[mine], expected, bound)


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", HALF)
def test_packed_head_sizes(dtype: torch.dtype, dim: int, device: str) -> None:
    check_packed(device, (2, 1, dim), [37, 1], dtype=dtype)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (7, 1), (40, 1)])
def test_packed_heads(heads: tuple[int, int], device: str) -> None:
    check_packed(device, (*heads, 32), [20, 3])


def test_packed_masks(device: str) -> None:
    slopes = torch.tensor([0.5, 0.125])
    for mask in (
        Mask(window=1),
        Mask(window=21),
        Mask(soft_cap=3.0),
        Mask(slopes=slopes),
        Mask(causal=False),
        Mask(causal=False, sinks=torch.tensor([2.0, 300.0])),
        Mask(causal=False, soft_cap=2.0),
        Mask(window=33, soft_cap=9.0, slopes=slopes),
    ):
        check_packed(device, (2, 2, 32), [70, 33, 1], mask=mask)


def test_packed_with_earlier_keys(device: str) -> None:
    """Fewer queries than keys: the queries are the last."""
    check_packed(device, (2, 1, 32), [5, 32], [70, 32])
    check_packed(device, (2, 1, 32), [5, 32], [70, 32], Mask(window=40))


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("kinds", [("fp16", "fp16"), ("8", "4"), ("3", "2")])
def test_paged_head_sizes(kinds: tuple[str, str], dim: int, device: str) -> None:
    check_paged(device, Cache(kinds, 1, dim, [69]), 2, [21])


@pytest.mark.parametrize(("dim", "kinds"), [(320, ("bf16", "fp16")), (512, ("4", "8")), (576, ("8", "3"))])
def test_wide_heads(dim: int, kinds: tuple[str, str], device: str) -> None:
    """Cut into two or three parts."""
    check_paged(device, Cache(kinds, 1, dim, [69, 30]), 2, [21, 1], Mask(window=40))
    if dim == 512:
        check_packed(device, (2, 1, dim), [37, 1], mask=Mask(soft_cap=2.0))


@pytest.mark.parametrize("kinds", [("2", "3"), ("4", "8"), ("bf16", "4"), ("4", "fp16"), ("bf16", "bf16")])
def test_paged_kinds(kinds: tuple[str, str], device: str) -> None:
    """Rows with much, some and nothing before, one of them without new tokens."""
    check_paged(device, Cache(kinds, 2, 32, [140, 40, 33, 9]), 6, [12, 40, 0, 1])


def test_paged_masks(device: str) -> None:
    slopes = torch.tensor([0.5, 0.125])
    sinks = torch.tensor([-1.0, 4.0])
    for mask in (Mask(window=30), Mask(soft_cap=3.0), Mask(slopes=slopes), Mask(window=30, sinks=sinks)):
        check_paged(device, Cache(("4", "4"), 2, 32, [100, 20]), 2, [35, 20], mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_types(dtype: torch.dtype, device: str) -> None:
    check_paged(device, Cache(("4", "4"), 1, 64, [50]), 2, [20], dtype=dtype, out=dtype)


def test_sinks_where_scales_are_on_scores(device: str) -> None:
    """Probabilities carry a factor there, which the sink must carry, too."""
    config = PrefillConfig(rows=32, block=16, warps=2, stages=1, scale_tiles=False)
    check_paged(device, Cache(("4", "4"), 1, 32, [50]), 2, [20], Mask(sinks=torch.tensor([0.0, 2.0])), config=config)


@pytest.mark.parametrize("kinds", [("4", "4"), ("8", "3")])
def test_scales_on_scores(kinds: tuple[str, str], device: str) -> None:
    """The other place to apply the scales, as RDNA does."""
    config = PrefillConfig(rows=32, block=16, warps=2, stages=1, scale_tiles=False)
    check_paged(device, Cache(kinds, 2, 32, [100, 20]), 4, [35, 20], config=config)


def test_chosen_config(device: str) -> None:
    check_paged(device, Cache(("4", "4"), 1, 64, [90]), 4, [40], config=None)
    check_packed(device, (4, 2, 64), [70], config=None)


def test_refuses(device: str) -> None:
    x = torch.zeros(4, 2, 32, dtype=torch.float16, device=device)
    bounds = torch.tensor([0, 4], device=device)

    def call(**changes: Any) -> None:
        given = {"q": x, "bounds": bounds, "k": x, "v": x, "scale": 1.0, "max_queries": 4}
        attention_prefill(**{**given, **changes})

    with pytest.raises(ValueError, match="fp16 or bf16"):
        call(k=x.float(), v=x.float())
    with pytest.raises(ValueError, match="features"):
        call(q=x[..., :16])
    with pytest.raises(ValueError, match="causal"):
        call(causal=False, window=3)
    with pytest.raises(ValueError, match="key_bounds"):
        call(key_bounds=bounds[:1])
    with pytest.raises(ValueError, match="query heads"):
        call(q=torch.zeros(4, 3, 32, dtype=torch.float16, device=device))
    with pytest.raises(ValueError, match="contiguous, not strides"):
        call(k=torch.zeros(4, 2, 64, dtype=torch.float16, device=device)[..., :32])
