"""Tuning without a GPU: the search with a timer of our own, jobs in Triton's interpreter, the command, the real timer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import pytest
import torch
from decoder_cases import DictSource, quantized, tame_tensors, tiny_config

pytest.importorskip("triton")

from tune_cases import ARCH, DECODE, PREFILL, SQUARE, TARGET, other_than_default
from tune_cases import own_cache as own_cache

from kbit.backends.triton.backend import TritonBackend
from kbit.formats.registry import parse_format
from kbit.gpu_check import measuring
from kbit.host.errors import KbitError, UnsupportedError, UsageError
from kbit.kernels.triton.codecs.layout import TritonWeight, prepare_weight
from kbit.kernels.triton.product import configs
from kbit.kernels.triton.product.configs import Problem
from kbit.kernels.triton.product.gemm import gemm
from kbit.kernels.triton.product.gemv import gemv, problem_of
from kbit.models.decoder import DecoderDefinition
from kbit.models.load import load_decoder
from kbit.tuning import jobs as tuning_jobs
from kbit.tuning import timing as tuning
from kbit.tuning.jobs import Heads, Product, model_jobs, product_jobs, products_of
from kbit.tuning.run import tune_jobs, tune_model
from kbit.tuning.stored import choices, default_config, load, target_of
from kbit.tuning.timing import Job, Trial, tune_job

pytestmark = pytest.mark.usefixtures("one_thread")


def quant_weight(device: str, rows: int = 48, columns: int = 512, format: str = "nf4-b64") -> TritonWeight:
    x = torch.randn((rows, columns), generator=torch.Generator().manual_seed(1))
    return prepare_weight(parse_format(format).encode(lambda start, stop: x[start:stop], (rows, columns)), device)


class Clock:
    """A timer that says what `seconds` says of a configuration; its jobs' launches tell it which one they were given."""

    def __init__(self, seconds: Callable[[Any], float]) -> None:
        self.seconds = seconds
        self.timed: list[Any] = []
        self.last: Any = None

    def __call__(self, launch: Callable[[], object]) -> float:
        launch()
        self.timed.append(self.last)
        return self.seconds(self.last)

    def job(self, kernel: str, problem: Any, refuse: Callable[[Any], str] = lambda config: "") -> Job:
        """A job whose launches do nothing; `refuse` says "fail" or "wrong" of a configuration."""

        def launch(config: Any) -> torch.Tensor:
            self.last = config
            if refuse(config) == "fail":
                raise RuntimeError("PassManager::run failed")
            return torch.tensor(refuse(config) == "wrong")

        return Job(kernel, problem, f"{kernel} job", lambda: [Trial(launch, lambda out: bool(out))] * 2)


