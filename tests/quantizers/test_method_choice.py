"""What `kbit quantize` does where its first choice of method is more than the machine can do."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
from error_cases import run_command

from kbit.calibration.request import CalibrationRequest
from kbit.checkpoint.resolve import open_model
from kbit.formats.registry import parse_format
from kbit.formats.trellis import TrellisFormat
from kbit.host.errors import UsageError
from kbit.host.quantities import parse_duration
from kbit.models.families import spec_from_config
from kbit.models.params import parameters
from kbit.quantizers.calibrated import Gptq, TwoSided
from kbit.quantizers.estimate import Rates, Steps, estimate, measure_rates
from kbit.quantizers.plan import BASE_BYTES
from kbit.quantizers.request import QuantizeRequest
from kbit.quantizers.trellis import OneSidedTrellis


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, write_model: Any) -> Path:
    folder: Path = write_model(tmp_path_factory.mktemp("choice") / "model")
    return folder


def memory_for(model: Path, method: TwoSided | Gptq) -> int:
    with open_model(str(model)) as source:
        return BASE_BYTES + method.memory(source)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what is available, and keeps calibrations apart from other tests'."""

    def set_to(nbytes: int) -> None:
        monkeypatch.setattr("kbit.host.memory.available_memory", lambda: nbytes)

    return set_to


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBIT_CALIBRATION", str(tmp_path / "calibration"))


def test_without_memory_for_gradients_inputs_serve(tmp_path: Path, model: Path, memory: Any) -> None:
    needed = memory_for(model, TwoSided())
    memory(needed - 1)
    code, out, said = run_command(["quantize", str(model), "--dry-run", "--json"])
    assert code == 0
    plan = json.loads(out)
    assert (plan["method"], plan["mixed"]) == ("gptq", False)
    assert f"needs about {needed / 1e6:.0f} MB of memory, and {(needed - 1) / 1e6:.0f} MB is available" in said
    assert "inputs only" in said
    memory(needed)
    code, out, said = run_command(["quantize", str(model), "--dry-run", "--json"])
    plan = json.loads(out)
    assert (code, plan["method"], plan["mixed"], said) == (0, "ldlq2", True, "")


@pytest.mark.parametrize("flags", [["--method", "ldlq2"], ["--bits", "3.5"], ["--size", "30KB"], ["--max-kl", "0.1"]])
def test_what_was_asked_for_is_not_replaced(model: Path, memory: Any, flags: list[str]) -> None:
    """The remedy works."""
    memory(memory_for(model, TwoSided()) - 1)
    code, _, error = run_command(["quantize", str(model), *flags, "--dry-run"])
    assert code == 2
    assert "is available; use --calibration-tokens 32768, or " in error
    assert ("--method gptq --inputs-only" in error) == ("--method" in flags)
    code, out, _ = run_command(["quantize", str(model), *flags, "--dry-run", "--json", "--calibration-tokens", "32768"])
    assert (code, json.loads(out)["method"]) == (0, "ldlq2")


def test_a_fast_search_is_offered_what_takes_fast(model: Path, memory: Any) -> None:
    memory(memory_for(model, TwoSided()) - 1)
    words = ["quantize", str(model), "--method", "trellis", "--fast", "--dry-run"]
    code, _, error = run_command(words)
    assert (code, "--method trellis --inputs-only, or --method rtn (without --fast)" in error) == (2, True), error
    assert run_command([*words, "--inputs-only"])[0] == 0
    assert run_command(["quantize", str(model), "--method", "rtn", "--dry-run"])[0] == 0


def test_with_no_memory_for_inputs_either_nothing_is_promised(model: Path, memory: Any) -> None:
    memory(BASE_BYTES)
    code, _, error = run_command(["quantize", str(model), "--dry-run"])
    assert (code, error.rstrip().endswith("is available; use --method rtn")) == (2, True)


def test_what_is_calibrated_needs_no_memory_for_it(model: Path, memory: Any) -> None:
    words = ["quantize", str(model), "--calibration-tokens", "256", "--dry-run", "--json"]
    assert run_command(["calibrate", str(model), "--calibration-tokens", "256"])[0] == 0
    memory(BASE_BYTES)
    code, out, said = run_command(words)
    assert (code, json.loads(out)["method"], said) == (0, "ldlq2", "")


