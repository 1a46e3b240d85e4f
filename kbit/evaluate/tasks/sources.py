"""Where the tasks' rows come from: files of a folder, in any of the layouts they are handed around in, or the hub.

A folder (`--task-data`, or the one KBIT_DATA names) is looked through for the files of _LAYOUTS. Whatever their layout,
rows come out with the fields that the data set has on the hub. Two layouts are not the original ones:

- ARC and WinoGrande wrapped as instructions (the LLM-Adapters collection): question, answers and sentence are cut out
  again. They stand there unchanged but for white space at their ends.
- HellaSwag as text, six lines an item (the form of llama.cpp's perplexity tool). WikiHow's markup has been taken out by
  the same rule as lm-eval's, and a context that ends in the middle of a sentence has lost the capital letter that
  lm-eval gives that sentence: it is put back. Which context came from which video is not in the file.

Nothing here imports torch; `datasets` (of the extra kbit[tasks]) is imported where the hub is asked.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from kbit.evaluate.tasks.documents import Item, Row, Task
from kbit.host.errors import KbitError, UnsupportedError, UsageError, one_line

# The largest of the sets, HellaSwag's validation split, has 12 MB as JSON lines.
MAX_BYTES = 256 << 20
HUB = "hub"

_ARC_ITEM = re.compile(
    r"Please choose the correct answer to the question: (.*)\n\nAnswer1: (.*)\n\nAnswer format: ([\w/]+)", re.DOTALL
)
_WINOGRANDE_ITEM = re.compile(
    r"Please choose the correct answer to fill in the blank to complete the given sentence: (.*)\n\n"
    r"Option1: (.*) Option2: (.*?) ?Answer format: option1/option2",
    re.DOTALL,
)


@dataclass(frozen=True, eq=False)
class TaskItems:
    """The items of a task.

    Attributes:
        task: whose.
        rows: with the hub's fields, as many as were asked for, in the data set's order.
        items: the questions they ask.
        available: how many the source has.
        origin: the file or files, or the repository.
        note: what the reader of a number should know about the source, or None.
    """

    task: Task
    rows: tuple[Row, ...]
    items: tuple[Item, ...]
    available: int
    origin: str
    note: str | None

    @property
    def sha256(self) -> str:
        """Digest of all questions: equal digests mean comparable numbers."""
        return hashlib.sha256("".join(item_digest(item) for item in self.items).encode()).hexdigest()


@dataclass(frozen=True)
class _Layout:
    """Files below a folder, and how they become rows."""

    files: tuple[str, ...]
    read: Callable[[list[Path]], list[dict[str, Any]]]
    note: str | None = None


def item_digest(item: Item) -> str:
    """Names a question by its texts and its right answer: 16 hex digits."""
    content = json.dumps([item.requests, item.gold])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def load_items(task: Task, data: str | None = None, limit: int | None = None) -> TaskItems:
    """The first `limit` items of a task.

    Args:
        data: a folder, or "hub"; None: the folder KBIT_DATA names where it has the task's files, else the hub.
        limit: None takes all.

    Raises:
        UsageError: a limit below 1, or `data` is no folder or has none of the task's files.
        UnsupportedError: the hub is needed and `datasets` is not installed.
        KbitError: a file or a row cannot be read, or the hub cannot be reached.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: expected at least 1 item")
    rows, origin, note = _rows(task, data)
    if not rows:
        raise KbitError(f"{origin}: there are no rows")
    taken = rows[:limit]
    items = tuple(task.item(row, f"{origin}, item {index + 1}") for index, row in enumerate(taken))
    return TaskItems(task, tuple(taken), items, len(rows), origin, note)


