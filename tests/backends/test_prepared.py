"""Prepared weights in a mapped file: the same bits, never stale, never half-written, and errors instead of crashes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conversion_cases import quantize
from fault_cases import Recorder, put, some

from kbit._native import Context
from kbit.backends.cpu import prepared_writing
from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.cpu.prepared import PreparedSource, find
from kbit.backends.cpu.prepared_writing import make
from kbit.checkpoint.prepared_place import forget
from kbit.checkpoint.resolve import open_model
from kbit.engine.loader import LoadedModel, load_model
from kbit.host.errors import CheckpointError
from kbit.models.families import spec_from_config
from kbit.models.load import load_decoder
from kbit.text.tokenizer import Tokenizer

IDS = [1, 5, 9, 2, 7, 30, 4]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where prepared weights go in this test."""
    monkeypatch.setenv("KBIT_PREPARED", str(tmp_path / "prepared"))
    return tmp_path / "prepared"


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    """A checkpoint of its own, to be changed."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def load(model: Path) -> LoadedModel:
    return load_model(str(model), threads=1)


def logits(loaded: LoadedModel) -> np.ndarray:
    decoder = loaded.decoder
    return np.array(decoder.extend(IDS, decoder.new_cache(1, 16), last_only=False))


def plain_logits(model: Path) -> np.ndarray:
    """Of weights that were prepared in memory."""
    with open_model(str(model)) as source:
        decoder = load_decoder(source, NativeBackend(1))
    return np.array(decoder.extend(IDS, decoder.new_cache(1, 16), last_only=False))


@pytest.mark.parametrize("format", [None, "nf4-b64-dq", "int3-b32-asym", "lloyd6-b64", "int8-row-bf16"])
def test_the_same_bits(folder: Path, model: Path, tmp_path: Path, format: str | None) -> None:
    if format is not None:
        quantize(model, tmp_path / "out", format)
        model = tmp_path / "out"
    expected = plain_logits(model)
    first, second = load(model), load(model)
    assert first.prepared == second.prepared
    assert first.prepared is not None
    assert first.prepared.parent == folder
    np.testing.assert_array_equal(logits(first), expected)
    np.testing.assert_array_equal(logits(second), expected)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [first.prepared.name, first.prepared.with_suffix(".used").name]  # no lock, no leftovers


def test_dead_at_any_call(folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed, or without power, while weights are prepared: the next run computes the same with what it finds."""
    folder.mkdir()
    recorder = Recorder(folder)
    recorder.run(lambda: load(model))
    expected = plain_logits(model)
    images = [*recorder.killed(), *recorder.power_cuts()]
    assert len(images) > 10
    made = 0
    for index, tree in enumerate(some(images, 16)):
        place = tmp_path / str(index)
        put(tree, place)
        before = {path.name for path in place.iterdir()}
        monkeypatch.setenv("KBIT_PREPARED", str(place))
        loaded = load(model)
        np.testing.assert_array_equal(logits(loaded), expected)
        assert loaded.prepared is not None
        made += loaded.prepared.name not in before
        left = {path.name for path in place.iterdir() if path.suffix not in (".lock", ".used")}
        assert left == {loaded.prepared.name}
    assert made


def test_a_changed_checkpoint_is_prepared_again(folder: Path, model: Path) -> None:
    before = load(model).prepared
    config = model / "config.json"
    config.write_text(config.read_text() + " ")
    after = load(model).prepared
    assert before != after
    assert [path for path in folder.iterdir() if path.suffix == ".kbit"] == [after]  # the old one is gone


def test_a_file_put_in_the_place_of_another_is_noticed(folder: Path, model: Path) -> None:
    """Same name, size and time, another inode: what `cp -p` and rsync make."""
    before = load(model).prepared
    weights = next(model.glob("*.safetensors"))
    status = weights.stat()
    shutil.copyfile(weights, model / "copy")
    os.replace(model / "copy", weights)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert load(model).prepared != before


