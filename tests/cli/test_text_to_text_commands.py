"""`kbit translate`, `summarize`, and what other commands make of encoder-decoders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import encoder_decoder_cases as cases
import pytest
import torch
from command_cases import Run, report
from piece_cases import save_marian

from kbit.models.families import spec_from_config
from kbit.models.opening import open_model
from kbit.models.params import parameters

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = {"summarization": {"prefix": "summarize : ", "num_beams": 2, "max_length": 8}}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("encoder-decoders")
    cases.saved(cases.model_of("flan-t5"), root / "t5")
    cases.save_tokenizer(root / "t5", ["<pad>", "</s>", "<unk>"])
    path = root / "t5/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task_specific_params": TASKS}))
    cases.saved(cases.model_of("marian"), root / "marian")
    save_marian(root / "marian")
    return {name: str(root / name) for name in ("t5", "marian")}


def test_translations_from_anywhere_are_the_same(kbit: Run, folders: dict[str, str], tmp_path: Path) -> None:
    texts, model = ["the cat", "a mat"], ["--model", folders["marian"], "--max-tokens", "6", "--beams", "2"]
    found = report(kbit, "translate", *texts, *model, "--from", "en", "--to", "de")
    assert (found["beams"], found["max_tokens"], len(found["texts"])) == (2, 6, 2)
    assert all(text["finish_reason"] in ("stop", "length") for text in found["texts"])
    assert [text["source_tokens"] for text in found["texts"]] == [3, 3]
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(texts) + "\n")
    assert report(kbit, "translate", "--file", str(file), *model)["texts"] == found["texts"]
    assert report(kbit, "translate", *model, stdin=file.read_bytes())["texts"] == found["texts"]
    code, out, err = kbit("translate", *texts, *model)
    assert (code, out.splitlines()) == (0, [text["text"] for text in found["texts"]])
    assert "6 tokens read" in err
    assert "2 beams" in err


def test_widths_of_a_nested_model(kbit: Run, folders: dict[str, str], tmp_path: Path) -> None:
    out, pairs = str(tmp_path / "all"), tmp_path / "pairs.tsv"
    flags = ["--nested", "2..8", "--block-size", "16", "--method", "rtn", "-o", out]
    assert kbit("quantize", folders["marian"], *flags)[0] == 0
    texts = ["the cat", "a mat"]
    wide, narrow, widest = (
        [text["text"] for text in report(kbit, "translate", *texts, "--model", *model, "--max-tokens", "9")["texts"]]
        for model in ([out], [out, "--bits", "2"], [out, "--bits", "8"])
    )
    assert wide == widest != narrow
    pairs.write_text("the cat\tdie Katze\n")
    asked = ["eval", out, "--data", str(pairs), "--bits", "9"]
    translate, run = (["translate", *texts, "--model", out], ["run", "the cat", "--model", out])
    for command in ([*translate, "--bits", "9"], [*run, "--bits", "9"], asked):
        code, _, error = kbit(*command)
        assert (code, "serves 2 to 8 bits; choose one of these" in error) == (2, True), error


def test_summaries_and_run(kbit: Run, folders: dict[str, str]) -> None:
    """`run` reads the prompt as it is; `summarize` as the task of config.json says."""
    model = ["--model", folders["t5"]]
    summary = report(kbit, "summarize", "the cat sat on the mat", *model)
    assert (summary["beams"], summary["max_tokens"], summary["texts"][0]["source_tokens"]) == (2, 7, 9)
    assert report(kbit, "run", "the cat sat on the mat", *model)["texts"][0]["source_tokens"] == 7
    code, out, _ = kbit("run", "the cat", *model, "--max-tokens", "5")
    assert code == 0
    assert out.strip() == report(kbit, "run", "the cat", *model, "--max-tokens", "5")["texts"][0]["text"]


@pytest.mark.parametrize("bits", ["2", "3", "4", "8"])
def test_quantized_models_run_like_their_weights(kbit: Run, folders: dict[str, str], tmp_path: Path, bits: str) -> None:
    """Both stacks' matrices are quantized, and both backends write the same."""
    out = str(tmp_path / "out")
    made = report(
        kbit, "quantize", folders["marian"], "--bits", bits, "--block-size", "16", "--method", "rtn", "-o", out
    )
    info = report(kbit, "info", out)
    assert info["cannot_run"] is None
    assert (info["encoder_layers"], info["layers"], info["heads"], info["hidden_size"]) == (3, 2, 2, 32)
    linears = {name: row["format"] for name, row in info["tensors"].items() if row["role"] == "linear"}
    # 3 encoder layers of 6 matrices, 2 decoder layers of 10.
    assert len(linears) == 3 * 6 + 2 * 10
    assert all(kind.startswith(("int", "nf", "float", "lloyd")) for kind in linears.values())
    assert made["bits_per_weight"] < 32
    texts = [
        report(kbit, "translate", "the cat sat", "--model", out, "--max-tokens", "9", "--beams", "2", *more)["texts"]
        for more in (["--backend", "reference"], ["--compute", "fp32"])
    ]
    assert texts[0][0]["text"] == texts[1][0]["text"]


