"""The commands on models whose published tensors are not the canonical ones: nothing of it shows but the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_family_cases import CASES, write

from kbit.cli.main import _run

pytestmark = pytest.mark.usefixtures("one_thread")


def json_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    """What a command prints under --json; fails unless that is one JSON object and nothing else."""
    capsys.readouterr()
    assert _run([*arguments, "--json"], debug=True) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "name",
    ["gemma3", "phi3", "qwen2-moe", "gpt-oss", "deepseek-v2-lite", "gemma4-e", "qwen3_5", "lfm2", "granite-hybrid-moe"]
    + ["falcon-h1-norm", "nemotron-h-moe"],
)
def test_quantize_info_run_eval(
    tmp_path: Path, published: Callable[[str], Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both backends say the same of what was converted, and it is close to what it was converted from."""
    model, out = str(published(name)), str(tmp_path / "out")
    before = json_of(["info", model], capsys)
    json_of(["quantize", model, "--method", "rtn", "--bits", "6", "-o", out], capsys)
    after = json_of(["info", out], capsys)
    assert after["parameters"] == before["parameters"]
    assert after["bits_per_weight_without_embeddings"] < 8 < before["bits_per_weight"]
    texts = {
        backend: json_of(["run", "Hello", "--model", out, "--max-tokens", "6", "--backend", backend, *more], capsys)[
            "text"
        ]
        for backend, more in (("reference", []), ("native", ["--compute", "fp32", "--kv-bits", "32"]))
    }
    assert texts["reference"] == texts["native"]
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 20, encoding="utf-8")
    found = json_of(["eval", out, "--reference", model, "--data", str(text), "--max-tokens", "300"], capsys)
    assert 0 < found["kl_mean"] < 0.5


def test_info_and_plan_tell_active_weights_apart(
    published: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(published("qwen3-moe"))
    found = json_of(["info", model], capsys)
    assert found["experts"] == {"experts": 6, "chosen": 2, "layers": 3, "width": 24, "shared_width": 0}
    # 4 of 6 experts in each of 3 layers, of 3 matrices of 24 x 48, are not chosen.
    assert found["parameters"] - found["active_parameters"] == 4 * 3 * 3 * 24 * 48
    assert _run(["info", model], debug=True) == 0
    assert "2 of 6 for each token, of 24 features, in 3 layers" in capsys.readouterr().out
    flags = ["--memory", "2GiB", "--context", "64", "--no-speed"]
    choice = json_of(["plan", model, *flags], capsys)["choices"][0]
    assert choice["active_parameters"] == found["active_parameters"] < choice["parameters"] == found["parameters"]
    assert _run(["plan", model, *flags], debug=True) == 0
    assert "of which a token goes through" in capsys.readouterr().out


def test_a_later_run_maps_what_the_first_prepared(
    tmp_path: Path,
    published: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KBIT_PREPARED", str(tmp_path))
    arguments = ["run", "Hello", "--model", str(published("glm4")), "--max-tokens", "6", "--backend", "native"]
    first, later = (json_of(arguments, capsys)["text"] for _ in range(2))
    assert first == later
    assert len(list(tmp_path.glob("*.kbit"))) == 1


def test_a_gguf_file_is_converted_as_it_means(
    tmp_path: Path, published: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Norms that have their 1 already do not get another one, neither when read nor when read again."""
    assert "gemma2" in CASES
    path = write("gemma2", published("gemma2"), tmp_path / "m.gguf")
    assert _run(["quantize", str(path), "--method", "rtn", "--bits", "8", "-o", str(tmp_path / "out")], debug=True) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["kbit_canonical_tensors"] is True
    from kbit.models.opening import open_model

    norm = "model.layers.0.input_layernorm.weight"
    with open_model(str(published("gemma2"))) as one, open_model(str(tmp_path / "out")) as other:
        assert (one.read(norm) - other.read(norm)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("llama", "heads of 8 features"),
        ("gemma3", "heads of 10 features"),
        ("gemma4-e", None),
        ("gpt-oss-no-biases", None),
        ("qwen3-next", None),
        ("bloom", "scores that depend on the distance"),
    ],
)
def test_info_says_what_no_gpu_kernel_computes(
    published: Callable[[str], Path], name: str, lacking: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the Triton backend, which refuses it."""
    found = json_of(["info", str(published(name))], capsys)
    assert found["without_gpu_kernel"] == lacking
    assert lacking is None or found["runs_on"]["cuda"] is None
    assert _run(["info", str(published(name))], debug=True) == 0
    assert (f"cuda: no kernels for {lacking}" in capsys.readouterr().out) == (lacking is not None)
