"""Rows of the zero-shot data sets: what models are asked, and every layout the rows come in."""

from __future__ import annotations

import bz2
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from kbit.evaluate.tasks.documents import TASKS, Item, parse_tasks
from kbit.evaluate.tasks.sources import item_digest, load_items
from kbit.host.errors import KbitError, UnsupportedError, UsageError

LAMBADA = {"text": "The cat sat. It  was on the mat"}
PIQA = {"goal": "boil water", "sol1": "use fire", "sol2": "use ice ", "label": 0}
WINOGRANDE = {
    "sentence": "Anna told Mary that _ had won. ",
    "option1": "Anna",
    "option2": "Mary",
    "answer": "2",
}
HELLASWAG = {
    "activity_label": "Baking",
    "ctx_a": "A man [step] mixes  dough.",
    "ctx_b": "he Then",
    "endings": ["bakes it [title] Wait.", "eats.", "sleeps [sub] well.", "runs  off."],
    "label": "2",
}
ARC = {
    "question": "What is wet?",
    "choices": {"text": ["sand", "water", "fire"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}


def item(task: str, row: dict[str, Any]) -> Item:
    return TASKS[task].item(row, "here")


def test_lambada_asks_for_what_stands_after_the_last_space() -> None:
    assert item("lambada_openai", LAMBADA).requests == (("The cat sat. It  was on the", " mat"),)
    assert item("lambada_openai", {"text": "word"}).requests == (("", " word"),)


def test_piqa_asks_which_solution_answers() -> None:
    found = item("piqa", PIQA)
    assert found.requests == (
        ("Question: boil water\nAnswer:", " use fire"),
        ("Question: boil water\nAnswer:", " use ice "),
    )
    assert (found.gold, found.lengths, found.group) == (0, (8, 8), "boil water")


def test_winogrande_asks_how_likely_the_end_is_after_each_name() -> None:
    found = item("winogrande", WINOGRANDE)
    assert found.requests == (("Anna told Mary that Anna", " had won."), ("Anna told Mary that Mary", " had won."))
    assert found.gold == 1
    twin = item("winogrande", {**WINOGRANDE, "sentence": "Anna told Mary that _ had lost. ", "answer": "1"})
    other = item("winogrande", {**WINOGRANDE, "sentence": "Later Mary told Anna that _ had won."})
    assert twin.group == found.group != other.group


def test_hellaswag_cleans_markup_and_capitalises_the_second_part() -> None:
    found = item("hellaswag", HELLASWAG)
    # As lm-eval cleans it: "[step]" leaves two spaces, which become one; so do others, once each.
    assert {context for context, _ in found.requests} == {"Baking: A man mixes dough. He then"}
    assert [text for _, text in found.requests] == [" bakes it. Wait.", " eats.", " sleeps well.", " runs off."]
    assert (found.gold, found.lengths) == (2, (15, 5, 12, 9))
    assert item("hellaswag", {**HELLASWAG, "source_id": "activitynet~v_1"}).group == "activitynet~v_1"


def test_arc_finds_the_answer_by_its_label() -> None:
    found = item("arc_easy", ARC)
    assert found.requests[1] == ("Question: What is wet?\nAnswer:", " water")
    assert (found.gold, len(found.requests)) == (1, 3)


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("lambada_openai", {}),
        ("lambada_openai", {"text": 3}),
        ("piqa", {**PIQA, "label": "x"}),
        ("piqa", {**PIQA, "label": 2}),
        ("piqa", {**PIQA, "label": True}),
        ("piqa", {**PIQA, "sol1": ""}),
        ("winogrande", {**WINOGRANDE, "sentence": "no blank"}),
        ("winogrande", {**WINOGRANDE, "answer": ""}),
        ("hellaswag", {**HELLASWAG, "endings": "text"}),
        ("hellaswag", {**HELLASWAG, "endings": []}),
        ("hellaswag", {**HELLASWAG, "label": "4"}),
        ("arc_easy", {**ARC, "answerKey": "E"}),
        ("arc_easy", {**ARC, "choices": None}),
    ],
)
def test_what_is_no_row_is_named(task: str, row: dict[str, Any]) -> None:
    with pytest.raises(KbitError, match="^here: "):
        item(task, row)


def test_names_of_tasks() -> None:
    assert [task.name for task in parse_tasks("piqa, arc_easy,piqa")] == ["piqa", "arc_easy"]
    assert len(parse_tasks("all")) == 6
    for bad in ("", " , ", "piqua", "piqa,all"):
        with pytest.raises(UsageError, match="--tasks"):
            parse_tasks(bad)


