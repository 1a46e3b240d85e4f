"""kbit export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kbit.cli.main import _run


def test_exports_and_says_what_rounding_changed(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert _run(["export", str(tiny_model), "-o", str(out), "--json"], debug=True) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["path"], facts["dtype"], facts["relative_error"]) == (str(out), "fp16", 0.0)
    assert facts["bytes"] == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert _run(["export", str(tiny_model), "-o", str(out), "--dtype", "bf16", "--force"], debug=True) == 0
    assert "rounded to bf16: relative error 1." in capsys.readouterr().out
    for option in ("run", "info"):
        arguments = ["hello", "--model"] if option == "run" else []
        assert _run([option, *arguments, str(out)], debug=True) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to", "gguf"], "kbit exports to safetensors only"),
        (["--dtype", "int8"], "use fp16, bf16 or fp32"),
        (["--shard-size", "0"], "use a size in GB above 0"),
    ],
)
def test_wrong_usage(
    tmp_path: Path, tiny_model: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(["export", str(tiny_model), "-o", str(tmp_path / "out"), *flags], debug=False) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
