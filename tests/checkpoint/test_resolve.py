"""From what a user types to an open model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from kbit.checkpoint.hub import gguf_parts
from kbit.checkpoint.readers.hf_folder import SIDECAR_NAMES, HFFolder
from kbit.checkpoint.readers.kbit_folder import KbitFolder
from kbit.checkpoint.resolve import open_model
from kbit.formats.quant_format import QuantFormat
from kbit.host.errors import CheckpointError, KbitError, UnsupportedError, UsageError
from kbit.quantizers.convert import convert
from kbit.quantizers.plan import make_plan


def refused(model: str, message: str, kind: type[KbitError]) -> None:
    with pytest.raises(kind, match=message) as caught:
        open_model(model)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


# --- paths -----------------------------------------------------------------------------------------------------------


def test_folders_are_told_apart(tmp_path: Path, tiny_model: Path) -> None:
    with open_model(str(tiny_model)) as source:
        assert type(source) is HFFolder
        convert(source, make_plan(source, QuantFormat.parse("nf4-b64")), tmp_path / "out")
    with open_model(str(tmp_path / "out")) as source:
        assert type(source) is KbitFolder


def test_ways_to_write_a_path(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_model, tmp_path / "org" / "name")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    # An existing folder wins over a hub id of the same spelling.
    for text in (
        "org/name",
        "./org/name",
        "org/name/",
        "org/../org/name",
        "~/org/name",
        str(tmp_path / "org" / "name"),
    ):
        open_model(text).close()
    monkeypatch.chdir(tmp_path / "org" / "name")
    open_model(".").close()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("", "the model's name is empty"),
        (" \t\n", "the model's name is empty"),
        ("no-such-thing", r"no-such-thing: no such folder or file, and not a name kbit knows \(smollm2-135m"),
        ("./org/name", "no such folder or file"),
        ("../x", "no such folder or file"),
        ("/nowhere/model", "no such folder or file"),
        ("~/nowhere/model", "no such folder or file"),
        ("~no-such-user-here/model", "no such folder or file"),
        ("models/out.gguf", "no such folder or file"),
        ("a/b/c", "no such folder or file"),
        ("org/name:weights.bin", "no such folder or file"),
        ("org/na me", "no such folder or file"),
        ("with\0nul", "no such folder or file"),
    ],
)
def test_what_is_not_there(model: str, message: str) -> None:
    refused(model, message, UsageError)


def test_a_path_that_is_too_long() -> None:
    refused("x" * 5000, "cannot be opened .File name too long", CheckpointError)


def test_an_empty_folder(tmp_path: Path) -> None:
    refused(str(tmp_path), "no config.json", CheckpointError)


def test_a_folder_with_one_gguf_file_stands_for_it(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    refused(str(tmp_path), r"a\.gguf: truncated", CheckpointError)
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    refused(str(tmp_path), r"holds 2 GGUF files; name one, for example .*a\.gguf", UsageError)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "x.pkl"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
    refused(str(tmp_path / name), "looks like a pickle, .* convert them to safetensors once", UnsupportedError)


def test_a_safetensors_file_needs_its_folder(tiny_model: Path) -> None:
    refused(str(tiny_model / "model.safetensors"), "name the folder that holds it", UsageError)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello, this is no model at all, whatever you may think")
    refused(str(tmp_path / "notes.txt"), r"notes\.txt: not a GGUF file", CheckpointError)


def test_catalogue_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name opens the cached file, and pulls it where it is not there."""
    asked = []

    def pull(name: str) -> Path:
        asked.append(name)
        (tmp_path / "m.gguf").write_bytes(b"not")
        return tmp_path / "m.gguf"

    monkeypatch.setattr("kbit.checkpoint.pull.pull", pull)
    refused("smollm2-135m-instruct", r"m\.gguf", CheckpointError)
    assert asked == ["smollm2-135m-instruct"]


# --- the hub, which no test reaches ----------------------------------------------------------------------------------


def test_a_hub_id_without_a_network(tmp_path: Path) -> None:
    code = "import sys; from kbit.checkpoint.resolve import open_model\nopen_model(sys.argv[1])"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    for model in ("org/name", "org/name:model.gguf"):
        arguments = [sys.executable, "-c", code, model]
        result = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 1
        last = result.stderr.splitlines()[-1]
        assert last.startswith(
            f"kbit.host.errors.KbitError: {model}: not a local path, and the hub could not be reached ("
        )
        assert last.endswith("download it elsewhere and pass the folder")


