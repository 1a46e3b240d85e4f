"""Attention of many new tokens against the reference: packed sequences, and paged caches with tokens already in them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from triton_cases import DTYPES, HALF

triton = pytest.importorskip("triton")

from kbit.gpu_check import attention  # noqa: E402
from kbit.gpu_check.attention import Cache, Mask  # noqa: E402
from kbit.kernels.triton.attention.configs import PrefillConfig  # noqa: E402
from kbit.kernels.triton.attention.prefill import attention_prefill  # noqa: E402

SMALL = PrefillConfig(rows=32, block=32)  # several tiles of few tokens
check_paged = partial(attention.check_paged, config=SMALL)
check_packed = partial(attention.check_packed, config=SMALL)


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
        Mask(window=33, chunked=True),
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
    check_packed(device, (2, 1, 32), [5, 32], [70, 32], Mask(window=67, chunked=True))


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
    for mask in (
        Mask(window=30),
        Mask(window=64, chunked=True),
        Mask(soft_cap=3.0),
        Mask(slopes=slopes),
        Mask(window=30, sinks=sinks),
    ):
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
