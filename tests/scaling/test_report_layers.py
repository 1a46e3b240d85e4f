"""kbit info --plot: errors and sensitivity of every matrix, and their picture."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from error_cases import check_line, run_command

from kbit.backends.reference.backend import ReferenceBackend
from kbit.checkpoint.resolve import open_model
from kbit.cli.layer_picture import parse_formats
from kbit.evaluate.compare import compare
from kbit.evaluate.sensitivity import measure_sensitivity, noise_kl
from kbit.formats.quant_format import QuantFormat
from kbit.host.errors import KbitError, UsageError
from kbit.models.load import load_decoder
from kbit.quantizers.plan import make_plan
from kbit.quantizers.rtn import QuantizedView
from kbit.scaling.report.layer_plots import check_picture_path
from kbit.scaling.report.layers import linear_rows, measure_errors, with_sensitivity
from kbit.text.datasets import resolve_data
from kbit.text.tokenizer import Tokenizer
from kbit.text.windows import Windows, make_windows

pytestmark = pytest.mark.usefixtures("one_thread")

NF4 = QuantFormat("nf", 4, 64)


@pytest.fixture(scope="module")
def novels(data_dir: Path) -> tuple[Path, Path]:
    """The smallest real model, and a text it has not seen."""
    return data_dir / "models" / "novels-0.7m", data_dir / "novels" / "heldout" / "Doyle_Hound_1902.txt"


def windows_of(model: Path, text: Path, tokens: int) -> Windows:
    with open_model(str(model)) as source:
        return make_windows(resolve_data(str(text)), Tokenizer.from_source(source), "gptq", 256, tokens)


def test_sensitivity_is_what_noise_in_a_matrix_does(novels: tuple[Path, Path]) -> None:
    """Against the definition: noise in one matrix at a time. Both sides are estimates: theirs of one draw of noise (some
    percent, as matrices have thousands of weights), ours with the standard error it reports."""
    model, text = novels
    windows = windows_of(model, text, 1024)
    with open_model(str(model)) as source:
        found = measure_sensitivity(source, windows, probes=4)
        chosen = [found[index] for index in (2, 4, 6, len(found) - 4, len(found) - 1)]
        tried = noise_kl(source, windows, [entry.name for entry in chosen], energy=1e-3)
    for entry, kl in zip(chosen, tried, strict=True):
        assert entry.stderr is not None
        assert abs(kl / 1e-3 - entry.kl_per_error) < 5 * entry.stderr + 0.1 * entry.kl_per_error, entry.name
    values = np.array([entry.kl_per_error for entry in found])
    assert values.max() > 10 * values.min()  # there is something to see in the map


def test_sensitivities_and_errors_predict_what_quantizing_costs(novels: tuple[Path, Path]) -> None:
    """The sum of sensitivity times error over matrices is the whole model's KL divergence, at errors as small as these."""
    model, text = novels
    windows = windows_of(model, text, 2048)
    with open_model(str(model)) as source:
        rows = measure_errors(source, linear_rows(source), [NF4])
        rows = with_sensitivity(rows, measure_sensitivity(source, windows))
        predicted = sum(row.damage(str(NF4)) or 0.0 for row in rows)
        backend = ReferenceBackend()
        view = QuantizedView(source, make_plan(source, NF4))
        measured = compare(load_decoder(view, backend), load_decoder(source, backend), windows).kl_mean
    assert predicted == pytest.approx(measured, rel=0.2)


def test_sensitivity_is_the_fisher_trace(write_model: Callable[..., Path], tmp_path: Path) -> None:
    """Of a model small enough for the exact trace: one backward pass per logit, weights as leaves of torch's own graph."""
    model = write_model(tmp_path / "m", hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=257)
    ids = np.array([[3, 70, 200]])
    windows = Windows("gptq", ids, 0, 3)
    with open_model(str(model)) as source:
        found = {entry.name: entry for entry in measure_sensitivity(source, windows, probes=400)}
        weights = {name: source.read(name) for name in source.tensors}
    exact = exact_traces(weights, torch.from_numpy(ids[:, :-1]), list(found))
    for name, trace in exact.items():
        weight = weights[name]
        expected = 0.5 * float(weight.square().mean()) * trace / 2
        assert found[name].kl_per_error == pytest.approx(expected, rel=0.15), name


