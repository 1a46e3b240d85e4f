"""`kbit embed`, `fill`, `classify`, `answer`, and what other commands make of encoders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import encoder_cases as cases
import numpy as np
import pytest
from command_cases import Run, report

from kbit.api.model import load

KINDS = {
    "embed": "Model",
    "fill": "ForMaskedLM",
    "label": "ForSequenceClassification",
    "words": "ForTokenClassification",
    "answer": "ForQuestionAnswering",
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model of each kind; that for embeddings as sentence-transformers saves it."""
    root = tmp_path_factory.mktemp("encoders")
    for kind, head in KINDS.items():
        cases.saved(cases.model_of("Bert", head), root / kind)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (root / "embed/modules.json").write_text(json.dumps(modules))
    (root / "embed/1_Pooling").mkdir()
    (root / "embed/1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (root / "embed/sentence_bert_config.json").write_text('{"max_seq_length": 8}')
    (root / "embed/config_sentence_transformers.json").write_text('{"prompts": {"query": "who ? "}}')
    return {kind: str(root / kind) for kind in KINDS}


@pytest.mark.parametrize("prepared", ["", "off"])
def test_widths_of_a_nested_encoder(
    kbit: Run, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: str
) -> None:
    """`kbit embed --bits 3` and `kbit.load(bits=3)` are 3 bits, as the reference has them; none of the file's other widths."""
    monkeypatch.setenv("KBIT_PREPARED", prepared or str(tmp_path / "prepared"))
    out = str(tmp_path / "all")
    flags = ["--nested", "2..4", "--block-size", "16", "--method", "rtn", "-o", out]
    assert kbit("quantize", folders["embed"], *flags)[0] == 0
    model = ["embed", "the cat", "--model", out, "--compute", "fp32"]
    found = {bits: report(kbit, *model, "--bits", bits)["embeddings"] for bits in ("2", "3", "4")}
    assert report(kbit, *model)["embeddings"] == found["4"]
    assert found["2"] != found["3"] != found["4"]
    exact = report(kbit, "embed", "the cat", "--model", out, "--backend", "reference", "--bits", "3")["embeddings"]
    cases.assert_near(np.array(found["3"]), np.array(exact))
    with load(out, bits=3, compute="fp32", threads=1) as made:
        np.testing.assert_allclose(made.embed("the cat").vectors, np.array(found["3"]), rtol=1e-6)
    for more in ([], ["--backend", "reference"]):
        code, _, error = kbit(*model[:-2], *more, "--bits", "5")
        assert (code, "serves 2 to 4 bits; choose one of these" in error) == (2, True), error


class TestEmbed:
    def test_texts_from_anywhere_are_the_same_vectors(self, kbit: Run, folders: dict[str, str], tmp_path: Path) -> None:
        texts, model = ["the cat", "a dog ran far away on the mat ."], ["--model", folders["embed"]]
        found = report(kbit, "embed", *texts, *model)
        assert (found["dimensions"], found["pooling"], found["normalized"]) == (32, ["mean"], True)
        assert (found["tokens"], found["truncated"], found["max_length"]) == ([4, 11], [1], 8)
        file = tmp_path / "lines.txt"
        file.write_text("\n".join(texts) + "\n")
        lines = file.read_bytes()
        assert report(kbit, "embed", "--file", str(file), *model)["embeddings"] == found["embeddings"]
        assert report(kbit, "embed", *model, stdin=lines)["embeddings"] == found["embeddings"]
        code, out, err = kbit("embed", *model, "--npy", str(tmp_path / "v.npy"), stdin=lines)
        assert (code, out) == (0, "")
        assert "1 cut to 8 tokens (text 2)" in err
        assert np.array_equal(np.load(tmp_path / "v.npy"), np.array(found["embeddings"], dtype=np.float32))
        code, out, err = kbit("embed", *texts, *model)
        rows = [[float(value) for value in line.split()] for line in out.splitlines()]
        assert np.allclose(rows, found["embeddings"], rtol=1e-6)

    def test_prompts_and_long_texts(self, kbit: Run, folders: dict[str, str]) -> None:
        model = ["--model", folders["embed"]]
        found = report(kbit, "embed", "the cat", "--prompt-name", "query", *model)
        assert found["prompt"] == "who ? "
        assert found["embeddings"] == report(kbit, "embed", "the cat", "--prompt", "who ? ", *model)["embeddings"]
        assert found["embeddings"] == report(kbit, "embed", "who ? the cat", *model)["embeddings"]
        long = "a dog ran far away on the mat ."
        assert report(kbit, "embed", long, "--long", "windows", *model)["in_windows"] == [0]
        assert report(kbit, "embed", long, "--max-length", "300", *model)["truncated"] == []

    def test_an_assumed_pooling_is_said(self, kbit: Run, folders: dict[str, str]) -> None:
        code, _, err = kbit("embed", "the cat", "--model", folders["fill"])
        assert code == 0
        assert "mean pooling (assumed: there is no modules.json)" in err
        assert report(kbit, "embed", "the cat", "--model", folders["fill"], "--pooling", "cls,max")["dimensions"] == 64


def test_fill(kbit: Run, folders: dict[str, str]) -> None:
    found = report(kbit, "fill", "the [MASK] sat on [MASK]", "--model", folders["fill"], "--top", "3")
    assert [len(row) for row in found["masked"]] == [3, 3]
    code, out, _ = kbit("fill", "-", "--model", folders["fill"], "--top", "3", stdin=b"the [MASK] sat on [MASK]\n")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "[MASK] 1"
    assert lines[1].split()[0] == f"{found['masked'][0][0]['probability']:.4f}"


def test_classify_texts_and_pairs(kbit: Run, folders: dict[str, str]) -> None:
    model = ["--model", folders["label"]]
    found = report(kbit, "classify", "the cat", "--pair", "a dog", "--pair", "who ?", *model)
    assert len(found["results"]) == 2
    assert found["results"][0]["scores"] != found["results"][1]["scores"]
    assert sum(found["results"][0]["scores"].values()) == pytest.approx(1.0)
    code, out, _ = kbit("classify", "the cat", *model)
    assert (code, out.split()[1]) == (0, report(kbit, "classify", "the cat", *model)["results"][0]["label"])


def test_classify_words(kbit: Run, folders: dict[str, str]) -> None:
    found = report(kbit, "classify", "the cats sat", "--model", folders["words"], "--aggregation", "none")
    assert [(one["start"], one["stop"]) for one in found["entities"][0]] == [(0, 3), (4, 7), (7, 8), (9, 12)]
    code, out, _ = kbit("classify", "the cats sat", "--model", folders["words"])
    assert (code, out.split()[1][:6]) == (0, "LABEL_")


def test_answer(kbit: Run, folders: dict[str, str], tmp_path: Path) -> None:
    context = "the cat sat on the mat . " * 20
    (tmp_path / "context.txt").write_text(context)
    flags = ["--model", folders["answer"], "--window", "40", "--overlap", "8"]
    found = report(kbit, "answer", "who sat ?", "--context", context, "--top", "2", *flags)
    assert found["windows"] > 1
    assert found["answers"][0]["text"] == context[found["answers"][0]["start"] : found["answers"][0]["stop"]]
    assert (
        report(kbit, "answer", "who sat ?", "--context", str(tmp_path / "context.txt"), *flags)["answers"]
        == (found["answers"][:1])
    )
    code, out, err = kbit("answer", "who sat ?", "-c", "-", *flags, stdin=context.encode())
    assert (code, err) == (0, f"read in {found['windows']} windows\n")
    assert out.endswith(f"  {found['answers'][0]['text']}\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["embed", "x", "--long", "cut"], 2, "--long cut: use one of truncate, windows, refuse"),
        (["embed", "x", "--prompt", "a", "--prompt-name", "b"], 2, "two ways to say one thing"),
        (["embed", "x", "--file", "y"], 2, "from the command line or from --file, not from both"),
        (["embed", "--file", "/nowhere/x"], 2, "/nowhere/x: cannot be read"),
        (["embed", " "], 2, "text 1 is empty"),
        (["embed"], 2, "standard input is empty"),
        (["embed", "x", "--pooling", "median"], 2, "pooling median: use one of cls, max"),
        (["embed", "x", "--prompt-name", "passage"], 2, "no prompt named 'passage': it has query"),
        (["embed", "x", "--npy", "/nowhere/x.npy"], 2, "/nowhere/x.npy: cannot be written"),
        (["embed", "the cat sat on the mat", "--max-length", "4", "--long", "refuse"], 2, "text 1 has 8 tokens"),
        (["fill", "x", "--top", "0"], 2, "--top 0: expected at least 1"),
        (
            ["fill", "x"],
            1,
            "has no head that predicts masked words: use a model whose architecture ends in ForMaskedLM",
        ),
        (["classify", "x"], 1, "has no head that gives labels"),
        (["classify", "x", "y", "--pair", "z"], 2, "2 texts and 1 --pair"),
        (["classify", "x", "--aggregation", "mean"], 2, "--aggregation mean: use one of none"),
        (["answer", "x", "--context", "y"], 1, "has no head that finds answers"),
        (["answer", " ", "--context", "y"], 2, "the question is empty"),
        (["answer", "x", "--context", " "], 2, "the context is empty"),
        (["answer", "x", "--context", "y", "--window", "4"], 2, "--window 4: expected at least 8"),
        (
            ["run", "x"],
            1,
            "predicts no next token, so it cannot go on with a text or be measured by that; use kbit embed",
        ),
    ],
)
def test_mistakes_are_named(kbit: Run, folders: dict[str, str], arguments: list[str], code: int, message: str) -> None:
    found, out, err = kbit(*arguments, "--model", folders["embed"])
    assert (found, out) == (code, "")
    assert message in err
    assert err.startswith("kbit: error: ")


