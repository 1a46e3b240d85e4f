"""Items and a model that is loaded: what it says to each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kbit.evaluate.tasks.documents import Metric
from kbit.evaluate.tasks.records import Estimate, ItemRecord, RecordFile, make_record, summarize
from kbit.evaluate.tasks.scorer import Encoded, Score, Scorer, TooLongError
from kbit.evaluate.tasks.sources import TaskItems, item_digest
from kbit.host.errors import KbitError

# (task, tokens done, tokens in all, accuracy on the task's items so far)
Progress = Callable[[str, int, int, float], None]
# Items after which a file of rows is written on: what a killed run repeats at most.
_FLUSH_ITEMS = 16


@dataclass(frozen=True, eq=False)
class TaskResult:
    """A model on one task.

    Attributes:
        data: the items.
        records: what it said, in the items' order.
        metrics: the task's metrics.
        left_out: items, by index, of which an answer alone is longer than the model's context. lm-eval gives up there.
    """

    data: TaskItems
    records: tuple[ItemRecord, ...]
    metrics: dict[Metric, Estimate]
    left_out: tuple[int, ...] = ()

    @property
    def truncated(self) -> int:
        """Items whose context did not fit into the model and was cut off in front."""
        return sum(record.truncated > 0 for record in self.records)


class _Work:
    """The items of a task that are still to be scored, and the rows there are."""

    def __init__(self, scorer: Scorer | None, data: TaskItems, keep: RecordFile | None) -> None:
        self.data = data
        self._keep = keep
        self._unsaved: list[ItemRecord] = []
        self.rows: dict[int, ItemRecord] = {}
        self.requests: list[Encoded] = []
        self._owners: list[int] = []  # the item of each request; the choices of an item follow each other
        self._scores: dict[int, list[Score | None]] = {}
        self._left_out: dict[int, TooLongError] = {}
        for index, item in enumerate(data.items):
            known = None if keep is None else keep.records.get((data.task.name, item_digest(item)))
            if known is not None:
                self.rows[index] = known
                continue
            if scorer is None:
                raise ValueError("items that have no rows need a model")
            try:
                encoded = [scorer.encode(*pair) for pair in item.requests]
            except TooLongError as error:
                self._left_out[index] = error
                continue
            except KbitError as error:
                raise type(error)(f"{data.origin}, item {index + 1}: {error}") from None
            self.requests += encoded
            self._owners += [index] * len(encoded)
            self._scores[index] = [None] * len(encoded)
        self._first = {owner: number for number, owner in reversed(list(enumerate(self._owners)))}
        if len(self._left_out) == len(data.items):
            raise KbitError(f"{data.origin}: no item can be scored; the first: {next(iter(self._left_out.values()))}")
        self._right = sum(row.value("acc") for row in self.rows.values())

    @property
    def tokens(self) -> int:
        """Of all requests."""
        return sum(len(request.ids) for request in self.requests)

    @property
    def accuracy(self) -> float:
        """On the items so far."""
        return self._right / max(1, len(self.rows))

    def take(self, number: int, score: Score, run: str, model: str) -> None:
        """The score of a request; the row of its item, once all its scores are there."""
        index = self._owners[number]
        scores = self._scores[index]
        scores[number - self._first[index]] = score
        complete = [each for each in scores if each is not None]
        if len(complete) < len(scores):
            return
        del self._scores[index]
        row = make_record(run, model, self.data.task, index, self.data.items[index], complete)
        self.rows[index] = row
        self._right += row.value("acc")
        self._unsaved.append(row)
        if len(self._unsaved) >= _FLUSH_ITEMS:
            self.save()

    def save(self) -> None:
        """Writes the rows that are not in the file yet."""
        if self._keep is not None and self._unsaved:
            self._keep.append(self.data.task, self._unsaved)
        self._unsaved = []

    def result(self) -> TaskResult:
        """Once all is scored."""
        records = tuple(row for _, row in sorted(self.rows.items()))
        return TaskResult(self.data, records, summarize(self.data.task, records), tuple(self._left_out))


def score_items(
    scorer: Scorer | None,
    data: Sequence[TaskItems],
    run: str = "",
    model: str = "",
    keep: RecordFile | None = None,
    progress: Progress | None = None,
) -> dict[str, TaskResult]:
    """Score items.

    Args:
        scorer: the model; None where `keep` has all the items.
        data: the items of each task.
        run, model: written into the rows.
        keep: rows that are in it are taken from it, and new ones added.
        progress: called after every request.

    Raises:
        UsageError, KbitError: a request cannot be scored, or the model's logits are NaN.
    """
    work = [_Work(scorer, each, keep) for each in data]
    total, done = sum(each.tokens for each in work), 0
    for each in work:
        try:
            for number, score in scorer.stream(each.requests) if scorer is not None else ():
                each.take(number, score, run, model)
                done += len(each.requests[number].ids)
                if progress is not None:
                    progress(each.data.task.name, done, total, each.accuracy)
        finally:
            each.save()
    return {each.data.task.name: each.result() for each in work}