def test_switched_off(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBIT_PREPARED", "off")
    loaded = load(model)
    assert loaded.prepared is None
    np.testing.assert_array_equal(logits(loaded), plain_logits(model))


def test_no_place_to_write(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KBIT_PREPARED", str(tmp_path / "file" / "folder"))
    assert load(model).prepared is None


def test_no_room(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_writing, "_SPARE_BYTES", 1 << 60)
    assert load(model).prepared is None
    assert not list(folder.glob("*.kbit"))


@pytest.mark.parametrize("damage", ["empty", "short", "index", "pointer", "magic"])
def test_a_damaged_file_is_made_again(folder: Path, model: Path, damage: str) -> None:
    file = load(model).prepared
    assert file is not None
    data = bytearray(file.read_bytes())
    if damage == "empty":
        data = bytearray()
    elif damage == "short":
        del data[-100:]
    elif damage == "index":
        data[-10] ^= 1
    elif damage == "pointer":
        data[8:16] = (1 << 62).to_bytes(8, "little")
    else:
        data[0] ^= 1
    file.write_bytes(bytes(data))
    np.testing.assert_array_equal(logits(load(model)), plain_logits(model))


def test_an_index_that_points_outside(folder: Path, model: Path) -> None:
    """Hostile numbers with a right checksum: refused by name."""
    load(model)
    source = find(model)
    assert source is not None
    name, entry = next(iter(source._matrices.items()))
    for change in (
        {"rows": 1 << 40},
        {"begins": [1 << 50, 0, 0, 0]},
        {"begins": [4097, 0, 0, 0]},
        {"bits": 9},
        {"kind": "x"},
    ):
        source._matrices[name] = {**entry, **change}
        with pytest.raises(CheckpointError, match="prepared weights are damaged"):
            source.prepared_weight(name)
    vector = next(iter(source._vectors))
    source._vectors[vector] = [0, 1 << 60]
    with pytest.raises(CheckpointError, match="prepared weights are damaged"):
        source.prepared_vector(vector)


@pytest.mark.skipif(sys.platform == "win32", reason="a mapped file is read whole there")
def test_a_file_that_changes_while_it_is_used_is_an_error(folder: Path, model: Path) -> None:
    loaded = load(model)
    assert loaded.prepared is not None
    logits(loaded)
    with loaded.prepared.open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        logits(loaded)


@pytest.mark.skipif(sys.platform == "win32", reason="a mapped file is read whole there")
def test_a_file_that_shrinks_while_it_is_used_is_an_error(folder: Path, model: Path) -> None:
    """In a process of its own: without the guard the system would end it (SIGBUS)."""
    load(model)
    code = (
        "import sys, os; from kbit.engine.loader import load_model\n"
        "loaded = load_model(sys.argv[1], threads=2)\n"
        "os.truncate(loaded.prepared, 4096)\n"
        "try:\n    loaded.decoder.extend([1, 2, 3], loaded.decoder.new_cache(1, 8))\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.split()[0]) == (0, "CheckpointError"), result.stderr


def test_two_processes_make_it_at_once(folder: Path, model: Path) -> None:
    code = (
        "import sys; from kbit.engine.loader import load_model\n"
        "loaded = load_model(sys.argv[1], threads=1)\n"
        "print(loaded.prepared, loaded.decoder.extend([1, 2, 3], loaded.decoder.new_cache(1, 8)).tobytes().hex())\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(model)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert outputs[0] == outputs[1] != ""
    assert len([path for path in folder.iterdir() if path.suffix == ".kbit"]) == 1


def test_forgetting(folder: Path, model: Path) -> None:
    file = load(model).prepared
    assert file is not None
    size = file.stat().st_size
    assert forget(model) == size
    assert not file.exists()
    assert forget(model) == 0


def test_what_was_prepared_of_a_checkpoint_that_is_gone_goes_too(folder: Path, model: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    shutil.copytree(model, gone)
    orphan = load(gone).prepared
    assert orphan is not None
    shutil.rmtree(gone)
    kept = load(model).prepared
    assert [path for path in folder.iterdir() if path.suffix == ".kbit"] == [kept]


def test_not_a_number_is_named(folder: Path, model: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = next(model.glob("*.safetensors"))
    tensors = load_file(path)
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds \d+ NaN and 0 infinite values"):
        load(model)
    assert not list(folder.glob("*.kbit"))


def prepare(model: Path) -> PreparedSource:
    """Prepares a model without running it."""
    with open_model(str(model)) as source:
        names = spec_from_config(source.config).expected_tensors()
        made = make(source, model, names, Context(None, 1))
    assert made is not None
    return made


def test_the_tokenizer_is_prepared_too(folder: Path, model: Path) -> None:
    source = prepare(model)
    with open_model(str(model)) as original:
        plain = Tokenizer.from_source(original)
    assert dict(source.sidecar_files()) == {"tokenizer.json": (model / "tokenizer.json").read_bytes()}
    assert source.token_table() is not None
    source._files.clear()  # tokenizer.json is not asked for
    tokenizer = Tokenizer.from_source(source)
    assert tokenizer.encode("Hello there, é漢") == plain.encode("Hello there, é漢")
    assert tokenizer.has_vocabulary_of(plain)
    source._table = [4096, 1 << 60]
    with pytest.raises(CheckpointError, match="prepared weights are damaged"):
        source.token_table()


def test_a_tokenizer_that_no_table_holds(folder: Path, model: Path) -> None:
    state = json.loads((model / "tokenizer.json").read_bytes())
    state["decoder"] = None
    (model / "tokenizer.json").write_text(json.dumps(state))
    source = prepare(model)
    assert source.token_table() is None
    assert Tokenizer.from_source(source).decode([1, 2])  # by tokenizer.json