def test_other_commands_name_encoders(kbit: Run, folders: dict[str, str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat .\n" * 50)
    code, _, err = kbit("scale", folders["fill"], "--bits", "4", "--data", str(text), "-o", str(tmp_path / "study"))
    assert code == 1
    assert "does not go on with texts" in err
    assert "and kbit eval OUT --tasks stsb --reference" in err
    code, out, err = kbit("quantize", folders["fill"], "--bits", "4", "--dry-run")
    assert code == 0, err
    assert "bits per weight" in out + err
    for command in (
        ["eval", folders["fill"], "--data", str(text)],
        ["calibrate", folders["fill"]],
        ["quantize", folders["fill"], "--method", "ldlq2", "-o", str(tmp_path / "out")],
        ["quantize", folders["fill"], "--method", "gptq", "-o", str(tmp_path / "out")],
    ):
        code, _, err = kbit(*command)
        assert code == 1
        assert "predicts no next token" in err


def test_plan_says_what_encoders_take(kbit: Run, folders: dict[str, str]) -> None:
    code, out, err = kbit("plan", folders["fill"], "--memory", "1GiB", "--no-speed", "--json", "--bits", "4,8")
    assert code == 0, err
    plan = json.loads(out)
    assert [row["kv"] for row in plan["choices"]] == ["fp32"] * 3
    sizes = [row["memory"]["linear"] for row in plan["choices"]]
    assert sizes == sorted(sizes, reverse=True)
    assert "eval MODEL --tasks stsb" in " ".join(plan["notes"])
    code, out, err = kbit("plan", folders["fill"], "--memory", "1GiB", "--no-speed")
    assert "an encoder; memory and tokens/s are of texts of" in out
    code, out, err = kbit("plan", folders["fill"], "--memory", "1KB", "--no-speed", "--json")
    assert "needs" in json.loads(out)["rejected"][0]["why"]


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq"])
def test_quantized_models_run(method: str, kbit: Run, folders: dict[str, str], tmp_path: Path) -> None:
    """With everything that stands beside the weights, also in folders of its own; at 8 bits results are nearly those of
    the original."""
    words = np.random.default_rng(2).choice([*cases.WORDS[:14], *"bcdefghijklmnop"], 8000)
    (tmp_path / "text.txt").write_text(" ".join(words))
    bits = ["--bits", "8", "--block-size", "16", *(["--asym"] if method == "hqq" else [])]
    if method == "gptq":
        bits += ["--calibration", str(tmp_path / "text.txt"), "--calibration-tokens", "6200", "--inputs-only"]
        bits += ["--embedding-bits", "16"]  # (6 bits are usual where matrices are calibrated)
    for kind, arguments in (("embed", ["embed", "the cat"]), ("label", ["classify", "the cat"])):
        out = str(tmp_path / kind)
        code, _, err = kbit("quantize", folders[kind], "--method", method, *bits, "-o", out)
        assert code == 0, err
        key = "embeddings" if kind == "embed" else "results"
        before, after = (report(kbit, *arguments, "--model", m)[key][0] for m in (folders[kind], out))
        if kind == "embed":
            assert float(np.dot(before, after)) > 0.99
        else:
            logits = np.array([before["logits"], after["logits"]])
            # (Random weights of this size amplify; int8 activations round, too. What a wrong matrix makes is 1 or more.)
            assert np.abs(logits[1] - logits[0]).max() < 0.25 * np.abs(logits).max()
    assert report(kbit, "embed", "the cat", "--model", str(tmp_path / "embed"))["normalized"] is True
    (tmp_path / "embed/1_Pooling/config.json").write_text('{"pooling_mode_cls_token": true}')
    code, _, err = kbit("embed", "the cat", "--model", str(tmp_path / "embed"))
    assert (code, "1_Pooling/config.json: changed since it was written" in err) == (1, True)


def test_the_method_of_encoders_is_said(kbit: Run, folders: dict[str, str], tmp_path: Path) -> None:
    code, out, err = kbit("quantize", folders["fill"], "-o", str(tmp_path / "out"), "--block-size", "16")
    assert code == 0
    assert "method rtn" in out
    assert err.startswith("kbit: note: an encoder writes no text to calibrate on: method rtn")
    code, out, _ = kbit("info", str(tmp_path / "out"))
    assert (code, "BertForMaskedLM" in out) == (0, True)
    assert len(report(kbit, "fill", "[MASK]", "--model", str(tmp_path / "out"))["masked"][0]) == 5


def test_the_cpu_engine_loads_no_torch(folders: dict[str, str]) -> None:
    for arguments in (
        ["embed", "the cat"],
        ["classify", "the cat"],
        ["fill", "[MASK]"],
        ["answer", "who ?", "-c", "a"],
    ):
        kind = "label" if arguments[0] == "classify" else arguments[0]
        code = (
            "import sys; from kbit.cli.main import _run\n"
            f"code = _run({[*arguments, '--model', folders[kind], '--json']!r}, True)\n"
            "print(code, *{'torch', 'scipy', 'transformers', 'rich'} & sys.modules.keys(), file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
        assert done.stderr.splitlines()[-1] == "0"
