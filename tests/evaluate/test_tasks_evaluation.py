"""Zero-shot tasks from start to end: rows that are kept, runs that are taken up, comparisons, the command line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from error_cases import run_command

from kbit.evaluate.tasks import evaluation as module
from kbit.evaluate.tasks.documents import TASKS
from kbit.evaluate.tasks.evaluation import TaskEvaluation, TaskRequest, evaluate_tasks
from kbit.evaluate.tasks.records import ItemRecord, RecordFile, read_records, summarize
from kbit.host.errors import KbitError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

TASK_NAMES = "lambada_openai,piqa,winogrande,arc_easy"


def record(index: int = 0, **changes: Any) -> ItemRecord:
    values: dict[str, Any] = {
        "run": "r",
        "model": "m",
        "task": "piqa",
        "index": index,
        "item": f"item{index}",
        "group": None,
        "gold": 1,
        "loglikelihoods": (-4.0, -6.0),
        "greedy": (False, False),
        "tokens": (2, 3),
        "lengths": (4, 12),
        "truncated": 0,
    }
    return ItemRecord(**(values | changes))


def test_an_item_is_right_by_its_likelihood_or_by_that_per_character() -> None:
    assert record().value("acc") == 0.0
    assert record().value("acc_norm") == 1.0
    assert record().answer == 0
    # Of equals the first is taken, as numpy and so lm-eval do.
    assert record(loglikelihoods=(-4.0, -4.0), lengths=(2, 2)).answer == 0
    single = record(gold=0, loglikelihoods=(-1.5,), greedy=(True,), tokens=(1,), lengths=(5,))
    assert (single.value("acc"), single.value("perplexity")) == (1.0, -1.5)


def test_metrics_are_means_over_items() -> None:
    rows = [record(index, gold=index % 3 == 0) for index in range(9)]
    found = summarize(TASKS["piqa"], rows)
    values = [float(row.value("acc")) for row in rows]
    assert found["acc"].value == pytest.approx(6 / 9)
    assert found["acc"].stderr == pytest.approx(np.std(values, ddof=1) / 3)
    words = [
        record(index, gold=0, loglikelihoods=(-float(index),), greedy=(False,), tokens=(1,), lengths=(3,))
        for index in range(4)
    ]
    perplexity = summarize(TASKS["lambada_openai"], words)["perplexity"]
    assert perplexity.value == pytest.approx(math.exp(1.5))
    assert perplexity.stderr == pytest.approx(math.exp(1.5) * np.std(range(4), ddof=1) / 2)
    assert summarize(TASKS["piqa"], rows[:1])["acc"].stderr is None


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [record(0), record(1, group="g\n", model="m\u2028\x1b")]
    with RecordFile(tmp_path / "new" / "rows.jsonl", "r") as file:
        file.append(TASKS["piqa"], rows)
    assert read_records(tmp_path / "new" / "rows.jsonl") == rows
    first = json.loads((tmp_path / "new" / "rows.jsonl").read_text().split("\n")[0])
    assert (first["acc"], first["acc_norm"]) == (0.0, 1.0)


def test_an_unfinished_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(record(0).to_json(TASKS["piqa"]) + "\n" + record(1).to_json(TASKS["piqa"])[:40])
    assert read_records(path) == [record(0)]
    with RecordFile(path, "r") as file:
        assert file.records == {("piqa", "item0"): record(0)}
        file.append(TASKS["piqa"], [record(2)])
    assert read_records(path) == [record(0), record(2)]


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"gold": 2},
        {"gold": -1},
        {"loglikelihoods": []},
        {"loglikelihoods": [None, 1.0]},
        {"greedy": [True]},
        {"tokens": "ab"},
        {"model": 3},
        {"index": True},
    ],
)
def test_damaged_rows_are_named(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.loads(record().to_json(TASKS["piqa"]))
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
    with pytest.raises(KbitError, match=r"rows\.jsonl, line 2"):
        read_records(path)


@pytest.mark.parametrize("content", [b"text\n", b"[1]\n", b"\xff\n", b'{"schema": 1, "loglikelihoods": [NaN]}\n'])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(KbitError, match=r"rows\.jsonl"):
        read_records(path)
    with pytest.raises(KbitError, match="no such file"):
        read_records(tmp_path / "none")
    with pytest.raises(KbitError, match="cannot be"):
        RecordFile(tmp_path / "rows.jsonl" / "below", "r")


@pytest.fixture(scope="module")
def models(data_dir: Path) -> tuple[str, str]:
    return str(data_dir / "models" / "novels-0.7m"), str(data_dir / "models" / "novels-2m")


def evaluate(model: str, data_dir: Path, **options: Any) -> TaskEvaluation:
    settings: dict[str, Any] = {"tasks": TASK_NAMES, "limit": 12, "threads": 1, "compute": "fp32"}
    return evaluate_tasks(TaskRequest(model, data=str(data_dir), **(settings | options)))


def test_a_reference_and_a_kept_file_of_it_compare_alike(
    models: tuple[str, str], data_dir: Path, tmp_path: Path
) -> None:
    small, large = models
    kept = tmp_path / "large.jsonl"
    evaluate(large, data_dir, items=str(kept))
    report = evaluate(small, data_dir, reference=large, reference_backend="native", against=(str(kept),))
    half = len(report.comparisons) // 2
    assert half == 4
    for one, other in zip(report.comparisons[:half], report.comparisons[half:], strict=True):
        assert one.accuracy == other.accuracy
        assert one.gold.mean == pytest.approx(other.gold.mean, abs=1e-3)
        ours, theirs = (side[one.task].metrics["acc"].value for side in (report.results, report.reference))
        assert one.accuracy.difference == pytest.approx(ours - theirs)
        assert one.adjusted_p >= one.accuracy.p_value
    # The larger of the two models finds the words of novels likelier; 12 items tell that, their accuracies do not.
    lambada = report.comparisons[0]
    assert lambada.task == "lambada_openai"
    assert lambada.gold.mean < 0
    rows = report.to_dict()
    json.dumps(rows, allow_nan=False)
    assert rows["tasks"]["piqa"]["items"] == rows["tasks"]["piqa"]["items_available"] - 1826 == 12


def test_the_same_model_does_not_differ_from_itself(models: tuple[str, str], data_dir: Path) -> None:
    report = evaluate(models[0], data_dir, reference=models[0], tasks="piqa")
    (comparison,) = report.comparisons
    assert comparison.accuracy.p_value == 1.0
    assert (comparison.accuracy.flips, comparison.changed) == (0.0, 0.0)
    assert comparison.gold.mean == pytest.approx(0, abs=1e-3)


def test_an_interrupted_run_repeats_no_item(
    models: tuple[str, str], data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(models[0], data_dir)
    path = tmp_path / "rows.jsonl"
    calls = 0

    def stop(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt

    request = TaskRequest(
        models[0], TASK_NAMES, limit=12, data=str(data_dir), threads=1, compute="fp32", items=str(path)
    )
    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(request, stop)
    done = len(read_records(path))
    assert 12 <= done < 30
    path.write_bytes(path.read_bytes()[:-10])  # as if killed while writing
    kept = read_records(path)
    assert len(kept) == done - 1
    scored: list[int] = []
    again = evaluate_tasks(request, lambda task, finished, total, accuracy: scored.append(finished))
    assert again.resumed == len(kept)
    requests = sum(len(row.loglikelihoods) for result in whole.results.values() for row in result.records)
    assert len(scored) == requests - sum(len(row.loglikelihoods) for row in kept)
    for task, result in whole.results.items():
        ours = [row.loglikelihoods for row in again.results[task].records]
        assert np.concatenate(ours) == pytest.approx(
            np.concatenate([row.loglikelihoods for row in result.records]), abs=1e-3
        )
    assert len(read_records(path)) == 48

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a finished run needs no model")

    monkeypatch.setattr(module, "load_model", fail)
    finished = evaluate_tasks(request)
    assert finished.resumed == 48
    assert finished.results["piqa"].metrics == again.results["piqa"].metrics


def test_rows_of_another_run_are_not_mixed_in(models: tuple[str, str], data_dir: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "rows.jsonl")
    evaluate(models[0], data_dir, items=path, tasks="piqa", limit=2)
    evaluate(models[0], data_dir, items=path, tasks="piqa,arc_easy", limit=3)  # more items are the same run
    assert len(read_records(Path(path))) == 6
    for other in ({"compute": "int8"}, {"context": 128}):
        with pytest.raises(UsageError, match="another run"):
            evaluate(models[0], data_dir, **({"items": path, "tasks": "piqa", "limit": 2} | other))
    with pytest.raises(UsageError, match="another run"):
        evaluate(models[1], data_dir, items=path, tasks="piqa", limit=2)


def test_a_file_without_the_items_is_refused(models: tuple[str, str], data_dir: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "rows.jsonl")
    evaluate(models[0], data_dir, items=path, tasks="piqa", limit=2)
    with pytest.raises(UsageError, match="its tasks: piqa"):
        evaluate(models[0], data_dir, against=(path,), tasks="arc_easy", limit=2)
    report = evaluate(models[0], data_dir, against=(path,), tasks="piqa,arc_easy", limit=4)
    assert [(each.task, each.accuracy.items) for each in report.comparisons] == [("piqa", 2)]


def test_the_command(models: tuple[str, str], data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBIT_DATA", str(data_dir))
    small, large = models
    kept = str(tmp_path / "rows [bold].jsonl")
    common = ["--tasks", "piqa,lambada_openai", "--limit", "5", "--threads", "1"]
    code, out, error = run_command(["eval", small, *common, "--items", kept, "--json"])
    assert (code, error) == (0, "")
    figures = json.loads(out)
    assert figures["tasks"]["piqa"]["items"] == 5
    assert {"acc", "acc_stderr", "acc_norm"} <= figures["tasks"]["piqa"].keys()
    code, out, error = run_command(["eval", large, *common, "--against", kept])
    assert code == 0, error
    for expected in ("perplexity", "lost", "rows [bold].jsonl", "No difference in accuracy holds at 5%", small):
        assert expected in out.replace("\n", "")


def test_a_nested_model_answers_at_the_bits_that_are_named(
    models: tuple[str, str], data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KBIT_DATA", str(data_dir))
    out = str(tmp_path / "all")
    assert run_command(["quantize", models[0], "--nested", "2..4", "--method", "rtn", "-o", out])[0] == 0
    asked = ["eval", out, "--tasks", "lambada_openai", "--limit", "3", "--threads", "1", "--json"]
    found = [
        json.loads(run_command([*asked, *more])[1])["tasks"]["lambada_openai"]["perplexity"]
        for more in ([], ["--bits", "4"], ["--bits", "2"])
    ]
    assert found[0] == found[1] != found[2]
    code, _, error = run_command([*asked, "--bits", "9"])
    assert (code, "serves 2 to 4 bits; choose one of these" in error) == (2, True), error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "piqua"], "piqua"),
        (["--tasks", "piqa", "--data", "wikitext2"], "--data"),
        (["--tasks", "piqa", "--convention", "gptq"], "--convention"),
        (["--tasks", "piqa", "--max-tokens", "5"], "--max-tokens"),
        (["--tasks", "piqa", "--limit", "0"], "--limit 0"),
        (["--tasks", "piqa", "--context", "1"], "--context 1"),
        (["--tasks", "piqa", "--context", "9999"], "--context 9999"),
        (["--tasks", "piqa", "--against", "/nowhere/rows"], "/nowhere/rows"),
        (["--tasks", "piqa", "--task-data", "/nowhere"], "/nowhere"),
        (["--tasks", "piqa", "--reference-backend", "other"], "other"),
        (["--limit", "5"], "--limit"),
        (["--items", "x"], "--items"),
        (["--against", "x"], "--against"),
        (["--task-data", "x"], "--task-data"),
    ],
)
def test_wrong_flags_are_told_before_anything_is_computed(
    models: tuple[str, str], data_dir: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.setenv("KBIT_DATA", str(data_dir))

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a wrong request needs no model")

    monkeypatch.setattr(module, "load_model", fail)
    code, out, error = run_command(["eval", models[0], *arguments])
    assert code in (1, 2)
    assert out == ""
    assert said in error
    assert error.startswith("kbit: error: ")
    assert error.count("\n") == 1


def test_items_whose_context_is_too_long_are_counted(models: tuple[str, str], data_dir: Path) -> None:
    report = evaluate(models[0], data_dir, tasks="lambada_openai", context=64)
    assert report.results["lambada_openai"].truncated > 6
    assert all(row.truncated >= 0 for row in report.results["lambada_openai"].records)


def test_a_model_without_a_tokenizer_is_an_error(models: tuple[str, str], data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models[0], folder)
    folder.chmod(0o755)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(KbitError, match=r"tokenizer\.json"):
        evaluate(str(folder), data_dir, tasks="piqa")


def test_items_with_an_answer_too_long_for_the_model_are_left_out_and_counted(
    models: tuple[str, str], data_dir: Path, tmp_path: Path
) -> None:
    path = str(tmp_path / "rows.jsonl")
    report = evaluate(models[0], data_dir, tasks="piqa", context=32, items=path)
    result = report.results["piqa"]
    assert 0 < len(result.left_out) < 12
    assert len(result.records) + len(result.left_out) == 12
    assert {record.index for record in result.records}.isdisjoint(result.left_out)
    assert report.to_dict()["tasks"]["piqa"]["left_out_items"] == len(result.left_out)
    again = evaluate(models[0], data_dir, tasks="piqa", context=32, items=path)
    assert again.results["piqa"].metrics == result.metrics
    with pytest.raises(KbitError, match="no item can be scored"):
        evaluate(models[0], data_dir, tasks="piqa", context=2)