def write(folder: Path, name: str, content: str | bytes) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def arc_instruction(question: str, answers: list[str], gold: int) -> dict[str, str]:
    names = [f"answer{index + 1}" for index in range(len(answers))]
    listed = " ".join(f"Answer{index + 1}: {text}" for index, text in enumerate(answers))
    return {
        "instruction": f"Please choose the correct answer to the question: {question}\n\n{listed}\n\n"
        f"Answer format: {'/'.join(names)}",
        "input": "",
        "output": f"the correct answer is {names[gold]}",
        "answer": names[gold],
    }


WRAPPED_SENTENCE = {
    "instruction": "Please choose the correct answer to fill in the blank to complete the given sentence: "
    "Anna told Mary that _ had won. \n\nOption1: Anna Option2: Mary Answer format: option1/option2",
    "input": "",
    "output": "the correct answer is option2",
    "answer": "option2",
}
ORIGINAL_ARC = {
    "id": "1",
    "question": {
        "stem": "What is wet?",
        "choices": [{"text": t, "label": n} for t, n in zip(("sand", "water", "fire"), "123", strict=True)],
    },
    "answerKey": "2",
}
HELLASWAG_TEXT = (
    "Baking: A man mixes dough. he then\n2\nbakes it.\neats.\nsleeps.\nruns.\n"
    "Home and Garden: How to sweep. Take a broom.\n0\nSweep.\nSleep.\nEat.\nRun.\n"
)

LAYOUTS: list[tuple[str, dict[str, str | bytes], dict[str, Any]]] = [
    ("lambada_openai", {"lambada/lambada_test.jsonl": lines(LAMBADA)}, LAMBADA),
    (
        "piqa",
        {"piqa/valid.jsonl": lines({k: v for k, v in PIQA.items() if k != "label"}), "piqa/valid-labels.lst": "0\n"},
        PIQA,
    ),
    ("winogrande", {"winogrande/dev.jsonl": lines(WINOGRANDE)}, WINOGRANDE),
    ("winogrande", {"winogrande/winogrande.test.json": json.dumps([WRAPPED_SENTENCE])}, WINOGRANDE),
    ("hellaswag", {"hellaswag/hellaswag_val.jsonl": lines(HELLASWAG)}, HELLASWAG),
    ("arc_easy", {"arc/ARC-Easy-Test.jsonl": lines(ORIGINAL_ARC)}, ARC),
    (
        "arc_challenge",
        {"arc/ARC-Challenge.test.json": json.dumps([arc_instruction("What is wet?", ["sand", "water", "fire"], 1)])},
        ARC,
    ),
]


@pytest.mark.parametrize(("task", "files", "row"), LAYOUTS)
def test_every_layout_gives_the_same_item(
    tmp_path: Path, task: str, files: dict[str, str | bytes], row: dict[str, Any]
) -> None:
    for name, content in files.items():
        write(tmp_path, name, content)
    found = load_items(TASKS[task], str(tmp_path))
    assert found.items == (item(task, row),)
    assert (found.available, next(iter(files)) in found.origin) == (1, True)


@pytest.mark.parametrize("name", ["hellaswag_val_full.txt.bz2", "hellaswag_val_full.txt"])
def test_hellaswag_as_text_gets_its_capital_back(tmp_path: Path, name: str) -> None:
    content = HELLASWAG_TEXT.encode()
    write(tmp_path, f"hellaswag/{name}", bz2.compress(content) if name.endswith("bz2") else content)
    found = load_items(TASKS["hellaswag"], str(tmp_path))
    assert found.items[0].requests[0] == ("Baking: A man mixes dough. He then", " bakes it.")
    assert found.items[1].requests[0] == ("Home and Garden: How to sweep. Take a broom.", " Sweep.")
    assert [each.gold for each in found.items] == [2, 0]
    assert found.note is not None


def test_a_limit_takes_the_first(tmp_path: Path) -> None:
    write(tmp_path, "lambada/lambada_test.jsonl", lines(*({"text": f"word {index}"} for index in range(5))))
    found = load_items(TASKS["lambada_openai"], str(tmp_path), limit=2)
    assert [each.requests[0][1] for each in found.items] == [" 0", " 1"]
    assert found.available == 5
    whole = load_items(TASKS["lambada_openai"], str(tmp_path))
    assert whole.sha256 != found.sha256
    assert item_digest(whole.items[0]) == item_digest(found.items[0])
    with pytest.raises(UsageError, match="--limit 0"):
        load_items(TASKS["lambada_openai"], str(tmp_path), limit=0)


