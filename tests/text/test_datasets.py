"""Evaluation texts: files, names, downloads, and what can be wrong with each."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from kbit.host.errors import KbitError, UsageError
from kbit.text import datasets
from kbit.text.datasets import NAMED_TEXTS, HubArchive, NamedText, read_text_file, resolve_data
from kbit.text.wikitext import (
    WIKITEXT2_TEST_SHA256,
    looks_like_wikitext,
    restore_wikitext2_test,
    wikitext_rows,
)

OFFICIAL = " \n = A Title = \n \n First paragraph . \n Second one . \n \n = = Section = = \n \n Third . \n"


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the machine's data folder, cache, or network."""
    monkeypatch.delenv("KBIT_DATA", raising=False)
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _no_network)


def _no_network(*args: object, **kwargs: object) -> str:
    raise LocalEntryNotFoundError("no connection\nsecond line")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _one_line(error: BaseException) -> str:
    text = str(error)
    assert text
    assert "\n" not in text
    return text


class TestFiles:
    def test_a_file_is_read_as_it_stands(self, tmp_path: Path) -> None:
        file = tmp_path / "text.txt"
        file.write_bytes("Grüße,\n\nWelt.\n".encode())
        data = resolve_data(str(file))
        assert data.text == "Grüße,\n\nWelt.\n"
        assert data.layout == "plain"
        assert data.sha256 == _digest(file.read_bytes())
        assert data.origin == str(file)
        assert data.note is None

    @pytest.mark.parametrize("ending", ["\r\n", "\r"])
    def test_line_ends_of_a_file_are_kept_and_told(self, tmp_path: Path, ending: str) -> None:
        """As llama.cpp reads it: what a model is asked to predict is what the file holds."""
        file = tmp_path / "text.txt"
        file.write_bytes(b"\xef\xbb\xbf" + f"one{ending}two{ending}".encode())
        data = resolve_data(str(file))
        assert data.text == f"one{ending}two{ending}"
        assert data.note == "its 2 CR line ends are kept: they are tokens, too"

    def test_line_ends_of_wikitext_are_those_of_the_original(self, tmp_path: Path) -> None:
        file = tmp_path / "wiki.txt"
        file.write_bytes(b" = Title = \r\n \r\n One . \r\n")
        data = resolve_data(str(file))
        assert (data.text, data.layout) == (" = Title = \n \n One . \n", "wikitext")
        assert data.note == "WikiText with 3 CR line ends, read as the LF of the original"

    def test_line_ends_of_named_texts(self, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a name stands for is one text, whatever line ends its files have here."""
        monkeypatch.setenv("KBIT_DATA", str(data_dir))
        assert "\r" not in resolve_data("novels-heldout").text

    @pytest.mark.parametrize("content", [b"", b" \n\t\r\n"])
    def test_a_file_without_text(self, tmp_path: Path, content: bytes) -> None:
        file = tmp_path / "empty.txt"
        file.write_bytes(content)
        with pytest.raises(UsageError, match=r"empty\.txt holds no text") as caught:
            resolve_data(str(file))
        _one_line(caught.value)

    def test_bytes_that_are_not_utf8_are_named(self, tmp_path: Path) -> None:
        file = tmp_path / "latin1.txt"
        file.write_bytes("abc café".encode("latin-1"))
        with pytest.raises(UsageError, match=r"latin1\.txt is not UTF-8 at byte 7: convert it .*iconv -f WINDOWS-1252"):
            resolve_data(str(file))

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="is a folder"):
            resolve_data(str(tmp_path))
        with pytest.raises(UsageError, match="is a folder"):
            read_text_file(tmp_path)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
    def test_a_named_pipe_is_refused_without_waiting_for_a_writer(self, tmp_path: Path) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        with pytest.raises(UsageError, match="not a regular file"):
            resolve_data(str(pipe))
        with pytest.raises(UsageError, match="not a regular file"):
            read_text_file(pipe)

    def test_no_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "secret.txt"
        file.write_text("text")

        def refuse(self: Path, *args: object, **kwargs: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)  # chmod would not stop root, who runs tests in containers
        with pytest.raises(KbitError, match=r"secret\.txt: no permission") as caught:
            resolve_data(str(file))
        assert caught.value.exit_code == 1

    def test_a_file_that_vanishes(self, tmp_path: Path) -> None:
        with pytest.raises(KbitError, match="no such file"):
            read_text_file(tmp_path / "gone.txt")

    def test_a_file_that_is_too_large(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets, "MAX_TEXT_BYTES", 10)
        file = tmp_path / "long.txt"
        file.write_text("x" * 11)
        with pytest.raises(UsageError, match="is larger than"):
            resolve_data(str(file))
        file.write_text("x" * 10)
        assert resolve_data(str(file)).text == "x" * 10

    @pytest.mark.parametrize(
        "name", ["nothing-of-that-name", "no/such/file.txt", "", "a\0b", "~nobody-here/x", "y" * 9999]
    )
    def test_neither_file_nor_name(self, name: str) -> None:
        with pytest.raises(UsageError) as caught:
            resolve_data(name)
        assert len(_one_line(caught.value)) < 500

    def test_a_missing_file_lists_the_names(self) -> None:
        with pytest.raises(UsageError, match="no such file, and not one of the named texts: wikitext2, "):
            resolve_data("wikitext3")


class TestNames:
    def test_the_data_folder_comes_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "tinystories").mkdir()
        (tmp_path / "tinystories" / "sample.txt").write_text("Once upon a time.")
        monkeypatch.setenv("KBIT_DATA", str(tmp_path))
        data = resolve_data("tinystories")
        assert data.text == "Once upon a time."
        assert data.name == "tinystories"

    def test_several_files_are_joined(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / "novels" / "heldout"
        folder.mkdir(parents=True)
        for name in ("Woolf_Lighthouse_1927", "Doyle_Hound_1902", "Burnett_Garden_1911"):
            (folder / f"{name}.txt").write_text(name)
        monkeypatch.setenv("KBIT_DATA", str(tmp_path))
        assert resolve_data("novels-heldout").text == "Burnett_Garden_1911\n\nDoyle_Hound_1902\n\nWoolf_Lighthouse_1927"

    def test_an_existing_file_wins_over_a_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("tinystories").write_text("mine")
        assert resolve_data("tinystories").text == "mine"

    def test_a_folder_of_the_same_spelling_does_not_hide_a_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "tinystories").mkdir()
        (tmp_path / "tinystories" / "sample.txt").write_text("Once.")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("KBIT_DATA", ".")
        assert resolve_data("tinystories").text == "Once."

    def test_the_data_folder_must_exist(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KBIT_DATA", str(tmp_path / "missing"))
        with pytest.raises(KbitError, match=r"KBIT_DATA names .*missing, which is not a folder"):
            resolve_data("wikitext2")

    @pytest.mark.parametrize("name", sorted(NAMED_TEXTS))
    def test_offline_with_nothing_names_both_remedies(self, name: str) -> None:
        with pytest.raises(KbitError) as caught:
            resolve_data(name)
        message = _one_line(caught.value)
        assert "KBIT_DATA" in message
        assert "path to --data" in message
        assert caught.value.exit_code == 1

    def test_a_text_that_is_not_the_official_one_is_said_to_be_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "wikitext2").mkdir()
        (tmp_path / "wikitext2" / "wiki.test.raw").write_text(OFFICIAL)
        monkeypatch.setenv("KBIT_DATA", str(tmp_path))
        note = resolve_data("wikitext2").note
        assert note is not None
        assert "not the official wiki.test.raw" in note


class TestDownload:
    """Downloads, with the network replaced by a local zip file and a table entry with its digests."""

    member = "folder/wiki.test.raw"

    def offer(self, monkeypatch: pytest.MonkeyPatch, path: Path, content: bytes = OFFICIAL.encode()) -> list[object]:
        """Serve a zip with `content`, and expect OFFICIAL; returns the list of requests made."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
            bundle.writestr(self.member, content)
            bundle.writestr("../../escape.txt", "never extracted")
        digest = _digest(path.read_bytes())
        archive = HubArchive(
            "somebody/texts", path.name, digest, self.member, _digest(OFFICIAL.encode()), len(OFFICIAL)
        )
        monkeypatch.setitem(NAMED_TEXTS, "sample", NamedText("a sample", (("sample.txt",),), archive))
        requests: list[object] = []

        def download(repo: str, repo_type: str, allow_patterns: list[str]) -> str:
            requests.append((repo, *allow_patterns, repo_type))
            return str(path.parent)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return requests

    def test_fetched_once_checked_and_cached(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        requests = self.offer(monkeypatch, tmp_path / "texts.zip")
        for _ in range(2):
            data = resolve_data("sample")
            assert data.text == OFFICIAL
            assert data.note is None
        assert requests == [("somebody/texts", "texts.zip", "dataset")]
        assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["wiki.test.raw"]
        assert not list(tmp_path.rglob("escape.txt"))

    def test_a_damaged_cache_is_not_used(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.offer(monkeypatch, tmp_path / "texts.zip")
        file = Path(resolve_data("sample").origin)
        file.write_text(OFFICIAL[:-5])
        with pytest.raises(KbitError, match=r"wiki\.test\.raw is damaged .* delete it"):
            resolve_data("sample")

    def test_an_archive_with_another_digest(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "texts.zip"
        self.offer(monkeypatch, path)
        path.write_bytes(path.read_bytes() + b"x")
        with pytest.raises(KbitError, match="does not have the expected sha256"):
            resolve_data("sample")
        assert not (tmp_path / "cache").exists()

    def test_an_archive_that_is_gone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.offer(monkeypatch, tmp_path / "texts.zip")
        (tmp_path / "texts.zip").unlink()
        with pytest.raises(KbitError, match=r"texts\.zip could not be downloaded from somebody/texts: set KBIT_DATA"):
            resolve_data("sample")

    @pytest.mark.parametrize("content", [OFFICIAL.encode() + b"x" * 10_000_000, OFFICIAL.encode()[:-1], b""])
    def test_a_member_with_another_content(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
    ) -> None:
        self.offer(monkeypatch, tmp_path / "texts.zip", content)
        with pytest.raises(KbitError, match="does not have the expected sha256"):
            resolve_data("sample")
        assert not (tmp_path / "cache").exists()

    def test_an_archive_without_the_member(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(self, "member", "folder/other.raw")
        self.offer(monkeypatch, tmp_path / "texts.zip")
        named = NAMED_TEXTS["sample"]
        assert named.archive is not None
        wrong = HubArchive(**{**vars(named.archive), "member": "folder/wiki.test.raw"})
        monkeypatch.setitem(NAMED_TEXTS, "sample", NamedText("a sample", named.files, wrong))
        with pytest.raises(KbitError, match="cannot be extracted"):
            resolve_data("sample")

    @pytest.mark.parametrize("damage", ["header", "data"])
    def test_a_damaged_archive(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
        path = tmp_path / "texts.zip"
        self.offer(monkeypatch, path)
        content = bytearray(path.read_bytes())
        if damage == "header":
            content = content[:30]
        else:
            content[60:70] = b"\xff" * 10
        path.write_bytes(content)
        named = NAMED_TEXTS["sample"]
        assert named.archive is not None
        same_digest = HubArchive(**{**vars(named.archive), "sha256": _digest(bytes(content))})
        monkeypatch.setitem(NAMED_TEXTS, "sample", NamedText("a sample", named.files, same_digest))
        with pytest.raises(KbitError, match="cannot be extracted"):
            resolve_data("sample")

    def test_http_errors_of_the_hub_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its HTTP library's own errors come through unchanged: they are siblings of the base of HfHubHTTPError."""
        base = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")

        def fail(*args: object, **kwargs: object) -> str:
            raise base("connection reset")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(KbitError, match=r"could not be downloaded \(connection reset\)"):
            resolve_data("wikitext2")

    def test_a_cache_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.offer(monkeypatch, tmp_path / "texts.zip")
        (tmp_path / "cache").write_text("a file where the folder should be")
        with pytest.raises(KbitError, match="cannot write"):
            resolve_data("sample")

    def test_an_interrupted_write_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.offer(monkeypatch, tmp_path / "texts.zip")

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(KbitError, match=r"cannot write .*No space left"):
            resolve_data("sample")
        assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


class TestWikiText:
    def test_rows_are_those_of_the_published_data_set(self) -> None:
        rows = wikitext_rows(OFFICIAL)
        assert rows[:4] == ["", " = A Title = \n", "", " First paragraph . \n"]
        assert len(rows) == OFFICIAL.count("\n")
        assert wikitext_rows("a\nb") == ["a\n", "b"]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (OFFICIAL, True),
            (" = A Title = \n Text", True),
            ("It was a dark night.\n = A Title = \n", False),
            (" = = Section = = \n", False),
            ("= Markdown-ish =\n", False),
            ("", False),
        ],
    )
    def test_recognised_by_the_first_line(self, text: str, expected: bool) -> None:
        assert looks_like_wikitext(text) is expected

    def test_only_the_test_split_is_restored(self) -> None:
        assert restore_wikitext2_test(OFFICIAL) is None

    def test_the_stripped_copy_becomes_the_official_file(self, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Size, digest and number of rows are those of wikitext-2-raw-v1.zip and of the Hugging Face data set."""
        monkeypatch.setenv("KBIT_DATA", str(data_dir))
        data = resolve_data("wikitext2")
        assert data.sha256 == WIKITEXT2_TEST_SHA256 == _digest(data.text.encode())
        assert len(data.text.encode()) == 1_290_590
        assert data.layout == "wikitext"
        rows = wikitext_rows(data.text)
        assert len(rows) == 4358
        assert rows[1] == " = Robert Boulter = \n"
        assert sum(not row for row in rows) == 1467
        # Already official: nothing changes. One word changed: not restored.
        assert restore_wikitext2_test(data.text) == data.text
        assert restore_wikitext2_test(data.text.replace("Boulter", "Bolter", 1)) is None