def _rows(task: Task, data: str | None) -> tuple[list[dict[str, Any]], str, str | None]:
    """(rows, origin, note) of a task."""
    layouts = _LAYOUTS[task.name]
    wanted = " or ".join(" and ".join(layout.files) for layout in layouts)
    if data == HUB:
        return _from_hub(task, f"--task-data {HUB} needs")
    named = data if data is not None else os.environ.get("KBIT_DATA")
    if not named:
        return _from_hub(task, f"{task.name} is looked for on the hub, as KBIT_DATA names no folder, which needs")
    folder = Path(os.path.expanduser(named))
    what = f"--task-data {named}" if data is not None else f"KBIT_DATA ({named})"
    try:
        if not folder.is_dir():
            raise UsageError(f"{what} is not a folder: correct it, or use --task-data {HUB}")
        for layout in layouts:
            paths = [folder / name for name in layout.files]
            if all(path.is_file() for path in paths):
                return _read(layout, paths), ", ".join(map(str, paths)), layout.note
    except (OSError, ValueError) as error:
        raise UsageError(f"{what} cannot be looked into: {one_line(error)}") from None
    if data is not None:
        raise UsageError(f"{what} has no data of {task.name}: expected {wanted} there")
    return _from_hub(task, f"{task.name} is looked for on the hub, as {what} has no {wanted}, which needs")


def _read(layout: _Layout, paths: list[Path]) -> list[dict[str, Any]]:
    where = ", ".join(map(str, paths))
    try:
        return layout.read(paths)
    except FileNotFoundError as error:
        raise KbitError(f"{error.filename}: no such file") from None
    except UnicodeDecodeError as error:
        raise KbitError(f"{where}: not UTF-8 text at byte {error.start}") from None
    except (OSError, EOFError) as error:
        raise KbitError(f"{where} cannot be read: {one_line(error)}") from None
    except (ValueError, RecursionError) as error:
        raise KbitError(f"{where}: {one_line(error)}") from None


def _from_hub(task: Task, why: str) -> tuple[list[dict[str, Any]], str, None]:
    """Rows of the data set on the hub, or in the cache of an earlier download."""
    try:
        datasets = import_module("datasets")  # it has no types
    except ImportError:
        raise UnsupportedError(
            f"{why} the package datasets: pip install 'kbit[tasks]', or give a folder with --task-data"
        ) from None
    repo, configuration, split = task.hub
    origin = f"{repo} ({split} split) on the hub"
    try:
        found = datasets.load_dataset(repo, configuration, split=split)
        return [dict(row) for row in found], origin, None
    except Exception as error:  # the library's, pyarrow's, the HTTP library's: whatever stands in the way
        raise KbitError(
            f"{origin} could not be read ({one_line(error, 160)}): give a folder with the files to --task-data"
        ) from error


def _text(path: Path) -> str:
    """A UTF-8 file, unpacked where its name ends in .bz2."""
    with bz2.open(path, "rb") if path.suffix == ".bz2" else path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES >> 20} MiB: this is not the data set")
    return data.decode("utf-8-sig")


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    # Not splitlines(): texts may hold other separators of lines, such as U+2028.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON ({one_line(error)})") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no object")
        rows.append(row)
    return rows


def _plain(paths: list[Path]) -> list[dict[str, Any]]:
    """JSON lines that have the hub's fields already."""
    return _json_lines(paths[0])


def _piqa(paths: list[Path]) -> list[dict[str, Any]]:
    """Questions and, in a file of their own, labels."""
    rows, labels = _json_lines(paths[0]), _text(paths[1]).split()
    if len(rows) != len(labels):
        raise ValueError(f"{len(rows)} rows and {len(labels)} labels do not belong together")
    return [{**row, "label": int(label)} for row, label in zip(rows, labels, strict=True)]


def _arc_original(paths: list[Path]) -> list[dict[str, Any]]:
    """AI2's own files: the question has a stem and choices."""
    rows = []
    for number, row in enumerate(_json_lines(paths[0]), 1):
        try:
            question, key = row["question"], row["answerKey"]
            pairs = [(str(choice["text"]), str(choice["label"])) for choice in question["choices"]]
            texts, labels = map(list, zip(*pairs, strict=True))
            rows.append({"question": question["stem"], "choices": {"text": texts, "label": labels}, "answerKey": key})
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"line {number} is no question of ARC") from None
    return rows


def _instructions(path: Path) -> Iterable[tuple[str, str]]:
    """(instruction, answer) of every item of a JSON list."""
    items = json.loads(_text(path))
    if not isinstance(items, list):
        raise ValueError("not a JSON list of items")
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in ("instruction", "answer")):
            raise ValueError(f"item {number} has no instruction or no answer")
        yield item["instruction"], item["answer"]


