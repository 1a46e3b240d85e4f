"""Zero-shot tasks from start to end: items, models, scores, comparisons; and the result as plain data."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kbit.backends.select import set_threads
from kbit.engine.loader import load_model
from kbit.evaluate.paired import PairedAccuracy, PairedMean, compare_correct, holm, paired_mean
from kbit.evaluate.request import EngineRequest
from kbit.evaluate.tasks.documents import parse_tasks
from kbit.evaluate.tasks.records import ItemRecord, RecordFile, read_records
from kbit.evaluate.tasks.scorer import Scorer, choose_length
from kbit.evaluate.tasks.scoring import Progress, TaskResult, score_items
from kbit.evaluate.tasks.sources import TaskItems, item_digest, load_items
from kbit.graph.backend import Backend
from kbit.host.errors import UsageError
from kbit.host.process import peak_rss_bytes
from kbit.models.families import spec_from_config
from kbit.models.opening import open_model


@dataclass(frozen=True)
class TaskRequest(EngineRequest):
    """What to evaluate, and who computes (EngineRequest).

    Attributes:
        model, reference: a folder, a .gguf file, a hub id or a name `kbit pull` lists.
        tasks: names, separated by commas, or "all" (kbit.evaluate.tasks.documents).
        limit: items of each task, the first of it; None for all.
        data: folder of the tasks' files, "hub", or None (kbit.evaluate.tasks.sources).
        items: file that keeps what the model said to each item; a file of the same model is continued.
        against: files of that kind to compare with.
        context: tokens of context and answer; None: what a model is meant for.
    """

    model: str
    tasks: str
    limit: int | None = None
    data: str | None = None
    reference: str | None = None
    items: str | None = None
    against: tuple[str, ...] = ()
    context: int | None = None


@dataclass(frozen=True, eq=False)
class TaskComparison:
    """A model and another on the items of a task that both have.

    Attributes:
        task: its name.
        other: the reference, or the file of --against.
        other_model: the model that the other's rows name.
        accuracy: right and wrong answers (acc).
        adjusted_p: accuracy.p_value after Holm's correction over all comparisons of the evaluation.
        changed: fraction of items with another answer, right or wrong.
        gold: difference of the right answers' log-likelihoods in nats per item, the model's less the other's.
    """

    task: str
    other: str
    other_model: str
    accuracy: PairedAccuracy
    adjusted_p: float
    changed: float
    gold: PairedMean


@dataclass(frozen=True, eq=False)
class TaskEvaluation:
    """What one evaluation measured.

    Attributes:
        request: what was asked for.
        backend, reference_backend: one line each about what ran.
        seconds: time spent scoring, the reference included.
        results: of the model by task.
        reference: of the reference by task, where there is one.
        comparisons: with the reference first, then with every file of --against.
        resumed: items that were in the file of --items already.
    """

    request: TaskRequest
    backend: str
    reference_backend: str | None
    seconds: float
    results: dict[str, TaskResult]
    reference: dict[str, TaskResult]
    comparisons: tuple[TaskComparison, ...]
    resumed: int

    def to_dict(self) -> dict[str, Any]:
        """Numbers and strings for JSON, metrics under lm-eval's names."""
        shown: dict[str, Any] = {
            "model": self.request.model,
            "limit": self.request.limit,
            "tasks": {name: _result_dict(result) for name, result in self.results.items()},
            "backend": self.backend,
            "seconds": self.seconds,
            "items_resumed": self.resumed,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        if self.request.reference is not None:
            shown |= {
                "reference": self.request.reference,
                "reference_backend": self.reference_backend,
                "reference_tasks": {name: _result_dict(result) for name, result in self.reference.items()},
            }
        if self.comparisons:
            shown["comparisons"] = [_comparison_dict(comparison) for comparison in self.comparisons]
        return shown


def evaluate_tasks(
    request: TaskRequest, progress: Progress | None = None, status: Callable[[str], None] | None = None
) -> TaskEvaluation:
    """Score a model on zero-shot tasks, and compare it with a reference or with earlier runs on the same items.

    What can be wrong with the request is checked before any weight is read.

    Args:
        progress: called after every request.
        status: told what is being done before the first batch of a model.

    Raises:
        UsageError: a wrong option, or files of items that do not fit.
        KbitError: data or checkpoints that cannot be read.
    """
    say = status or (lambda _: None)
    tasks = parse_tasks(request.tasks)
    set_threads(request.threads)
    backend, reference_backend = request.backends()
    say("reading the tasks")
    data = [load_items(task, request.data, request.limit) for task in tasks]
    others = [(path, read_records(Path(path))) for path in request.against]
    for path, records in others:
        _pairs_exist(path, records, data)
    started = time.perf_counter()
    results, resumed = _score(request, request.model, request.bits, backend, data, request.items, progress, say)
    reference: dict[str, TaskResult] = {}
    if request.reference is not None:
        reference, _ = _score(request, request.reference, None, reference_backend, data, None, progress, say)
        rows = [record for result in reference.values() for record in result.records]
        others.insert(0, (request.reference, rows))
    seconds = time.perf_counter() - started
    return TaskEvaluation(
        request,
        backend.describe(),
        None if request.reference is None else reference_backend.describe(),
        seconds,
        results,
        reference,
        compare_results(results, others),
        resumed,
    )


def compare_results(
    results: dict[str, TaskResult], others: Sequence[tuple[str, Sequence[ItemRecord]]]
) -> tuple[TaskComparison, ...]:
    """Compare a model with others, task by task, on the items that both have; tasks without such are left out.

    Args:
        results: the model's, by task.
        others: (name, rows).
    """
    found = []
    for name, records in others:
        by_item = {(record.task, record.item): record for record in records}
        for task, result in results.items():
            pairs = [
                (record, by_item[task, record.item]) for record in result.records if (task, record.item) in by_item
            ]
            if not pairs:
                continue
            ours, theirs = zip(*pairs, strict=True)
            groups = [record.group or f"item {record.index}" for record in ours]
            accuracy = compare_correct(
                [record.value("acc") for record in ours], [record.value("acc") for record in theirs], groups
            )
            gold = paired_mean([a.loglikelihoods[a.gold] - b.loglikelihoods[b.gold] for a, b in pairs], groups)
            changed = sum(a.answer != b.answer for a, b in pairs) / len(pairs)
            found.append((task, name, theirs[0].model, accuracy, changed, gold))
    adjusted = holm([accuracy.p_value for _, _, _, accuracy, _, _ in found])
    return tuple(
        TaskComparison(task, name, model, accuracy, p_value, changed, gold)
        for (task, name, model, accuracy, changed, gold), p_value in zip(found, adjusted, strict=True)
    )


def _score(
    request: TaskRequest,
    model: str,
    bits: float | None,
    backend: Backend,
    data: Sequence[TaskItems],
    items: str | None,
    progress: Progress | None,
    say: Callable[[str], None],
) -> tuple[dict[str, TaskResult], int]:
    """One model on all items, and how many of them the file of --items had already."""
    with ExitStack() as stack:
        with open_model(model, bits) as source:
            spec = spec_from_config(source.config, where=f"config of {source.path}")
            length = choose_length(spec, request.context)
            how = [source.fingerprint(), backend.name, request.compute, request.kv_bits, length]
        run = hashlib.sha256(repr(how).encode()).hexdigest()[:16]
        keep = None if items is None else stack.enter_context(RecordFile(Path(items), run))
        wanted = {(each.task.name, item_digest(item)) for each in data for item in each.items}
        known = wanted & (set() if keep is None else keep.records.keys())
        scorer = None
        if known != wanted:
            say(f"loading {model}")
            loaded = load_model(model, backend=backend, bits=bits)
            scorer = Scorer(loaded.decoder, loaded.tokenizer, length)
            say("tokenising")
        return score_items(scorer, data, run, model, keep, progress), len(known)


def _pairs_exist(path: str, records: Sequence[ItemRecord], data: Sequence[TaskItems]) -> None:
    """
    Raises:
        UsageError: a file of --against has no item that will be scored.
    """
    wanted = {(each.task.name, item_digest(item)) for each in data for item in each.items}
    if not any((record.task, record.item) in wanted for record in records):
        has = ", ".join(sorted({record.task for record in records})) or "none"
        raise UsageError(
            f"--against {path} has none of the items that are asked for (its tasks: {has}): the same --tasks, --limit "
            "and data make the same items"
        )


def _result_dict(result: TaskResult) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for metric, estimate in result.metrics.items():
        figures |= {metric: estimate.value, f"{metric}_stderr": estimate.stderr}
    return {
        **figures,
        "items": len(result.records),
        "items_available": result.data.available,
        "truncated_items": result.truncated,
        "left_out_items": len(result.left_out),
        "data_origin": result.data.origin,
        "data_sha256": result.data.sha256,
        "data_note": result.data.note,
    }


def _comparison_dict(comparison: TaskComparison) -> dict[str, Any]:
    accuracy, gold = comparison.accuracy, comparison.gold
    return {
        "task": comparison.task,
        "other": comparison.other,
        "other_model": comparison.other_model,
        "items": accuracy.items,
        "groups": accuracy.groups,
        "acc": accuracy.accuracy,
        "other_acc": accuracy.reference_accuracy,
        "difference": accuracy.difference,
        "difference_stderr": accuracy.stderr,
        "difference_ci95": None if accuracy.interval is None else list(accuracy.interval),
        "lost": accuracy.lost,
        "gained": accuracy.gained,
        "flips": accuracy.flips,
        "changed_answers": comparison.changed,
        "mcnemar_p": accuracy.p_value,
        "mcnemar_p_holm": comparison.adjusted_p,
        "gold_loglikelihood_difference": gold.mean,
        "gold_loglikelihood_difference_ci95": None if gold.interval is None else list(gold.interval),
    }