class TestSearch:
    def test_finds_the_fastest(self) -> None:
        best = other_than_default("gemv", SQUARE)
        clock = Clock(lambda config: 1e-5 if config == best else 3e-5)
        outcome = tune_job(clock.job("gemv", SQUARE), ARCH, clock)
        assert outcome.entry is not None
        assert (outcome.entry.config, outcome.failed, outcome.wrong) == (best, 0, 0)
        assert outcome.speedup == pytest.approx(3.0)
        assert {*clock.timed} == {*choices("gemv", ARCH, SQUARE)}
        # Both trials: every candidate once, then the finalists (with the default) twice more.
        assert len(clock.timed) == 2 * (outcome.tried + 2 * len({*clock.timed[2 * outcome.tried :]}))

    def test_noise_does_not_beat_the_default(self) -> None:
        best = other_than_default("gemv", SQUARE)
        clock = Clock(lambda config: 0.99e-5 if config == best else 1e-5)
        outcome = tune_job(clock.job("gemv", SQUARE), ARCH, clock)
        assert outcome.entry is not None
        assert outcome.entry.config == default_config("gemv", ARCH, SQUARE)
        assert outcome.speedup == 1.0

    def test_wrong_and_failing_candidates_are_not_taken(self) -> None:
        candidates = choices("decode", ARCH, DECODE)
        verdicts = {candidates[0]: "fail", candidates[1]: "wrong", candidates[2]: "wrong"}
        clock = Clock(lambda config: 1e-5 if config in verdicts else 2e-5)
        outcome = tune_job(clock.job("decode", DECODE, lambda config: verdicts.get(config, "")), ARCH, clock)
        assert (outcome.failed, outcome.wrong) == (1, 2)
        assert outcome.entry is not None
        assert outcome.entry.config in candidates[3:]
        assert (outcome.entry.default_seconds, outcome.speedup) == (None, None)
        nothing = tune_job(clock.job("decode", DECODE, lambda config: "fail"), ARCH, clock)
        assert (nothing.entry, nothing.failed) == (None, len(candidates))

    def test_a_lost_gpu_ends_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def lost() -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", lost)
        clock = Clock(lambda config: 1e-5)
        with pytest.raises(KbitError, match=r"stopped working in gemv job.*GemvConfig"):
            tune_job(clock.job("gemv", SQUARE, lambda config: "fail"), ARCH, clock)

    def test_saved_as_it_goes_and_taken_up_again(self) -> None:
        clock = Clock(lambda config: 1e-5 if config.warps == 8 else 2e-5)
        jobs = [clock.job("gemv", SQUARE), clock.job("prefill", PREFILL)]
        steps: list[tuple[int, int, str]] = []

        def on_step(*step: Any) -> None:
            steps.append(step)
            if step[2] == "prefill job":
                raise KeyboardInterrupt

        report = tune_jobs(jobs, TARGET, clock, on_step=on_step)
        assert (report.interrupted, len(report.outcomes), report.known) == (True, 1, 0)
        assert list(load(TARGET)) == [("gemv", SQUARE)]
        assert configs.gemv_config(ARCH, SQUARE).warps == 8  # in force at once
        total = len(choices("gemv", ARCH, SQUARE)) + len(choices("prefill", ARCH, PREFILL))
        assert steps[0] == (1, total, "gemv job")
        report = tune_jobs(jobs, TARGET, clock)
        assert (report.interrupted, report.known) == (False, 1)
        assert [outcome.job.kernel for outcome in report.outcomes] == ["prefill"]
        assert {kernel for kernel, _ in load(TARGET)} == {"gemv", "prefill"}
        assert tune_jobs(jobs, TARGET, clock).outcomes == []
        repeated = tune_jobs(jobs, TARGET, clock, again=True)
        assert len(repeated.outcomes) == 2
        assert json.loads(json.dumps(repeated.to_dict()))["problems"][0]["config"]["warps"] == 8
        assert repeated.gain is not None


