"""The checks of a GPU find what is wrong: kernels, whole models, and where nothing may be said about time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kbit.formats.nested import NestedFormat
from kbit.formats.nested_codec import codes_at
from kbit.formats.planes_codec import PlanesTensor
from kbit.gpu_check import kernels, models, times
from kbit.gpu_check.bounds import TooFarError, assert_equal, assert_within
from kbit.gpu_check.place import DRY, FULL, SHORT, Place
from kbit.gpu_check.products import check_product, quantized
from kbit.gpu_check.synthetic import EIGHT_BILLION, TINY, RandomModel, random_codes
from kbit.kernels.triton.product.gemv import gemv
from kbit.models.families import spec_from_config
from kbit.models.params import parameters

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_kernel_width_and_codec_has_a_check(device: str) -> None:
    names = kernels.items(Place(device, FULL))
    for kernel in ("gemv", "gemm"):
        for family in ("int", "nf", "lloyd", "float", "dynamic", "quantile"):
            for bits in range(2, 9):
                assert any(name.startswith(f"{kernel} {family}{bits}-") for name in names)
        for bits in range(2, 9):
            assert any(name.startswith(f"{kernel} nested2..{bits}-") for name in names)
    assert {"embed nested2..8-b32", "dequantize nested2..8-b64", "gated silu nested2..5-b64 2"} <= set(names)
    assert {f"trellis trellis{bits} 1" for bits in range(2, 9)} <= set(names)
    first = {name.split()[0] for name in names}
    assert {"gemm_int8", "gemm_fp8", "grouped", "attention_decode", "attention_prefill", "kv_append"} <= first
    for scale in (SHORT, DRY):
        fewer = kernels.items(Place(device, scale))
        assert {name.split()[0] for name in fewer} == first
        assert len(fewer) < len(names) / 2


def test_a_wrong_kernel_is_found(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product whose last column of weights is left out, and one that is not a number."""

    def short(x: torch.Tensor, weight: Any) -> torch.Tensor:
        x = x.clone()
        x[:, -1] = 0.0
        return gemv(x, weight)

    weight = quantized("int4-b64", 24, 320)
    assert check_product(device, weight, 1, run=gemv) < 1
    with pytest.raises(TooFarError, match="too far off") as raised:
        check_product(device, weight, 1, run=short)
    assert raised.value.worst > 1
    case = {"gemv": lambda device: check_product(device, weight, 1, run=lambda x, w: gemv(x, w) * float("nan"))}
    monkeypatch.setattr(kernels, "_cases", lambda seed: case)
    (row,) = kernels.run(Place(device, DRY), "gemv")
    assert row["error"] == "24 results are NaN"
    assert row["worst"] == float("inf")


def test_a_wrong_model_is_found(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that rounds keys and values to 2 bits where 16 were asked for."""
    from kbit.backends.triton import backend

    made = backend.TritonBackend
    monkeypatch.setattr(backend, "TritonBackend", lambda device, kv, graphs: made(device, kv="2", graphs=graphs))
    (row,) = models.run(Place(device, DRY), f"{models.SYNTHETIC} | KV 16 | no graph")
    assert row["worst"] > 1
    assert "logits are" in row["error"]


def test_no_time_is_made_up(device: str) -> None:
    place = Place("cpu", DRY)
    assert times.run(place, "limits") == [{"case": "limits", "us": None, "why": "not timed"}]
    (row,) = times.run(place, "no such thing")
    assert row["us"] is None
    assert "error" in row


def test_bounds() -> None:
    x = torch.tensor([1.0, 2.0])
    assert assert_within(x + 0.5, x, 1.0) == 0.5
    with pytest.raises(TooFarError, match=r"\(2,\) is not \(1,\)"):
        assert_within(x, x[:1], 1.0)
    assert assert_equal(x, x.clone()) == 0
    with pytest.raises(TooFarError, match="1 of 2 differ"):
        assert_equal(x, torch.tensor([1.0, 2.5]))
    with pytest.raises(TooFarError, match="float64"):
        assert_equal(x, x.double())


@pytest.mark.parametrize("text", ["int2-b64", "nf3-b64", "lloyd6-b64", "int8-b64", "nested2..5-b64"])
def test_random_codes_are_a_weight(text: str) -> None:
    """Finite, every code there, and products of about unit size."""
    weight = random_codes(text, 64, 512, seed=1)
    values = weight.dequantize()
    assert bool(torch.isfinite(values).all())
    format = weight.format
    if isinstance(format, NestedFormat):
        codes = codes_at(format, weight.stored, 512, format.bits)
    else:
        codes = PlanesTensor.of(weight).codes()
    assert len(codes.unique()) == 2**format.bits
    norm = float((torch.randn(512, generator=torch.Generator().manual_seed(0)) @ values.T).square().mean().sqrt())
    assert 0.2 < norm < 3


def test_random_models() -> None:
    """The large one has 8 billion weights; of the small one every tensor is there, and the same twice."""
    spec = spec_from_config(EIGHT_BILLION)
    assert sum(torch.Size(p.shape).numel() for p in parameters(spec)) == pytest.approx(8.03e9, rel=0.01)
    source = RandomModel(TINY, "nf4-b64", "cpu", seed=3)
    for name, info in source.tensors.items():
        assert source.read(name).shape == info.shape
        assert torch.equal(source.read(name), source.read(name))
    assert not torch.equal(*(source.read(f"model.layers.{i}.self_attn.q_proj.weight") for i in (0, 1)))
