"""Accuracy against bits on a real model small enough to measure every format in a minute or two.

    pytest benchmarks/test_accuracy.py -s

The novels-2m model of the data folder, on a novel it has not seen. For SmolLM2 run benchmarks/accuracy_table.py.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any


def load_accuracy_table() -> Any:
    path = Path(__file__).with_name("accuracy_table.py")
    spec = importlib.util.spec_from_file_location("accuracy_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_format(benchmark: Any, data_dir: Path) -> None:
    accuracy_table = load_accuracy_table()
    model, text = data_dir / "models" / "novels-2m", data_dir / "novels" / "heldout" / "Doyle_Hound_1902.txt"

    def measure() -> list[dict[str, Any]]:
        return accuracy_table.measure(str(model), str(text), bits=(2, 3, 4, 5, 6, 7, 8), max_tokens=4096)

    rows = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info["rows"] = [
        {key: row[key] for key in ("format", "bits_per_weight", "perplexity", "kl_mean", "kl_stderr")} for row in rows
    ]
    print("\n" + accuracy_table.table(rows))
