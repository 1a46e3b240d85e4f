"""Models that no cache holds: where they are, and what is made of them.

    KBIT_MODELS=~/models pytest benchmarks/test_models.py -s        # that folder holds qwen1.5b.gguf, qwen0.5b.gguf

qwen0.5b and qwen1.5b are Qwen2.5-Coder-0.5B/1.5B-Instruct as GGUF files (Q4_K_M), as their authors publish them. 8b is
made on the spot: 8 billion random weights at 4 bits, for which the temporary folder needs 5 GB.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

GGUFS = ("qwen0.5b", "qwen1.5b")
SYNTHETIC = "8b"
SYNTHETIC_BYTES = 5_000_000_000
HEAD_BITS = 8  # of embedding and head at 4 bits, as in llama.cpp's Q4_0
TOOL = Path(__file__).resolve().parent.parent / "tools" / "make_synthetic_checkpoint.py"


@dataclass(frozen=True)
class LargeModel:
    """A model to measure.

    Attributes:
        name: for reports.
        quantized: its folder at 4 bits, embedding and head at 8.
        gguf: the GGUF file it comes from; None where it comes from nowhere.
        weights: how many it has, a tied head counted once.
        linear_weights: those that every token of a prompt is multiplied by: without embedding and head.
    """

    name: str
    quantized: Path
    gguf: Path | None
    weights: int
    linear_weights: int


def find(name: str, temporary: Callable[[], Path]) -> LargeModel:
    """A model by name, its 4-bit folder made where it is missing (in the cache; of the synthetic one in `temporary`).

    Skips the test, with the reason, where the model is not there.
    """
    if name == SYNTHETIC:
        return _synthetic(temporary())
    named = os.environ.get("KBIT_MODELS")
    if not named:
        pytest.skip(f"KBIT_MODELS is not set: name a folder with {name}.gguf in it")
    gguf = Path(named).expanduser().absolute() / f"{name}.gguf"
    if not gguf.is_file():
        pytest.skip(f"there is no {gguf}: put Qwen2.5-Coder-{name[4:].upper()}-Instruct, Q4_K_M, there")
    return LargeModel(name, quantized(gguf), gguf, *count_weights(gguf))


def quantized(gguf: Path) -> Path:
    """The 4-bit folder of a GGUF file, in the cache; made anew when the file's size changes."""
    from kbit.host.cache_folder import cache_dir

    folder = cache_dir() / "benchmarks" / f"{gguf.stem}-{gguf.stat().st_size}-4bit-head{HEAD_BITS}"
    if not (folder / "config.json").is_file():  # quantize moves a finished folder into place, never a part of it
        words = [
            "quantize",
            str(gguf),
            "--bits",
            "4",
            "--method",
            "rtn",
            "--embedding-bits",
            str(HEAD_BITS),
            "-o",
            str(folder),
            "--force",
        ]
        subprocess.run(
            [sys.executable, "-m", "kbit.cli.main", *words], check=True, capture_output=True, cwd=Path.home()
        )
    return folder


def _synthetic(folder: Path) -> LargeModel:
    model = folder / "8b"
    if not model.is_dir():
        free = shutil.disk_usage(folder).free
        if free < 1.1 * SYNTHETIC_BYTES:
            pytest.skip(f"8 billion weights need {SYNTHETIC_BYTES / 1e9:.0f} GB of disk; {folder} has {free / 1e9:.1f}")
        _tool().make_quantized(model, 4, head_bits=HEAD_BITS)
    return LargeModel("synthetic 8b", model, None, *count_weights(model))


def count_weights(path: Path) -> tuple[int, int]:
    """Numbers in a checkpoint, and those of them in the matrices of its layers."""
    from kbit.models.opening import open_model

    with open_model(str(path)) as source:
        infos = source.tensors.values()
        return (
            sum(info.numel for info in infos),
            sum(info.numel for info in infos if len(info.shape) == 2 and ".layers." in info.name),
        )


def _tool() -> ModuleType:
    """tools/make_synthetic_checkpoint.py, which is no package."""
    spec = importlib.util.spec_from_file_location("make_synthetic_checkpoint", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look for their module there
    spec.loader.exec_module(module)
    return module
