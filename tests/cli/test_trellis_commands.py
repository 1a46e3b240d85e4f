"""kbit quantize with trellis codes, and what runs them: from a real model to the same text on every backend."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

import pytest
import torch
from decoder_cases import saved_model
from error_cases import edit_tensors, run_command
from safetensors.torch import load_file

from kbit.backends.select import select_backend
from kbit.host.errors import UnsupportedError
from kbit.models.load import load_decoder
from kbit.models.opening import open_model
from kbit.text.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBIT_CALIBRATION", str(tmp_path / "calibration"))
    monkeypatch.setenv("KBIT_PREPARED", str(tmp_path / "prepared"))


def formats_of(folder: Path) -> dict[str, str]:
    tensors = json.loads((folder / "config.json").read_text())["quantization_config"]["tensors"]
    return {name: tensor["format"] for name, tensor in tensors.items()}


def test_a_real_model_is_quantized_and_runs(tmp_path: Path, data_dir: Path) -> None:
    """novels-0.7m at 3 bits: nearer to the original than rounding to nearest with a quarter of a bit more."""
    model = data_dir / "models" / "novels-0.7m"
    if not model.exists():
        pytest.skip(f"{model} is not there")
    kl, text = {}, data_dir / "novels" / "heldout" / "Doyle_Hound_1902.txt"
    for name, words in {
        "trellis": ["--method", "trellis", "--bits", "3", "--uniform", "--fast", "--calibration-tokens", "2048"],
        "rtn": ["--method", "rtn", "--format", "nf3-b64", "--embedding-bits", "6"],
    }.items():
        out = tmp_path / name
        code, said, _ = run_command(["quantize", str(model), *words, "--no-measure", "-o", str(out)])
        assert code == 0, said
        code, said, _ = run_command(
            ["eval", str(out), "--reference", str(model), "--data", str(text), "--max-tokens", "2048",
             "--context", "256", "--json"]
        )  # fmt: skip
        assert code == 0, said
        kl[name] = json.loads(said)["kl_mean"]
    assert kl["trellis"] < 0.5 * kl["rtn"]
    assert set(formats_of(tmp_path / "trellis").values()) == {"trellis3-l12", "lloyd6-b64"}
    # Twice: weights are prepared, then mapped as they were.
    words = ["run", "It was a dark", "--model", str(tmp_path / "trellis"), "--max-tokens", "12", "--json"]
    first, again = (json.loads(run_command(words)[1])["text"] for _ in range(2))
    assert first == again
    code, said, _ = run_command(["info", str(tmp_path / "trellis")])
    assert code == 0
    assert "trellis3-l12" in said


def test_large_weights_are_kept_apart(tmp_path: Path, data_dir: Path) -> None:
    """A real model with two features that `down` takes 512 times as large and `up` gives 512 times as small: the same
    model, but for a rotation that would spread these weights. Its codes are as good, and what runs them agrees."""
    original = data_dir / "models" / "novels-0.7m"
    if not original.exists():
        pytest.skip(f"{original} is not there")
    model, features = tmp_path / "model", [5, 99]
    copytree(original, model)

    def plant(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][features] /= 512
        tensors["model.layers.1.mlp.down_proj.weight"][:, features] *= 512

    edit_tensors(model, plant)
    text, kl = data_dir / "novels" / "heldout" / "Doyle_Hound_1902.txt", {}
    words = ["--method", "trellis", "--bits", "3", "--uniform", "--fast", "--calibration-tokens", "2048"]
    for name, source in (("as it was", original), ("planted", model)):
        out = tmp_path / name
        code, said, err = run_command(["quantize", str(source), *words, "--no-measure", "-o", str(out)])
        assert code == 0, said + err
        for compute in ("fp32", "int8"):
            code, said, _ = run_command(
                ["eval", str(out), "--reference", str(source), "--data", str(text), "--max-tokens", "2048",
                 "--context", "256", "--compute", compute, "--json"]
            )  # fmt: skip
            assert code == 0, said
            kl[name, compute] = json.loads(said)["kl_mean"]
    rows = load_file(model / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].shape[0]
    found = formats_of(tmp_path / "planted")
    assert {name: format for name, format in found.items() if "-o" in format} == {
        "model.layers.1.mlp.down_proj.weight": f"trellis3-l12-o{2 * rows}"
    }
    assert kl["planted", "fp32"] < 1.1 * kl["as it was", "fp32"]
    assert kl["planted", "int8"] == pytest.approx(kl["planted", "fp32"], rel=0.1)
    again = run_command(["quantize", str(model), *words, "--no-measure", "-o", str(tmp_path / "planted")])
    assert "already complete" in again[1]
    said = run_command(["info", str(tmp_path / "planted")])[1]
    assert "trellis3-l12 " in said
    runs = {}
    for backend in ("native", "reference"):
        with open_model(str(tmp_path / "planted")) as source:
            decoder = load_decoder(source, select_backend(backend=backend, compute="fp32"))
            runs[backend] = torch.as_tensor(decoder.forward(torch.arange(40)[None] + 50, decoder.new_cache(1, 64)))
    assert torch.allclose(runs["native"], runs["reference"], atol=2e-3)


def test_half_widths_run_with_int8_activations(tmp_path: Path, data_dir: Path) -> None:
    """On real text 3.5 bits cost less than 3, and rounding activations adds little to what the codes cost."""
    model, text = data_dir / "models" / "novels-0.7m", data_dir / "novels" / "heldout" / "Doyle_Hound_1902.txt"
    if not model.exists():
        pytest.skip(f"{model} is not there")
    kl: dict[tuple[str, str], float] = {}
    for format, computes in (("trellis3-l12", ("int8",)), ("trellis3.5-l12", ("int8", "fp32"))):
        out = str(tmp_path / format)
        code, said, _ = run_command(
            ["quantize", str(model), "--method", "rtn", "--format", format, "--no-measure", "-o", out]
        )
        assert code == 0, said
        for compute in computes:
            words = [
                "eval",
                out,
                "--reference",
                str(model),
                "--data",
                str(text),
                "--max-tokens",
                "1024",
                "--context",
                "256",
            ]
            code, said, _ = run_command([*words, "--compute", compute, "--json"])
            assert code == 0, said
            kl[format, compute] = json.loads(said)["kl_mean"]
    assert kl["trellis3.5-l12", "int8"] < 0.7 * kl["trellis3-l12", "int8"]
    assert kl["trellis3.5-l12", "int8"] == pytest.approx(kl["trellis3.5-l12", "fp32"], rel=0.1)
    words = [
        "run",
        "It was a dark",
        "--model",
        str(tmp_path / "trellis3.5-l12"),
        "--max-tokens",
        "12",
        "--temperature",
        "0",
    ]
    code, said, _ = run_command([*words, "--compute", "int8", "--json"])
    assert code == 0
    found = json.loads(said)
    with open_model(str(tmp_path / "trellis3.5-l12")) as source:
        decoder = load_decoder(source, select_backend("cpu", compute="int8"))
        tokenizer = Tokenizer.from_source(source)
        ids = tokenizer.encode("It was a dark")
        cache = decoder.new_cache(1, 64)
        logits, written = decoder.extend(ids, cache), []
        for _ in range(12):
            written.append(int(logits.argmax()))
            logits = decoder.extend(written[-1:], cache)
    assert found["text"] == tokenizer.decode(written)


@pytest.mark.parametrize("format", ["trellis2", "trellis2.5", "trellis5-h32", "trellis8"])
def test_backends_agree(tmp_path: Path, tiny_model: Path, format: str) -> None:
    out = tmp_path / "out"
    code, said, _ = run_command(["quantize", str(tiny_model), "--method", "rtn", "--format", format, "-o", str(out)])
    assert code == 0, said
    ids = torch.tensor([[5, 7, 11, 200, 3, 42]])
    logits = []
    with open_model(str(out)) as source:
        for options in ({"backend": "reference"}, {"compute": "fp32"}):
            decoder = load_decoder(source, select_backend("cpu", **options))  # type: ignore[arg-type]
            logits.append(decoder.forward(ids, decoder.new_cache(1, 8)))
    assert torch.allclose(logits[0], logits[1], atol=2e-4 * float(logits[0].abs().max()))


@pytest.mark.parametrize("compute", ["int8", "fp32"])
def test_matrices_of_one_input_may_be_rotated_each_in_its_way(tmp_path: Path, tiny_model: Path, compute: str) -> None:
    """Queries beside keys and values, and up beside gate with its activation: the sums of the reference."""
    out = tmp_path / "out"
    overrides = ["--override", "*.q_proj.weight=trellis4-h16", "--override", "*.up_proj.weight=trellis4-h32"]
    words = ["quantize", str(tiny_model), "--method", "rtn", "--format", "trellis4", *overrides, "-o", str(out)]
    assert run_command(words)[0] == 0
    assert {"trellis4", "trellis4-h16", "trellis4-h32"} <= set(formats_of(out).values())
    ids = torch.tensor([[5, 7, 11, 200, 3, 42]])
    with open_model(str(out)) as source:
        options = ({"backend": "reference"}, {"compute": compute})
        decoders = [load_decoder(source, select_backend("cpu", **each)) for each in options]  # type: ignore[arg-type]
        expected, found = (decoder.forward(ids, decoder.new_cache(1, 8)) for decoder in decoders)
    far = 2e-4 if compute == "fp32" else 0.05
    assert torch.allclose(found, expected, atol=far * float(expected.abs().max()))


def test_experts_that_are_rotated_in_different_ways_are_refused(tmp_path: Path) -> None:
    """Those of a layer share one rotated input; the remedy that is named works."""
    model, out = tmp_path / "model", str(tmp_path / "out")
    saved_model("mixtral", model, hidden_size=96)
    words = ["quantize", str(model), "--method", "rtn", "--format", "trellis4-h16", "-o", out]
    assert run_command([*words, "--override", "*.experts.0.w1.weight=trellis4-h32"])[0] == 0

    def logits() -> torch.Tensor:
        with open_model(out) as source:
            decoder = load_decoder(source, select_backend("cpu"))
            return torch.as_tensor(decoder.forward(torch.tensor([[5, 7, 11]]), decoder.new_cache(1, 8)))

    with pytest.raises(
        UnsupportedError, match="gate and up matrices of a layer's experts are rotated in different ways"
    ):
        logits()
    assert run_command([*words, "--force"])[0] == 0
    assert logits().isfinite().all()


def test_widths_are_mixed_within_a_budget(tmp_path: Path, tiny_model: Path) -> None:
    out = tmp_path / "out"
    words = [
        "quantize",
        str(tiny_model),
        "--method",
        "trellis",
        "--bits",
        "3.5",
        "--calibration-tokens",
        "256",
        "--fast",
    ]
    code, said, _ = run_command([*words, "--no-measure", "-o", str(out)])
    assert code == 0, said
    formats = formats_of(out)
    linear = {name: format for name, format in formats.items() if "proj" in name}
    assert all(format.startswith("trellis") for format in linear.values())
    assert len(set(linear.values())) > 1
    assert any(".5" in format for format in linear.values())  # half widths among them
    assert not any(format.startswith("trellis") for name, format in formats.items() if "embed" in name)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "trellis", "--bits", "3", "--dtype", "nf"], "has formats of its own: drop --dtype"),
        (["--method", "trellis", "--bits", "4", "--asym"], "has formats of its own: drop --asym"),
        (["--method", "trellis", "--format", "nf4-b64"], "use another method, or --format trellis4"),
        (["--method", "trellis", "--bits", "9"], "--bits 9: use 2 to 8"),
        (["--method", "trellis", "--bits", "2.25", "--uniform"], "--bits 2.25 mixes widths: drop --uniform"),
        (["--method", "trellis-plain", "--bits", "3.25", "--calibration-tokens", "256"], "needs gradients to weigh"),
        (["--method", "trellis", "--nested", "2..4"], "--method trellis: --nested 2..4 has every width"),
        (["--nested", "2..4", "--fast"], "--fast: --nested 2..4 has every width"),
        (["--nested", "2..4", "--asym"], "--asym: --nested 2..4 has every width"),
        (["--format", "trellis2.5", "--fast"], "write --format trellis2.5-l12 for both"),
        (["--method", "rtn", "--bits", "3", "--fast"], "--fast: is for --method trellis"),
        (["--method", "trellis", "--bits", "3", "--static-scales"], "drop --static-scales"),
        (["--method", "awq", "--format", "trellis3"], "formats of planes only"),
        (["--method", "rtn", "--format", "nf4-b64", "--bits", "4"], "says everything; drop --bits"),
        (["--method", "rtn", "--bits", "4", "--override", "*embed_tokens*=trellis4"], "not looked up one by one"),
        (["--method", "rtn", "--format", "trellis3-sum2"], "write trellis3"),
        (["--method", "rtn", "--format", "trellis2.25"], "or trellis2.5 to trellis5.5"),
    ],
)
def test_what_cannot_be_is_said(tmp_path: Path, tiny_model: Path, words: list[str], said: str) -> None:
    code, _, err = run_command(["quantize", str(tiny_model), *words, "-o", str(tmp_path / "out")])
    assert code == 2
    assert said in err
