"""The same items, scored here and by lm-eval: with its own Hugging Face model, and with kbit as a model of lm-eval."""

from __future__ import annotations

import functools
import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kbit.evaluate.tasks.documents import TASKS
from kbit.evaluate.tasks.scoring import TaskResult, score_items
from kbit.evaluate.tasks.sources import load_items
from kbit.host.errors import UnsupportedError, UsageError

lm_eval: Any  # see `offline`

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

ITEMS = 6
# float32 log-softmax of 2048 or so logits, summed over up to 100 tokens, against float64.
ABSOLUTE = 1e-3


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    """lm-eval's Hugging Face model imports accelerate, for several GPUs; on one CPU nothing of it is called.

    lm-eval is imported here, and not by every process that collects these tests: it takes seconds.
    """
    global lm_eval
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("lm_eval.tasks")
    pytest.importorskip("transformers")
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("HF_DATASETS_OFFLINE", "1")
    patch.setenv("TQDM_DISABLE", "1")
    if "accelerate" not in sys.modules:
        accelerate, utils = types.ModuleType("accelerate"), types.ModuleType("accelerate.utils")
        for name in ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size"):
            setattr(accelerate, name, None)
        utils.get_max_memory = None  # type: ignore[attr-defined]
        patch.setitem(sys.modules, "accelerate", accelerate)
        patch.setitem(sys.modules, "accelerate.utils", utils)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def folder(data_dir: Path) -> str:
    return str(data_dir / "models" / "novels-5m")


@pytest.fixture(scope="module")
def kbit_model(folder: str, offline: None) -> Any:
    from kbit.evaluate.lm_eval_model import KbitLM

    return KbitLM(folder, compute="fp32", threads=1)


@pytest.fixture(scope="module")
def hf_model(folder: str, offline: None) -> Any:
    import transformers
    from lm_eval.models.huggingface import HFLM

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return HFLM(pretrained=model, tokenizer=transformers.AutoTokenizer.from_pretrained(folder), batch_size=4)


@pytest.fixture(scope="module")
def own(kbit_model: Any, data_dir: Path) -> dict[str, TaskResult]:
    data = [load_items(task, str(data_dir), ITEMS) for task in TASKS.values()]
    return score_items(kbit_model._scorer, data)


@pytest.fixture(scope="module", params=["hf", "kbit"])
def theirs(request: pytest.FixtureRequest, data_dir: Path) -> tuple[str, dict[str, Any]]:
    from kbit.evaluate.lm_eval_model import local_tasks

    model = request.getfixturevalue(f"{request.param}_model")
    # Only these five folders of lm-eval's tasks: it takes 15 s to read all of them.
    root = Path(lm_eval.tasks.__file__).parent
    folders = [str(root / name) for name in ("lambada", "piqa", "winogrande", "hellaswag", "arc")]
    manager = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)
    tasks = local_tasks(TASKS, str(data_dir), ITEMS)
    return request.param, lm_eval.simple_evaluate(model=model, tasks=[tasks], task_manager=manager, bootstrap_iters=0)


@pytest.mark.parametrize("name", TASKS)
def test_scores_equal_lm_evals_to_the_last_item(
    own: dict[str, TaskResult], theirs: tuple[str, dict[str, Any]], name: str
) -> None:
    model, results = theirs
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    result = own[name]
    assert len(samples) == len(result.records) == ITEMS
    # The same arithmetic where kbit is lm-eval's model; float32 log-softmax where it is not.
    tolerance = ABSOLUTE if model == "hf" else 0.0
    for sample, item, record in zip(samples, result.data.items, result.records, strict=True):
        assert tuple(map(tuple, _requests(sample))) == item.requests
        answers = [response[0] for response in sample["resps"]]
        assert [float(each[0]) for each in answers] == pytest.approx(record.loglikelihoods, abs=tolerance)
        assert tuple(str(each[1]) == "True" for each in answers) == record.greedy
        for metric in TASKS[name].metrics:
            if metric != "perplexity":
                assert sample[metric] == record.value(metric)
    for metric, estimate in result.metrics.items():
        assert results["results"][name][f"{metric},none"] == pytest.approx(estimate.value, rel=1e-5 + tolerance)


def _requests(sample: dict[str, Any]) -> list[list[str]]:
    """The texts of a sample's requests, in either form that lm-eval has logged them in."""
    arguments = sample["arguments"]
    if isinstance(arguments, dict):
        return [[each["arg_0"], each["arg_1"]] for each in arguments.values()]
    return [list(each) for each in arguments]


def test_standard_errors_equal_lm_evals(own: dict[str, TaskResult]) -> None:
    from lm_eval.api.metrics import mean_stderr

    for name, result in own.items():
        values = [record.value("acc") for record in result.records]
        if name != "lambada_openai":
            assert result.metrics["acc"].stderr == pytest.approx(mean_stderr(values))


def test_hellaswags_rows_are_cleaned_as_lm_eval_cleans_them() -> None:
    """Markup of every kind that WikiHow's texts have, odd spaces and capitals."""
    import datasets
    from lm_eval.tasks.hellaswag.utils import process_docs

    texts = ["[header] How to [title] Go out [step] now", "  a [b] c  d ", "HE Then  ran", "é [x] [title] y", "]odd["]
    rows = [
        {"activity_label": label, "ctx_a": a, "ctx_b": b, "endings": texts[:4], "label": str(index % 4)}
        for index, (label, a, b) in enumerate((x, y, z) for x in texts[:2] for y in texts for z in ("", *texts))
    ]
    for row, expected in zip(rows, process_docs(datasets.Dataset.from_list(rows)), strict=True):
        item = TASKS["hellaswag"].item(row, "row")
        assert {context for context, _ in item.requests} == {expected["query"]}
        assert [text for _, text in item.requests] == [f" {choice}" for choice in expected["choices"]]
        assert item.lengths == tuple(map(len, expected["choices"]))
        assert item.gold == expected["gold"]


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


