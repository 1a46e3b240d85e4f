"""The zero-shot tasks: from a row of a data set to what a model is asked, word for word as lm-eval asks it.

A row has the fields that the data set has on the hub (`kbit.evaluate.tasks.sources` makes such rows of files in other
layouts). What is scored is the log-likelihood of a continuation after a context; an answer is the likeliest choice
(`acc`), or the likeliest per character (`acc_norm`).

The texts are those of the tasks of the same names in EleutherAI's lm-evaluation-harness 0.4.13 (each of them at version
1.0), without examples in front (zero-shot) and without a chat template. `tests/test_tasks_lm_eval.py` compares them
string by string.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kbit.host.errors import KbitError, UsageError

Row = Mapping[str, Any]
Metric = Literal["perplexity", "acc", "acc_norm"]


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        requests: (context, continuation) of each choice; a single one where the model is to go on by itself.
        gold: index of the right choice.
        lengths: characters of each choice as `acc_norm` counts them.
        group: items of one name belong together and are not independent of each other; None: this one is on its own.
    """

    requests: tuple[tuple[str, str], ...]
    gold: int
    lengths: tuple[int, ...]
    group: str | None = None


@dataclass(frozen=True)
class Task:
    """A zero-shot task.

    Attributes:
        name: lm-eval's.
        about: one line for people.
        metrics: what lm-eval reports for it, the first for comparisons between models.
        make: row -> Item; raises KeyError, ValueError or TypeError where a row is not what it should be.
        hub: repository, configuration and split of the data set on the hub.
    """

    name: str
    about: str
    metrics: tuple[Metric, ...]
    make: Callable[[Row], Item]
    hub: tuple[str, str | None, str]

    def item(self, row: Row, where: str) -> Item:
        """The question a row asks.

        Raises:
            KbitError: a field is missing or not what it should be; `where` says which row.
        """
        try:
            item = self.make(row)
        except KeyError as error:
            raise KbitError(f"{where}: no field {error.args[0]!r}: this is no row of {self.name}") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise KbitError(f"{where}: not a row of {self.name}: {error}") from None
        if not 0 <= item.gold < len(item.requests):
            raise KbitError(f"{where}: the right answer is number {item.gold + 1} of {len(item.requests)}")
        if "acc_norm" in self.metrics and not all(item.lengths):
            raise KbitError(f"{where}: choice {item.lengths.index(0) + 1} is empty")
        return item


def parse_tasks(names: str) -> tuple[Task, ...]:
    """The tasks of a comma-separated list, each once, in its order; "all" for all of them.

    Raises:
        UsageError: no name, or one that is none of TASKS.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if wanted == ["all"]:
        return tuple(TASKS.values())
    known = ", ".join(TASKS)
    if not wanted:
        raise UsageError(f"--tasks {names!r} names no task: choose from {known}, or all")
    for name in wanted:
        if name not in TASKS:
            raise UsageError(f"--tasks {name}: there is no such task: choose from {known}, or all")
    return tuple(TASKS[name] for name in dict.fromkeys(wanted))


def _lambada(row: Row) -> Item:
    """Is the last word of a passage what the model would say next? Words are what stands between single spaces."""
    words = _text(row, "text").split(" ")
    continuation = " " + words[-1]
    return Item(((" ".join(words[:-1]), continuation),), 0, (len(continuation),))


def _piqa(row: Row) -> Item:
    goal, solutions = _text(row, "goal"), (_text(row, "sol1"), _text(row, "sol2"))
    # Rows with one goal are one question with other pairs of answers.
    return _choose(f"Question: {goal}\nAnswer:", solutions, _whole(row, "label"), group=goal)


def _winogrande(row: Row) -> Item:
    """Partial evaluation (Trinh and Le 2018): the same end of a sentence after two beginnings."""
    sentence, options = _text(row, "sentence"), (_text(row, "option1"), _text(row, "option2"))
    if "_" not in sentence:
        raise ValueError(f"the sentence has no blank (_): {sentence!r:.80}")
    blank = sentence.index("_")
    end = " " + sentence[blank + 1 :].strip()
    beginnings = [sentence[:blank] + option for option in options]
    gold = ("1", "2").index(str(row["answer"]))
    # Most sentences come in pairs of the same words and options but for one word, which decides for the other option.
    group = " / ".join([*sorted(options), *sentence.split()[:3]])
    return Item(tuple((start, end) for start in beginnings), gold, tuple(map(len, beginnings)), group)


def _hellaswag(row: Row) -> Item:
    context = f"{_text(row, 'ctx_a')} {_text(row, 'ctx_b').capitalize()}"
    query = _clean(f"{_text(row, 'activity_label')}: {context}")
    source = row.get("source_id")  # a video or an article, of which several contexts were cut
    endings = [_clean(ending) for ending in _texts(row["endings"])]
    return _choose(query, endings, _whole(row, "label"), group=source if isinstance(source, str) else None)


def _arc(row: Row) -> Item:
    choices = row["choices"]
    labels = _texts(choices["label"])
    return _choose(
        f"Question: {_text(row, 'question')}\nAnswer:", _texts(choices["text"]), labels.index(_text(row, "answerKey"))
    )


def _choose(context: str, choices: tuple[str, ...] | list[str], gold: int, group: str | None = None) -> Item:
    return Item(tuple((context, f" {choice}") for choice in choices), gold, tuple(map(len, choices)), group)


def _clean(text: str) -> str:
    """WikiHow's markup out of HellaSwag's texts, exactly as lm-eval takes it out."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub("\\[.*?\\]", "", text).replace("  ", " ")


def _text(row: Row, field: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise TypeError(f"{field} is a {type(value).__name__}, not a text")
    return value


def _texts(values: Any) -> list[str]:
    if not isinstance(values, (list, tuple)) or not values or not all(isinstance(value, str) for value in values):
        raise TypeError(f"expected a list of texts, not {values!r:.80}")
    return list(values)


def _whole(row: Row, field: str) -> int:
    """A label: a whole number, or its digits."""
    value = row[field]
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"{field} is a {type(value).__name__}, not a number")
    return int(value)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "lambada_openai",
            "the last word of a passage from a novel (Paperno et al. 2016; OpenAI's form)",
            ("acc", "perplexity"),
            _lambada,
            ("EleutherAI/lambada_openai", "default", "test"),
        ),
        Task(
            "piqa",
            "which of two ways works (Bisk et al. 2020), validation split",
            ("acc", "acc_norm"),
            _piqa,
            ("baber/piqa", None, "validation"),
        ),
        Task(
            "winogrande",
            "which of two names a pronoun stands for (Sakaguchi et al. 2020), validation split",
            ("acc",),
            _winogrande,
            ("allenai/winogrande", "winogrande_xl", "validation"),
        ),
        Task(
            "hellaswag",
            "which of four endings follows (Zellers et al. 2019), validation split",
            ("acc", "acc_norm"),
            _hellaswag,
            ("Rowan/hellaswag", None, "validation"),
        ),
        Task(
            "arc_easy",
            "questions of school science, the easy ones (Clark et al. 2018), test split",
            ("acc", "acc_norm"),
            _arc,
            ("allenai/ai2_arc", "ARC-Easy", "test"),
        ),
        Task(
            "arc_challenge",
            "questions of school science that word overlap does not answer (Clark et al. 2018), test split",
            ("acc", "acc_norm"),
            _arc,
            ("allenai/ai2_arc", "ARC-Challenge", "test"),
        ),
    )
}