class TestJobs:
    """The real launches, in the interpreter: results are right, and a wrong one is noticed."""

    @pytest.mark.parametrize("format", ["nf4-b64", "int3-b32-asym", "nested2..3-b64"])
    @pytest.mark.parametrize("gated", [False, True])
    def test_products(self, device: str, format: str, gated: bool) -> None:
        weight = quant_weight(device, format=format)
        product = Product(weight, weight if gated else None, "silu" if gated else "")
        for tokens in (1, 16):
            jobs = product_jobs(product, tokens)
            assert [job.kernel for job in jobs] == (["gemv"] if tokens == 1 else ["gemm"] * (1 + gated))
            assert jobs[-1].problem.gated == gated  # type: ignore[union-attr]
            for job in jobs:
                (trial,) = job.prepare()
                config = choices(job.kernel, "interpreter", job.problem)[-1]
                out = trial.launch(config)
                assert not trial.is_wrong(out)
                assert trial.is_wrong(torch.zeros_like(out))
                out[-1, out.shape[1] // 2 :] *= 1.1
                assert trial.is_wrong(out)
                out[0, 0] = float("nan")
                assert trial.is_wrong(out)

    def test_launchers_ask_for_the_same_problem(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is tuned is found again by gemv and gemm, plain and gated."""
        weight = quant_weight(device)
        asked = []
        for module, name in (("gemv", "gemv_config"), ("gemm", "gemm_config")):
            choose = getattr(configs, name)

            def spy(arch: str, problem: Problem, choose: Any = choose) -> Any:
                asked.append(problem)
                return choose(arch, problem)

            monkeypatch.setattr(f"kbit.kernels.triton.product.{module}.{name}", spy)
        x = torch.randn((1, 512), device=device).half()
        gemv(x, weight)
        gemv(x, weight, up=weight, kind="silu")
        x = x.expand(16, -1).contiguous()
        gemm(x, weight)
        gemm(x, weight, gate=torch.zeros((16, 48), device=device), kind="silu")
        plain, gated = Product(weight), Product(weight, weight, "silu")
        wanted = [product_jobs(product, tokens)[-1].problem for tokens in (1, 16) for product in (plain, gated)]
        assert asked == wanted
        assert problem_of(x, weight).format == "nf4-b64"

    @pytest.mark.parametrize("kv", ["fp16", "4"])
    def test_attention(self, device: str, kv: str) -> None:
        heads = Heads(4, 2, 32, 32**-0.5, None, kv, torch.float16, torch.device(device))
        for job in (heads.decode_job(1, [5, 200]), heads.decode_job(4, [70]), heads.prefill_job([(40, 40), (20, 90)])):
            for trial in job.prepare():
                out = trial.launch(choices(job.kernel, "interpreter", job.problem)[0])
                assert not trial.is_wrong(out)
                assert trial.is_wrong(torch.zeros_like(out))
                out[-1, 0] = float("nan")
                assert trial.is_wrong(out)

    def test_a_model(self, device: str) -> None:
        """q, k and v as one, gate and up together, the rest one by one, alike layers once; float matrices are left out."""
        config = {**tiny_config("llama"), "head_dim": 16}
        tensors = quantized(tame_tensors(config), "nf4-b16")
        decoder = load_decoder(DictSource(config, tensors), TritonBackend(device))
        spec = decoder.spec
        products = products_of(DecoderDefinition(spec, decoder.weights))
        assert len([product for product in products if product.up is not None]) == 1
        width = spec.head_dim * (spec.heads + 2 * spec.kv_heads)
        assert (width, spec.hidden_size) in {product.weight.shape for product in products}
        jobs = model_jobs(decoder.weights, spec, "fp16", torch.device(device), quick=True)
        assert len({job.key for job in jobs}) == len(jobs)
        assert {job.kernel for job in jobs} == {"gemv", "gemm", "decode", "prefill"}
        more = model_jobs(decoder.weights, spec, "fp16", torch.device(device), quick=False)
        assert {job.key for job in jobs if job.kernel != "gemm"} <= {job.key for job in more}
        plain = load_decoder(DictSource(config, tame_tensors(config)), TritonBackend(device))
        assert products_of(DecoderDefinition(spec, plain.weights)) == []

    def test_from_model_to_file(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The whole way, on few of the candidates: real launches, results checked, saved, preferred."""
        few = lambda kernel, arch, problem: choices(kernel, arch, problem)[:2]  # noqa: E731
        monkeypatch.setattr(tuning, "choices", few)
        monkeypatch.setattr(tuning_jobs, "QUICK_TOKENS", (1, 16))
        config = {**tiny_config("llama"), "head_dim": 16, "num_hidden_layers": 1}
        decoder = load_decoder(DictSource(config, quantized(tame_tensors(config), "nf4-b16")), TritonBackend(device))
        jobs = model_jobs(decoder.weights, decoder.spec, "4", torch.device(device), quick=True)
        target = target_of(torch.device(device))
        ticks = iter(range(10**6, 0, -1))
        report = tune_jobs(jobs, target, lambda launch: next(ticks) * 1e-9)
        assert len(report.outcomes) == len(jobs)
        assert not [outcome.job.label for outcome in report.outcomes if outcome.entry is None or outcome.wrong]
        assert {*load(target)} == {job.key for job in jobs}


class TestCommand:
    def test_without_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(UnsupportedError, match="torch sees none"):
            tune_model("there/is/no/such/model")
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UnsupportedError, match="pip install triton"):
            tune_model("there/is/no/such/model")

    def test_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(UsageError, match="--device cpu: tuning is for GPUs"):
            tune_model("any", "cpu")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        for device in ("cuda:1", "cuda:x"):
            with pytest.raises(UsageError, match=f"--device {device}: torch sees 1 GPUs"):
                tune_model("any", device)

    @pytest.mark.parametrize("flags", [[], ["--json", "--bits", "3"]])
    def test_output(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str]
    ) -> None:
        from kbit.cli.main import main

        clock = Clock(lambda config: 1e-5 if config.warps == 8 else 2e-5)
        candidates = choices("prefill", ARCH, PREFILL)
        wrong = lambda config: "wrong" if config == candidates[-1] else ""  # noqa: E731
        jobs = [clock.job("gemv", SQUARE), clock.job("prefill", PREFILL, wrong)]
        asked: dict[str, Any] = {}

        def tuned(model: str, device: str, **options: Any) -> Any:
            asked.update(options)
            return tune_jobs(jobs, TARGET, clock)

        monkeypatch.setattr("kbit.tuning.run.tune_model", tuned)
        monkeypatch.setattr(sys, "argv", ["kbit", "tune", "model", *flags])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        assert asked["bits"] == (3 if flags else None)
        out = capsys.readouterr().out
        if flags:
            report = json.loads(out)
            assert (report["gpu"], report["interrupted"], len(report["problems"])) == (TARGET.gpu, False, 2)
            assert report["problems"][0]["problem"] == asdict(SQUARE)
        else:
            assert "NVIDIA H100 80GB HBM3, Triton 3.7.1" in out
            assert "times as fast as by default" in out
            assert "1 configurations computed something else" in out
            assert str(TARGET.path) in out


