"""Which benchmarks run, what they save, and what memory they count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def collected(*lines: tuple[str, ...]) -> list[set[str]]:
    """What each of some command lines would run; they are asked side by side."""
    # As the `pytest` command does it: with -m, the checkout's kbit, which has no compiled module, would hide the installed.
    run = "import sys; sys.path.remove(''); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", run, "--collect-only", "-q", "-p", "no:cacheprovider"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": REPOSITORY}
    processes = [subprocess.Popen([*command, *line], **pipes) for line in lines]  # type: ignore[call-overload]
    found = []
    for process in processes:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
        found.append({line.split("/")[-1] for line in out.splitlines() if "::" in line})
    return found


def test_which_benchmarks_run() -> None:
    """A folder: the short suite; --full: all but the GPU's; a named file: all of it."""
    short, full, named = collected(
        ("benchmarks",),
        ("benchmarks", "--full"),
        ("benchmarks/test_startup.py", "benchmarks/test_cpu_engine.py::test_batch"),
    )
    assert 5 <= len(short) < len(full) / 5
    assert short < full
    assert {"test_accuracy.py::test_widths", "test_throughput.py::test_native", "test_convert.py::test_memory"} <= short
    assert any(name.startswith("test_cpu_engine.py::test_decode[4bit") for name in short)
    assert not any(name.startswith("test_gpu") for name in full)
    assert named == {name for name in full if name.startswith(("test_startup", "test_cpu_engine.py::test_batch"))}


def test_peak_memory_is_the_process_own(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the process which started it: what ru_maxrss of an ended process begins with."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the system's own figure is taken where there is no /proc")
    held = np.ones(50_000_000)  # 400 MB
    program = "import sys; held = bytearray(60_000_000); print(flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    peers = load("peers")
    # It lives until it was asked once: wait_for sleeps after asking.
    monkeypatch.setattr(peers, "sleep", lambda seconds: process.stdin.close())
    peak = peers.wait_for(process, peak=True)
    process.stdout.close()
    assert process.returncode == 0
    assert 60e6 < peak < 200e6 < held.nbytes


@pytest.mark.slow
def test_a_run_is_saved_and_compares(
    data_dir: Path, tmp_path: Path, load: Callable[[str], ModuleType], tool: Any
) -> None:
    """Accuracy and throughput of a real model, through pytest: printed, saved with the machine, summarised, comparable."""
    saved = tmp_path / "run.json"
    environment = {
        # A user's run: pytest-benchmark measures nothing in what it takes for a worker of pytest-xdist.
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")},
        "KBIT_DATA": str(data_dir),
        "KBIT_CACHE": str(tmp_path / "cache"),  # empty, and pip finds nothing: so it is novels-5m
        "KBIT_BENCH_ROUNDS": "2",
        "KBIT_BENCH_TOKENS": "512",
        "KBIT_DEBUG": "",
        "PIP_NO_INDEX": "1",
        "OMP_NUM_THREADS": "1",
    }
    chosen = ["-k", "test_native or test_widths", "-p", "no:cacheprovider", "--benchmark-json", str(saved)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(REPOSITORY / "benchmarks"), *chosen],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("accuracy by width, novels-5m", "throughput, model novels-5m", "what the bits cost"):
        assert words in done.stdout
    results = json.loads(saved.read_text())
    assert results["machine_info"]["kbit"]["versions"]["torch"]
    by_case = {entry["extra_info"]["case"]: entry["extra_info"] for entry in results["benchmarks"]}
    widths = by_case["accuracy by width"]["rows"]
    assert [item["bits"] for item in widths] == list(range(2, 9))
    divergences = [item["kl_mean"] for item in widths]
    assert divergences[0] > 10 * divergences[2] > 100 * divergences[6] > 0
    assert sum(widths[0]["cluster_kl"]) / sum(widths[0]["cluster_tokens"]) == pytest.approx(divergences[0])
    speeds = by_case["throughput"]["rows"]
    assert {(item["bits"], item["phase"]) for item in speeds} == {
        (k, p) for k in range(2, 9) for p in ("decode", "prefill")
    }
    for item in speeds:
        assert len(item["values"]) == 2
        assert item["share"] > 0
    assert len(by_case["throughput"]["controls"]) == 2
    table = load("summary").summary(results).splitlines()
    assert len(table) == 9
    assert table[0] == "novels-5m"
    assert all(len(line.split()) == len(table[2].split()) for line in table[2:])
    assert tool.main([str(saved), str(saved), "--fail-on-loss"]) == 0

    # What two rounds of a busy machine can show depends on its mood (their scatter once hid a loss of five times), so
    # the loss is planted among steady values in the file that was saved.
    steady, slower = tmp_path / "steady.json", tmp_path / "slower.json"
    for item in [*speeds, *by_case["throughput"]["controls"]]:
        item["values"] = [100.0, 101.0]
    steady.write_text(json.dumps(results))
    for item in speeds:
        if item["name"] == "4 bits, decode":
            item["values"] = [20.0, 20.2]
    slower.write_text(json.dumps(results))
    assert tool.main([str(steady), str(slower), "--fail-on-loss"]) == 1
