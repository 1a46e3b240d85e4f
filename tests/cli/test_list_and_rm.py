"""`kbit list` and `kbit rm`: what is found where, and that nothing goes but what was put there."""

from __future__ import annotations

import json
import mmap
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command_cases import in_process
from gguf_model_cases import Model

from kbit.calibration.store import CalibrationFolder
from kbit.checkpoint.prepared_place import prepared_path
from kbit.host.mapped_files import processes_that_map
from kbit.models.opening import open_model

COMMIT = "1" * 40


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder kbit wrote. Not to be changed."""
    from error_cases import run_command

    out = tmp_path_factory.mktemp("written") / "out"
    code, _, error = run_command(["quantize", str(tiny_model), "--method", "rtn", "--bits", "4", "-o", str(out)])
    assert code == 0, error
    return out


@pytest.fixture
def here(tmp_path: Path, written: Path, monkeypatch: pytest.MonkeyPatch, no_network: None) -> Path:
    """The current folder, with out/ that kbit wrote, and empty caches."""
    folder = tmp_path / "here"
    shutil.copytree(written, folder / "out")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("KBIT_PREPARED", str(tmp_path / "prepared"))
    for module in ("constants", "utils._cache_manager"):
        monkeypatch.setattr(f"huggingface_hub.{module}.HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


def in_hub(tmp_path: Path, name: str) -> Path:
    """The snapshot of an empty repository in the hub's cache."""
    storage = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    (storage / "refs").mkdir(parents=True)
    (storage / "refs" / "main").write_text(COMMIT)
    snapshot = storage / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (storage / "blobs").mkdir()
    return snapshot


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, error = in_process(["run", "Hi", "--model", name, "--max-tokens", "1", "--json"], monkeypatch)
    assert code == 0, error


def listed(monkeypatch: pytest.MonkeyPatch, *folders: str) -> dict[str, dict[str, Any]]:
    code, out, error = in_process(["list", *folders, "--json"], monkeypatch)
    assert (code, error) == (0, "")
    return {model["name"]: model for model in json.loads(out)["models"]}


def test_models_are_found_where_they_are(
    here: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model, here / "plain")
    (here / "broken").mkdir()
    (here / "broken" / "config.json").write_text("{")
    (here / "broken" / "model.safetensors").write_bytes(b"")
    (here / "not-a-model").mkdir()
    Model().write(here / "m.gguf")
    one, several = in_hub(tmp_path, "org/one"), in_hub(tmp_path, "org/several-files")
    shutil.copytree(tiny_model, one, dirs_exist_ok=True)
    for name in "ab":
        Model().write(several / f"{name}.gguf")
    models = listed(monkeypatch)
    places = {name: model["place"] for name, model in models.items()}
    hub = dict.fromkeys(("org/one", "org/several-files:a.gguf", "org/several-files:b.gguf"), "hub")
    assert places == {**dict.fromkeys(("out", "plain", "broken", "m.gguf"), "folder"), **hub}
    assert models["plain"]["family"] == models["out"]["family"] == "llama"
    assert models["plain"]["parameters"] == models["out"]["parameters"]
    assert models["plain"]["bits_per_weight"] == 16 > models["out"]["bits_per_weight"] > 4
    assert models["plain"]["bytes"] == sum(file.stat().st_size for file in tiny_model.iterdir())
    assert "config.json" in models["broken"]["error"]
    code, out, error = in_process(["list", str(here)], monkeypatch)
    assert code == 0
    assert out.split()[0] == "model"
    assert len(out.splitlines()) == 1 + len(models)
    assert "broken: cannot be read: " in error


def test_what_was_used_last_comes_first(here: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_model, here / "plain")
    assert {model["last_used"] for model in listed(monkeypatch).values()} == {None}
    for name in ("plain", "out"):
        use(name, monkeypatch)
        assert next(iter(listed(monkeypatch))) == name
    before = listed(monkeypatch)["plain"]
    assert before["prepared_bytes"] > 0
    use("plain", monkeypatch)  # mapped, not made
    after = listed(monkeypatch)
    assert next(iter(after)) == "plain"
    assert after["plain"]["last_used"] > before["last_used"]


