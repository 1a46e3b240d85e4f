"""tools/fuzz.py: a few thousand inputs of a fixed seed for every target, and that what is wrong would be found."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

from fuzzing import judge as judging  # noqa: E402
from fuzzing.judge import Finding, judge  # noqa: E402
from fuzzing.loop import executions, random_loop, shared_memory  # noqa: E402
from fuzzing.mutations import mutate_json  # noqa: E402
from fuzzing.target import TARGETS, Target, corpus, load_target  # noqa: E402

from kbit.host.errors import CheckpointError  # noqa: E402

# Changed inputs, so that a target takes about a second and a half; all those of the corpus come before.
EXECUTIONS = {
    "safetensors": 2000,
    "gguf-header": 4000,
    "gguf-model": 150,
    "gguf-blocks": 1000,
    "config": 800,
    "generation": 2000,
    "tokenizer": 100,
    "sentencepiece": 150,
    "template": 150,
    "manifest": 150,
    "packed": 100,
    "http": 60,
    "native": 1000,
}


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder where writing is quick; what targets set in the environment is taken back."""
    with tempfile.TemporaryDirectory(dir=shared_memory()) as folder:
        for variable in ("KBIT_CACHE", "KBIT_PREPARED"):
            monkeypatch.setenv(variable, str(Path(folder) / "cache"))
        yield Path(folder)


def test_every_target_has_a_budget_and_a_corpus() -> None:
    assert EXECUTIONS.keys() == TARGETS.keys()
    assert all(corpus(name) for name in TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_target(name: str, scratch: Path) -> None:
    if name == "http":
        pytest.importorskip("fastapi", reason="the [serve] extra is not installed")
    target = load_target(name, scratch)
    found: list[Finding] = []
    try:
        count = random_loop(target, corpus(name), Random(5), found.append, executions(EXECUTIONS[name]))
    finally:
        target.close()
    assert count == len(corpus(name)) + EXECUTIONS[name]
    assert not found, "\n".join(f"{finding.kind}: {finding.text}\n{finding.data[:500]!r}" for finding in found)


class Wrong(Target):
    """Does what an input says."""

    def run(self, data: bytes) -> None:
        if data == b"slow":
            time.sleep(0.01)
            end = time.process_time() + judging.SECONDS
            while time.process_time() < end:
                pass
        elif data == b"refused":
            raise CheckpointError("model: damaged; download it again")
        elif data == b"silent":
            raise CheckpointError("")
        elif data == b"bug":
            raise IndexError("list index out of range")
        elif data == b"panic":
            raise type("PanicException", (BaseException,), {})("no entry")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"fine", None),
        (b"refused", None),
        (b"silent", "without a word"),
        (b"bug", "IndexError"),
        (b"panic", "PanicException"),
        (b"slow", "slow"),
    ],
)
def test_what_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, kind: str | None) -> None:
    monkeypatch.setattr(judging, "SECONDS", 0.05)
    finding = judge(Wrong(tmp_path), data)
    assert finding is None if kind is None else finding is not None and kind in finding.kind


def test_too_much_memory_is_a_finding() -> None:
    """In a process of its own, whose peak no other test has raised."""
    code = (
        "import fuzzing.judge as j; from fuzzing.target import Target; from pathlib import Path;"
        "T = type('T', (Target,), {'run': lambda self, data: len(b'x' * int(data))});"
        "found = [j.judge(T(Path()), b'%d' % (n << 20)) for n in (150, 450)];"
        "print(found[0], found[1].kind)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{TOOLS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "None memory\n"


def test_a_finding_can_be_run_again(tmp_path: Path) -> None:
    """The command that is written beside an input runs it, whatever it is."""
    path = Finding("x", "Traceback", b"PK\x03\x04").save(tmp_path, "safetensors")
    assert "--target safetensors --reproduce" in path.with_suffix(".txt").read_text()
    command = [sys.executable, str(TOOLS / "fuzz.py"), "--target", "safetensors", "--reproduce", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "no finding\n")


def test_changes_of_json_are_of_one_place() -> None:
    value: dict[str, Any] = {"a": [1, 2, {"b": None}], "c": "text"}
    random, seen = Random(0), set()
    for _ in range(300):
        seen.add(repr(mutate_json(value, random)))
    assert value == {"a": [1, 2, {"b": None}], "c": "text"}
    assert len(seen) > 100
