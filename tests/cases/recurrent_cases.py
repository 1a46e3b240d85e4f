"""Two ways to compute one recurrence: chunk by chunk, and token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def made(*shapes: tuple[int, ...], seed: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def assert_the_same_function(together: torch.Tensor, one_by_one: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
    """Results and gradients of the same inputs are equal, up to the order of sums in float32."""
    with torch.no_grad():
        assert float((together - one_by_one).abs().max()) <= 1e-5 * float(one_by_one.abs().max())
    towards = torch.randn(together.shape, generator=torch.Generator().manual_seed(4))
    wanted, found = (torch.autograd.grad((out * towards).sum(), inputs) for out in (one_by_one, together))
    for mine, theirs in zip(found, wanted, strict=True):
        assert float((mine - theirs).norm()) <= 1e-4 * float(theirs.norm())
