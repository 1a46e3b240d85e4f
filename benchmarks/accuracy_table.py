"""Perplexity and KL divergence for every width and data type: the table of docs/accuracy.md.

    python benchmarks/accuracy_table.py --data wikitext2 --max-tokens 8192 --context 512

Linear layers are rounded to nearest in blocks of 64 with fp16 scales; embeddings and norms stay as they are. The
reference is the model itself, run once; its logits are kept on disk meanwhile. One line of JSON per format goes to
--json, so that an interrupted run continues where it stopped; the table is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DTYPES = ("int", "float", "dynamic", "quantile", "nf", "lloyd")


def measure(
    model: str,
    data: str,
    *,
    bits: Sequence[int],
    block_size: int = 64,
    max_tokens: int | None = None,
    context: int | None = None,
    results: Path | None = None,
) -> list[dict[str, Any]]:
    """Compare every data type at every width with the model itself.

    Args:
        model, data: as for `kbit eval`.
        bits: widths.
        block_size: weights per scale.
        max_tokens, context: how much text, and in windows of how many tokens.
        results: file of earlier results, one JSON object per line; formats in it are not measured again, and new ones
            are appended.

    Returns:
        One row per format: its name, bits per weight and the figures of `kbit eval --json`.
    """
    from kbit.backends.select import select_backend
    from kbit.evaluate.compare import compare_many
    from kbit.evaluate.evaluation import comparison_dict
    from kbit.evaluate.logits import StoredLogits
    from kbit.evaluate.statistics import cluster
    from kbit.formats.quant_format import QuantFormat
    from kbit.models.families import spec_from_config
    from kbit.models.load import load_decoder
    from kbit.models.opening import open_model
    from kbit.quantizers.plan import make_plan
    from kbit.quantizers.rtn import QuantizedView
    from kbit.text.datasets import resolve_data
    from kbit.text.tokenizer import Tokenizer
    from kbit.text.windows import choose_context, make_windows

    rows = read_rows(results)
    done = {row["format"] for row in rows}
    formats = [QuantFormat(dtype, k, block_size) for k in bits for dtype in DTYPES]
    formats += [QuantFormat("int", k, block_size, asymmetric=True) for k in bits]
    missing = [format for format in formats if str(format) not in done]
    if not missing:
        return rows
    with open_model(model) as source:
        length = choose_context("gptq", context, spec_from_config(source.config).max_positions)
        windows = make_windows(resolve_data(data), Tokenizer.from_source(source), "gptq", length, max_tokens)
        weights = {name: source.read(name) for name in source.tensors}
        backend = select_backend("cpu", compute="fp32")  # equals the reference to rounding, and is quicker
        with StoredLogits(load_decoder(source, backend), windows) as reference:
            plans = {str(format): make_plan(source, format) for format in missing}
            candidates = [
                (name, lambda plan=plan: load_decoder(QuantizedView(source, plan, weights.__getitem__), backend))
                for name, plan in plans.items()
            ]
            started = time.perf_counter()
            for format, (name, comparison) in zip(missing, compare_many(candidates, reference, windows), strict=True):
                row = {
                    "format": name,
                    "dtype": format.dtype + ("-asym" if format.asymmetric else ""),
                    "bits": format.bits,
                    "bits_per_weight": plans[name].bits_per_weight("linear"),
                    "tokens": comparison.model.tokens,
                    "perplexity": comparison.model.perplexity,
                    **comparison_dict(comparison),
                    "cluster_tokens": cluster(comparison.kl).sizes.tolist(),
                    "cluster_nll": cluster(comparison.model.nll).sums.tolist(),
                    "cluster_kl": cluster(comparison.kl).sums.tolist(),
                }
                rows.append(row)
                if results is not None:
                    with results.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                print(
                    f"{name}: perplexity {row['perplexity']:.3f}, "
                    f"KL {row['kl_mean']:.5f}; {time.perf_counter() - started:.0f} s so far",
                    file=sys.stderr,
                )
    return rows


def read_rows(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(rows: list[dict[str, Any]]) -> str:
    """The two tables in Markdown."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    cells = {(row["bits"], row["dtype"]): row for row in rows}
    lines = []
    for title, show in (
        ("perplexity", show_perplexity),
        ("KL divergence from the original, nats per token ± standard error", show_kl),
    ):
        lines += [f"**{title}**", "", "| bits | " + " | ".join(dtypes) + " |", "|--|" + "--|" * len(dtypes)]
        for bits in sorted({row["bits"] for row in rows}):
            shown = [show(cells[bits, dtype]) if (bits, dtype) in cells else "" for dtype in dtypes]
            lines.append(f"| {bits} | " + " | ".join(shown) + " |")
        lines.append("")
    first = rows[0]
    lines.append(f"{first['tokens']:,} tokens; perplexity of the original {first['reference_perplexity']:.2f}.")
    return "\n".join(lines)


def show_perplexity(row: dict[str, Any]) -> str:
    return f"{row['perplexity']:.2f}" if row["perplexity"] < 1e4 else f"{row['perplexity']:.0e}"


def show_kl(row: dict[str, Any]) -> str:
    mean, error = row["kl_mean"], row["kl_stderr"] or 0.0
    digits = 3 if mean >= 0.1 else 4 if mean >= 0.01 else 5
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", default="wikitext2")
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 7, 8])
    parser.add_argument("--json", type=Path, help="append results here, and skip formats that are there already")
    arguments = parser.parse_args()
    rows = measure(
        arguments.model,
        arguments.data,
        bits=arguments.bits,
        block_size=arguments.block_size,
        max_tokens=arguments.max_tokens,
        context=arguments.context,
        results=arguments.json,
    )
    print(table([row for row in rows if row["bits"] in arguments.bits]))


if __name__ == "__main__":
    main()
