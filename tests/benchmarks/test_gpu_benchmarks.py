"""The GPU's benchmarks with stand-ins for its clock and graphs, in Triton's interpreter: what they would run is right,
and their reports hold what they should. No time in them means anything."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.quant_format import QuantFormat
from kbit.kernels.triton.codecs.layout import prepare_weight

pytestmark = pytest.mark.usefixtures("one_thread")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = ("gpu", "gpu_peers", "measuring", "test_gpu_layers", "test_gpu_engine")


class Benchmark:
    """pytest-benchmark's fixture, without the clock."""

    disabled = False

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, function: Callable[[], None], rounds: int, warmup_rounds: int) -> None:
        for _ in range(1 + warmup_rounds):
            function()


class Rotation:
    """gpu.Rotation, without a GPU: every launch once."""

    graph = False

    def __init__(self, launches: list[Callable[[], object]]) -> None:
        self.launches = launches
        self.seconds()

    def seconds(self) -> float:
        self.launches[-1]()
        return 1e-4


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of the benchmarks, with the stand-ins in it."""
    import importlib

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    stand_ins = {
        "Rotation": Rotation,
        "bandwidth": lambda: 1e12,
        "peak": lambda: 1e14,
        "copies_for": lambda nbytes: 2,
        "facts": lambda: {"gpu": "none"},
    }

    def get(name: str) -> ModuleType:
        return stand_in(importlib.import_module(name))

    def stand_in(module: ModuleType) -> ModuleType:
        for attribute, value in stand_ins.items():
            if hasattr(module, attribute):
                monkeypatch.setattr(module, attribute, value)
        return module

    stand_in(importlib.import_module("kbit.gpu_check.measuring"))
    get("gpu")
    yield get
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(before)


def test_products(load: Callable[[str], ModuleType], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, peers = load("test_gpu_layers"), load("gpu_peers")
    monkeypatch.setattr(layers, "WIDTHS", (3, 4))
    monkeypatch.setattr(
        layers, "PEERS", [*peers.PEERS[:1], peers.Peer("x", "x int4", "no_such_package", "pip x", None)]
    )
    benchmark = Benchmark()
    layers.test_product(benchmark, torch.device(device), (48, 256), 1)
    report = benchmark.extra_info
    assert [row["name"] for row in report["rows"]] == ["kbit nf3-b64", "kbit nf4-b64", "torch fp16"]
    assert report["missing"] == ["x int4: not installed; to install it: pip x"]
    for row in report["rows"]:
        assert row["median"] == pytest.approx(100)
        assert row["share_of_roofline"] == pytest.approx(max(row["bytes"] / 1e12, row["operations"] / 1e14) / 1e-4)
    four, fp16 = report["rows"][1:]
    assert (four["kernel"], fp16["bits_per_weight"]) == ("gemv", 16)
    assert fp16["error"] < 1e-3 < four["error"] < 0.15
    assert four["bits_per_weight"] == pytest.approx(4.25, abs=0.05)


def test_rounded_products(load: Callable[[str], ModuleType], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = load("test_gpu_layers")
    monkeypatch.setattr(layers, "WIDTHS", (4, 8))
    monkeypatch.setattr(layers, "PEERS", [])
    benchmark = Benchmark()
    layers.test_product(benchmark, torch.device(device), (48, 256), 70)
    rows = {row["name"]: row for row in benchmark.extra_info["rows"]}
    names = [f"kbit int{bits}-b128 with {kind} activations" for kind, bits in (("int8", 4), ("int8", 8), ("fp8", 4))]
    assert [*rows][2:] == names
    assert [rows[name]["kernel"] for name in names] == ["gemm_int8", "gemm_int8", "gemm_fp8"]
    assert rows[names[1]]["error"] < rows[names[0]]["error"] < rows[names[2]]["error"] < 0.2
    (reason,) = benchmark.extra_info["missing"]
    assert "fp8 does not run int8-b128" in reason


def test_attention(load: Callable[[str], ModuleType], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = load("test_gpu_layers")
    monkeypatch.setattr("kbit.tuning.timing.GpuTimer", lambda device: lambda launch: launch() is None or 1e-3)
    monkeypatch.setattr(layers, "HEADS", (4, 2, 32))
    monkeypatch.setattr(layers, "KV_KINDS", ("fp16", "4"))
    for run, held in ((layers.test_attention_decode, 100), (layers.test_attention_prefill, 40)):
        benchmark = Benchmark()
        run(benchmark, torch.device(device), held)
        names = [row["name"] for row in benchmark.extra_info["rows"]]
        assert names == ["kbit fp16 KV", "kbit 4 KV", "torch sdpa fp16"]


def test_engine(
    load: Callable[[str], ModuleType], device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write_model: Any
) -> None:
    from kbit.backends.triton.backend import TritonBackend
    from kbit.engine import loader

    engine = load("test_gpu_engine")
    folder = write_model(tmp_path / "model", hidden_size=64, num_hidden_layers=1, max_position_embeddings=128)
    original = loader.load_model

    def load_model(model: str, device_: str = "", **options: Any) -> Any:
        if options.get("device") != "cuda":
            return original(model, **options)
        backend = TritonBackend(device, kv={16: "16", 4: "4"}[options["kv_bits"]], compute=options["compute"])
        return original(model, backend=backend)

    monkeypatch.setattr(loader, "load_model", load_model)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.delenv("KBIT_BENCH_MODEL", raising=False)
    for name, value in {"BITS": (4,), "DECODE": 3, "WARM_UP": 1, "PROMPT": 12}.items():
        monkeypatch.setattr(engine, name, value)
    for run, arguments, count in ((engine.test_decode, (5,), 2), (engine.test_prefill, (), 1)):
        benchmark = Benchmark()
        run(benchmark, torch.device(device), lambda bits: folder, *arguments)
        rows = benchmark.extra_info["rows"]
        assert len(rows) == count
        assert 0 <= rows[0]["kl"] < 1e-3
        missing = benchmark.extra_info["missing"]
        refused = [
            line for line in missing if "this model's layers have none" in line
        ]  # int8 and fp8: it is not quantized
        assert (len(missing), len(refused)) == ((3, 0) if count == 2 else (5, 2))


def test_a_wrong_product_is_noticed(load: Callable[[str], ModuleType]) -> None:
    gpu = load("gpu")
    x = torch.randn((3, 64), generator=torch.Generator().manual_seed(0)).half()
    weight = torch.randn((8, 64), generator=torch.Generator().manual_seed(1))
    out = (x.double() @ weight.double().T).half()
    assert 0 < gpu.assert_product(out, x, weight) < 2**-10
    for wrong in (float("nan"), float(out[1, 2]) * 1.1 + 1):
        spoilt = out.clone()
        spoilt[1, 2] = wrong
        with pytest.raises(AssertionError, match="1 of 24 results are wrong"):
            gpu.assert_product(spoilt, x, weight)


def test_copies_are_different_memory(load: Callable[[str], ModuleType], device: str) -> None:
    layers = load("test_gpu_layers")
    x = torch.randn((16, 256), generator=torch.Generator().manual_seed(0))
    weight = prepare_weight(quantize_blockwise(x, QuantFormat.parse("nf4-b64-dq")).to(device), device)
    first, second = layers.rotated(weight)
    assert first is weight
    for name in ("scales", "scales_super", "table"):
        ours, theirs = getattr(first, name), getattr(second, name)
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()
    assert first.planes[0].data_ptr() != second.planes[0].data_ptr()


def test_how_peers_weights_are_quantized(load: Callable[[str], ModuleType]) -> None:
    peers = load("gpu_peers")
    weight = torch.randn((8, 512), generator=torch.Generator().manual_seed(0))
    codes, scales, zeros = peers._quantize(weight)
    assert (codes.dtype, codes.shape, int(codes.max()), scales.shape) == (torch.uint8, (8, 512), 15, (8, 4))
    decoded = (codes.float().unflatten(-1, (-1, peers.GROUP)) - zeros[..., None]) * scales[..., None]
    assert float((decoded.flatten(-2) - weight).norm() / weight.norm()) < 0.15
    assert len({peer.name for peer in peers.PEERS}) == len(peers.PEERS)
