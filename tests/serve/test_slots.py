"""Slots over HTTP: saved by one server, restored by another, and who asks for what is not there is told so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from error_cases import run_command
from serve_cases import error_of, serving
from starlette.testclient import TestClient

TEXT = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. " * 4


def complete(client: TestClient, prompt: str, slot: int) -> Any:
    body = {"prompt": prompt, "id_slot": slot, "n_predict": 8, "temperature": 0}
    response = client.post("/completion", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def act(client: TestClient, number: int, action: str, filename: str | None = None) -> Any:
    return client.post(f"/slots/{number}?action={action}", json={"filename": filename})


def test_a_slot_outlives_its_server(novels_folder: str, tmp_path: Path) -> None:
    with serving(("novels", Path(novels_folder)), seats=4, slot_folder=tmp_path) as client:
        first = complete(client, TEXT, 1)
        length = first["timings"]["prompt_n"]
        assert complete(client, TEXT, 2)["timings"]["prompt_n"] == length
        saved = act(client, 1, "save", "story.bin").json()
        assert (saved["id_slot"], saved["filename"], saved["n_saved"]) == (1, "story.bin", length + 7)
        assert saved["n_written"] == (tmp_path / "story.bin").stat().st_size
        assert act(client, 1, "erase").json() == {"id_slot": 1, "n_erased": length + 7}
        assert complete(client, TEXT, 1)["timings"]["prompt_n"] == length
    with serving(("novels", Path(novels_folder)), seats=4, slot_folder=tmp_path) as client:
        restored = act(client, 3, "restore", "story.bin").json()
        assert (restored["n_restored"], restored["n_read"]) == (saved["n_saved"], saved["n_written"])
        again = complete(client, TEXT, 3)
        assert again["content"] == first["content"]
        assert again["timings"]["prompt_n"] == 1
        turn = TEXT + first["content"] + " But"
        on = complete(client, turn, 3)
        assert on["timings"]["cache_n"] > length
        assert on["content"] == complete(client, turn, 0)["content"]
        refused(client, tmp_path)


def refused(client: TestClient, folder: Path) -> None:
    for name in ("", "..", "a/b", "/etc/passwd", ".hidden", "a\\b", "x.tmp", "n" * 300, "a\x07"):
        assert "give a file's name" in error_of(act(client, 0, "save", name), 400)["message"]
    half = b'{"filename": "\\ud800"}'  # of a character
    error_of(client.post("/slots/0?action=save", content=half, headers={"content-type": "application/json"}), 400)
    assert "slots 0 to 3" in error_of(act(client, 4, "save", "x"), 400)["message"]
    message = error_of(client.post("/completion", json={"prompt": "a", "id_slot": 4}), 400)["message"]
    assert message == "slot 4: this server has slots 0 to 3 (--parallel)"
    assert "slot 2 is empty" in error_of(act(client, 2, "save", "x"), 400)["message"]
    missing = error_of(act(client, 0, "restore", "none"), 400)["message"]
    assert missing.startswith("none: cannot be read")
    whole = (folder / "story.bin").read_bytes()
    (folder / "half").write_bytes(whole[: len(whole) // 2])
    assert "is damaged" in error_of(act(client, 0, "restore", "half"), 400)["message"]
    assert client.post("/slots/0?action=burn", json={}).status_code in (400, 422)
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("slot", [None, -1])
def test_requests_without_a_slot_share_with_each_other(novels_folder: str, tmp_path: Path, slot: int | None) -> None:
    with serving(("novels", Path(novels_folder)), slot_folder=tmp_path) as client:
        body = {"prompt": TEXT, "n_predict": 1, "id_slot": slot}
        found = [client.post("/completion", json=body).json()["timings"]["prompt_n"] for _ in range(2)]
        assert found[0] > found[1] == 1


def test_a_folder_that_is_not_there_is_refused(novels_folder: str, tmp_path: Path) -> None:
    code, _, error = run_command(["serve", novels_folder, "--slot-save-path", str(tmp_path / "no"), "--port", "0"])
    assert code == 2
    assert f"--slot-save-path {tmp_path / 'no'}: is no folder: make it first (mkdir)" in error.replace("\n", " ")
