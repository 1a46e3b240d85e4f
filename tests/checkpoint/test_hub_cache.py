"""Without a connection, what the hub's cache holds is used: of the kinds that its own library does not find."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_model_cases import Model

from kbit.checkpoint.resolve import open_model
from kbit.host.errors import KbitError, UsageError
from kbit.host.notes import KbitNote

COMMITS = ("1" * 40, "2" * 40)


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None) -> Path:
    """The cache's folder of org/name, with revision main and no files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    storage = tmp_path / "hub" / "models--org--name"
    (storage / "refs").mkdir(parents=True)
    (storage / "refs" / "main").write_text(COMMITS[0])
    (storage / "snapshots" / COMMITS[0]).mkdir(parents=True)
    return storage


def opened(model: str, path: Path) -> None:
    with pytest.warns(KbitNote, match=f"{model}: the hub could not be reached; {path} of its cache is used"):
        source = open_model(model)
    with source:
        assert source.path == path


def test_one_gguf_file(storage: Path) -> None:
    snapshot = storage / "snapshots" / COMMITS[0]
    Model().write(snapshot / "m.gguf")
    opened("org/name", snapshot / "m.gguf")
    assert open_model("org/name:m.gguf").path == snapshot / "m.gguf"  # the hub's own library finds it


def test_several_gguf_files(storage: Path) -> None:
    for name in "ab":
        Model().write(storage / "snapshots" / COMMITS[0] / f"{name}.gguf")
    with pytest.raises(UsageError, match="org/name: holds 2 GGUF files; name one, for example org/name:a.gguf"):
        open_model("org/name")
    assert open_model("org/name:a.gguf").path.name == "a.gguf"


@pytest.mark.parametrize("model", ["org/name", "org/name:m.gguf"])
def test_a_revision_that_main_does_not_name(storage: Path, model: str) -> None:
    """Fetched by the hash of its commit, say: the ref may name another, which is empty."""
    snapshot = storage / "snapshots" / COMMITS[1]
    snapshot.mkdir()
    Model().write(snapshot / "m.gguf")
    shutil.rmtree(storage / "snapshots" / COMMITS[0])
    opened(model, snapshot / "m.gguf")


def test_a_folder_whose_listing_names_more(storage: Path, tiny_model: Path) -> None:
    """Of a repository of which only what is needed was fetched: its library calls that incomplete."""
    snapshot = storage / "snapshots" / COMMITS[0]
    shutil.copytree(tiny_model, snapshot, dirs_exist_ok=True)
    from huggingface_hub import snapshot_download

    listing = pytest.importorskip("huggingface_hub._tree_cache")  # what a download leaves there
    entry = listing.TreeCacheEntry(size=1, blob_id="b", lfs_sha256=None, lfs_size=None, xet_hash=None)
    names = [*(path.name for path in tiny_model.iterdir()), "merges.txt"]
    listing.write_tree_cache(str(storage), COMMITS[0], dict.fromkeys(names, entry))
    with pytest.raises(OSError, match="incomplete|missing"):
        snapshot_download("org/name", allow_patterns=["*.safetensors", "*.json", "merges.txt"])
    opened("org/name", snapshot)


@pytest.mark.parametrize("make", [lambda storage: None, lambda storage: shutil.rmtree(storage / "refs")])
def test_a_cache_without_the_model(storage: Path, make: Callable[[Path], object]) -> None:
    make(storage)
    (storage / "snapshots" / COMMITS[0] / "README.md").write_text("nothing else")
    for model in ("org/other", "org/other:m.gguf"):
        with pytest.raises(KbitError, match="not a local path, and the hub could not be reached"):
            open_model(model)


def test_part_of_a_split_file(storage: Path) -> None:
    Model().write(storage / "snapshots" / COMMITS[0] / "m-00001-of-00002.gguf")
    with pytest.raises(KbitError, match="the hub could not be reached"):
        open_model("org/name")


def test_where_nobody_answers(tmp_path: Path) -> None:
    """Not offline by a setting, but without a connection: the same, and without minutes of trying again."""
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / COMMITS[0]
    snapshot.mkdir(parents=True)
    Model().write(snapshot / "m.gguf")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMITS[0])
    # Nobody listens on the port of "discard" of this machine.
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment.pop("HF_HUB_OFFLINE", None)
    code = "import sys; from kbit.cli.main import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "info", "org/name"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("kbit: note: org/name: the hub could not be reached; ")
    assert "m.gguf" in result.stdout