RATES = Rates(operations=1e9, elements=1e8, weights=1e6, windows=1e10)


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is always as fast."""
    monkeypatch.setattr("kbit.quantizers.estimate.measure_rates", lambda threads, trellises: RATES)


WORDS = ["--calibration-tokens", "2048", "--dry-run", "--json"]


@pytest.mark.usefixtures("rates")
def test_less_time_takes_a_method_further_down(model: Path) -> None:
    found = []
    for seconds in (2, 5, 7, 9, 12, 30):
        code, out, said = run_command(["quantize", str(model), "--time-budget", f"{seconds}s", *WORDS])
        if code == 0:
            plan = json.loads(out)
            found.append((plan["method"], plan["mixed"]))
            assert f"time budget {seconds} s: method {plan['method']}" in said
            assert ("would take about" in said) == (found[-1] != ("ldlq2", True))
        else:
            assert (code, "rtn takes about" in said, found) == (2, True, [])
    order = [("rtn", False), ("search", False), ("gptq", False), ("ldlq2", False), ("ldlq2", True)]
    assert found == sorted(found, key=order.index)
    assert {found[0], found[-1]} == {order[0], order[-1]}


@pytest.mark.usefixtures("rates")
def test_what_is_calibrated_takes_no_time(model: Path) -> None:
    with open_model(str(model)) as source:
        request = CalibrationRequest(tokens=2048)
        whole, inputs, none = (
            estimate(source, Steps(calibrate=what), RATES)
            for what in (request, CalibrationRequest(tokens=2048, gradients=False), None)
        )
    assert whole > inputs > none
    budget = ["--time-budget", f"{(none + whole) / 2:.2f}s"]
    words = ["quantize", str(model), "--uniform", "--no-measure", *budget, *WORDS]
    assert json.loads(run_command(words)[1])["method"] != "ldlq2"
    assert run_command(["calibrate", str(model), "--calibration-tokens", "2048"])[0] == 0
    assert json.loads(run_command(words)[1])["method"] == "ldlq2"


@pytest.mark.usefixtures("rates")
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--time-budget", "soon"], "write a time such as 90s, 10m or 1h30m"),
        (["--time-budget", "0s"], "write a time such as 90s, 10m or 1h30m"),
        (["--time-budget", "10m", "--method", "rtn"], "chooses the method, and it is rtn already"),
        (["--time-budget", "4s", "--bits", "3.5"], "and --bits 3.5 needs it"),
    ],
)
def test_budgets_that_cannot_be_kept(model: Path, flags: list[str], said: str) -> None:
    code, _, error = run_command(["quantize", str(model), *flags, *WORDS])
    assert (code, said in error) == (2, True), error


def test_rates_are_of_this_machine() -> None:
    rates = measure_rates(1)
    assert min(rates.operations, rates.elements, rates.weights) > 0


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("1h30m", 5400), ("1.5h", 5400), ("10", None), ("", None)]
)
def test_times_as_people_write_them(text: str, seconds: float | None) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("method", ["search", "rtn", "awq"])
def test_options_of_feedback_need_feedback(model: Path, method: str) -> None:
    code, _, error = run_command(["quantize", str(model), "--method", method, "--act-order", *WORDS[2:]])
    assert (code, "--act-order: method" in error, "--method ldlq2" in error) == (2, True, True)


def test_options_are_part_of_what_is_made(tmp_path: Path, model: Path) -> None:
    words = ["quantize", str(model), "--uniform", "--bits", "4", "--no-measure"]
    made = {}
    for option in ("", "--static-scales", "--act-order"):
        out = tmp_path / f"out{option}"
        flags = [*([option] if option else []), "--calibration-tokens", "256", "-o", str(out)]
        assert run_command([*words, *flags])[0] == 0
        made[option] = (out / "model.safetensors").read_bytes()
        manifest = (out / "kbit-manifest.json").read_text()
        assert ('"act_order": true' in manifest, '"static_scales": true' in manifest) == (
            option == "--act-order",
            option != "",
        )
    assert len(set(made.values())) == 3
    plan = tmp_path / "plan.json"
    assert run_command([*words, "--act-order", "--calibration-tokens", "256", "--save-plan", str(plan)])[0] == 0
    out = tmp_path / "planned"
    assert run_command(["quantize", str(model), "--plan", str(plan), "--no-measure", "-o", str(out)])[0] == 0
    assert (out / "model.safetensors").read_bytes() == made["--act-order"]


def test_what_a_gpu_takes_part_in() -> None:
    """Rounding to nearest, and the search for trellis codes; a method that calibrates otherwise is refused."""
    for name, format in (("rtn", "nf4-b64"), ("trellis", "trellis3"), ("trellis-plain", "trellis3")):
        flags = QuantizeRequest("m", format=format, method=name, device="cuda")
        assert flags.chosen_method(flags.codec()).name == name
    flags = QuantizeRequest("m", format="nf4-b64", method="ldlq2", device="cuda")
    with pytest.raises(UsageError, match="--device cuda: .*use --method rtn, --method trellis, or --device cpu"):
        flags.chosen_method(flags.codec())


def test_searching_for_trellises_takes_its_time(model: Path) -> None:
    """By its windows: at 2^16 a weight nearly all there is, sixteen times that of --fast; integers are not searched."""
    with open_model(str(model)) as source:
        linear = sum(p.shape[0] * p.shape[1] for p in parameters(spec_from_config(source.config)) if p.role == "linear")
        windows, fast, integers, weighed = (
            estimate(source, Steps(trellis=format, weigh=weigh), RATES)
            for format, weigh in (
                (TrellisFormat(4), False),
                (TrellisFormat(4, window=12), False),
                (TrellisFormat(8), False),
                (TrellisFormat(4, window=12), True),
            )
        )
    assert windows - fast == pytest.approx(linear * (2**16 - 2**12) / RATES.windows)
    assert fast - integers > linear * 2**12 / RATES.windows
    assert weighed - fast > 9 * linear * 2**12 / RATES.windows  # nine widths that are not integers
    assert measure_rates(1, trellises=True).windows < inf
    assert measure_rates(1).windows == inf


def test_the_time_of_trellises_is_said(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = replace(RATES, windows=1e6)
    monkeypatch.setattr(
        "kbit.quantizers.estimate.measure_rates", lambda threads, trellises: slow if trellises else RATES
    )
    words = ["quantize", str(model), "--calibration-tokens", "256", "--no-measure", "--time-budget", "30s", "--dry-run"]
    assert run_command(words)[0] == 0
    code, _, said = run_command([*words, "--format", "trellis3"])
    assert (code, "takes about" in said, "allow more time" in said) == (2, True, True)


def test_formats_that_a_trellis_method_brings() -> None:
    """Half widths where all have one; short windows also of what is mixed with integers, which have none."""
    formats = {
        "trellis2.5": QuantizeRequest("m", bits=2.5, uniform=True, method="trellis"),
        "trellis3.5-l12": QuantizeRequest("m", bits=3.5, uniform=True, method="trellis-tuned", fast=True),
        "trellis3.5-sum4-l12-h128": QuantizeRequest("m", bits=3.5, uniform=True, method="trellis-plain", fast=True),
        "trellis7": QuantizeRequest("m", bits=7.0, uniform=True, method="trellis", fast=True),
        "trellis6-l12": QuantizeRequest("m", bits=8.0, method="trellis", fast=True),
        "trellis8": QuantizeRequest("m", bits=8.0, method="trellis", fast=True, inputs_only=True),
    }
    for said, flags in formats.items():
        codec = flags.codec()
        assert codec == parse_format(said), said
        assert flags.mixes_widths(flags.chosen_method(codec)) == (said == "trellis6-l12"), said
    # Without a method's name, the one that rounds to trellises best.
    flags = QuantizeRequest("m", format="trellis3")
    assert flags.chosen_method(flags.codec()).name == "trellis"


def test_the_plain_trellis_has_plain_second_moments() -> None:
    """Also where flags say what it is calibrated on."""
    flags = QuantizeRequest("m", bits=3.0, method="trellis-plain", calibration_tokens=256)
    method = flags.chosen_method(flags.codec())
    assert isinstance(method, OneSidedTrellis)
    assert not method.request.gradients
    assert method.request.tokens == 256
