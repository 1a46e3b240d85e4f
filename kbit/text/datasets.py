"""What `--data` means: a text file, or the name of an evaluation text.

A name is looked for in the folder that the environment variable KBIT_DATA names, then in kbit's cache, then (for
the sets a public repository carries) downloaded through huggingface_hub, checked against a pinned sha256 and
put into the cache. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import os
import stat
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kbit.host.errors import KbitError, UsageError
from kbit.host.files import sha256_of, write_durably
from kbit.host.utf8 import decode
from kbit.text.wikitext import WIKITEXT2_TEST_SHA256, looks_like_wikitext, restore_wikitext2_test

# A tokenizer needs some forty times the text's size in memory; WikiText-2's test split has 1.3 MB.
MAX_TEXT_BYTES = 64 << 20

Layout = Literal["plain", "wikitext"]


@dataclass(frozen=True)
class TextData:
    """An evaluation text.

    Attributes:
        name: what the user asked for.
        text: the text; line ends are "\\n" in named texts and in WikiText, and as they are in other files.
        layout: "wikitext" where lines are the rows of a WikiText data set, else "plain".
        sha256: digest of `text` in UTF-8: equal digests mean comparable numbers.
        origin: the file or files it was read from.
        note: something the reader of a number should know about the text, or None.
    """

    name: str
    text: str
    layout: Layout
    sha256: str
    origin: str
    note: str | None = None


@dataclass(frozen=True)
class HubArchive:
    """A member of a zip file in a Hugging Face data set repository, with the digests both must have."""

    repo: str
    filename: str
    sha256: str
    member: str
    member_sha256: str
    member_bytes: int


@dataclass(frozen=True)
class NamedText:
    """An entry of the table of names: candidates below the data folder (each a tuple of files to join)."""

    description: str
    files: tuple[tuple[str, ...], ...]
    archive: HubArchive | None = None


def _wikitext2(split: str, sha256: str, nbytes: int) -> NamedText:
    member = f"wiki.{split}.raw"
    return NamedText(
        f"WikiText-2 raw, {split} split",
        ((f"wikitext2/{member}",), (f"wikitext-2-raw/{member}",), (f"wikitext-2-raw-v1/{member}",)),
        HubArchive(
            repo="ggml-org/ci",
            filename="wikitext-2-raw-v1.zip",
            sha256="ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
            member=f"wikitext-2-raw/{member}",
            member_sha256=sha256,
            member_bytes=nbytes,
        ),
    )


_HELDOUT = ("Burnett_Garden_1911.txt", "Doyle_Hound_1902.txt", "Woolf_Lighthouse_1927.txt")

NAMED_TEXTS: dict[str, NamedText] = {
    "wikitext2": _wikitext2("test", WIKITEXT2_TEST_SHA256, 1_290_590),
    "wikitext2-valid": _wikitext2(
        "valid", "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7", 1_146_846
    ),
    "wikitext2-valid-tokenized": NamedText(
        "WikiText-2 with <unk> words, valid split (not the raw form)", (("wikitext2/tokenized.valid.txt",),)
    ),
    "tinystories": NamedText("TinyStories sample", (("tinystories/sample.txt",),)),
    "novels-heldout": NamedText(
        "three English novels (Burnett, Doyle, Woolf)", (tuple(f"novels/heldout/{name}" for name in _HELDOUT),)
    ),
}


def resolve_data(data: str) -> TextData:
    """The text that `--data` asks for.

    An existing file wins over a name of the same spelling.

    Raises:
        UsageError: no such file or name, or the file is not UTF-8 text, empty, a folder or too large.
        KbitError: the file cannot be read, or a named set is neither here nor to be downloaded.
    """
    shown = repr(data if len(data) <= 200 else data[:200] + "...")
    try:
        path = Path(data).expanduser()
        is_file = path.is_file()
        exists = path.exists()
    except OSError as error:
        raise UsageError(f"--data {shown} is not a usable path: {error.strerror}") from error
    except (ValueError, RuntimeError) as error:  # a NUL character; a home folder that cannot be found
        raise UsageError(f"--data {shown} is not a usable path: {error}") from error
    if is_file:
        return _text_data(data, (path,))
    named = NAMED_TEXTS.get(data)
    if named is not None:
        return _text_data(data, _locate(data, named), named.archive, named=True)
    known = ", ".join(NAMED_TEXTS)
    if exists:
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise UsageError(f"--data {shown} is {kind}: give a text file or one of: {known}")
    raise UsageError(f"--data {shown}: no such file, and not one of the named texts: {known}")


def read_text_file(path: Path) -> str:
    """A UTF-8 text file with its line ends as they are, and no byte order mark.

    Raises:
        UsageError: a folder, a device, empty, larger than MAX_TEXT_BYTES, or not UTF-8.
        KbitError: missing or unreadable.
    """
    try:
        # A named pipe without a writer, or an endless device, must not be opened at all.
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise UsageError(f"{path} is {kind}: give a UTF-8 text file")
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    except FileNotFoundError as error:
        raise KbitError(f"{path}: no such file") from error
    except PermissionError as error:
        raise KbitError(f"{path}: no permission to read it") from error
    except OSError as error:
        raise KbitError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_TEXT_BYTES:
        raise UsageError(f"{path} is larger than {MAX_TEXT_BYTES >> 20} MiB: evaluate on a part of it")
    text = decode(data, str(path), "utf-8-sig")
    if not text.strip():
        raise UsageError(f"{path} holds no text: give a text of at least one window")
    return text


def _text_data(
    name: str, paths: tuple[Path, ...], archive: HubArchive | None = None, *, named: bool = False
) -> TextData:
    stored = "\n\n".join(read_text_file(path) for path in paths)
    text = stored.replace("\r\n", "\n").replace("\r", "\n")
    layout: Layout = "wikitext" if looks_like_wikitext(text) else "plain"
    note = None
    if text != stored and not named:
        count = stored.count("\r")
        if layout == "wikitext":
            note = f"WikiText with {count:,} CR line ends, read as the LF of the original"
        else:
            text, note = stored, f"its {count:,} CR line ends are kept: they are tokens, too"
    official = restore_wikitext2_test(text) if layout == "wikitext" else None
    if official is not None and official != text:
        text = official
        note = "blank lines put back: now byte for byte the official wiki.test.raw"
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    if archive is not None and digest != archive.member_sha256:
        note = f"not the official {Path(archive.member).name}: do not compare with published numbers"
    return TextData(name, text, layout, digest, ", ".join(str(path) for path in paths), note)


def _locate(name: str, named: NamedText) -> tuple[Path, ...]:
    """The files of a named text, downloading them where that is possible."""
    from kbit.host.cache_folder import cache_dir

    folder = os.environ.get("KBIT_DATA")
    if folder:
        root = Path(os.path.expanduser(folder))
        if not root.is_dir():
            raise KbitError(f"KBIT_DATA names {folder}, which is not a folder: correct it or unset it")
        for candidate in named.files:
            paths = tuple(root / file for file in candidate)
            if all(path.is_file() for path in paths):
                return paths
    looked = f"in KBIT_DATA ({folder})" if folder else "because KBIT_DATA is not set"
    if named.archive is None:
        wanted = " and ".join(named.files[0])
        raise KbitError(
            f"the text {name} was not found {looked}: set KBIT_DATA to a folder with {wanted}, "
            "or give a text file's path to --data"
        )
    target = cache_dir() / "data" / name / Path(named.archive.member).name
    if not target.is_file():
        _download(named.archive, target, f"the text {name} was not found {looked}", named.files[0][0])
    elif _file_sha256(target) != named.archive.member_sha256:
        raise KbitError(f"{target} is damaged (its sha256 is wrong): delete it, and it will be downloaded again")
    return (target,)


def _download(archive: HubArchive, target: Path, problem: str, wanted: str) -> None:
    """Fetch, check and extract one archive member to `target`, which appears only when complete.

    Args:
        problem: why a download is needed, for the error where there is no network.
        wanted: the file that would make it unnecessary, below KBIT_DATA.
    """
    from huggingface_hub import snapshot_download

    try:
        # Not hf_hub_download: without a network that retries for 20 s, with warnings of its own.
        folder = snapshot_download(archive.repo, repo_type="dataset", allow_patterns=[archive.filename])
    except _network_errors() as error:
        reason = str(error).strip().split("\n", 1)[0].split(". ", 1)[0][:160] or type(error).__name__
        raise KbitError(
            f"{problem}, and it could not be downloaded ({reason}): set KBIT_DATA to a folder with {wanted}, "
            "or give a text file's path to --data"
        ) from error
    fetched = Path(folder) / archive.filename
    if not fetched.is_file():  # gone from the repository, or an older incomplete download and no network
        raise KbitError(
            f"{problem}, and {archive.filename} could not be downloaded from {archive.repo}: set KBIT_DATA to a folder "
            f"with {wanted}, or give a text file's path to --data"
        )
    if _file_sha256(fetched) != archive.sha256:
        raise KbitError(f"{fetched} does not have the expected sha256 {archive.sha256}: delete it and try again")
    content = _read_member(fetched, archive)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_durably(target, content)
    except OSError as error:
        raise KbitError(f"cannot write {target}: {error.strerror or error}") from error


def _read_member(zip_path: Path, archive: HubArchive) -> bytes:
    """A zip member's bytes: never more than its pinned size is read, and the digest must be the pinned one."""
    try:
        with zipfile.ZipFile(zip_path) as bundle, bundle.open(archive.member) as member:
            content = member.read(archive.member_bytes + 1)
    except (zipfile.BadZipFile, zlib.error, KeyError, NotImplementedError, RuntimeError, OSError, EOFError) as error:
        raise KbitError(f"{zip_path}: {archive.member} cannot be extracted ({error}): delete it and retry") from error
    if hashlib.sha256(content).hexdigest() != archive.member_sha256:
        raise KbitError(f"{zip_path}: {archive.member} does not have the expected sha256 {archive.member_sha256}")
    return content


def _file_sha256(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise KbitError(f"{path} cannot be read: {error.strerror or error}") from error


def _network_errors() -> tuple[type[BaseException], ...]:
    """What a download through huggingface_hub raises when the network or the hub fails.

    Its errors derive from those of the HTTP library it is built on (requests, then httpx, by version), which it
    also lets through unchanged; so the bases of its HTTP error name them without importing that library.
    """
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled

    general = (Exception, BaseException, object)
    http_errors = [base for base in HfHubHTTPError.__mro__ if base not in general]
    return (OSError, EntryNotFoundError, OfflineModeIsEnabled, *http_errors)