@pytest.mark.parametrize(
    ("task", "files"),
    [
        ("lambada_openai", {"lambada/lambada_test.jsonl": "{"}),
        ("lambada_openai", {"lambada/lambada_test.jsonl": "[]\n"}),
        ("lambada_openai", {"lambada/lambada_test.jsonl": ""}),
        ("lambada_openai", {"lambada/lambada_test.jsonl": b"\xff\xfe"}),
        ("piqa", {"piqa/valid.jsonl": lines(PIQA), "piqa/valid-labels.lst": "0\n1\n"}),
        ("piqa", {"piqa/valid.jsonl": lines(PIQA), "piqa/valid-labels.lst": "one\n"}),
        ("hellaswag", {"hellaswag/hellaswag_val_full.txt": HELLASWAG_TEXT + "more\n"}),
        ("hellaswag", {"hellaswag/hellaswag_val_full.txt": "no label\n2\na\nb\nc\nd\n"}),
        ("hellaswag", {"hellaswag/hellaswag_val_full.txt.bz2": b"not packed"}),
        ("hellaswag", {"hellaswag/hellaswag_val_full.txt.bz2": bz2.compress(HELLASWAG_TEXT.encode())[:-9]}),
        ("arc_easy", {"arc/ARC-Easy.test.json": "{}"}),
        ("arc_easy", {"arc/ARC-Easy.test.json": "[1]"}),
        ("arc_easy", {"arc/ARC-Easy.test.json": json.dumps([arc_instruction("q", ["a", "b Answer2: c"], 0)])}),
        ("arc_easy", {"arc/ARC-Easy-Test.jsonl": lines({"question": 1, "answerKey": "A"})}),
        ("winogrande", {"winogrande/winogrande.test.json": json.dumps([{**WRAPPED_SENTENCE, "answer": "option3"}])}),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, task: str, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        write(tmp_path, name, content)
    with pytest.raises(KbitError, match=next(iter(files)).split("/")[0]):
        load_items(TASKS[task], str(tmp_path))


def test_folders_that_do_not_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = TASKS["piqa"]
    with pytest.raises(UsageError, match=r"piqa/valid\.jsonl"):
        load_items(task, str(tmp_path))
    with pytest.raises(UsageError, match="not a folder"):
        load_items(task, str(tmp_path / "none"))
    with pytest.raises(UsageError, match="--task-data"):
        load_items(task, "a\0b")
    monkeypatch.setenv("KBIT_DATA", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="KBIT_DATA"):
        load_items(task)


def test_the_hub_is_asked_where_no_folder_has_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(repo: str, configuration: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((repo, configuration, split))
        return [ARC]

    library = types.ModuleType("datasets")
    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.setenv("KBIT_DATA", str(tmp_path))
    found = load_items(TASKS["arc_challenge"])
    assert found.items == (item("arc_challenge", ARC),)
    assert load_items(TASKS["arc_challenge"], "hub").sha256 == found.sha256
    assert asked == [("allenai/ai2_arc", "ARC-Challenge", "test")] * 2

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto host")

    library.load_dataset = fail  # type: ignore[attr-defined]
    with pytest.raises(KbitError, match=r"allenai/ai2_arc.*no route to host.*--task-data"):
        load_items(TASKS["arc_challenge"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delenv("KBIT_DATA")
    with pytest.raises(UnsupportedError, match=r"kbit\[tasks\]"):
        load_items(TASKS["arc_challenge"])


@pytest.mark.parametrize(
    ("task", "items", "choices"),
    [
        ("lambada_openai", 5153, {1}),
        ("piqa", 1838, {2}),
        ("winogrande", 1267, {2}),
        ("hellaswag", 10042, {4}),
        ("arc_easy", 2376, {3, 4, 5}),
        ("arc_challenge", 1172, {3, 4, 5}),
    ],
)
def test_the_real_sets_are_read_whole(data_dir: Path, task: str, items: int, choices: set[int]) -> None:
    """The published sizes of the sets, and no trace of the layouts that they came in."""
    found = load_items(TASKS[task], str(data_dir))
    assert found.available == len(found.items) == items
    assert {len(each.requests) for each in found.items} == choices
    for each in found.items:
        for context, continuation in each.requests:
            assert not continuation.endswith("\n")
            assert not any(trace in context + continuation for trace in ("Answer2:", "Option2:", "Answer format"))
    counts = [sum(each.gold == index for each in found.items) for index in range(2)]
    if choices != {1}:
        assert min(counts) > 0.2 * items