def _arc_instructions(paths: list[Path]) -> list[dict[str, Any]]:
    rows = []
    for number, (instruction, answer) in enumerate(_instructions(paths[0]), 1):
        match = _ARC_ITEM.fullmatch(instruction)
        names = match[3].split("/") if match else []
        texts = re.split(r" Answer\d: ", match[2]) if match else []
        # As many answers as the item says it has, or an answer's own text was taken for a separator.
        if len(names) != len(texts) or answer not in names:
            raise ValueError(f"item {number} is not a wrapped question of ARC: {one_line(instruction, 80)!r}")
        assert match is not None
        letters = [chr(ord("A") + index) for index in range(len(names))]
        rows.append(
            {
                "question": match[1],
                "choices": {"text": texts, "label": letters},
                "answerKey": letters[names.index(answer)],
            }
        )
    return rows


def _winogrande_instructions(paths: list[Path]) -> list[dict[str, Any]]:
    rows = []
    for number, (instruction, answer) in enumerate(_instructions(paths[0]), 1):
        match = _WINOGRANDE_ITEM.fullmatch(instruction)
        if match is None or answer not in ("option1", "option2"):
            raise ValueError(f"item {number} is not a wrapped sentence of WinoGrande: {one_line(instruction, 80)!r}")
        rows.append({"sentence": match[1], "option1": match[2], "option2": match[3], "answer": answer[-1]})
    return rows


def _hellaswag_text(paths: list[Path]) -> list[dict[str, Any]]:
    """Six lines an item: context with its label in front, index of the right ending, four endings."""
    lines = _text(paths[0]).removesuffix("\n").split("\n")
    if len(lines) % 6:
        raise ValueError(f"{len(lines)} lines are no whole number of items of 6")
    rows = []
    for start in range(0, len(lines), 6):
        context, label, *endings = lines[start : start + 6]
        activity, colon, text = context.partition(": ")
        if not colon or label not in ("0", "1", "2", "3"):
            raise ValueError(f"line {start + 1} begins no item: {one_line(context, 60)!r}, {one_line(label, 20)!r}")
        # A whole last sentence is part of the context; an unfinished one is what HellaSwag calls ctx_b.
        before, stop, last = text.rpartition(". ")
        unfinished = not text.endswith(".")
        rows.append(
            {
                "activity_label": activity,
                "ctx_a": before + stop.rstrip() if unfinished else text,
                "ctx_b": last if unfinished else "",
                "endings": endings,
                "label": label,
            }
        )
    return rows


_LLM_ADAPTERS = "cut out of instructions: white space at the ends of texts may differ from the original's"
_HELLASWAG_TEXT = (
    "made of a text file: markup was removed before, and the capital letter of an unfinished sentence is put back"
)

_LAYOUTS: dict[str, tuple[_Layout, ...]] = {
    "lambada_openai": (_Layout(("lambada/lambada_test.jsonl",), _plain),),
    "piqa": (_Layout(("piqa/valid.jsonl", "piqa/valid-labels.lst"), _piqa),),
    "winogrande": (
        _Layout(("winogrande/dev.jsonl",), _plain),
        _Layout(("winogrande/winogrande.test.json",), _winogrande_instructions, _LLM_ADAPTERS),
    ),
    "hellaswag": (
        _Layout(("hellaswag/hellaswag_val.jsonl",), _plain),
        _Layout(("hellaswag/hellaswag_val_full.txt.bz2",), _hellaswag_text, _HELLASWAG_TEXT),
        _Layout(("hellaswag/hellaswag_val_full.txt",), _hellaswag_text, _HELLASWAG_TEXT),
    ),
    "arc_easy": (
        _Layout(("arc/ARC-Easy-Test.jsonl",), _arc_original),
        _Layout(("arc/ARC-Easy.test.json",), _arc_instructions, _LLM_ADAPTERS),
    ),
    "arc_challenge": (
        _Layout(("arc/ARC-Challenge-Test.jsonl",), _arc_original),
        _Layout(("arc/ARC-Challenge.test.json",), _arc_instructions, _LLM_ADAPTERS),
    ),
}
