"""kbit export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nested_cases import write_nested

from kbit.cli.main import _run
from kbit.models.opening import open_model


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
        (["--to", "onnx"], "kbit exports to safetensors, compressed-tensors, gguf"),
        (["--dtype", "int8"], "use fp16, bf16 or fp32"),
        (["--requantize", "int4-b128"], "--requantize goes with --to compressed-tensors and gguf"),
        (["--to", "compressed-tensors"], "no linear layer is quantized: name a format with --requantize int8-row"),
        (
            ["--to", "compressed-tensors", "--requantize", "int4-b16", "--data", __file__, "--max-tokens", "5"],
            "--max-tokens 5 is less than one window",
        ),
        (["--to", "gguf"], "name a file that ends in .gguf"),
        (["--to", "gguf", "--shard-size", "2"], "--shard-size goes with folders"),
        (["--to", "compressed-tensors", "--requantize", "nf4-b64"], "other libraries' formats are integers"),
        (
            ["--to", "compressed-tensors", "--requantize", "int4-b16", "--data", "no-such"],
            "--data 'no-such': no such file",
        ),
        (["--shard-size", "0"], "use a size in GB above 0"),
        (["--bits", "3"], "has one width; drop --bits"),
    ],
)
def test_wrong_usage(
    tmp_path: Path, tiny_model: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(["export", str(tiny_model), "-o", str(tmp_path / "out"), *flags], debug=False) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rounding_tells_the_divergence(
    tmp_path: Path, packable_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `kbit eval` measures it of the folder that was written, on the same text."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    out = str(tmp_path / "out")
    measured = ["--data", str(text), "--max-tokens", "120"]
    arguments = ["export", str(packable_model), "-o", out, "--to", "compressed-tensors", "--requantize", "int3-b32"]
    assert _run([*arguments, *measured, "--json"], debug=True) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["packed"], facts["rounded"]) == (14, 14)
    exact = ["--compute", "fp32", "--reference-backend", "native"]
    assert _run(["eval", out, "--reference", str(packable_model), *measured, *exact, "--json"], debug=True) == 0
    assert facts["kl_mean"] == json.loads(capsys.readouterr().out)["kl_mean"] > 1e-6
    assert _run([*arguments, *measured, "--force"], debug=True) == 0
    assert f"; KL(MODEL || OUTPUT) {facts['kl_mean']:.6f} nats/token on {text}" in capsys.readouterr().out
    assert _run(["run", "hello", "--model", out, "--max-tokens", "2"], debug=True) == 0


def test_a_width_of_a_nested_model(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the model is at that width, bit for bit; and another width does not go on with a killed run's files."""
    nested, out = str(write_nested(tiny_model, tmp_path / "nested", "2..4", "--block-size", "16")), tmp_path / "out"
    for bits in (3, 2):
        arguments = ["export", nested, "-o", str(out), "--dtype", "fp32", "--bits", str(bits), "--force"]
        assert _run(arguments, debug=True) == 0
        with open_model(nested, bits) as source, open_model(str(out)) as plain:
            assert source.tensors.keys() == plain.tensors.keys()
            assert all(torch.equal(source.read(name), plain.read(name)) for name in plain.tensors)
    assert _run([*arguments[:-3], "--bits", "5", "--force"], debug=False) == 2
    assert "serves 2 to 4 bits; choose one of these" in capsys.readouterr().err
    with open_model(nested, 2) as source, open_model(str(out)) as plain:  # what was there is kept
        assert all(torch.equal(source.read(name), plain.read(name)) for name in plain.tensors)


def test_a_gguf_file(tmp_path: Path, packable_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    arguments = ["export", str(packable_model), "-o", str(tmp_path / "m.gguf"), "--to", "gguf"]
    assert _run(arguments, debug=True) == 0
    assert "tensors: 15 F16, 5 F32; " in (said := capsys.readouterr().out)
    assert "every value exact" in said
    measured = ["--requantize", "Q4_0", "--data", str(text), "--max-tokens", "120", "--force"]
    assert _run([*arguments, *measured], debug=True) == 0
    assert "14 Q4_0 (14 rounded to Q4_0); " in (said := capsys.readouterr().out)
    assert "; KL(MODEL || OUTPUT) 0." in said
    assert _run(["run", "hello", "--model", str(tmp_path / "m.gguf"), "--max-tokens", "2"], debug=True) == 0
