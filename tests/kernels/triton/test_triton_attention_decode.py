"""Attention of a few new tokens to a paged cache against the reference: kinds, heads, masks, splits, lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_cases import DTYPES, assert_within

triton = pytest.importorskip("triton")

from kbit.gpu_check.attention import Cache, Mask, attend, attention_bound, check_decode  # noqa: E402
from kbit.kernels import reference  # noqa: E402
from kbit.kernels.triton.attention.configs import DecodeConfig  # noqa: E402
from kbit.kernels.triton.attention.decode import attention_decode, splits_for  # noqa: E402
from kbit.kernels.triton.attention.kv_layout import KINDS, write_tokens  # noqa: E402


@pytest.mark.parametrize("v_kind", KINDS)
@pytest.mark.parametrize("k_kind", KINDS)
def test_every_pair_of_kinds(k_kind: str, v_kind: str, device: str) -> None:
    check_decode(device, Cache((k_kind, v_kind), 1, 32, [67, 4]), 3, 2, splits=2)


@pytest.mark.parametrize("dim", [16, 48, 64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("kinds", [("fp16", "bf16"), ("8", "3"), ("4", "4"), ("3", "2")])
def test_head_sizes(kinds: tuple[str, str], dim: int, device: str) -> None:
    check_decode(device, Cache(kinds, 1, dim, [45]), 2, 1, splits=1)


@pytest.mark.parametrize(("dim", "kinds"), [(320, ("4", "3")), (512, ("fp16", "8")), (576, ("3", "bf16"))])
def test_wide_heads(dim: int, kinds: tuple[str, str], device: str) -> None:
    """Cut into two or three parts, with queries that are made ready beforehand."""
    check_decode(device, Cache(kinds, 2, dim, [70, 20]), 4, 2, Mask(window=40, sinks=torch.zeros(4)), splits=2)
    check_decode(device, Cache(kinds, 1, dim, [70]), 2, 1, Mask(soft_cap=2.0), splits=None)


@pytest.mark.parametrize("tokens", range(1, 9))
def test_tokens_and_lengths(tokens: int, device: str) -> None:
    """1 to 8 new tokens of rows of very different lengths, the shortest of these tokens alone; G = 3."""
    check_decode(device, Cache(("4", "8"), 2, 32, [130, 64, tokens, 65]), 6, tokens, splits=3)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (7, 1), (8, 2), (20, 1), (40, 1)])
def test_heads(heads: tuple[int, int], device: str) -> None:
    """G from 1 to 40: tiles of 16, 32 and 64 rows, and with 3 tokens of G = 40 two tiles."""
    count, kv_heads = heads
    check_decode(device, Cache(("4", "3"), kv_heads, 32, [70]), count, 3, splits=2)


@pytest.mark.parametrize("kinds", [("fp16", "fp16"), ("4", "4")])
def test_masks(kinds: tuple[str, str], device: str) -> None:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.01])
    for mask in (
        Mask(window=1),
        Mask(window=33),
        Mask(window=1000),
        Mask(window=65, chunked=True),
        Mask(window=1, chunked=True, soft_cap=10.0),
        Mask(soft_cap=3.0),
        Mask(slopes=slopes),
        Mask(window=20, soft_cap=10.0, slopes=slopes),
    ):
        check_decode(device, Cache(kinds, 2, 32, [131, 30]), 4, 3, mask, splits=2)


@pytest.mark.parametrize("kinds", [("fp16", "fp16"), ("4", "3")])
def test_sinks(kinds: tuple[str, str], device: str) -> None:
    """Of no, little and all weight, of heads that share keys; queries that see nothing but it."""
    cache, sinks = Cache(kinds, 2, 32, [131, 30]), torch.tensor([-40.0, -2.0, 3.0, 500.0])
    for mask in (Mask(sinks=sinks), Mask(window=20, soft_cap=10.0, sinks=sinks.flip(0))):
        check_decode(device, cache, 4, 3, mask, splits=2)
    check_decode(device, cache, 4, 2, Mask(sinks=sinks), positions=torch.tensor([[130, -1], [-1, 0]]), splits=2)


@pytest.mark.parametrize("splits", [1, 2, 5, 16, 40])
def test_splits(splits: int, device: str) -> None:
    """More splits than tiles of tokens, too: some then see nothing and write nothing."""
    check_decode(device, Cache(("3", "4"), 1, 32, [200, 1]), 2, 1, splits=splits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_types(dtype: torch.dtype, device: str) -> None:
    check_decode(device, Cache(("4", "4"), 1, 64, [80]), 4, 1, dtype=dtype, out=dtype)
    check_decode(device, Cache(("bf16", "bf16"), 1, 64, [80]), 4, 1, dtype=dtype, out=dtype)


@pytest.mark.parametrize("block", [16, 64])
def test_blocks(block: int, device: str) -> None:
    config = DecodeConfig(block=block, p_log2=10)
    check_decode(device, Cache(("4", "2"), 1, 64, [130]), 2, 2, splits=2, config=config)


@pytest.mark.parametrize("kinds", [("4", "4"), ("8", "3"), ("2", "fp16")])
def test_scaled_values(kinds: tuple[str, str], device: str) -> None:
    """Scales go to the decoded values instead of scores and probabilities."""
    check_decode(device, Cache(kinds, 1, 64, [45]), 2, 1, splits=2, config=DecodeConfig(block=16, scale_tiles=True))


def test_queries_that_see_less(device: str) -> None:
    """Positions of any order, before the row's end, and padding: a query that sees nothing yields zeros."""
    cache = Cache(("4", "4"), 1, 32, [100, 70])
    check_decode(device, cache, 2, 3, positions=torch.tensor([[99, 3, -1], [64, 63, 0]]), splits=2)
    check_decode(device, cache, 2, 3, Mask(window=8), positions=torch.tensor([[99, 3, -1], [64, 63, 0]]), splits=2)


