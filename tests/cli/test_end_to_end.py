"""The product's main path on the real model: convert, inspect, run, measure, each through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kbit.cli.main import _run

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = "smollm2-135m-instruct"


@pytest.fixture
def converted(smollm2_gguf: Path, make_once: Callable[[str, Callable[[Path], object]], Path]) -> Callable[[int], Path]:
    """converted(bits): SmolLM2 at 8, 5 or 4 bits, in the data types kbit chooses; converted once."""

    def convert(bits: int, out: Path) -> None:
        assert _run(["quantize", MODEL, "--bits", str(bits), "--method", "rtn", "-o", str(out)], debug=True) == 0

    return lambda bits: make_once(f"smollm2-{bits}", partial(convert, bits))


def json_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    """What a command prints under --json; fails unless that is one JSON object and nothing else."""
    capsys.readouterr()
    assert _run([*arguments, "--json"], debug=True) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("bits", [8, 5, 4])
def test_the_capital_of_france(converted: Callable[[int], Path], bits: int, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "--raw", "The capital of France is", "--model", str(converted(bits)), "--max-tokens", "12"]
    result = json_of(arguments, capsys)
    assert result["text"].startswith(" Paris")
    assert result["prompt_tokens"] == 5
    assert result["completion_tokens"] <= 12
    for key in ("prefill_tokens_per_second", "time_to_first_token_s", "peak_rss_bytes"):
        assert result[key] > 0
    assert result["backend"] == "native"


@pytest.mark.parametrize(("bits", "format"), [(8, "int8-b64"), (5, "lloyd5-b64"), (4, "nf4-b64")])
def test_info_counts_every_bit(
    converted: Callable[[int], Path], bits: int, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    info = json_of(["info", str(converted(bits))], capsys)
    assert info["formats"][format]["tensors"] == 7 * 30
    # 16 bits of scale per 64 weights; the norms, in float32, add the rest.
    assert bits + 0.25 < info["bits_per_weight_without_embeddings"] < bits + 0.27
    # All there is in the file but its header: the embedding in 16 bits included.
    assert 8 * info["tensor_bytes"] / info["parameters"] == pytest.approx(info["bits_per_weight"])
    assert 0 < info["file_bytes"] - info["tensor_bytes"] < 100_000


def test_eight_bits_cost_next_to_nothing(
    converted: Callable[[int], Path], data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mean KL below 0.002 nats on WikiText-2 test; on the first 512 tokens here, on more of it in the README.

    That is the weights' own: int8 compute would add to it (see test_native_smollm2.py).
    """
    text = str(data_dir / "wikitext2" / "wiki.test.raw")
    arguments = ["eval", str(converted(8)), "--data", text, "--reference", MODEL, "--compute", "fp32"]
    result = json_of([*arguments, "--max-tokens", "512", "--context", "256"], capsys)
    assert result["tokens"] == 2 * 255
    assert 0 < result["kl_mean"] < 0.002
    assert result["top1_agreement"] > 0.95
    low, high = result["delta_nll_ci95"]
    assert low < result["delta_nll"] < high
    assert result["perplexity"] == pytest.approx(result["reference_perplexity"], rel=0.02)
