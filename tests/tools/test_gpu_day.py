"""tools/gpu_day.py from beginning to end, in small, in Triton's interpreter, from a source tree that is not compiled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = ["facts", "kernels", "models", "times", "peers", "estimates", "tuned", "speed"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python files alone, as they are carried to a machine with a GPU."""
    folder = tmp_path_factory.mktemp("tree")
    for part in ("kbit", "kernels", "tools", "benchmarks", "tests/cases"):
        ignored = shutil.ignore_patterns(
            "*.so", "*.cpp", "*.h", "*.hpp", "__pycache__", "kernels" if part == "kbit" else ""
        )
        shutil.copytree(REPOSITORY / part, folder / part, ignore=ignored)
    return folder


def gpu_day(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, str(tree / "tools" / "gpu_day.py"), *arguments],
        capture_output=True, text=True, check=False, cwd=tree,
        env={**kept, "OMP_NUM_THREADS": "1", "KBIT_CACHE": str(tree / "cache")},
    )  # fmt: skip


def test_a_rehearsal_runs_every_step(tree: Path) -> None:
    done = gpu_day(tree, "--device", "interpreter", "--out", "out", "--minutes", "60")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tree / "out" / "gpu_day.json").read_text())
    assert found["passed"]
    assert found["facts"]["compiled_module"] is False
    assert [step["name"] for step in found["steps"]] == STEPS
    rows = {step["name"]: step["rows"] for step in found["steps"]}
    assert all(step["outcome"] == "passed" and step["rows"] for step in found["steps"])
    assert all(0 <= row["worst"] <= 1 for name in ("kernels", "models") for row in rows[name])
    # Nothing was timed, and nothing says so.
    timed = [row for name in ("times", "peers", "tuned", "speed") for row in rows[name]]
    assert all(row["why"] == "not timed" for row in timed)
    assert not any(row.get("us") for row in timed)
    (estimate,) = rows["estimates"]
    assert estimate["estimate_us"] > 1
    page = (tree / "out" / "gpu_day.md").read_text()
    assert "every check held" in page
    assert "| gemv |" in page


def test_without_a_gpu_it_says_so(tree: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = gpu_day(tree, "--out", "none")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("gpu_day.py: torch sees no GPU.")
    assert gpu_day(tree, "--step", "sped").stderr.startswith("gpu_day.py: --step sped: use facts, kernels")