TEXT = "The fog came in from the north, and with it the sound of a bell. " * 12


def test_whole_texts_and_empty_contexts(kbit_model: Any, hf_model: Any) -> None:
    """Windows of 256 tokens over some 250 to 500, and a text without a context."""
    rolling = instances("loglikelihood_rolling", (TEXT,), ("Short.",), (TEXT + TEXT,))
    assert kbit_model.loglikelihood_rolling(rolling, disable_tqdm=True) == pytest.approx(
        hf_model.loglikelihood_rolling(rolling, disable_tqdm=True), abs=10 * ABSOLUTE
    )
    pairs = instances("loglikelihood", ("", " Once upon a time"), ("", "<|endoftext|>Once"), (TEXT * 2, " bell."))
    ours = kbit_model.loglikelihood(pairs, disable_tqdm=True)
    for one, other in zip(ours, hf_model.loglikelihood(pairs, disable_tqdm=True), strict=True):
        assert one[0] == pytest.approx(other[0], abs=ABSOLUTE)
        assert one[1] == other[1]


def test_generated_texts(kbit_model: Any, hf_model: Any) -> None:
    requests = instances(
        "generate_until",
        ("It was a dark and", {"until": [".", "\n"], "max_gen_toks": 30}),
        (TEXT, {"until": [], "max_gen_toks": 12}),
        ("She said", {"until": ["a"], "max_gen_toks": 40, "do_sample": False}),
    )
    ours = kbit_model.generate_until(requests, disable_tqdm=True)
    assert ours == hf_model.generate_until(requests, disable_tqdm=True)
    assert len("".join(ours)) > 20
    sampled = instances("generate_until", ("She", {"max_gen_toks": 20, "do_sample": True, "temperature": 0.8}))
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts += kbit_model.generate_until(sampled, disable_tqdm=True)
    assert texts[0] == texts[1] != texts[2]
    with pytest.raises(UsageError, match="256"):
        kbit_model.generate_until(instances("generate_until", ("a", {"max_gen_toks": 256})), disable_tqdm=True)


def test_the_model_is_found_by_name(kbit_model: Any, folder: str) -> None:
    from lm_eval.api.registry import get_model

    from kbit.evaluate.lm_eval_model import KbitLM

    assert get_model("kbit") is KbitLM
    model = KbitLM.create_from_arg_string(f"pretrained={folder},max_length=64,threads=1", {"device": "cpu"})
    assert (model.max_length, model.eot_token_id, model.prefix_token_id) == (64, 0, 0)
    for bad in ({}, {"model": folder, "pretrained": folder}):
        with pytest.raises(UsageError, match="model"):
            KbitLM(**bad)


def test_chat_templates(tmp_path: Path, tiny_model: Path) -> None:
    import shutil

    from kbit.evaluate.lm_eval_model import KbitLM

    shutil.copytree(tiny_model, tmp_path / "model")
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    model = KbitLM(str(tmp_path / "model"), threads=1)
    assert model.chat_template(True) == template
    turns = [{"role": "user", "content": "Hi"}]
    assert model.apply_chat_template(turns) == "<user>Hi</><assistant>"
    begun = [*turns, {"role": "assistant", "content": "Well, "}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == "<user>Hi</><assistant>Well,"
    assert model.chat_template(False) is None
    with pytest.raises(UsageError, match="no such chat template"):
        model.chat_template("other")


TASK = """\
task: wet
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


def test_lm_evals_command_line_knows_the_model(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A task of the user's own, without what lm-eval takes 15 s for: reading all of its tasks."""
    from kbit.evaluate.lm_eval_model import main

    manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    rows, task = tmp_path / "rows.jsonl", tmp_path / "wet.yaml"
    rows.write_text("".join(json.dumps({"question": f"Is {x} wet?", "label": 0}) + "\n" for x in ("rain", "snow")))
    task.write_text(TASK.format(rows=rows, cache=tmp_path / "cache"))
    command = ["lm_eval", "run", "--model", "kbit", "--tasks", str(task), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*command, "--model_args", f"model={folder},threads=1"])
    main()
    assert re.search(r"\|wet +\|.*\|acc +\|", capsys.readouterr().out)
    monkeypatch.setattr(sys, "argv", [*command, "--model_args", "model=/nowhere/model"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code in (1, 2)
    assert capsys.readouterr().err.splitlines()[-1].startswith("kbit: error: /nowhere/model")


def test_lm_evals_default_device_is_no_wish_for_a_gpu(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kbit.evaluate.lm_eval_model import KbitLM

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert KbitLM(folder, device="cuda:0", threads=1).device == torch.device("cpu")


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    import kbit.evaluate.lm_eval_model as adapter

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    source = importlib.util.spec_from_file_location("adapter_without_lm_eval", adapter.__file__)
    assert source is not None
    assert source.loader is not None
    with pytest.raises(UnsupportedError, match=r"kbit\[tasks\]"):
        source.loader.exec_module(importlib.util.module_from_spec(source))
