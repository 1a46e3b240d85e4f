"""`kbit transcribe`: from files to texts, and what quantizing makes of a model that hears."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sound_cases as sounds
from command_cases import in_process
from scipy.io import wavfile

pytestmark = pytest.mark.usefixtures("one_thread")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whisper")
    sounds.saved_whisper(sounds.whisper(seed=1), folder)
    wavfile.write(folder / "short.wav", 16_000, sounds.sound(1.3))
    wavfile.write(folder / "long.wav", 16_000, sounds.sound(5.3))
    return folder


@pytest.fixture
def kbit(monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        return in_process(list(arguments), monkeypatch)

    return run


def report(kbit: Run, *arguments: str) -> Any:
    code, out, err = kbit(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_files_become_lines(kbit: Run, folder: Path) -> None:
    files = [str(folder / "short.wav"), str(folder / "long.wav")]
    more = ["--model", str(folder), "--language", "en", "--max-tokens", "12", "--compute", "fp32"]
    code, out, err = kbit("transcribe", *files, *more)
    assert code == 0
    assert "6.6 s of sound" in err
    found = report(kbit, "transcribe", *files, *more)["texts"]
    assert [" ".join(text["text"].split()) for text in found] == out.splitlines()
    assert [text["language"] for text in found] == ["en", "en"]
    assert found[1]["windows"] >= 3
    code, out, _ = kbit("transcribe", files[1], *more, "--timestamps")
    assert len(out.splitlines()) == len(found[1]["segments"])
    assert out.startswith("[")
    both = [report(kbit, "transcribe", files[0], *more, "--backend", name)["texts"] for name in ("native", "reference")]
    assert both[0] == both[1]


@pytest.mark.parametrize("bits", ["2", "3", "5", "8"])
def test_quantized_models_run_like_their_weights(kbit: Run, folder: Path, tmp_path: Path, bits: str) -> None:
    """Both stacks' matrices are quantized, the convolutions are not; both backends write the same."""
    out = str(tmp_path / "out")
    report(kbit, "quantize", str(folder), "--bits", bits, "--block-size", "16", "--method", "rtn", "-o", out)
    info = report(kbit, "info", out)
    assert (info["cannot_run"], info["encoder_layers"], info["layers"]) == (None, 3, 2)
    formats = {name: row["format"] for name, row in info["tensors"].items() if row["role"] == "linear"}
    assert len(formats) == 3 * 6 + 2 * 10
    assert all(kind.startswith(("int", "nf", "float", "lloyd")) for kind in formats.values())
    assert info["tensors"]["model.encoder.conv2.weight"]["format"] == "F32"
    texts = [
        report(kbit, "transcribe", str(folder / "short.wav"), "--model", out, "--max-tokens", "9", *more)["texts"]
        for more in (["--backend", "reference"], ["--compute", "fp32"])
    ]
    assert texts[0] == texts[1]
    code, text, _ = kbit("info", out)
    assert "Whisper" in text
    assert code == 0


def test_methods(kbit: Run, folder: Path, tmp_path: Path) -> None:
    """hqq needs no data; what is calibrated on text is refused, as this model reads none."""
    plain = ["quantize", str(folder)]
    code, _, err = kbit(*plain, "--method", "hqq", "--format", "int3-b16-asym", "-o", str(tmp_path / "hqq"))
    assert code == 0, err
    assert report(kbit, "transcribe", str(folder / "short.wav"), "--model", str(tmp_path / "hqq"), "--max-tokens", "3")
    text = tmp_path / "x.txt"
    text.write_text("w1 w2 w3 " * 400)
    code, _, err = kbit(*plain, "--calibration", str(text), "-o", str(tmp_path / "gptq"))
    assert code != 0
    assert "a whisper model reads sound, so it is not calibrated on text: use --method rtn or hqq" in err
    assert not (tmp_path / "gptq").exists()


def test_transformers_that_is_not_there(kbit: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = kbit("transcribe", str(folder / "short.wav"), "--model", str(folder))
    assert code == 2
    assert "transformers is not installed, which makes the features of sound: pip install 'kbit[audio]'" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["transcribe", "{0}/short.wav", "--model", "{0}", "--task", "sing"],
            "--task sing: use one of transcribe, translate",
        ),
        (
            ["transcribe", "{0}/short.wav", "--model", "{0}", "--language", "fr"],
            "--language fr: this model knows de, en",
        ),
        (["transcribe", "{0}/short.wav", "--model", "{0}", "--max-tokens", "0"], "--max-tokens 0: expected at least 1"),
        (["transcribe", "{0}/config.json", "--model", "{0}"], "no WAV file that can be read"),
        (["translate", "x", "--model", "{0}"], "a whisper model reads sound, and no text: use kbit transcribe"),
        (["run", "x", "--model", "{0}"], "use kbit transcribe"),
    ],
)
def test_what_is_refused(kbit: Run, folder: Path, arguments: list[str], message: str) -> None:
    code, out, err = kbit(*(argument.format(folder) for argument in arguments))
    assert code != 0
    assert message in err
    assert not out


def test_a_quantized_folder_keeps_what_is_said_of_features(kbit: Run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert kbit("quantize", str(folder), "--bits", "8", "--block-size", "16", "--method", "rtn", "-o", str(out))[0] == 0
    assert (out / "preprocessor_config.json").read_bytes() == (folder / "preprocessor_config.json").read_bytes()
    shutil.rmtree(out)