class FakeResponse:
    """As much of an HTTP response as the hub's errors want to see."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.status_code = 404
        self.request = None


def hub_raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)


class ConnectError(Exception):
    pass


ConnectError.__module__ = "httpx._exceptions"


@pytest.mark.parametrize(
    ("make", "message", "kind"),
    [
        (lambda: GatedRepoError("401", response=FakeResponse()), "restricted; ask for it on its page", KbitError),
        (
            lambda: RepositoryNotFoundError("404", response=FakeResponse()),
            "neither a local path nor a model on the hub",
            UsageError,
        ),
        (lambda: HfHubHTTPError("500\nServer Error", response=FakeResponse()), r"not be reached \(500\)", KbitError),
        (lambda: OfflineModeIsEnabled("offline"), r"not be reached \(offline\)", KbitError),
        (lambda: ConnectionResetError(104, "Connection reset"), "not be reached .*Connection reset", KbitError),
        (lambda: OSError(28, "No space left on device"), "No space left on device", KbitError),
        (lambda: ConnectError("no route"), r"not be reached \(ConnectError\)", KbitError),
    ],
)
@pytest.mark.parametrize("model", ["org/name", "org/name:m.gguf"])
def test_what_the_hub_says(
    monkeypatch: pytest.MonkeyPatch, model: str, make: Callable[[], Exception], message: str, kind: type[KbitError]
) -> None:
    hub_raises(monkeypatch, make())
    refused(model, f"{model}: .*{message}", kind)


def test_bugs_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_raises(monkeypatch, ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        open_model("org/name")


@pytest.mark.parametrize("model", ["org/name..x", "org/name--x", "org/-name", "org/" + "x" * 200])
def test_impossible_hub_ids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str) -> None:
    """The hub's library checks names before it asks anyone."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(model, "not a possible hub id", UsageError)


def test_a_downloaded_folder_is_opened(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    wanted = ["config.json", *weights, *SIDECAR_NAMES]
    unwanted = [
        *("README.md", ".gitattributes", "params.json", "modeling_custom.py", "pytorch_model.bin", "model.gguf"),
        *("consolidated.safetensors", "consolidated.00.pth", "original/consolidated.00.pth", "original/params.json"),
        *("onnx/model.onnx", "onnx/config.json", "sub/model.safetensors", "sub/sub/tokenizer.json"),
    ]
    hub_serves(monkeypatch, tiny_model, [*wanted, *unwanted], fetched := [])
    with open_model("org/name") as source:
        assert source.path == tiny_model
    assert sorted(fetched) == sorted(wanted)


def hub_serves(monkeypatch: pytest.MonkeyPatch, folder: Path, files: list[str], fetched: list[str]) -> None:
    """A repository that holds `files`, already downloaded to `folder`; notes what the hub's own filter lets through."""

    def download(repository: str, allow_patterns: list[str], ignore_patterns: list[str] | None = None) -> str:
        assert repository == "org/name"
        fetched.extend(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)

    def info(api: object, repository: str) -> SimpleNamespace:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", info)


def test_a_repository_of_gguf_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = ["README.md", "a.gguf", "b.gguf"]
    hub_serves(monkeypatch, tmp_path, files, fetched := [])
    refused("org/name", "org/name: holds 2 GGUF files; name one, for example org/name:a.gguf", UsageError)
    assert fetched == []
    files.remove("b.gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    refused("org/name", r"a\.gguf: truncated", CheckpointError)
    assert fetched == ["a.gguf"]
    files.remove("a.gguf")
    (tmp_path / "a.gguf").unlink()
    refused("org/name", "no config.json", CheckpointError)
    refused("org/name:a.gguf", "org/name:a.gguf: there is no a.gguf in this repository", UsageError)


@pytest.mark.parametrize(
    "model", ["org/name", "org/name:Q4/m-00001-of-00003.gguf", "org/name:Q4/m-00003-of-00003.gguf"]
)
def test_all_parts_of_a_split_gguf_file_are_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str
) -> None:
    parts = [f"Q4/m-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    hub_serves(monkeypatch, tmp_path, ["config.json", *parts, "Q4/m-00001-of-00002.txt"], fetched := [])
    (tmp_path / "Q4").mkdir()
    for part in parts:
        (tmp_path / part).write_bytes(b"GGUF")
    refused(model, r"Q4/m-00001-of-00003\.gguf: truncated", CheckpointError)  # the first part, whichever was named
    assert [name for name in fetched if name != "config.json"] == parts
    (tmp_path / parts[1]).unlink()
    refused(model, "there is no Q4/m-00002-of-00003.gguf in this repository", UsageError)


@pytest.mark.parametrize("name", ["m.gguf", "m-00000-of-00002.gguf", "m-00003-of-00002.gguf", "m-1-of-2.gguf"])
def test_what_is_no_part_stands_alone(name: str) -> None:
    assert gguf_parts(name) == [name]