def test_a_folder_kbit_wrote_goes_with_what_was_prepared(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use("out", monkeypatch)
    prepared = prepared_path(here / "out")
    assert prepared is not None
    assert prepared.is_file()
    code, out, error = in_process(["rm", "out", "--yes"], monkeypatch)
    assert (code, error) == (0, "")
    assert out.startswith("removed out (a folder kbit wrote): ")
    assert not (here / "out").exists()
    assert not prepared.exists()


def test_calibrations_go_with_their_model(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBIT_CALIBRATION", str(tmp_path / "calibration"))
    with open_model("out") as source:
        own = source.fingerprint()
    for name, model in (("one", own), ("two", own), ("others", "0" * 64)):
        CalibrationFolder(tmp_path / "calibration" / name, {"model": model, "request": {"tokens": 64}})
        (tmp_path / "calibration" / name / "layer-00000.safetensors").write_bytes(bytes(1000))
    (tmp_path / "calibration" / "broken").mkdir()
    (tmp_path / "calibration" / "broken" / "calibration.json").write_text("{")
    code, out, error = in_process(["rm", "out", "--yes", "--json"], monkeypatch)
    assert (code, error) == (0, "")
    removed = json.loads(out)["removed"]["out"]
    assert removed["calibrations"] == 2
    assert removed["bytes"] > 2000
    assert sorted(path.name for path in (tmp_path / "calibration").iterdir()) == ["broken", "others"]
    assert not (here / "out").exists()


def test_what_else_is_in_the_folder_stays(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "config.json").write_text("mine")
    (here / "out" / "notes.txt").write_text("mine")
    (here / "out" / "1_Pooling").symlink_to(tmp_path / "precious")
    manifest = here / "out" / "kbit-manifest.json"
    said = json.loads(manifest.read_text())
    said["files"]["1_Pooling/config.json"] = "0" * 64
    manifest.write_text(json.dumps(said))
    code, out, _ = in_process(["rm", "out", "--yes", "--json"], monkeypatch)
    assert code == 0
    assert "notes.txt" in json.loads(out)["removed"]["out"]["stays"]
    assert sorted(path.name for path in (here / "out").iterdir()) == ["1_Pooling", "notes.txt"]
    assert (tmp_path / "precious" / "config.json").read_text() == "mine"


@pytest.mark.parametrize("name", ["../precious.txt", "/etc/hostname", "a/b/c", ".."])
def test_a_manifest_that_names_files_elsewhere(here: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "precious.txt").write_text("mine")
    manifest = here / "out" / "kbit-manifest.json"
    manifest.write_text(json.dumps({"version": 1, "tensors": {}, "files": {"config.json": "", name: ""}}))
    code, _, error = in_process(["rm", "out", "--yes"], monkeypatch)
    assert code == 1
    assert "remove it by hand" in error
    assert (here / "precious.txt").exists()
    assert (here / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("plain", "there is no kbit-manifest.json here"),
        ("m.gguf", "there is no kbit-manifest.json here"),
        ("link", "is a symbolic link: name the folder"),
        ("org/other", "the hub's cache does not hold it"),
        ("smollm2-135m-instruct", "is not on this machine"),
        ("nothing there", "kbit list shows names"),
        ("", "the model's name is empty"),
    ],
)
def test_what_is_not_kbits_is_refused(
    here: Path, tiny_model: Path, name: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model, here / "plain")
    Model().write(here / "m.gguf")
    (here / "link").symlink_to(here / "out")
    before = sorted(here.rglob("*"))
    code, _, error = in_process(["rm", "out", name, "--yes"], monkeypatch)
    assert code == 2
    assert why in error
    assert len(error.splitlines()) == 1
    assert sorted(here.rglob("*")) == before  # out neither


def test_a_repository_of_the_hub(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = in_hub(tmp_path, "org/one")
    blob = snapshot.parents[1] / "blobs" / "abc"
    Model().write(blob)
    (snapshot / "m.gguf").symlink_to(blob)
    other = in_hub(tmp_path, "org/other")
    Model().write(other / "m.gguf")
    code, _, error = in_process(["rm", "org/one:m.gguf", "--yes"], monkeypatch)
    assert code == 2
    assert error.rstrip().endswith("kbit rm org/one")
    code, out, _ = in_process(["rm", "org/one", "--yes"], monkeypatch)
    assert code == 0
    assert "1 file" in out
    assert not snapshot.parents[1].exists()
    assert listed(monkeypatch).keys() == {"out", "org/other"}


def test_nobody_to_ask(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, error = in_process(["rm", "out"], monkeypatch)
    assert code == 2
    assert "give --yes" in error
    assert (here / "out" / "config.json").exists()


@contextmanager
def mapping(file: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has a file mapped."""
    code = (
        "import mmap, sys\nfile = open(sys.argv[1], 'rb')\nkept = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "print('mapped', flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mapped\n"
        yield process
        process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who has a file mapped")
def test_a_model_that_is_in_use(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = here / "out" / "model.safetensors"
    with mapping(file) as process:
        code, _, error = in_process(["rm", "out", "--yes"], monkeypatch)
        assert code == 1
        assert f"process {process.pid} (" in error
        assert file.exists()
    assert in_process(["rm", "out", "--yes"], monkeypatch)[0] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who has a file mapped")
def test_who_has_a_file_mapped(tmp_path: Path) -> None:
    file = tmp_path / "a file with spaces"
    file.write_bytes(b"x" * mmap.PAGESIZE)
    assert processes_that_map([file]) == {}
    with mapping(file) as process:
        found = processes_that_map([tmp_path / "another", file])
        assert found.keys() == {process.pid}
        assert "mmap" in found[process.pid]
    assert processes_that_map([file], proc=tmp_path / "no proc") == {}