def test_quantizing_says_what_is_calibrated(
    kbit: Run, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing, or what goes in to the matrices while a text is read and another one written."""
    monkeypatch.setenv("KBIT_CALIBRATION", str(tmp_path / "kept"))
    text = tmp_path / "x.txt"
    text.write_text("the cat sat on the mat . " * 400)
    plain = ["quantize", folders["marian"], "--bits", "2", "--block-size", "16"]
    code, _, err = kbit(*plain, "-o", str(tmp_path / "plain"))
    assert code == 0, err
    assert "note: an encoder-decoder has no text of its own to calibrate on: method rtn" in err
    more = ["--calibration", str(text), "--calibration-tokens", "930"]
    code, _, err = kbit(*plain, *more, "-o", str(tmp_path / "gptq"))
    assert code == 0, err
    assert "note: an encoder-decoder is calibrated on inputs only: method gptq" in err
    changed = 0
    with open_model(str(tmp_path / "plain")) as plainly, open_model(str(tmp_path / "gptq")) as calibrated:
        for parameter in parameters(spec_from_config(plainly.config)):
            if parameter.role == "linear":
                name = parameter.name
                assert plainly.tensors[name].stored_as == calibrated.tensors[name].stored_as
                changed += not torch.equal(plainly.read(name), calibrated.read(name))
    assert changed == 3 * 6 + 2 * 10
    for method in (["--method", "gptq"], ["--method", "ldlq2", *more], ["--method", "awq", *more]):
        code, _, err = kbit(*plain, *method, "-o", str(tmp_path / "other"))
        assert code != 0
        assert "--inputs-only" in err
        assert not (tmp_path / "other").exists()


def test_narrow_caches(kbit: Run, folders: dict[str, str]) -> None:
    model = ["--model", folders["marian"], "--max-tokens", "9"]
    for kv in ("2", "4", "8,4"):
        assert report(kbit, "translate", "the cat", *model, "--kv-bits", kv)["texts"][0]["tokens"] > 0


def test_translating_on_the_cpu_needs_no_torch(folders: dict[str, str]) -> None:
    arguments = ["translate", "the cat", "--model", folders["marian"], "--max-tokens", "4", "--beams", "2"]
    code = (
        "import sys; from kbit.cli.main import _run\n"
        f"code = _run({arguments!r}, True)\n"
        "print(code, *{'torch', 'scipy', 'transformers', 'sacrebleu', 'rich'} & sys.modules.keys(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "0"


def test_pairs(kbit: Run, folders: dict[str, str], tmp_path: Path) -> None:
    """BLEU of what it writes against itself is 100, and sacrebleu's signature is told."""
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    model = ["--model", folders["marian"], "--max-tokens", "12"]
    sources = ["the cat sat on the mat", "a cat"]
    written = [text["text"] for text in report(kbit, "translate", *sources, *model, "--beams", "2")["texts"]]
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"{s}\t{t}\n" for s, t in zip(sources, written, strict=True)))
    flags = ["--beams", "2", "--max-tokens", "12"]
    found = report(kbit, "eval", folders["marian"], "--data", str(pairs), *flags)
    assert found["texts"] == written
    assert found["chrf"] == pytest.approx(100.0)
    assert found["rouge"]["rougeL"] == pytest.approx(100.0)
    assert "tok:13a" in found["signatures"]["bleu"]
    lines = tmp_path / "pairs.jsonl"
    lines.write_text(json.dumps({"source": sources[0], "references": ["no", written[0]]}) + "\n")
    other = report(kbit, "eval", folders["marian"], "--data", str(lines), *flags, "--task", "translation")
    assert (other["pairs"], other["chrf"]) == (1, pytest.approx(100.0))
    code, out, _ = kbit("eval", folders["marian"], "--data", str(pairs), *flags)
    assert code == 0
    assert "chrF:" in out
    assert "ROUGE:" in out


