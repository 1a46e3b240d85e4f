"""The repaired interpreter against torch: bfloat16 as hardware computes it."""

from __future__ import annotations

import pytest
import torch
from triton_cases import ON_GPU

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(ON_GPU, reason="about the interpreter")


@triton.jit
def _pairs(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    if OP == "add":
        out = x + y
    elif OP == "mul":
        out = x * y
    elif OP == "div":
        out = x / y
    elif OP == "max":
        out = tl.maximum(x, y)
    elif OP == "less":
        out = tl.where(x < y, x, y)
    elif OP == "negate":
        out = -x
    else:
        out = tl.abs(x) - y
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty))


@triton.jit
def _cast(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


@triton.jit
def _product(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at)))


@triton.jit
def _total(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), 0).to(tl.float32))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


EXPECTED = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "max": torch.maximum,
    "less": torch.minimum,
    "negate": lambda x, y: -x,
    "sub": lambda x, y: x.abs() - y,
}


@pytest.mark.parametrize("op", EXPECTED)
def test_arithmetic(op: str, device: str) -> None:
    """Equal to torch to the last bit, but for division, which Triton does in float32 and torch does too."""
    x, y = (normal(256, seed=seed).bfloat16() for seed in (1, 2))
    for out in (torch.bfloat16, torch.float32):
        result = torch.empty(256, dtype=out)
        _pairs[(1,)](x, y, result, op, 256)
        expected = EXPECTED[op](x, y)
        if op == "div":
            torch.testing.assert_close(result.float(), (x.float() / y.float()), rtol=2**-8, atol=0)
        else:
            assert torch.equal(result, expected.to(out))


SPECIAL = torch.tensor(
    [
        0.0,
        -0.0,
        1.0,
        1 + 2**-8,
        1 + 3 * 2**-8,
        -1 - 2**-8,
        3.3e38,
        3.4e38,
        float("inf"),
        -float("inf"),
        float("nan"),
        1e-40,
    ]
)


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int8], ids=str)
@pytest.mark.parametrize("to", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_casts_round_to_nearest_even(source: torch.dtype, to: torch.dtype, device: str) -> None:
    x = torch.cat([SPECIAL, 100 * normal(1024 - len(SPECIAL))])
    x = x.to(source) if source.is_floating_point else x.nan_to_num().clamp(-100, 100).to(source)
    out = torch.empty(1024, dtype=to)
    _cast[(1,)](x, out, 1024)
    assert torch.equal(out.float().nan_to_num(123.0), x.to(to).float().nan_to_num(123.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dot(dtype: torch.dtype, device: str) -> None:
    x, y = normal(32, 32, seed=3).to(dtype), normal(32, 32, seed=4).to(dtype)
    out = torch.empty(32, 32)
    _product[(1,)](x, y, out, 32)
    torch.testing.assert_close(out, x.float() @ y.float(), rtol=1e-5, atol=1e-5)


def test_bfloat16_reductions_are_refused(device: str) -> None:
    with pytest.raises(Exception, match="reduce in float32"):
        _total[(1,)](normal(64).bfloat16(), torch.empty(1), 64)


@triton.jit
def _broadcast(x_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = rows[:, None] * COLUMNS + columns[None, :]
    x = tl.load(x_ptr + at)
    x = tl.where(x < 0, x - 1, x) + rows[:, None] * 2.0 - 1
    unsigned = (at.to(tl.uint32) >> 1) + 1
    signed = (at - 7) >> 1
    tl.store(out_ptr + at, x + (unsigned & 1) + signed + tl.sum(x, 1)[:, None])


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 8), (8, 1), (4, 16), (16, 4)])
def test_constants_and_shapes_are_kept_apart(rows: int, columns: int, device: str) -> None:
    """The same constants in several types and shapes, signed and unsigned, twice each."""
    x = normal(rows, columns, seed=5)
    out = torch.empty(rows, columns)
    for _ in range(2):
        _broadcast[(1,)](x, out.fill_(float("nan")), rows, columns)
    at = torch.arange(rows * columns).view(rows, columns)
    x = torch.where(x < 0, x - 1, x) + torch.arange(rows)[:, None] * 2.0 - 1
    expected = x + ((at >> 1) + 1 & 1) + ((at - 7) >> 1) + x.sum(1)[:, None]
    torch.testing.assert_close(out, expected)


@triton.jit
def _wrong_shape(x_ptr, A: tl.constexpr, B: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, A), tl.load(x_ptr + tl.arange(0, A)) + tl.arange(0, B))


@pytest.mark.parametrize(("a", "b", "message"), [(8, 4, "incompatible dimensions"), (8, 6, "power of 2")])
def test_shapes_are_still_checked(a: int, b: int, message: str, device: str) -> None:
    for _ in range(2):  # what is refused is not remembered
        with pytest.raises(Exception, match=message):
            _wrong_shape[(1,)](torch.zeros(8), a, b)


def test_names_of_types(device: str) -> None:
    block = tl.block_type(tl.float32, [4, 8])
    assert str(block) == "<['4', '8'], fp32>"
    assert (block.numel, *block.shape) == (32, 4, 8)
    assert block == tl.block_type(tl.float32, (tl.constexpr(4), 8)) != tl.block_type(tl.float16, (4, 8))
    assert tl.block_type(tl.float32, [8, 4]) != block
    assert tl.float32 == tl.dtype("fp32") != tl.float16
    with pytest.raises(TypeError, match="0d"):
        tl.block_type(tl.float32, [])