def exact_traces(weights: dict[str, torch.Tensor], ids: torch.Tensor, names: list[str]) -> dict[str, float]:
    """Sum over positions of tr(J^T (diag p - p p^T) J) for each matrix, by transformers' Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=True,
        attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).float()
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    parameters = dict(model.named_parameters())
    logits = model(ids).logits[0]  # (T, V)
    traces = dict.fromkeys(names, 0.0)
    for row in logits:
        p = torch.softmax(row.detach(), dim=0)
        chosen = [parameters[name] for name in names]
        outer = [torch.zeros_like(weight) for weight in chosen]
        for index in range(len(row)):
            gradients = torch.autograd.grad(row[index], chosen, retain_graph=True)
            for name, gradient, total in zip(names, gradients, outer, strict=True):
                traces[name] += float(p[index] * gradient.square().sum())
                total += p[index] * gradient
        for name, total in zip(names, outer, strict=True):
            traces[name] -= float(total.square().sum())
    return traces


def test_errors_are_those_of_the_weights(tiny_model: Path) -> None:
    with open_model(str(tiny_model)) as source:
        rows = measure_errors(source, linear_rows(source), [NF4, QuantFormat("int", 8, 32)])
        assert len(rows) == 14
        assert [row.layer for row in rows] == [0] * 7 + [1] * 7
        plan = make_plan(source, NF4)
        view = QuantizedView(source, plan)
        for row in rows:
            weight = source.read(row.name)
            error = float((view.read(row.name) - weight).square().sum() / weight.square().sum())
            assert row.errors["nf4-b64"] == pytest.approx(error, rel=1e-5)
            assert row.errors["int8-b32"] < row.errors["nf4-b64"]
            assert row.bits_per_weight == 16
            assert row.damage("nf4-b64") is None


def test_a_reference_of_another_shape_is_named(tiny_model: Path, small_model: Path) -> None:
    with open_model(str(tiny_model)) as source, open_model(str(small_model)) as other:
        rows = linear_rows(source)
        with pytest.raises(UsageError, match=r"_proj\.weight is .*--reference"):
            measure_errors(source, rows, (), other)


def test_command_draws_and_reports(novels: tuple[Path, Path], tmp_path: Path) -> None:
    model, text = str(novels[0]), str(novels[1])
    page = tmp_path / "layers.html"
    flags = ["--plot", str(page), "--bits", "3,4", "--data", text, "--max-tokens", "512"]
    code, out, error = run_command(["info", model, *flags, "--json"])
    assert code == 0, error
    plot = json.loads(out)["plot"]
    assert plot["formats"] == ["nf3-b64", "nf4-b64"]
    assert "510 tokens in 2 windows" in plot["text"]
    assert plot["notes"] == []
    assert plot["kl_predicted"]["nf3-b64"] > 3 * plot["kl_predicted"]["nf4-b64"] > 0
    total = sum(row["kl_per_error"] * row["errors"]["nf4-b64"] for row in plot["matrices"])
    assert plot["kl_predicted"]["nf4-b64"] == pytest.approx(total)
    html = page.read_text()
    assert html.count("<svg") == 1
    assert html.count("<td") >= 10 * len(plot["matrices"])


def test_command_compares_a_conversion_with_its_original(tiny_model: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "out", tmp_path / "layers.svg"
    flags = ["--bits", "3", "--override", "*.down_proj.weight=int8-b64"]
    assert run_command(["quantize", str(tiny_model), "--method", "rtn", "-o", str(out), *flags])[0] == 0
    code, text, error = run_command(
        ["info", str(out), "--plot", str(picture), "--reference", str(tiny_model), "--data", "none", "--json"]
    )
    assert code == 0, error
    rows = {row["kind"]: row for row in json.loads(text)["plot"]["matrices"]}
    assert rows["mlp.down_proj"]["errors"]["stored"] < 1e-3 < rows["mlp.up_proj"]["errors"]["stored"]
    assert ET.fromstring(picture.read_bytes()).tag.endswith("svg")
    code, text, _ = run_command(["info", str(out), "--plot", str(tmp_path / "x.png"), "--data", "none"])
    assert code == 0
    assert "--reference" in text  # says why there are no errors to show
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plot", "x.txt"], ".png, .svg or .html"),
        (["--bits", "4"], "--plot"),
        (["--data", "none"], "--plot"),
        (["--plot", "x.png", "--bits", "4,,"], "--bits"),
        (["--plot", "x.png", "--bits", "9"], "9 bits"),
        (["--plot", "x.png", "--bits", "nf4-b7"], "block size 7"),
        (["--plot", "x.png", "--bits", "4", "--reference", "x"], "choose one"),
        (["--plot", "x.png", "--max-tokens", "1"], "--max-tokens"),
        (["--plot", "x.png", "--data", "/no/such/text"], "no such file"),
    ],
)
def test_wrong_flags_are_named(tiny_model: Path, flags: list[str], message: str) -> None:
    code, out, error = run_command(["info", str(tiny_model), *flags])
    assert code == 2
    assert message in check_line(out, error)
    assert not Path("x.png").exists()


def test_a_picture_needs_a_model(tmp_path: Path) -> None:
    code, out, error = run_command(["info", "--plot", str(tmp_path / "x.png")])
    assert code == 2
    assert "name one" in check_line(out, error)


def test_without_a_text_the_picture_says_so(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(name: str) -> None:
        raise KbitError(f"the text {name} was not found")

    monkeypatch.setattr("kbit.text.datasets.resolve_data", nowhere)
    code, out, error = run_command(["info", str(tiny_model), "--plot", str(tmp_path / "x.png"), "--bits", "nf4-b32"])
    assert code == 0, error
    assert "no sensitivity: the text wikitext2 was not found" in out
    assert (tmp_path / "x.png").is_file()


def test_widths_and_formats_to_try() -> None:
    assert [str(format) for format in parse_formats("3, 4")] == ["nf3-b64", "nf4-b64"]
    assert [str(format) for format in parse_formats("7..8,nf4-b32,8")] == ["lloyd7-b64", "int8-b64", "nf4-b32"]
    for text in ("", "4..3", "0", "x", "3..400"):
        with pytest.raises(UsageError):
            list(parse_formats(text))


def test_picture_endings() -> None:
    assert check_picture_path(Path("a/B.PNG")) == "png"
    for name in ("a", "a.pdf", ".png"):
        with pytest.raises(UsageError, match=r"--plot"):
            check_picture_path(Path(name))