def test_empty_row(device: str) -> None:
    cache = Cache(("4", "4"), 1, 32, [1])
    got = attention_decode(
        torch.ones(1, 1, 1, 32, dtype=torch.float16, device=device),
        cache.k_pages.to(device),
        cache.v_pages.to(device),
        torch.zeros(1, 1, dtype=torch.int32, device=device),
        torch.tensor([[-1]], device=device),
        torch.tensor([0], device=device),
        1.0,
        k_kind="4",
        v_kind="4",
        splits=2,
    )
    assert torch.equal(got.cpu(), torch.zeros(1, 1, 1, 32, dtype=torch.float16))


def test_large_and_small_values(device: str) -> None:
    """Values near both ends of the scales' range: neither overflow nor loss."""
    for size in (3e4, 1e-4):
        cache = Cache(("4", "4"), 1, 32, [40])
        values = size * torch.randn(40, 1, 32, generator=torch.Generator().manual_seed(3)).clamp_(-1, 1)
        write_tokens(cache.v_pages, cache.formats[1], cache.slots(0, 40), values)
        q = torch.randn(1, 1, 2, 32, generator=torch.Generator().manual_seed(4)).half()
        got = attention_decode(
            q.to(device), cache.k_pages.to(device), cache.v_pages.to(device), cache.table.to(device),
            torch.tensor([[39]], device=device), torch.tensor([40], device=device), 32**-0.5,
            k_kind="4", v_kind="4", splits=1, out_dtype=torch.float32,
        )  # fmt: skip
        k, v = cache.row(0)
        expected, weights, magnitudes = attend(q[0], k, v, torch.tensor([39]), 32**-0.5, Mask())
        bound = attention_bound(v, weights, magnitudes, cache.kinds, torch.float32, Mask(), rounds_values=False)
        assert_within(got[0], expected, bound)


def test_equals_the_reference(device: str) -> None:
    """`attend` of these tests and `reference.attend` say the same."""
    cache = Cache(("4", "4"), 2, 32, [90])
    q = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1))
    k, v = cache.row(0)
    positions = torch.tensor([88, 89])
    ours, _, _ = attend(q, k, v, positions, 0.2, Mask(window=40))
    batch = (q[None], k[None], v[None], positions[None], torch.tensor([90]), 0.2)
    torch.testing.assert_close(ours.float(), reference.attend(*batch, window=40)[0])
    sinks = torch.tensor([-1.0, 0.0, 2.0, 400.0])
    ours, _, _ = attend(q, k, v, positions, 0.2, Mask(window=40, sinks=sinks))
    torch.testing.assert_close(ours.float(), reference.attend(*batch, window=40, sinks=sinks)[0])


def test_choice_of_splits() -> None:
    config = DecodeConfig(block=32, programs=1056)
    assert splits_for(config, 1, 8, 32768) == 132
    assert splits_for(config, 64, 8, 32768) == 2
    assert splits_for(config, 1, 8, 100) == 1  # not below four steps of 32
    assert splits_for(config, 1, 8, 1024) == 8


def test_refuses(device: str) -> None:
    cache = Cache(("4", "4"), 2, 32, [64])

    def call(**changes: Any) -> None:
        given = {
            "q": torch.zeros(1, 1, 4, 32, dtype=torch.float16, device=device),
            "k_pages": cache.k_pages.to(device),
            "v_pages": cache.v_pages.to(device),
            "block_table": cache.table.to(device),
            "positions": torch.zeros(1, 1, dtype=torch.int64, device=device),
            "lengths": torch.ones(1, dtype=torch.int64, device=device),
            "scale": 1.0,
            "k_kind": "4",
            "v_kind": "4",
        }
        attention_decode(**{**given, **changes})

    with pytest.raises(ValueError, match="query heads"):
        call(q=torch.zeros(1, 1, 3, 32, dtype=torch.float16, device=device))
    with pytest.raises(ValueError, match="contiguous, not strides"):
        call(q=torch.zeros(1, 1, 4, 64, dtype=torch.float16, device=device)[..., :32])
    with pytest.raises(ValueError, match="bytes per page"):
        call(v_kind="8")
    with pytest.raises(ValueError, match="block_table"):
        call(block_table=cache.table.long().to(device))
    with pytest.raises(ValueError, match="positions"):
        call(positions=torch.zeros(1, 2, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match="slopes"):
        call(slopes=torch.zeros(3, device=device))
    with pytest.raises(ValueError, match="sinks"):
        call(sinks=torch.zeros(4, dtype=torch.float16, device=device))
    with pytest.raises(ValueError, match="window"):
        call(window=0)
    with pytest.raises(ValueError, match="soft cap"):
        call(soft_cap=-1.0)
