"""How long conversion takes: SmolLM2-135M to 4 bits, beside reading and copying the same file.

pytest benchmarks/test_convert.py
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest


def test_copy_of_the_file(benchmark: Any, smollm2: Path, tmp_path: Path) -> None:
    """The floor: the bytes read and written once, nothing done to them."""
    benchmark.pedantic(lambda: shutil.copyfile(smollm2, tmp_path / "copy"), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("format", ["int4-b64", "nf4-b64", "nf3-b64", "int8-b64", "lloyd4-b64", "nf4-b64-dq"])
def test_smollm2(benchmark: Any, smollm2: Path, tmp_path: Path, format: str) -> None:
    """Open, plan, quantize, write, hash and move into place."""
    from kbit.checkpoint.resolve import open_model
    from kbit.formats.quant_format import QuantFormat
    from kbit.quantizers.convert import convert
    from kbit.quantizers.plan import make_plan

    def run() -> None:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with open_model(str(smollm2)) as source:
            plan = make_plan(source, QuantFormat.parse(format))
            convert(source, plan, tmp_path / "out")
            benchmark.extra_info["million_weights"] = sum(t.source.numel for t in plan.tensors if t.format) / 1e6

    benchmark.pedantic(run, rounds=3)
