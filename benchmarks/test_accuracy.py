"""Accuracy against bits: one model at every width, and every data type on a model small enough for all of them.

    pytest benchmarks/test_accuracy.py -s

The first is the default model (without it, novels-5m of the data folder) as users run it, int8 arithmetic and all, on
WikiText-2 (without it, on text that the model writes itself); the second novels-2m on a novel it has not seen, with
exact arithmetic. Both against the model as it is. For every data type on SmolLM2 run benchmarks/accuracy_table.py; for
any other model, `kbit scale`. KBIT_BENCH_TOKENS (2048): how much text the default model is measured on.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ladder import Ladder

TOKENS, CONTEXT = int(os.environ.get("KBIT_BENCH_TOKENS", "2048")), 512


def load_accuracy_table() -> Any:
    path = Path(__file__).with_name("accuracy_table.py")
    spec = importlib.util.spec_from_file_location("accuracy_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_widths(benchmark: Any, ladder: Ladder, text: Any) -> None:
    """Every width of the default model, as `kbit run` computes it."""
    from measuring import machine, machine_line

    from kbit.backends.select import select_backend
    from kbit.evaluate.compare import compare
    from kbit.evaluate.logits import StoredLogits
    from kbit.evaluate.statistics import cluster
    from kbit.text.windows import choose_context, make_windows

    rows: list[dict[str, Any]] = []

    def measure() -> None:
        exact = ladder.load(None, select_backend("cpu", compute="fp32"))
        context = min(CONTEXT, choose_context("gptq", None, exact.spec.max_positions))
        windows = make_windows(text, ladder.tokenizer, "gptq", context, TOKENS)
        with StoredLogits(exact, windows) as reference:
            for rung in ladder.rungs:
                found = compare(rung.decoder, reference, windows)
                losses, kl = cluster(found.model.nll), cluster(found.kl)
                rows.append(
                    {
                        **rung.about(),
                        "context": context,
                        "tokens": found.model.tokens,
                        "perplexity": found.model.perplexity,
                        "reference_perplexity": found.reference.perplexity,
                        "kl_mean": found.kl_mean,
                        "kl_stderr": found.kl_stderr,
                        "top1": found.top1_agreement,
                        "cluster_tokens": kl.sizes.tolist(),
                        "cluster_nll": losses.sums.tolist(),
                        "cluster_kl": kl.sums.tolist(),
                    }
                )

    benchmark.pedantic(measure, rounds=1)
    about = {"model": ladder.name, "data": text.name, "data_sha256": text.sha256}
    benchmark.extra_info.update({"case": "accuracy by width", **about, "machine": machine(), "rows": rows})
    first = rows[0]
    print(
        f"\n\naccuracy by width, {ladder.name} on {text.name}: {first['tokens']:,} tokens in windows of "
        f"{first['context']}, perplexity of the original {first['reference_perplexity']:.2f}\n{machine_line()}"
    )
    show_kl, show_perplexity = load_accuracy_table().show_kl, load_accuracy_table().show_perplexity
    for row in rows:
        print(
            f"  {row['bits']} bits, {row['format']:<12}{row['linear_bits_per_weight']:.2f} bits a weight "
            f"({row['bits_per_weight']:.2f} in all)  perplexity {show_perplexity(row):>8}  KL {show_kl(row):<20}"
            f"  top-1 {row['top1']:.1%}"
        )


def test_every_format(benchmark: Any, data_dir: Path, tmp_path: Path) -> None:
    """Every data type at every width on novels-2m."""
    accuracy_table = load_accuracy_table()
    model, text = data_dir / "models" / "novels-2m", data_dir / "novels" / "heldout" / "Doyle_Hound_1902.txt"
    if not model.is_dir() or not text.is_file():
        pytest.skip(f"no {model} or no {text}")
    read = tmp_path / text.name
    read.write_text(text.read_text(encoding="utf-8"), encoding="utf-8", newline="\n")  # without CR

    def measure() -> list[dict[str, Any]]:
        return accuracy_table.measure(str(model), str(read), bits=(2, 3, 4, 5, 6, 7, 8), max_tokens=4096)

    rows = benchmark.pedantic(measure, rounds=1)
    figures = ("format", "dtype", "bits", "bits_per_weight", "tokens", "perplexity", "kl_mean", "kl_stderr")
    clusters = ("cluster_tokens", "cluster_nll", "cluster_kl")
    benchmark.extra_info["case"] = "accuracy by format"
    benchmark.extra_info["rows"] = [{key: row[key] for key in (*figures, *clusters)} for row in rows]
    print("\n" + accuracy_table.table(rows))
