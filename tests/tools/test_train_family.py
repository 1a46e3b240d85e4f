"""tools/train_family.py as a command: a training that is killed and goes on, the folder it leaves, what it refuses."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

# Before the rest of ours: it puts tools/ where Python looks.
from train_family_cases import TOOLS, losses
from train_family_cases import texts as texts

# isort: split
import train.run
import train_family
from train.run import Step

from kbit.host.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")


def command(texts: Path, out: Path, *more: str) -> list[str]:
    """A run of the tool that takes seconds."""
    options = ["64x96x2", "--corpus", str(texts), "--out", str(out), "--vocabulary", "300", "--context", "32"]
    return [*options, "--tokens", "4k", "--batch", "4", "--threads", "1", "--precision", "fp32", *more]


def test_a_family(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several sizes share the tokenizer and the tokens; the next time all of it is there."""
    arguments = ["32x48x1", *command(texts, tmp_path / "out", "--json")]
    assert train_family.main(arguments) == 0
    printed = capsys.readouterr()
    models = json.loads(printed.out)["models"]
    assert [Path(model["folder"]).name for model in models] == [f"{texts.name}-32x48x1", f"{texts.name}-64x96x2"]
    assert printed.err.count("tokenising") == printed.err.count("training a tokenizer of 300 tokens") == 1
    for model in models:
        assert model["training_tokens"] == 4096
        assert (Path(model["folder"]) / "tokenizer.json").read_bytes() == (tmp_path / "out/tokenizer.json").read_bytes()
    assert train_family.main(arguments) == 0
    again = capsys.readouterr()
    assert json.loads(again.out)["models"] == models
    assert "step" not in again.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith("tokens-")) == sorted(
        [f"{texts.name}-32x48x1", f"{texts.name}-64x96x2", "tokenizer.json"]
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process that is sent these")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop(
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    """The step is finished, what was done stays, and the next time only the rest is done."""
    told = train_family.Reporter.__call__
    seen: list[int] = []

    def report(self: train_family.Reporter, step: Step) -> None:
        seen.append(step.number)
        if seen == [1, 2, 3, 4, 5]:
            signal.raise_signal(number)
        told(self, step)

    monkeypatch.setattr(train_family.Reporter, "__call__", report)
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    assert train_family.main(command(texts, tmp_path, "--name", "m")) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: stopped after step 5: the same command goes on")
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert train_family.main(command(texts, tmp_path, "--name", "m")) == 0
    assert seen == list(range(1, 33))
    assert len(losses(tmp_path / "m-64x96x2")) == 32


def test_without_text_the_novels(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new size joins the family that is there: its text, its held-out text, its tokenizer."""
    arguments = train_family.make_parser().parse_args(["0.3m", "--out", "x"])
    monkeypatch.setenv("KBIT_DATA", str(data_dir))
    corpus, heldout, tokenizer = train_family.choose_texts(arguments)
    assert corpus.is_file()
    assert tokenizer == data_dir / "models" / "novels-2m" / "tokenizer.json"
    recorded = json.loads((data_dir / "models" / "novels-2m" / "training.json").read_text())
    assert {path.stem for path in heldout[0].glob("*.txt")} == set(recorded["heldout"])
    monkeypatch.delenv("KBIT_DATA")
    with pytest.raises(UsageError, match="give --corpus"):
        train_family.choose_texts(arguments)


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--tokens", "many"], 2, "--tokens many"),
        (["--tokens", "0"], 2, "--tokens 0"),
        (["--context", "1"], 2, "context 1"),
        (["--context", "100000"], 2, "too few for windows of 100000"),
        (["--batch", "0"], 2, "batch 0"),
        (["--learning-rate", "2"], 2, "--learning-rate 2.0"),
        (["--learning-rate", "nan"], 2, "--learning-rate nan"),
        (["--name", "../up"], 2, "--name '../up'"),
        (["--threads", "0"], 2, "--threads 0"),
        (["--checkpoint-seconds", "-1"], 2, "--checkpoint-seconds -1.0"),
        (["--vocabulary", "100"], 2, "--vocabulary 100"),
        (["--heldout", "missing.txt"], 2, "missing.txt: no such file"),
        (["--tokenizer", "missing.json"], 1, "missing.json"),
        (["--corpus", "missing"], 2, "missing: no such file"),
    ],
)
def test_what_it_refuses(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: int, message: str
) -> None:
    assert train_family.main(command(texts, tmp_path / "out", *more)) == code
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("error: ")
    assert not list(tmp_path.glob("out/*x*x*/config.json"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_family.main(command(texts, tmp_path, "--device", "cuda")) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (b"{}", 1, "the tokenizer cannot be read"),
        (json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}).encode(), 2, "to stand between"),
    ],
)
def test_tokenizers_that_do_not_do(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, code: int, message: str
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    arguments = command(texts, tmp_path / "out", "--tokenizer", str(tmp_path / "tokenizer.json"))
    assert train_family.main(arguments) == code
    assert message in capsys.readouterr().err


class Terminal(io.StringIO):
    """Standard error as it is on a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal one line that changes; elsewhere a line every half minute; both tell the time left."""
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        reporter = train_family.Reporter("novels-2m", 100, 4096)
        for number in range(1, 101):
            reporter(Step(number, 7 - number / 50, 2.0 * number, 5.5 if number == 50 else None))
        text = stream.getvalue()
        lines = text.split("\r\x1b[K")[1:] if stream.isatty() else text.splitlines()
        assert len(lines) == (100 if stream.isatty() else 8)
        expected = "novels-2m: step 76 of 100, loss 5.480, held out 5.500, 2,048 tokens/s, 0.8 min left"
        assert expected in [line.strip() for line in lines]
        assert text.endswith("\n")


# The real thing


# The tool, as if killed at the worst moment: after 30 steps are in the log, before the checkpoint of the last is in place.
KILLED_AT_STEP_30 = """
import os, sys
sys.path.insert(0, sys.argv[1])
import train.run, train_family

replace, saved = os.replace, []

def replace_29_times(source, target):
    if os.path.basename(target) == train.run.CHECKPOINT:
        saved.append(target)
        if len(saved) == 30:
            os._exit(99)
    replace(source, target)

os.replace = replace_29_times
train_family.main(sys.argv[2:])
"""


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(str(argument) for argument in arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


@pytest.fixture(scope="module")
def trained(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model trained without a break, one that was killed on the way, and the held-out text.

    On two novels; of the third the beginning is held out.
    """
    folder = tmp_path_factory.mktemp("novels")
    (folder / "heldout").mkdir()
    heldout = folder / "heldout" / "Doyle_Hound_1902.txt"
    heldout.write_bytes((data_dir / "novels" / "heldout" / heldout.name).read_bytes()[:20_000].replace(b"\r", b""))
    arguments = ["64x128x2", "--name", "novels", "--corpus", str(data_dir / "novels" / "heldout"), "--tokens", "120k"]
    arguments += ["--heldout", str(heldout.parent), "--vocabulary", "512", "--context", "64", "--batch", "16"]
    arguments += ["--threads", "1"]
    model, partial = folder / "broken" / "novels-64x128x2", folder / "broken" / "novels-64x128x2.partial"
    broken = [*arguments, "--out", str(folder / "broken")]
    killed = python("-c", KILLED_AT_STEP_30, TOOLS, *broken, "--checkpoint-seconds", "0")
    assert killed.returncode == 99, killed.stderr
    assert not model.exists()
    assert (partial / train.run.LOG).read_bytes().count(b"\n") == 30
    finished = python(TOOLS / "train_family.py", *broken, "--json")
    assert finished.returncode == 0, finished.stderr
    assert "going on after step 29 of" in finished.stderr
    assert json.loads(finished.stdout)["models"][0]["folder"] == str(model)
    assert train_family.main([*arguments, "--out", str(folder / "whole")]) == 0
    return folder / "whole" / model.name, model, heldout


def test_killed_and_continued(trained: tuple[Path, Path, Path]) -> None:
    """The same losses at every step, and the same weights, as if it had not been killed."""
    whole, broken, _ = trained
    assert len(losses(whole)) == 118
    for name in (train.run.LOG, "model.safetensors", "tokenizer.json", "config.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    assert not broken.with_name(broken.name + ".partial").exists()
    assert losses(whole)[-1] < 0.8 * losses(whole)[0]


def test_kbit_and_transformers_agree_on_it(trained: tuple[Path, Path, Path]) -> None:
    """The folder means one thing: logits of both, and of the model that was trained."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    from kbit.engine.loader import load_model
    from kbit.evaluate.logits import ModelLogits
    from kbit.text.windows import cut_windows

    _, folder, heldout = trained
    text = heldout.read_text()[:2000]
    model = load_model(str(folder), backend="reference")
    ids = model.tokenizer.encode(text)[:64]
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"][:64] == ids
    assert model.tokenizer.decode(ids) in text
    with torch.no_grad():
        theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0, :-1]
    windows = cut_windows(ids, "gptq", len(ids))
    ours = torch.cat(list(ModelLogits(model.decoder).window(windows, 0)))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_heldout_loss_is_what_eval_says(
    trained: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from kbit.cli.main import _run

    _, folder, heldout = trained
    record = json.loads((folder / "training.json").read_text())
    assert record["heldout"] == ["Doyle_Hound_1902"]
    capsys.readouterr()
    arguments = ["eval", str(folder), "--data", str(heldout), "--context", "64", "--compute", "fp32", "--json"]
    assert _run(arguments, debug=True) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == record["heldout_tokens"]
    assert np.log(result["perplexity"]) == pytest.approx(record["heldout_nll_per_token"], abs=1e-4)
