"""`kbit bench`: what it counts and reports; never how fast anything is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_cases import in_process

from kbit import _native
from kbit.engine.loader import load_model
from kbit.graph.pages import PAGE


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is read for a moment, not for seconds."""
    monkeypatch.setattr("kbit.planner.kernel_timing.SECONDS", 0.01)
    monkeypatch.setattr("kbit.planner.kernel_timing._cache_bytes", lambda: 4 << 20)


def test_every_case_is_run_as_often_as_asked(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBIT_PREPARED", str(tmp_path))
    lengths = ["--prompt", "8,16", "--generate", "4", "--depth", "0,20", "--threads", "1,2", "--repeats", "3"]
    code, out, error = in_process(["bench", str(tiny_model), *lengths, "--json"], monkeypatch)
    assert code == 0, error
    result = json.loads(out)
    tests = [(row["threads"], row["test"]) for row in result["results"]]
    names = ["pp8", "pp8 @ d20", "pp16", "pp16 @ d20", "tg4", "tg4 @ d20"]
    assert tests == [(threads, name) for threads in (1, 2) for name in names]
    for row in result["results"]:
        low, high = row["quartiles"]
        assert len(row["all"]) == 3
        assert 0 < min(row["all"]) <= low <= row["tokens_per_second"] <= high <= max(row["all"])
        assert (row["bandwidth_share"] is not None) == (row["test"] == "tg4")
    assert result["prepare_s"] > 0
    assert len(result["loads_s"]) == 3 + 1  # for the second number of threads
    loaded = load_model(str(tiny_model), "cpu", 1)
    assert result["weights_bytes"] == result["bytes_read_per_token"] == loaded.decoder.weights.nbytes  # a tied head
    assert result["kv_bytes_per_token"] == _native.kv_page_bytes(2, 2, 8, "fp16") // PAGE
    again = json.loads(in_process(["bench", str(tiny_model), *lengths, "--json"], monkeypatch)[1])
    assert again["prepare_s"] is None


def test_what_a_token_does_not_read(published: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding that is only looked up in, and experts that are not chosen."""
    model = published("mixtral")
    short = ["--prompt", "0", "--generate", "2", "--depth", "0", "--threads", "1", "--repeats", "1"]
    code, out, error = in_process(["bench", str(model), *short, "--json"], monkeypatch)
    assert code == 0, error
    result = json.loads(out)
    loaded = load_model(str(model), "cpu", 1)
    config = json.loads((model / "config.json").read_text())
    experts = config["num_hidden_layers"] * config["num_local_experts"]
    # of stored float32 weights, three matrices each
    each = 3 * 4 * config["hidden_size"] * config["intermediate_size"]
    unchosen = experts * each * (1 - config["num_experts_per_tok"] / config["num_local_experts"])
    expected = loaded.decoder.weights.nbytes - loaded.decoder.weights.embedding.nbytes - unchosen
    assert not config["tie_word_embeddings"]
    assert result["bytes_read_per_token"] == round(expected)


def test_the_table(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ["--prompt", "8", "--generate", "2", "--depth", "0", "--threads", "1", "--repeats", "1"]
    code, out, _ = in_process(["bench", str(tiny_model), *short], monkeypatch)
    assert code == 0
    head, *rows = out.split("\n\n")[1].splitlines()
    assert head.split()[:3] == ["threads", "test", "tokens/s"]
    assert [row.split()[:2] for row in rows] == [["1", "pp8"], ["1", "tg2"]]
    assert rows[1].endswith("%")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "x"], "--prompt x: expected whole numbers"),
        (["--depth", "0,-1"], "--depth 0,-1: expected whole numbers"),
        (["--threads", "0"], "--threads 0: expected whole numbers from 1"),
        (["--threads", "99999"], "--threads 99999: expected at least 1"),
        (["--repeats", "0"], "--repeats 0: expected"),
        (["--prompt", "0", "--generate", "0"], "there is nothing to time"),
        (["--prompt", "60", "--depth", "8"], "pp60 @ d8: needs 68 tokens, and the model's context is 64"),
        (["--bits", "3"], "3"),
    ],
)
def test_wrong_usage_is_one_line(
    tiny_model: Path, flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, error = in_process(["bench", str(tiny_model), *flags], monkeypatch)
    assert (code, out) == (2, "")
    assert message in error
    assert len(error.splitlines()) == 1