class Gpu:
    """What GpuTimer and gpu.Rotation use of torch.cuda, writing down what happens instead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, captures: bool = True) -> None:
        self.log: list[str] = []
        gpu = self

        class Graph:
            def replay(self) -> None:
                gpu.log.append("replay")

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                gpu.log.append("record")

            def elapsed_time(self, end: Event) -> float:
                return 0.5  # milliseconds

        @contextmanager
        def capture(graph: Graph) -> Iterator[None]:
            gpu.log.append("capture")
            yield
            if not captures:
                raise RuntimeError("operation not permitted when stream is capturing")

        class Properties:
            L2_cache_size = 300 << 20

        for name, value in {
            "CUDAGraph": Graph,
            "Event": Event,
            "graph": capture,
            "device": lambda device: nullcontext(),
            "synchronize": lambda: gpu.log.append("wait"),
            "get_device_properties": lambda device: Properties,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def launch(self) -> None:
        self.log.append("launch")


def test_the_timer_empties_the_cache_and_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    timer = tuning.GpuTimer(torch.device("meta"), budget=0.004)
    flushed = timer._flush

    class Flush:
        nbytes = flushed.nbytes

        def zero_(self) -> None:
            gpu.log.append("flush")

    monkeypatch.setattr(timer, "_flush", Flush())
    assert flushed.nbytes == 600 << 20  # twice the cache
    assert timer(gpu.launch) == pytest.approx(0.5e-3)
    # 4 ms for launches of 0.5 ms and flushes of 0.25 ms: five.
    turn = ["flush", "record", "replay", "record"]
    assert gpu.log == ["launch", "wait", "capture", "launch", *turn * 3, "wait", *turn * 5, "wait"]


@pytest.mark.parametrize("captures", [True, False])
def test_rotation(monkeypatch: pytest.MonkeyPatch, captures: bool) -> None:
    """The benchmarks' clock: time per launch, of a graph of all or, where nothing can be captured, of all directly."""
    gpu = Gpu(monkeypatch, captures=captures)
    rotation = measuring.Rotation([gpu.launch] * 4)
    assert rotation.graph == captures
    del gpu.log[:]
    assert rotation.seconds() == pytest.approx(0.5e-3 / 4)
    once = ["replay"] if captures else ["launch"] * 4
    assert gpu.log == ["record", *once, "record"] * measuring.REPLAYS + ["wait"]
    assert (measuring.copies_for(10), measuring.copies_for(1 << 40), measuring.copies_for(100 << 20)) == (64, 2, 6)
