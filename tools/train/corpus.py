"""Text to train on: documents of a folder or an archive, a tokenizer, and the tokens in one file.

Documents are UTF-8 (a byte-order mark and the kind of line ends do not matter: both go, as kbit eval does it). The
training documents, each followed by the separator token, make one stream of tokens, kept in a file that is mapped into
memory. What is held out is never part of it: neither a document of the same name nor one of the same content.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kbit.host.errors import KbitError, UsageError, one_line
from kbit.host.files import fsync_folder

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
# The tokenizer takes about 100 bytes of memory per byte of text while it works, so long documents go through in pieces.
_PIECE = 4 << 20
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")

Document = tuple[str, str]  # name without .txt, text
Say = Callable[[str], None]


@dataclass(frozen=True)
class Corpus:
    """Where the documents are, and which are held out.

    Attributes:
        path: a folder (every .txt below it), a .txt file, or a tar archive of .txt files.
        heldout: texts that are never trained on, by name.
        excluded: names and digests of documents of `path` that are left out of training.
        tail: fraction of the one document there is whose end is held out; 0 where whole documents are.
    """

    path: Path
    heldout: tuple[Document, ...]
    excluded: frozenset[str]
    tail: float = 0.0

    @property
    def name(self) -> str:
        """The last part of the path without its ending."""
        return self.path.resolve().name.split(".")[0]

    def training(self) -> Iterator[Document]:
        """The training documents, in the order of read_documents."""
        for name, text in read_documents(self.path):
            if name not in self.excluded and _digest(text) not in self.excluded:
                yield name, text[: _cut(text, self.tail)] if self.tail else text


def open_corpus(path: Path, heldout: Sequence[Path], fraction: float) -> Corpus:
    """Find the held-out documents of a corpus.

    Args:
        heldout: .txt files, folders or archives of them; where empty, documents of the corpus itself are held out,
            chosen by the digest of their content (so always the same ones, whatever their names) until they make up
            `fraction` of its characters; of a single document the end.
        fraction: above 0 and below 1.

    Raises:
        UsageError: no such path, no text in it, or everything would be held out.
        KbitError: a document cannot be read.
    """
    if heldout:
        documents = tuple(document for item in heldout for document in read_documents(item))
        excluded = frozenset([name for name, _ in documents] + [_digest(text) for _, text in documents])
        corpus = Corpus(path, documents, excluded)
        if next(corpus.training(), None) is None:
            raise UsageError(f"{path}: every document of it is held out: nothing is left to train on")
        return corpus
    if not 0 < fraction < 1:
        raise UsageError(f"--heldout-fraction {fraction}: give a number between 0 and 1")
    lengths = {_digest(text): len(text) for _, text in read_documents(path)}
    if len(lengths) == 1:
        name, text = next(read_documents(path))
        return Corpus(path, ((f"{name} (end)", text[_cut(text, fraction) :]),), frozenset(), fraction)
    wanted = fraction * sum(lengths.values())
    chosen: set[str] = set()
    for digest in sorted(lengths)[:-1]:
        if sum(lengths[one] for one in chosen) >= wanted:
            break
        chosen.add(digest)
    documents = tuple(document for document in read_documents(path) if _digest(document[1]) in chosen)
    return Corpus(path, documents, frozenset(chosen))


def read_documents(path: Path) -> Iterator[Document]:
    """Documents of a .txt file, of a folder (by name) or of an archive (as they come); empty ones are passed over.

    Raises:
        UsageError: no such path, or no text in it.
        KbitError: a document or the archive cannot be read.
    """
    found = False
    for name, data in _files(path):
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise KbitError(f"{path}: {name} is not UTF-8 ({error.reason} at byte {error.start}): convert it") from None
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        if text.strip():
            found = True
            yield Path(name).stem, text
    if not found:
        raise UsageError(f"{path}: no .txt file with text in it")


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    try:
        if path.is_dir():
            for found in sorted(path.rglob("*.txt")):
                yield str(found.relative_to(path)), found.read_bytes()
        elif path.suffix == ".txt":
            yield path.name, path.read_bytes()
        elif path.name.endswith(_ARCHIVES):
            with tarfile.open(path) as archive:
                for member in archive:  # in its order: going back in a compressed stream decompresses it again
                    file = archive.extractfile(member) if member.name.endswith(".txt") else None
                    if file is not None:
                        yield member.name, file.read()
        else:
            raise UsageError(f"{path}: give a folder, a .txt file or a tar archive ({', '.join(_ARCHIVES)})")
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError, zlib.error) as error:
        raise KbitError(f"{path}: cannot be read: {one_line(error)}") from error


def train_tokenizer(texts: Iterator[Document], vocabulary: int) -> bytes:
    """A byte-level BPE tokenizer, as the content of its tokenizer.json.

    Args:
        vocabulary: tokens, the 256 bytes and the separator included.

    Raises:
        UsageError: fewer tokens than the alphabet has.
    """
    if vocabulary < 257:
        raise UsageError(f"--vocabulary {vocabulary}: the 256 bytes and the separator alone are 257")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATORS[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in texts), trainer=trainer)
    return tokenizer.to_str().encode()


@dataclass(frozen=True, eq=False)
class Tokens:
    """A corpus as numbers.

    Attributes:
        training: the stream, uint16 or uint32, mapped from its file.
        heldout: each held-out text, int64.
        heldout_names: their names.
        tokenizer_json: the tokenizer.
        vocabulary: its tokens.
        separator, separator_id: the token between documents.
        digest: of everything above.
    """

    training: NDArray[Any]
    heldout: tuple[NDArray[np.int64], ...]
    heldout_names: tuple[str, ...]
    tokenizer_json: bytes
    vocabulary: int
    separator: str
    separator_id: int
    digest: str


def tokenize(corpus: Corpus, tokenizer_json: bytes, folder: Path, say: Say) -> Tokens:
    """The corpus in tokens; those to train on in a file of `folder`, which later runs find again by its content.

    Args:
        say: told when the text is tokenised, which takes a while.

    Raises:
        KbitError: the tokenizer is none or has no separator; the file cannot be written.
    """
    try:
        tokenizer = Tokenizer.from_buffer(tokenizer_json)
    except Exception as error:  # the library raises bare Exceptions
        raise KbitError(f"the tokenizer cannot be read: {one_line(error)}") from None
    ids: dict[str, int] = tokenizer.get_vocab()
    separator = next((name for name in SEPARATORS if name in ids), None)
    if separator is None:
        raise UsageError(f"the tokenizer has none of {', '.join(SEPARATORS)}, to stand between documents: use another")
    # Ids may have gaps: the largest counts.
    separator_id, vocabulary = ids[separator], max(ids.values()) + 1
    digest = hashlib.sha256(hashlib.sha256(tokenizer_json).digest())
    for name, text in corpus.training():
        digest.update(f"{name}\0{_digest(text)}\n".encode())
    path = folder / f"tokens-{digest.hexdigest()[:16]}.npy"
    if not path.exists():
        say(f"tokenising {corpus.path}")
        _write_tokens(
            path, corpus, tokenizer, separator_id, np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
        )
    try:
        training = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise KbitError(f"{path}: cannot be read ({one_line(error)}): delete it") from None
    heldout = tuple(np.array(_encode(tokenizer, text), dtype=np.int64) for _, text in corpus.heldout)
    for name, text in corpus.heldout:
        digest.update(f"held out: {name}\0{_digest(text)}\n".encode())
    names = tuple(name for name, _ in corpus.heldout)
    return Tokens(training, heldout, names, tokenizer_json, vocabulary, separator, separator_id, digest.hexdigest())


class WindowOrder:
    """Which windows of the stream are trained on, in which order: every one once, in random order, then again.

    A function of the seed and of how many windows were seen, so where a run stopped is one number. Every pass starts
    the windows at another offset, so that they are not cut at the same places again.

    Args:
        tokens: the stream.
        context: predictions per window; a window has one token more.

    Raises:
        UsageError: the stream is shorter than a window.
    """

    def __init__(self, tokens: NDArray[Any], context: int, seed: int) -> None:
        self.tokens, self.context, self.seed = tokens, context, seed
        self.per_pass = (len(tokens) - context) // context
        if self.per_pass < 1:
            raise UsageError(f"{len(tokens)} tokens of text are too few for windows of {context}: use more text")
        self._pass = -1
        self._starts: NDArray[np.int64] = np.empty(0, np.int64)

    def windows(self, position: int, count: int) -> NDArray[np.int64]:
        """The windows number `position` and on, int64 (count, context + 1)."""
        rows = []
        for number in range(position, position + count):
            index = number % self.per_pass
            if number // self.per_pass != self._pass:
                self._pass = number // self.per_pass
                generator = np.random.default_rng([self.seed, self._pass])
                offset = generator.integers(self.context)
                self._starts = generator.permutation(self.per_pass) * self.context + offset
            start = int(self._starts[index])
            rows.append(self.tokens[start : start + self.context + 1])
        return np.stack(rows).astype(np.int64)


def _write_tokens(path: Path, corpus: Corpus, tokenizer: Tokenizer, separator_id: int, dtype: np.dtype[Any]) -> None:
    parts = []
    for _, text in corpus.training():
        parts.append(np.array([*_encode(tokenizer, text), separator_id], dtype=dtype))
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.save(file, np.concatenate(parts))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise KbitError(f"{path}: cannot be written: {error.strerror or error}") from error


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = []
    start = 0
    while start < len(text):
        stop = start + _PIECE
        if stop < len(text):  # at a line's end: the one word that could be cut otherwise would be cut unnaturally
            stop = text.rfind("\n", start, stop) + 1 or stop
        ids += tokenizer.encode(text[start:stop], add_special_tokens=False).ids
        start = stop
    return ids


def _cut(text: str, fraction: float) -> int:
    """Where the held-out end of a document starts: at a line's start near the last `fraction` of it."""
    wanted = int(len(text) * (1 - fraction))
    return text.rfind("\n", 0, wanted) + 1 or wanted


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
