"""What the steps found, as one JSON object and as a page of Markdown tables."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from math import exp, log
from pathlib import Path
from statistics import mean
from typing import Any

from kbit.gpu_check.place import Place, Row
from kbit.gpu_check.runner import FAILED, Result
from kbit.host.files import write_durably

VERSION = 1
# Columns of each step's table: heading, key, how it is written.
COLUMNS: dict[str, Sequence[tuple[str, str, str]]] = {
    "models": [("case", "case", ""), ("equal tokens", "equal", ""), ("of", "tokens", ""), ("worst", "worst", ".3f")],
    "times": [
        ("case", "case", ""), ("kernel", "kernel", ""), ("us", "us", ".2f"), ("GB/s", "GB/s", ".0f"),
        ("TFLOP/s", "TFLOP/s", ".1f"), ("share of roofline", "share", ".0%"),
    ],
    "peers": [("case", "case", ""), ("us", "us", ".2f"), ("share of roofline", "share", ".0%"), ("why", "why", "")],
    "estimates": [
        ("case", "case", ""), ("estimate us", "estimate_us", ".2f"), ("measured us", "us", ".2f"),
        ("measured / estimate", "factor", ".2f"),
    ],
    "tuned": [
        ("case", "case", ""), ("default us", "default_us", ".2f"), ("tuned us", "tuned_us", ".2f"),
        ("times as fast", "speedup", ".2f"), ("tried", "tried", ""),
    ],
    "speed": [
        ("model", "case", ""), ("KV", "kv", ""), ("decode tokens/s", "decode_tokens_per_s", ".1f"),
        ("prefill tokens/s", "prefill_tokens_per_s", ".0f"), ("share of bandwidth", "share_of_bandwidth", ".0%"),
    ],
}  # fmt: skip


def document(results: Sequence[Result], place: Place, started: float, now: float) -> dict[str, Any]:
    """The JSON object."""
    facts = next((result.rows[0] for result in results if result.step.name == "facts" and result.rows), {})
    return {
        "version": VERSION,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(now - started, 1),
        "scale": place.scale,
        "seed": place.seed,
        "facts": facts,
        "passed": all_right(results),
        "steps": [result.to_dict() for result in results],
    }


def all_right(results: Sequence[Result]) -> bool:
    """Whether every check of correctness ran and held."""
    checked = [result for result in results if result.step.name in ("facts", "kernels", "models")]
    return all(result.outcome == "passed" and result.rows for result in checked) and not any(
        result.outcome == FAILED for result in results
    )


def write(found: Mapping[str, Any], json_path: Path, markdown_path: Path) -> None:
    """Both files, each complete or not at all. Raises OSError."""
    write_durably(json_path, json.dumps(found, indent=1, default=str).encode())
    write_durably(markdown_path, markdown(found).encode())


def markdown(found: Mapping[str, Any]) -> str:
    """The page."""
    facts = found["facts"]
    names = ("driver", "arch", "torch", "triton", "cuda", "python", "kbit")
    gpu = facts.get("gpu", "no GPU")
    about = ", ".join(f"{name} {facts[name]}" for name in names if facts.get(name))
    verdict = "every check held" if found["passed"] else "NOT every check held"
    lines = [f"# {gpu}", "", f"{found['started']}, {found['seconds']} s, {verdict}. {about}", ""]
    for step in found["steps"]:
        lines += [f"## {step['title']}: {step['outcome']}", ""]
        rows = step["rows"]
        failed = [row for row in rows if "error" in row]
        lines += [f"- **failed** {row.get('case')}: {row['error']}" for row in failed]
        lines += [f"- cut short at {row['case']}: {row['cut']}" for row in rows if "cut" in row]
        make: Callable[[Sequence[Row]], list[str]] = _kernels if step["name"] == "kernels" else _nothing
        lines += make(rows)
        if step["name"] == "times" and rows:
            lines += [f"- {name}: {value:.0f}" for name, value in rows[0].items() if isinstance(value, float)]
        if step["name"] == "estimates":
            lines += _agreement(rows)
        if step["name"] in COLUMNS:
            shown = [row for row in rows if "error" not in row and "cut" not in row and row.get("case") != "limits"]
            lines += ["", *_table(COLUMNS[step["name"]], shown)]
        lines.append("")
    return "\n".join(lines)


def _nothing(rows: Sequence[Row]) -> list[str]:
    return []


def _kernels(rows: Sequence[Row]) -> list[str]:
    """One line a kernel: checks, and the worst error in units of its bound."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if "cut" not in row:
            groups.setdefault(str(row["case"]).split()[0].rstrip(","), []).append(row)
    table = []
    for name, group in groups.items():
        held = [row for row in group if "error" not in row and "refused" not in row]
        worst: Row = max(held, key=lambda row: row["worst"], default={})
        refused = sum("refused" in row for row in group)
        table.append(
            {"kernel": name, "held": len(held), "failed": len(group) - len(held) - refused, "refused": refused}
            | {"worst": worst.get("worst"), "of": worst.get("case")}
        )
    heads = [("kernel", "kernel", ""), ("held", "held", ""), ("failed", "failed", ""), ("refused", "refused", "")]
    return ["", *_table([*heads, ("worst error / bound", "worst", ".3f"), ("of", "of", "")], table)]


def _agreement(rows: Sequence[Row]) -> list[str]:
    """How well the model of a launch's time agrees with what was measured."""
    pairs = [(row["estimate_us"], row["us"]) for row in rows if row.get("us") and row.get("estimate_us")]
    if len(pairs) < 3:
        return ["- fewer than three launches have both an estimate and a time: nothing to compare"]
    factors = [measured / estimate for estimate, measured in pairs]
    geometric = exp(mean(map(log, factors)))
    rho = rank_correlation([estimate for estimate, _ in pairs], [measured for _, measured in pairs])
    return [
        f"- Spearman's rank correlation {rho:.3f} over {len(pairs)} launches; measured / estimate: geometric mean "
        f"{geometric:.2f}, from {min(factors):.2f} to {max(factors):.2f}"
    ]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, ties given their mean rank; NaN where one of the two is constant."""
    ranks = [_ranks(values) for values in (a, b)]
    (x, y), middle = ranks, (len(a) - 1) / 2
    covariance = sum((p - middle) * (q - middle) for p, q in zip(x, y, strict=True))
    spread = (sum((p - middle) ** 2 for p in x) * sum((q - middle) ** 2 for q in y)) ** 0.5
    return covariance / spread if spread else float("nan")


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def _table(columns: Sequence[tuple[str, str, str]], rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    lines = ["| " + " | ".join(heading for heading, _, _ in columns) + " |", "|--" * len(columns) + "|"]
    for row in rows:
        cells = []
        for _, key, form in columns:
            value = row.get(key)
            plain = value is None or not form or not isinstance(value, (int, float))
            cells.append(("" if value is None else str(value)) if plain else format(value, form))
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return lines
