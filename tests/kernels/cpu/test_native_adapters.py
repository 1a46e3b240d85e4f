"""What adapters add to products, on every instruction set: as kernels/reference.py says, within rounding; and the same
bits whoever else is in the pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from native_cases import ISAS

from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.reference.backend import ReferenceBackend
from kbit.graph.backend import Backend
from kbit.graph.batch import Batch
from kbit.graph.ops import LowRank, Ops
from kbit.kernels import reference

EPS = 2.0**-24  # unit roundoff of float32
Factors = Sequence[tuple[torch.Tensor, torch.Tensor, float] | None]


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors_of(rows: int, columns: int, ranks: Sequence[int | None], dtype: torch.dtype = torch.float32) -> Factors:
    found: list[tuple[torch.Tensor, torch.Tensor, float] | None] = []
    for seed, rank in enumerate(ranks):
        if rank is None:
            found.append(None)
        else:
            down, up = randn(rank, columns, seed=seed).to(dtype), randn(rows, rank, seed=50 + seed).to(dtype)
            found.append((down, up, 0.5 + seed))
    return found


class Two:
    """Two products of what a pass brings, side by side in one sum; of the first, no more than its adapters."""

    rotation_depends_on_length = False

    def __init__(self, backend: Backend, weight: torch.Tensor, own: Factors, other: Factors) -> None:
        self._weights = [backend.prepare(weight), backend.prepare(torch.zeros_like(weight))]
        self._factors = [
            [None if f is None else LowRank(backend.prepare(f[0]), backend.prepare(f[1]), f[2]) for f in of_one]
            for of_one in (own, other)
        ]

    def body(self, ops: Ops[Any], ids: Any) -> Any:
        x = ops.given(self._weights[0].shape[1])
        made = ops.linear_group(self._weights, x, [None, None])
        first, second = ops.adapt(x, made, self._factors)
        return ops.add(first, second)

    def head(self, ops: Ops[Any], hidden: Any) -> Any:
        return hidden

    def rotation(self, positions: Any, lengths: Any) -> tuple[Any, Any]:
        empty = np.empty((*positions.shape, 0), dtype=np.float32)
        return empty, empty


def run(backend: Backend, definition: Any, x: np.ndarray, adapters: np.ndarray) -> torch.Tensor:
    """A row for each sequence."""
    runner = backend.bind(definition)
    cache = backend.new_cache(1, len(x), 1, 16, 1)
    cache.reserve([1] * len(x))
    batch = replace(Batch.of_features([row[None] for row in x]), adapters=adapters)
    return torch.as_tensor(runner.hidden(batch, cache))


def exactly(x: torch.Tensor, weight: torch.Tensor, parts: Sequence[Factors], adapters: np.ndarray) -> Any:
    """The result in float64, and the sum of magnitudes that its error is bounded by."""
    exact, size = x.double() @ weight.double().T, x.abs().double() @ weight.abs().double().T
    for of_one in parts:
        for index, each in enumerate(of_one):
            if each is not None:
                down, up, scale = each[0].double(), each[1].double(), each[2]
                rows = torch.from_numpy(adapters == index)
                exact[rows] += scale * (x[rows].double() @ down.T) @ up.T
                size[rows] += scale * (x[rows].abs().double() @ down.abs().T) @ up.abs().T
    return exact, size


@pytest.mark.parametrize("isa", [*ISAS, "reference"])
@pytest.mark.parametrize(
    ("rows", "columns", "ranks", "count", "dtype"),
    [
        (77, 48, [3, None, 1], 9, torch.float32),
        (16, 64, [16, 8], 1, torch.float32),
        (530, 130, [65, 17, 2], 40, torch.bfloat16),  # pieces of panels and of rows
        (1, 1, [1], 3, torch.float16),
    ],
)
def test_the_kernel_adds_what_the_reference_says(
    isa: str, rows: int, columns: int, ranks: list[int | None], count: int, dtype: torch.dtype
) -> None:
    backend: Backend = ReferenceBackend() if isa == "reference" else NativeBackend(2, compute="fp32", isa=isa)
    weight, x = randn(rows, columns, seed=97), randn(count, columns, seed=98)
    x[0] *= 1e4
    own = factors_of(rows, columns, ranks, dtype)
    other = [None, *own[1:]] if len(own) > 1 else own
    adapters = np.sort(np.random.default_rng(5).integers(-1, len(ranks), count))
    definition = Two(backend, weight, own, other)
    found = run(backend, definition, x.numpy(), adapters)
    exact, size = exactly(x, weight, (own, other), adapters)
    # Dot products of K and of R terms one in the other, a factor, and four sums (Higham, section 3.1).
    most = max(rank or 0 for rank in ranks)
    assert bool(((found.double() - exact).abs() <= 1.01 * (columns + most + 6) * EPS * size).all())
    if isa != "reference":  # in another order, and alone, each row has the same bits
        order = np.random.default_rng(6).permutation(count)
        assert torch.equal(run(backend, definition, x.numpy()[order], adapters[order]), found[torch.from_numpy(order)])
        for index in (0, count - 1):
            alone = run(backend, definition, x.numpy()[index : index + 1], adapters[index : index + 1])
            assert torch.equal(alone[0], found[index])


def test_the_reference_is_the_formula() -> None:
    y, x = randn(7, 5, seed=1), randn(7, 4, seed=2)
    own = factors_of(5, 4, [2, None, 3])
    adapters = np.array([2, 0, -1, 1, 2, 2, 0])
    exact, size = exactly(x, torch.zeros(5, 4), (own,), adapters)
    found = reference.add_low_rank(y, x, own, torch.from_numpy(adapters))
    assert bool(((found - (y.double() + exact)).abs() <= (4 + 3 + 4) * EPS * (size + y.abs())).all())
    assert torch.equal(found[2:4], y[2:4])


def test_what_does_not_fit_is_refused() -> None:
    backend = NativeBackend(1, compute="fp32")
    weight = randn(6, 4, seed=1)
    wide = factors_of(7, 4, [2])
    with pytest.raises(ValueError, match="what an adapter adds to has 6 features where 7 are needed"):
        backend.bind(Two(backend, weight, wide, wide))
    own = factors_of(6, 4, [2])
    with pytest.raises(ValueError, match="there is no such adapter"):
        run(backend, Two(backend, weight, own, own), np.ones((2, 4), dtype=np.float32), np.array([0, 1]))
    with pytest.raises(ValueError, match="factors of all adapters"):
        backend.bind(Two(backend, weight, own, factors_of(6, 4, [2, 2])))
