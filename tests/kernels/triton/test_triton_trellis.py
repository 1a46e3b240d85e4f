"""Products with trellis codes against the reference: every width and code, odd shapes, what follows a product."""

from __future__ import annotations

import pytest
import torch
from format_cases import normal
from trellis_cases import trellis_tensor
from triton_cases import HALF

triton = pytest.importorskip("triton")

from kbit.formats.rotation import rotate  # noqa: E402
from kbit.gpu_check.products import check_trellis  # noqa: E402
from kbit.host.errors import UnsupportedError  # noqa: E402
from kbit.kernels import reference  # noqa: E402
from kbit.kernels.triton import library  # noqa: E402
from kbit.kernels.triton.codecs.layout import prepare_weight  # noqa: E402
from kbit.kernels.triton.codecs.trellis import rotate_tokens  # noqa: E402
from kbit.kernels.triton.product.matmul import gated_matmul, matmul  # noqa: E402
from kbit.kernels.triton.product.rounded import with_activations  # noqa: E402


@pytest.mark.parametrize(
    "text",
    [
        *(f"trellis{bits}" for bits in range(2, 9)),
        "trellis2-sum4",
        "trellis3-l12-h64",
        "trellis2.5",
        "trellis5.5",
        "trellis4-o64",
    ],
)
def test_every_width_and_code(device: str, text: str) -> None:
    check_trellis(device, text, (1, 24, 320), torch.float16)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_every_activation_type(device: str, dtype: torch.dtype) -> None:
    check_trellis(device, "trellis3", (3, 24, 128), dtype)


@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 17, 100), (70, 33, 257), (2, 16, 1024)])
@pytest.mark.parametrize("text", ["trellis2", "trellis3.5", "trellis5-o8"])
def test_odd_shapes(device: str, text: str, shape: tuple[int, int, int]) -> None:
    check_trellis(device, text, shape, torch.float16)


def test_rotated_tokens(device: str) -> None:
    for columns, mixed in ((16, 16), (96, 32), (1024, 512)):
        weight = prepare_weight(trellis_tensor(f"trellis3-h{mixed}", 16, columns), device, torch.float32)
        x = normal(3, columns, seed=2)
        assert weight.rotation is not None
        got = rotate_tokens(x.to(device), weight.rotation, weight.mixed).cpu()
        signs = trellis_tensor(f"trellis3-h{mixed}", 16, columns).stored["signs"]
        assert torch.allclose(got, rotate(x, signs, mixed), atol=1e-5)


def test_what_follows_a_product(device: str) -> None:
    weight, other = trellis_tensor("trellis2.5-o8", 20, 64), trellis_tensor("trellis4-o16", 20, 64)
    first, second = (prepare_weight(w, device, torch.float32) for w in (weight, other))
    x, bias, residual = normal(3, 64, seed=1), normal(1, 20, seed=2)[0], normal(3, 20, seed=3)
    got = matmul(x.to(device), first, bias.to(device), residual.to(device)).cpu()
    assert torch.allclose(got, reference.linear(x, weight) + bias + residual, atol=1e-4)
    for kind in ("silu", "gelu", "gelu_tanh", "relu"):
        got = gated_matmul(x.to(device), first, second, kind).cpu()
        expected = reference.activate(reference.linear(x, weight), reference.linear(x, other), kind)
        assert torch.allclose(got, expected, atol=1e-3, rtol=1e-4)
    tensors, description = library.pack(first)
    assert torch.equal(torch.ops.kbit.matmul(x.to(device), tensors, description), matmul(x.to(device), first))


def test_what_has_no_kernel_is_refused(device: str) -> None:
    weight = prepare_weight(trellis_tensor("trellis3", 16, 64), device, torch.float16)
    with pytest.raises(UnsupportedError, match="rotated tokens"):
        with_activations(weight, "int8")
