"""Float32 matrix products at the speed of the processor's widest vectors.

torch's own go to MKL, which uses AVX-512 on Intel's processors only; oneDNN, which torch carries too, does so on all
that have it, and is 2.2 times as fast there (docs/measurements.md). Both sum in float32, in an order of their own.
"""

from __future__ import annotations

from functools import cache

import torch


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b.

    Args:
        a: float32 (..., K).
        b: float32 (K, N); its transpose may be what is stored.
    """
    return product_with_rows(a, b.T)


def product_with_rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b^T.

    Args:
        a: float32 (..., K).
        b: float32 (N, K).
    """
    if a.shape[-1] == 0 or not _has_wide_products():
        return a @ b.T
    # Where memory has gaps between rows oneDNN takes a loop that is a hundred times as slow.
    a = a.contiguous()
    if not (b.is_contiguous() or b.T.is_contiguous()):
        b = b.contiguous()
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return found


@cache
def _has_wide_products() -> bool:
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
