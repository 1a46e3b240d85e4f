"""The planner's speed model: what is timed, kept and added up. No test looks at how long anything takes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbit.formats.quant_format import QuantFormat
from kbit.formats.registry import parse_format
from kbit.formats.trellis import TrellisFormat
from kbit.host.errors import KbitError
from kbit.models.families import spec_from_config
from kbit.planner import machine as machine_module
from kbit.planner import process_probe
from kbit.planner.kernel_timing import AttentionRate, KernelRate, Overheads, Timer, kernel_key
from kbit.planner.machine import MachineSpeed, attention_key, describe_machine, machine_speed
from kbit.planner.memory import prepared_bytes
from kbit.planner.process_probe import Probe, probe
from kbit.planner.speed import (
    bytes_per_token,
    needed_attention,
    needed_kernels,
    predict_speed,
    prompt_seconds,
)
from kbit.planner.weights import planned_weights

CONFIG = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
SPEC = spec_from_config(CONFIG)
WEIGHTS = planned_weights(SPEC, QuantFormat.parse("nf4-b64"), embedding="fp16", head="fp16")
RATES = MachineSpeed(
    machine={"cpu": "test", "instruction_set": "scalar"},
    threads=1,
    compute="int8",
    bandwidth=1e10,
    misses=[(1_000_000, 0.0), (2_000_000, 0.5), (4_000_000, 1.0)],
    overheads=Overheads(matmul=1e-7, column=1e-9, layer=1e-6, token=1e-5, vocabulary=1e-10, prompt=1e-3),
    constant_bytes=200_000_000,
    kernels={
        "int4-b64": KernelRate(1e-11, 3e-11, 5e-12, 0.53, 0.02),
        "fp16": KernelRate(4e-11, 1e-10, 2e-11, 2.0, 0.02),
    },
    attention={"fp16-d32-g2": AttentionRate(5e-9, 2e-8, 4e-9, 1e-7, 128.0)},
    busy=0.0,
    created="2026-01-01T00:00:00+00:00",
)


def test_formats_that_run_the_same_instructions() -> None:
    """The data type counts only where int8 does not hold its codebook: see kernels/cpu/codecs/matrix_storage.cpp."""
    assert kernel_key(QuantFormat.parse("nf4-b64")) == kernel_key(QuantFormat.parse("int4-b64")) == "int4-b64"
    assert kernel_key(QuantFormat.parse("lloyd6-b64")) == kernel_key(QuantFormat.parse("nf6-b64")) == "nf6-b64"
    assert kernel_key(QuantFormat.parse("int6-b64")) == "int6-b64"
    assert kernel_key(QuantFormat.parse("quantile8-b128")) == "nf8-b128"
    assert kernel_key(QuantFormat.parse("nf4-b64-dq")) == "int4-b64-fp32"  # factors are multiplied in at load
    assert kernel_key(QuantFormat.parse("int3-row-bf16")) == "int3-row-bf16"
    assert kernel_key(QuantFormat.parse("int4-b32-asym")) == "int4-b32-asym"
    assert kernel_key("fp16") == "fp16"
    assert kernel_key(TrellisFormat.parse("trellis2-sum4-l12")) == "trellis2-sum4"
    assert kernel_key(TrellisFormat.parse("trellis8-h128")) == "trellis8-h128"
    for text in ("nf4-b64", "quantile8-b128", "nf4-b64-dq", "int3-row-bf16", "int4-b32-asym"):
        key = kernel_key(QuantFormat.parse(text))
        assert kernel_key(QuantFormat.parse(key)) == key


@pytest.mark.parametrize(
    "key", ["int2-b64", "nf7-b32", "int8-row-asym", "int5-b128-fp32", "trellis3", "fp16", "bf16", "fp32"]
)
def test_products_are_timed(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kbit.planner.kernel_timing.SECONDS", 0.0)
    monkeypatch.setattr("kbit.planner.kernel_timing.CACHED_BYTES", 1 << 20)
    rate = Timer(2, "int8", memory_bytes=6 << 20).kernel(key)
    assert all(math.isfinite(value) and value >= 0 for value in asdict(rate).values())
    assert rate.memory >= rate.cached > 0 < rate.prompt
    dense = {"fp16": 2, "bf16": 2, "fp32": 4}
    if key in dense:
        assert rate.nbytes == dense[key]
    else:
        assert rate.nbytes * 8 >= parse_format(key).bits


@pytest.mark.parametrize(("kind", "dim", "group"), [("fp16", 64, 1), ("4", 64, 3), ("3", 80, 2), ("fp32", 24, 4)])
def test_attention_is_timed(kind: str, dim: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kbit.planner.kernel_timing.SECONDS", 0.0)
    rate = Timer(1, "int8", memory_bytes=4 << 20).attention(kind, dim, group)
    assert all(math.isfinite(value) and value >= 0 for value in asdict(rate).values())
    assert rate.memory >= rate.cached
    least = dim * (32 if kind == "fp32" else 16 if kind == "fp16" else int(kind)) * 2 / 8
    assert rate.nbytes >= least


def test_misses_rise_from_nothing_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kbit.planner.kernel_timing.SECONDS", 0.0)
    curve = Timer(1, "int8", memory_bytes=24 << 20).misses()
    shares = [share for _, share in curve]
    assert shares == sorted(shares)
    assert shares[0] >= 0
    assert shares[-1] == 1
    assert [size for size, _ in curve] == sorted({size for size, _ in curve})


def test_a_model_of_no_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """`kbit run` runs it, so a process's constant is that of the real command."""
    found = probe(1, "int8")
    assert 20e6 < found.nbytes < 3e9
    assert found.token_seconds > 0
    assert found.prompt_seconds > 0
    monkeypatch.setattr(process_probe, "_CONFIG", {**process_probe._CONFIG, "hidden_act": "sine"})
    with pytest.raises(KbitError, match="hidden_act"):
        probe(1, "int8")


