"""Whether comparing two runs of benchmarks tells real differences from the machine's moods."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest


def row(name: str, values: Sequence[float], engine: str = "kbit", **about: Any) -> dict[str, Any]:
    return {"engine": engine, "name": name, "values": list(values), **about}


def content(*cases: tuple[str, str, list[dict[str, Any]], list[dict[str, Any]]], **about: Any) -> dict[str, Any]:
    """What pytest-benchmark saves: cases of (name, unit, rows, controls)."""
    benchmarks = [
        {
            "name": name,
            "fullname": f"benchmarks/{name}",
            "stats": {"data": [1.0, 1.0]},
            "extra_info": {
                "case": name,
                "unit": unit,
                "higher_is_better": unit.endswith("/s"),
                "rows": rows,
                "controls": controls,
                **about,
            },
        }
        for name, unit, rows, controls in cases
    ]
    machine = {"kbit": {"cpu": "a CPU", "cores": 2, "versions": {"kbit": "1", "torch": "2"}}}
    return {"benchmarks": benchmarks, "datetime": "2026-01-01T00:00:00", "machine_info": machine}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, object], Path]:
    def write(name: str, value: object) -> Path:
        path = tmp_path / name
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    return write


class Machine:
    """Runs of a suite of twenty rows and eight controls on a machine whose pace changes from run to run and row to row."""

    def __init__(self, seed: int, drift: float, noise: float, rounds: int) -> None:
        self.random = np.random.default_rng(seed)
        self.drift, self.noise, self.rounds = drift, noise, rounds

    def values(self, middle: float) -> list[float]:
        of_run = self.random.normal(0, self.drift / math.sqrt(2))  # of two runs' difference: drift
        return list(middle * np.exp(of_run + self.random.normal(0, self.noise, self.rounds)))

    def run(self, gains: Sequence[float] = (), controls: int = 8) -> dict[str, Any]:
        """A run in which row i is gains[i] times as fast (1 where there is none)."""
        factors = [*gains, *(1.0 for _ in range(20 - len(gains)))]
        rows = [row(f"row {index}", self.values(100 * factor)) for index, factor in enumerate(factors)]
        rows += [row(f"peer {index}", self.values(70), "llama.cpp", version="1") for index in range(controls - 2)]
        beside = [row(f"memory {index}", self.values(20), "memory") for index in range(min(2, controls))]
        return content(("decode", "tokens/s", rows, beside))


def verdicts(
    load: Callable[[str], ModuleType], path: Path, before: list[Any], after: list[Any]
) -> tuple[Any, list[Any]]:
    results, comparison = load("results"), load("comparison")
    sides = []
    for contents in (before, after):
        runs = []
        for item in contents:
            path.write_text(json.dumps(item))
            runs.append(results.read_run(path))
        sides.append(runs)
    drift, found = comparison.compare(*sides)
    return drift, found


def test_the_machines_moods_are_not_real(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """Nothing changed: in about one comparison of twenty something may be called real, and intervals hold 1 as promised."""
    false, covered, drifts = 0, [], []
    for seed in range(80):
        machine = Machine(seed, drift=0.08, noise=0.03, rounds=4)
        drift, found = verdicts(load, tmp_path / "run.json", [machine.run()], [machine.run()])
        false += any(one.verdict in ("better", "worse") for one in found)
        covered += [one.low <= 1 <= one.high for one in found]
        drifts.append(drift.deviation)
        assert 0 < drift.freedom <= 8
        assert len(found) == 20
    assert false <= 9  # 4 expected; 10 or more of 80 at 5 % each has a chance of 0.6 %
    assert 0.92 < np.mean(covered) < 0.98
    assert np.sqrt(np.mean(np.square(drifts))) == pytest.approx(0.08, rel=0.15)


def test_a_change_beyond_them_is_real(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """Twice as fast and half as fast are found, each in its direction, at a drift of 8 %; the rest is not."""
    machine = Machine(1, drift=0.08, noise=0.03, rounds=4)
    _, found = verdicts(load, tmp_path / "run.json", [machine.run()], [machine.run([2, 0.5])])
    assert [one.verdict for one in found][:2] == ["better", "worse"]
    assert {one.verdict for one in found[2:]} == {"no real difference"}
    assert found[0].low < 2 < found[0].high
    assert found[1].low < 0.5 < found[1].high


def test_a_quiet_machine_shows_smaller_changes(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    machine = Machine(2, drift=0.002, noise=0.004, rounds=5)
    drift, found = verdicts(load, tmp_path / "run.json", [machine.run()], [machine.run([1.08])])
    assert drift.deviation == 0.01  # never closer
    assert [one.verdict for one in found].count("better") == 1
    assert found[0].verdict == "better"


def test_drift_without_controls(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """From several runs where there are, else assumed; and said so."""
    machine = Machine(3, drift=0.06, noise=0.02, rounds=4)
    runs = [machine.run(controls=0) for _ in range(6)]
    drift, _ = verdicts(load, tmp_path / "run.json", runs[:3], runs[3:])
    assert "6 runs" in drift.origin
    assert 3 < drift.freedom <= 4
    assert drift.deviation == pytest.approx(0.06 / math.sqrt(3), rel=0.3)  # means of three
    drift, _ = verdicts(load, tmp_path / "run.json", runs[:1], runs[1:2])
    assert "assumption" in drift.origin
    assert drift.deviation == 0.08


def test_a_peer_of_another_version_is_no_control(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    machine = Machine(4, drift=0.05, noise=0.02, rounds=4)
    before, after = machine.run(), machine.run()
    for item in after["benchmarks"][0]["extra_info"]["rows"]:
        item.update({"version": "2"} if item["engine"] == "llama.cpp" else {})
    drift, _ = verdicts(load, tmp_path / "run.json", [before], [after])
    assert "assumption" in drift.origin


def test_common_scatter(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """Variances that agree are pooled almost wholly; the pooled one is what they were drawn from."""
    results, comparison = load("results"), load("comparison")
    path = tmp_path / "run.json"
    path.write_text(json.dumps(Machine(5, drift=0.0, noise=0.05, rounds=3).run()))
    scatter = comparison.scatter_of([results.read_run(path)])
    assert scatter.variance == pytest.approx(0.05**2, rel=0.4)
    assert scatter.freedom > 10
    own = comparison.side_of([results.read_run(path).rows["decode", "row 0"]], comparison.Scatter())
    assert own.freedom == 2
    assert comparison.scatter_of([]) == comparison.Scatter()
    for value in (0.01, 0.5, 3.0, 1e3):
        from scipy.special import polygamma

        assert float(polygamma(1, comparison.inverse_trigamma(value))) == pytest.approx(value)


def test_lower_is_better_and_memory(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    def run(seconds: float, megabytes: list[float]) -> dict[str, Any]:
        times = [row("conversion", [seconds, 1.01 * seconds, 0.99 * seconds])]
        return content(("speed", "seconds", times, []), ("memory", "MB at the peak", [row("process", megabytes)], []))

    _, found = verdicts(load, tmp_path / "run.json", [run(4.0, [300.0, 301, 300])], [run(1.0, [200.0, 201, 200])])
    assert [one.verdict for one in found] == ["better", "better"]
    assert found[0].change == pytest.approx(4)
    _, found = verdicts(load, tmp_path / "run.json", [run(4.0, [300.0])], [run(4.1, [200.0])])
    assert [one.verdict for one in found] == ["no real difference", "measured once: cannot say"]


def accuracy(kl: Sequence[float], text: str = "a", **about: Any) -> dict[str, Any]:
    sizes = [100.0] * len(kl)
    item = {"format": "nf4-b64", "cluster_tokens": sizes, "cluster_kl": [100 * value for value in kl]}
    return content(("accuracy", "", [{**item, "kl_mean": float(np.mean(kl)), **about}], []), data_sha256=text)


def test_accuracy_is_paired(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """A tenth more divergence everywhere is real though texts differ tenfold; scatter without direction is not."""
    random = np.random.default_rng(6)
    text = random.lognormal(-2, 1, 16)

    def judge(after: dict[str, Any]) -> Any:
        return verdicts(load, tmp_path / "run.json", [accuracy(text)], [after])[1][0]

    worse = judge(accuracy(text * random.normal(1.1, 0.01, 16)))
    assert (worse.verdict, worse.better) == ("worse", False)
    assert worse.low > 0
    assert judge(accuracy(text * random.normal(0.9, 0.01, 16))).verdict == "better"
    assert judge(accuracy(text * (1 + 0.05 * np.where(np.arange(16) % 2, 1, -1)))).verdict == "no real difference"
    assert judge(accuracy(text)).verdict == "the same"
    assert judge(accuracy(text * (1 + 1e-5))).verdict == "the same to rounding"
    assert judge(accuracy(text * 1.2, text="b")).verdict == "not the same text: cannot say"
    assert judge(accuracy(text * 1.2, cluster_kl="?")).verdict == "not the same text: cannot say"
    assert judge(accuracy(text, bits_per_weight=4.5)).changed == []
    changed = verdicts(
        load, tmp_path / "run.json", [accuracy(text, bits_per_weight=4.25)], [accuracy(text, bits_per_weight=4.5)]
    )[1][0].changed
    assert changed == ["bits per weight 4.25 -> 4.5"]


def test_command(tool: ModuleType, write: Callable[[str, object], Path], capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine(7, drift=0.02, noise=0.01, rounds=4)
    one, two = machine.run(), machine.run([0.4])
    two["benchmarks"][0]["extra_info"]["rows"][3]["name"] = "row 3\x1b[2J"
    two["machine_info"]["kbit"].update(cpu="another\x1bCPU", versions={"kbit": "2", "torch": "3"})
    before, after = write("before.json", one), write("after.json", two)
    assert tool.main([str(before), str(after)]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "cpu differs: a CPU and another?CPU" in text
    assert "torch differs: 2 and 3" in text
    assert "1 results after have no counterpart" in text
    assert "19 compared: 0 really better, 1 really worse" in text
    assert tool.main([str(before), str(after), "--real"]) == 0
    assert len(re.findall("^  row", capsys.readouterr().out, re.MULTILINE)) == 1
    assert tool.main([str(before), str(after), "--fail-on-loss", "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert [item["verdict"] for item in shown["rows"]].count("worse") == 1
    assert tool.main([str(before), str(before), "--fail-on-loss"]) == 0
    both = ["--before", str(before), str(before), "--after", str(after)]
    assert tool.main(both) == 0
    capsys.readouterr()
    for wrong in (
        [str(before)],
        [str(after), *both],
        ["--before", str(before)],
        [str(before), str(after), "--level", "1"],
    ):
        with pytest.raises(SystemExit) as stop:
            tool.main(wrong)
        assert stop.value.code == 2


def test_bad_files(tool: ModuleType, write: Callable[[str, object], Path], capsys: pytest.CaptureFixture[str]) -> None:
    good = write("good.json", Machine(8, drift=0.02, noise=0.01, rounds=3).run())
    named = {
        "not JSON": "{",
        "not a file that": [1],
        "holds no results": {"benchmarks": [None, {"name": 3}, {"extra_info": {"rows": [{"values": ["x"]}]}}]},
        "no result of kbit in common": content(("other", "seconds", [row("x", [1.0, 2.0])], [])),
    }
    for words, value in named.items():
        path = write("bad.json", value)
        assert tool.main([str(path), str(good)]) == 1
        error = capsys.readouterr().err
        assert words in error
        assert "bad.json" in error
    other = write("other.json", json.loads(good.read_text()))
    for path, model in ((good, "one"), (other, "another")):
        value = json.loads(path.read_text())
        value["benchmarks"][0]["extra_info"]["model"] = model
        write(path.name, value)
    assert tool.main([str(good), str(other)]) == 1  # as fast on another model means nothing
    assert "no result of kbit in common" in capsys.readouterr().err
    assert tool.main([str(good.with_name("none.json")), str(good)]) == 1
    assert "none.json: No such file" in capsys.readouterr().err
    for values in ([0.0, 1.0], [-1.0], [float("nan"), 1.0], [float("inf")], [True], None, "12"):
        broken = write(
            "bad.json", content(("a", "seconds", [{"name": "x", "values": values}, row("y", [1.0, 2.0])], []))
        )
        assert tool.main([str(broken), str(broken)]) == 0
        assert "1 compared" in capsys.readouterr().out
