"""What the benchmarks share: where they run, the default model, as it is and converted, and the evaluation text."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

sys.path.insert(0, str(Path(__file__).parent))  # modules that benchmarks share: pytest's importlib mode adds no folders


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", help="cpu (the default), or a GPU: cuda, cuda:1: then only test_gpu_* run."
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU only what measures it: the CPU's benchmarks take hours, and say nothing about it."""
    if config.getoption("--device") == "cpu":
        return
    benchmarks = Path(__file__).parent
    others = [item for item in items if item.path.parent == benchmarks and not item.path.name.startswith("test_gpu_")]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


@pytest.fixture(scope="session")
def gpu(request: pytest.FixtureRequest) -> torch.device:
    """The GPU that --device names; skips without one."""
    import torch

    name = request.config.getoption("--device")
    if name == "cpu":
        pytest.skip("measures a GPU: pytest benchmarks/ --device cuda")
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    if not torch.cuda.is_available():
        pytest.skip(f"--device {name}: torch sees no GPU")
    device = torch.device(name)
    torch.cuda.set_device(device)
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def converted(smollm2: Path) -> Callable[[int, int], Path]:
    """A function (bits, bits of embedding and head) -> the default model converted so: a folder, made once and kept."""

    def convert(bits: int, head: int) -> Path:
        from kbit.checkpoint.cache import cache_dir

        folder = cache_dir() / "benchmarks" / f"smollm2-135m-instruct-{bits}bit-head{head}"
        widths = ["--bits", str(bits), "--embedding-bits", str(head)]
        command = ["-m", "kbit.cli.main", "quantize", str(smollm2), *widths, "-o", str(folder), "--force"]
        if not (folder / "config.json").is_file():  # quantize moves a finished folder into place, never a part of it
            subprocess.run([sys.executable, *command], check=True, capture_output=True, cwd=Path.home())
        return folder

    return convert


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model's GGUF file, downloaded into the cache on first use."""
    from kbit.checkpoint.pull import pull
    from kbit.errors import KbitError

    try:
        return pull("smollm2-135m-instruct")
    except KbitError as error:
        pytest.skip(f"the default model could not be fetched: {error}")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of evaluation text: KBIT_DATA, else shared/data beside the checkout."""
    named = os.environ.get("KBIT_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no evaluation data at {folder}: set KBIT_DATA")
    return folder
