"""A reference's logits in a file: what is read is what was computed, and a killed run's windows are taken up or redone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conversion_cases import Usage

from kbit.backends.select import select_backend
from kbit.checkpoint.resolve import open_model
from kbit.evaluate.logits import Evaluable, LogitsSource, ModelLogits, logits_bytes
from kbit.evaluate.shared_logits import SharedLogits, WritingLogits, logits_complete
from kbit.graph.backend import Backend
from kbit.host.errors import KbitError
from kbit.models.load import load_decoder
from kbit.text.windows import Windows, cut_windows


@pytest.fixture(scope="module")
def windows() -> Windows:
    ids = np.random.default_rng(1).integers(0, 260, 4 * 48).tolist()
    return cut_windows(ids, "llamacpp", 48)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Iterator[Evaluable]:
    backend: Backend = select_backend("cpu", backend="native", compute="fp32", threads=1)
    with open_model(str(tiny_model)) as source:
        yield load_decoder(source, backend)


class Counted:
    """A model that counts its passes, and refuses to compute once it has had enough."""

    def __init__(self, model: Evaluable, most: int = 1000) -> None:
        self._model, self._most = model, most
        self.spec, self.new_cache, self.passes = model.spec, model.new_cache, 0

    def forward(
        self, ids: torch.Tensor, cache: object, lengths: object = None, last_only: bool = False
    ) -> torch.Tensor:
        self.passes += not last_only
        if self.passes > self._most:
            raise InterruptedError
        return self._model.forward(ids, cache, last_only=last_only)  # type: ignore[arg-type]


def everything(source: LogitsSource, windows: Windows) -> list[list[torch.Tensor]]:
    return [list(source.window(windows, index)) for index in range(windows.count)]


def same(ours: list[list[torch.Tensor]], theirs: list[list[torch.Tensor]]) -> bool:
    return all(
        len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(ours, theirs, strict=True)
    )


def write(model: Evaluable, windows: Windows, path: Path) -> int:
    """Passes it took to write, or go on writing, the file."""
    counted = Counted(model)
    with WritingLogits(counted, windows, path) as writing:  # type: ignore[arg-type]
        everything(writing, windows)
    return counted.passes


def test_readers_see_what_was_computed(model: Evaluable, windows: Windows, tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.logits"
    expected = everything(ModelLogits(model), windows)
    assert not logits_complete(path, windows)
    with WritingLogits(model, windows, path) as writing:
        assert same(everything(writing, windows), expected)
        assert same(everything(writing, windows), expected)  # again, from the file
    assert path.stat().st_size == logits_bytes(windows, 260) == 4 * windows.scored * 260
    assert logits_complete(path, windows)
    assert same(everything(SharedLogits(windows, 260, path), windows), expected)
    assert {file.suffix for file in path.parent.iterdir()} == {".logits", ".done"}  # which kbit scale removes


def test_goes_on_where_a_killed_run_stopped(model: Evaluable, windows: Windows, tmp_path: Path) -> None:
    path = tmp_path / "a.logits"
    with pytest.raises(InterruptedError), WritingLogits(Counted(model, 2), windows, path) as writing:  # type: ignore[arg-type]
        everything(writing, windows)
    assert not logits_complete(path, windows)
    with pytest.raises(KbitError, match="not there"):
        SharedLogits(windows, 260, path)
    assert write(model, windows, path) == windows.count - 2
    assert same(everything(SharedLogits(windows, 260, path), windows), everything(ModelLogits(model), windows))
    assert write(model, windows, path) == 0


@pytest.mark.parametrize("damage", ["a flipped bit", "a cut line", "nonsense in the list", "another size", "no list"])
def test_damaged_windows_are_computed_again(model: Evaluable, windows: Windows, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.logits"
    write(model, windows, path)
    done = path.with_suffix(".done")
    again = windows.count
    if damage == "a flipped bit":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        again = 1
    elif damage == "a cut line":
        done.write_text(done.read_text()[:-3])
        again = 1
    elif damage == "nonsense in the list":
        done.write_text("0 zero\n-1 5\n77 1\n\n" + done.read_text().split("\n", 1)[1])
        again = 1
    elif damage == "another size":
        path.write_bytes(path.read_bytes()[:-4])
    else:
        done.unlink()
    assert write(model, windows, path) == again
    assert same(everything(SharedLogits(windows, 260, path), windows), everything(ModelLogits(model), windows))


def test_a_full_disk(model: Evaluable, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 0))
    with pytest.raises(KbitError, match="free"):
        WritingLogits(model, windows, tmp_path / "a.logits")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be(model: Evaluable, windows: Windows, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KbitError, match="cannot be kept"):
        WritingLogits(model, windows, tmp_path / "file" / "a.logits")


def test_files_of_other_windows_are_refused(model: Evaluable, windows: Windows, tmp_path: Path) -> None:
    path = tmp_path / "a.logits"
    write(model, windows, path)
    with pytest.raises(KbitError, match="not there"):
        SharedLogits(windows, 261, path)
    fewer = Windows(windows.convention, windows.ids[:2], windows.first_scored, windows.stream_tokens)
    with pytest.raises(KbitError, match="not there"):
        SharedLogits(fewer, 260, path)
    with pytest.raises(ValueError, match="windows"):
        list(SharedLogits(windows, 260, path).window(fewer, 0))
