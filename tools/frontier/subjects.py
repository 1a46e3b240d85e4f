"""The models that the frontier is measured on: where they are, what they read, and what they are compared with."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from kbit.host.errors import UsageError
from kbit.text.datasets import TextData, resolve_data


@dataclass(frozen=True)
class Subject:
    """A model of the frontier.

    Attributes:
        name: how rows call it.
        path: what opens it.
        data: held-out text, as `kbit eval --data` takes it.
        context, tokens: windows of so many tokens, of so many tokens of the text.
        calibration: text for the importance matrices of peers, never the held-out one.
        note: what a reader of its figures must know.
        chunks: of up to 512 tokens, of that text. Of large models fewer, still twice what kbit calibrates those on.
    """

    name: str
    path: str
    data: str
    context: int
    tokens: int
    calibration: str
    note: str
    chunks: int = 256


def note(name: str) -> str:
    """What a reader of a model's figures must know."""
    if name.startswith("novels-"):
        return "full precision (float16)"
    if name == "smollm2":
        return "its original is a Q4_1 file: on at most 16 levels per 32 weights, no float checkpoint"
    return "compared with its file as it is"


def data_folder() -> Path:
    """
    Raises:
        UsageError: KBIT_DATA names no folder.
    """
    folder = Path(os.environ.get("KBIT_DATA", ""))
    if not os.environ.get("KBIT_DATA") or not folder.is_dir():
        raise UsageError("set KBIT_DATA to the folder with the evaluation text and the small models")
    return folder


def subjects(names: list[str], paths: dict[str, str]) -> list[Subject]:
    """Models by name.

    Args:
        names: of `KNOWN`.
        paths: where those are that the data folder does not have.

    Raises:
        UsageError: an unknown name, or one without a path.
    """
    data = data_folder()
    hound = str(data / "novels" / "heldout" / "Doyle_Hound_1902.txt")
    found = []
    for name in names:
        if name in ("novels-0.7m", "novels-2m", "novels-5m"):
            path = paths.get(name, str(data / "models" / name))
            found.append(Subject(name, path, hound, 256, 160 * 256, "novels", note(name)))
        elif name == "smollm2":
            path = paths.get(name, "smollm2-135m-instruct")
            found.append(Subject(name, path, "wikitext2", 512, 4096, "wikitext2-valid-tokenized", note(name)))
        elif name in paths:
            found.append(
                Subject(name, paths[name], "wikitext2", 512, 4096, "wikitext2-valid-tokenized", note(name), 64)
            )
        else:
            raise UsageError(f"{name}: say where it is with --path {name}=FILE")
    return found


def evaluation_text(subject: Subject) -> TextData:
    """The text that a subject is measured on, with "\\n" at the end of every line: novels come as the web has them."""
    found = resolve_data(subject.data)
    return found if "\r" not in found.text else replace(found, text=found.text.replace("\r\n", "\n"), note=None)


def calibration_text(subject: Subject, characters: int) -> str:
    """Text for a subject's importance matrix: of novels those that models were trained on, which are not held out."""
    if subject.calibration != "novels":
        return resolve_data(subject.calibration).text[:characters]
    from train.corpus import open_corpus

    folder = data_folder() / "novels"
    corpus = open_corpus(folder / "novels.tar.xz", [folder / "heldout"], 0.0)
    share, pieces, have = characters // 8, [], 0
    for _, text in corpus.training():  # a part of each of several, from its middle: beginnings are prefaces
        pieces.append(text[len(text) // 2 :][:share])
        have += len(pieces[-1])
        if have >= characters:
            break
    return "\n\n".join(pieces)