@given(st.floats(0, 1e8), st.floats(0, 1e8))
def test_more_bytes_come_from_memory_no_less(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert 0 <= RATES.memory_share(low) <= RATES.memory_share(high) <= 1


def test_shares_between_measured_sizes() -> None:
    assert [RATES.memory_share(size) for size in (0, 1e6, 1.5e6, 2e6, 3e6, 4e6, 1e9)] == [0, 0, 0.25, 0.5, 0.75, 1, 1]


def test_a_token_is_the_sum_of_its_parts() -> None:
    """Everything in cache: the sum, by hand."""
    rates = replace(RATES, misses=[(1, 0.0)])
    context = 300
    linear = sum(weight.numel for weight in WEIGHTS if weight.role == "linear")
    head = 1024 * 128
    products = linear * 1e-11 + head * 4e-11
    attention = 2 * 2 * context * 5e-9  # layers, key/value heads
    columns = (2 * (2 * 128 + 128 + 2 * 256) + 128) * 1e-9
    seconds = 1e-5 + 1024 * 1e-10 + 2 * 1e-6 + 1e-7 + products + columns + attention
    speed = predict_speed(SPEC, WEIGHTS, rates, context=context)
    assert speed.decode == pytest.approx(1 / seconds)
    assert speed.decode_empty == pytest.approx(1 / (seconds - attention))
    assert speed.low == pytest.approx(speed.decode / 1.15)
    assert speed.high == pytest.approx(speed.decode * 1.15)
    read = sum(prepared_bytes(w) for w in WEIGHTS if w.role in ("linear", "head"))
    assert (
        speed.bytes_per_token == read + context * 2 * 2 * 32 * 2 * 2 == bytes_per_token(SPEC, WEIGHTS, context, "fp16")
    )


def test_what_slows_a_model_down() -> None:
    speeds = [predict_speed(SPEC, WEIGHTS, RATES, context=context).decode for context in (16, 256, 4096)]
    assert speeds == sorted(speeds, reverse=True)
    assert predict_speed(SPEC, WEIGHTS, replace(RATES, misses=[(1, 1.0)]), context=16).decode < speeds[0]
    slid = spec_from_config({**CONFIG, "model_type": "mistral", "sliding_window": 64})
    assert predict_speed(slid, WEIGHTS, RATES, context=4096).decode > 1.5 * speeds[2]
    times = [prompt_seconds(SPEC, WEIGHTS, RATES, tokens, "fp16") for tokens in (1, 10, 100, 1000, 4000)]
    assert times == sorted(times)
    assert times[4] > 4 * times[3]


def test_a_model_of_about_the_size_of_the_cache_is_uncertain() -> None:
    wide = predict_speed(SPEC, WEIGHTS, replace(RATES, misses=[(200_000, 0.0), (2_000_000, 1.0)]), context=16)
    sure = predict_speed(SPEC, WEIGHTS, replace(RATES, misses=[(1, 1.0)]), context=16)
    assert wide.high / wide.low > 1.15 * sure.high / sure.low


def test_rates_that_are_missing_are_named() -> None:
    with pytest.raises(KbitError, match="attention 4-d32-g2"):
        predict_speed(SPEC, WEIGHTS, RATES, context=16, kv="4")
    with pytest.raises(KbitError, match="nf7-b64"):
        predict_speed(SPEC, planned_weights(SPEC, QuantFormat.parse("nf7-b64")), RATES, context=16)
    assert needed_kernels(WEIGHTS, tied=False) == ["int4-b64", "fp16"]
    assert [attention_key(*shape) for shape in needed_attention(SPEC, "8")] == ["8-d32-g2"]
    tied = planned_weights(spec_from_config({**CONFIG, "tie_word_embeddings": True}), "fp16", embedding="fp32")
    assert needed_kernels(tied, tied=True) == ["fp32", "fp16"]


def test_rates_survive_a_file() -> None:
    again = MachineSpeed.from_dict(json.loads(json.dumps(RATES.to_dict())))
    assert again == RATES
    for spoil in ({"schema": 99}, {"bandwidth": -1.0}, {"misses": []}, {"bandwidth": math.nan}):
        with pytest.raises(ValueError, match="."):
            MachineSpeed.from_dict({**RATES.to_dict(), **spoil})


class FakeTimer:
    """Counts what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def kernel(self, key: str) -> KernelRate:
        self.asked.append(key)
        return RATES.kernels["fp16"]

    def attention(self, kind: str, dim: int, group: int) -> AttentionRate:
        self.asked.append(attention_key(kind, dim, group))
        return RATES.attention["fp16-d32-g2"]

    def bandwidth(self) -> float:
        self.asked.append("bandwidth")
        return 1e10

    def misses(self) -> list[tuple[int, float]]:
        return [(1, 1.0)]

    def overheads(self, token: float, prompt: float) -> Overheads:
        return replace(RATES.overheads, token=token, prompt=prompt)


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeTimer]:
    """A machine that takes no time to measure, and a cache of its own."""
    fake = FakeTimer()
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path))
    monkeypatch.setattr(machine_module, "_timer", lambda threads, compute: fake)
    monkeypatch.setattr(process_probe, "probe", lambda threads, compute: Probe(123_000_000, 1e-5, 1e-3))
    monkeypatch.setattr(machine_module, "other_work", lambda: 0.0)
    return fake


def test_nothing_is_timed_twice(timer: FakeTimer, tmp_path: Path) -> None:
    first = machine_speed(["int4-b64"], [("fp16", 64, 3)], threads=1)
    assert timer.asked == ["bandwidth", "int4-b64", "fp16-d64-g3"]
    assert first.constant_bytes == 123_000_000
    assert machine_speed(["int4-b64"], [("fp16", 64, 3)], threads=1) == first
    more = machine_speed(["int4-b64", "fp16", "fp16"], [("fp16", 64, 3)], threads=1)
    assert timer.asked[3:] == ["fp16"]
    assert set(more.kernels) == {"int4-b64", "fp16"}
    machine_speed(["int4-b64"], (), threads=2)  # another machine, as far as speed goes
    assert timer.asked[4:] == ["bandwidth", "int4-b64"]
    machine_speed(["fp16"], (), threads=1, remeasure=True)
    assert timer.asked[6:] == ["bandwidth", "fp16"]
    assert len(list((tmp_path / "machine").glob("*.json"))) == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"schema": 1}', '{"schema": 0}'])
def test_a_damaged_file_is_measured_again(timer: FakeTimer, tmp_path: Path, damage: str) -> None:
    machine_speed(["fp16"], (), threads=1)
    (file,) = (tmp_path / "machine").glob("*.json")
    file.write_text(damage)
    assert "fp16" in machine_speed(["fp16"], (), threads=1).kernels
    assert timer.asked == ["bandwidth", "fp16"] * 2


def test_a_busy_machine_is_remembered(timer: FakeTimer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not machine_speed(["fp16"], (), threads=1).disturbed
    monkeypatch.setattr(machine_module, "other_work", lambda: 1.7)
    assert machine_speed(["int4-b64"], (), threads=1).disturbed
    monkeypatch.setattr(machine_module, "other_work", lambda: None)
    assert machine_speed(["int5-b64"], (), threads=1).disturbed  # of some of what is kept it still holds
    assert machine_speed(["int5-b64"], (), threads=1, remeasure=True).busy is None


def test_a_machine_without_a_cache_folder(timer: FakeTimer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "machine").write_text("not a folder")
    assert machine_speed(["fp16"], (), threads=1).kernels


def test_this_machine_is_described() -> None:
    facts: dict[str, Any] = describe_machine()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cpu"]
    assert facts["cores"] >= 1
    assert facts["instruction_set"]
