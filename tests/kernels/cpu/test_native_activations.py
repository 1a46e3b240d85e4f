"""Activations of the CPU kernels against float64, near zero and far from it, with the same bits on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from native_cases import ISAS

from kbit import _native
from kbit.backends.cpu.backend import NativeBackend
from kbit.kernels.activations import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = 2.0**-24
ROWS, WIDTH = 48, 19


def activated(x: torch.Tensor, kind: str, isa: str) -> torch.Tensor:
    """act(x) of (ROWS, WIDTH), as a program computes it."""
    backend = NativeBackend(1, compute="fp32", isa=isa)
    program = _native.Program(backend.context, "fp32")
    ids, gate, out = program.buffer(1), program.buffer(WIDTH), program.buffer(WIDTH)
    del ids
    program.embed(backend.prepare(x, lookup=True).matrix, gate)  # type: ignore[attr-defined]
    program.activate(gate, None, kind, out)
    program.finish(out)
    found = np.empty((ROWS, WIDTH), dtype=np.float32)
    cache = backend.new_cache(1, 1, 1, 16, ROWS)
    cache.reserve((ROWS,))
    positions, angles = np.arange(ROWS, dtype=np.int32), np.zeros((ROWS, 0), dtype=np.float32)
    program.run(
        np.arange(ROWS), np.zeros(ROWS, dtype=np.int32), positions, angles, angles, positions,
        cache.pool.store, cache.tables, None, found,
    )  # fmt: skip
    return torch.from_numpy(found)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(kind: str) -> None:
    sizes = torch.logspace(-12, 1.9, ROWS * WIDTH // 2, dtype=torch.float64).float()
    x = torch.stack([sizes, -sizes], dim=1).reshape(ROWS, WIDTH)
    wide = x.double()
    exact = {
        "silu": wide * torch.sigmoid(wide),
        "gelu": torch.nn.functional.gelu(wide),
        "gelu_tanh": torch.nn.functional.gelu(wide, approximate="tanh"),
        "relu": wide.clamp(min=0),
        "elu": wide.clamp(min=0) + torch.expm1(wide.clamp(max=0)),
    }[kind]
    found = activated(x, kind, ISAS[0])
    # A few roundings of numbers below x (gelu's 1 + erf cancels, so not of the result); e^x is good to 2 ulp.
    assert bool(((found.double() - exact).abs() <= 8 * EPS * wide.abs()).all())
    for isa in ISAS[1:]:
        assert torch.equal(activated(x, kind, isa), found)