def test_remedies_work(kbit: Run, folders: dict[str, str]) -> None:
    model = ["--model", folders["marian"]]
    code, _, err = kbit("translate", "the " * 400, *model)
    assert code != 0
    assert "leave its end out with --long truncate" in err
    code, _, err = kbit("translate", "the " * 400, *model, "--long", "truncate", "--max-tokens", "2")
    assert code == 0
    assert "the end of 1 left out (text 1)" in err
    code, _, err = kbit("translate", "the", *model, "--max-tokens", "310")
    assert "use --max-tokens 309" in err
    assert kbit("translate", "the", *model, "--max-tokens", "309")[0] == 0
    code, out, _ = kbit("info", folders["marian"])
    assert "3 encoder and 2 decoder layers, hidden size 32, 2 heads" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["translate", "x", "--model", "{t5}"], "config.json describes no such translation"),
        (["translate", "x", "--model", "{marian}", "--to", "fr"], "this model translates to de only"),
        (["translate", "x", "--model", "{marian}", "--beams", "0"], "--beams 0: expected at least 1"),
        (["summarize", "x", "--model", "{marian}", "--max-tokens", "400"], "use --max-tokens 309"),
        (["summarize", "x", "--model", "{marian}", "--long", "cut"], "--long cut: use one of refuse, truncate"),
        (["run", "x", "--model", "{t5}", "--temperature", "1"], "--temperature: "),
        (["run", "x", "--model", "{t5}", "--chat"], "has no chat template"),
        (["chat", "--model", "{t5}"], "use kbit translate, kbit summarize or kbit run"),
        (["eval", "{t5}"], "kbit eval --data PAIRS.tsv"),
        (["eval", "{t5}", "--data", "none.tsv"], "none.tsv: cannot be read"),
        (["plan", "{t5}", "--memory", "1GiB"], "--dry-run prints what the weights take"),
        (
            ["export", "{t5}", "-o", "x", "--to", "compressed-tensors"],
            "t5 models are exported with --to safetensors only",
        ),
        (["export", "{t5}", "-o", "x.gguf", "--to", "gguf"], "cannot say that distances is 20"),
        (["embed", "x", "--model", "{t5}"], "encoder-decoder"),
        (["calibrate", "{t5}"], "--method gptq or search with --inputs-only and --calibration TEXT"),
    ],
)
def test_what_is_refused(kbit: Run, folders: dict[str, str], arguments: list[str], message: str) -> None:
    code, out, err = kbit(*(argument.format(**folders) for argument in arguments))
    assert code != 0, out
    assert message in err
    assert "internal error" not in err
