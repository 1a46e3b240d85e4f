"""The frontier as tables and as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from frontier.measure import PEER, Row
from frontier.subjects import note
from kbit.evaluate.statistics import DRAWS, SEED

# What part of a peer's divergence kbit is to have with no more bits: the goals of accuracy.
GOALS = dict.fromkeys(("IQ2_XXS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "Q4_K_M"), 1 / 3) | {
    "Q5_K_M": 0.5,
    "Q6_K": 0.5,
}
# Bits of kbit's that are to do what llama.cpp's types do with so many more, and how near a type's must come to those.
FEWER, FEWER_AT, _NEAR = 0.9, (2.1, 2.55, 3.1, 3.6), 0.15
_COLOURS = {"rtn": "#0072B2", "hqq": "#56B4E9", "awq": "#009E73", "gptq": "#CC79A7", "ldlq2": "#D55E00"}
_COLOURS |= {"trellis": "#6A3D9A", "trellis-plain": "#B2A1C7", "trellis-tuned": "#E31A1C"}
_PEERS = {PEER: "#E69F00", "GPTQModel": "#999933", "AutoRound": "#882255", "HQQ": "#6699CC", "torchao": "#117733"}
_OTHER = "#000000"


def latest(rows: list[Row]) -> list[Row]:
    """The last row of every point."""
    return list({(row["model"], row["tool"], row["method"], row["format"]): row for row in rows}.values())


def tables(rows: list[Row]) -> str:
    """Markdown: for every model its points, its best against each of the peers', and against llama.cpp's types with
    almost a bit more."""
    lines: list[str] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        chosen = sorted((row for row in rows if row["model"] == model), key=lambda row: row["linear_bits"])
        first = chosen[0]
        lines += [
            f"**{model}** ({note(model)}), {first['tokens']:,} tokens of {first['data']} in windows "
            f"of {first['context']}; perplexity of the original {first['original_perplexity']:.2f}",
            "",
            "| bits, linear | bits, all | | format | KL, nats | KL 99.9 % | perplexity | top-1 |",
            "|--|--|--|--|--|--|--|--|",
        ]
        for row in chosen:
            who = f"kbit {row['method']}" if row["tool"] == "kbit" else f"{row['tool']}, {row['method']}"
            digits = 4 if row["kl"] >= 0.1 else 5 if row["kl"] >= 0.01 else 6
            error = "" if row["kl_stderr"] is None else f" ± {row['kl_stderr']:.{digits}f}"
            lines.append(
                f"| {row['linear_bits']:.3f} | {row['all_bits']:.2f} | {who} | {row['format']} | "
                f"{_digits(row['kl'])}{error} | {_digits(row['kl_p99.9'])} | {row['perplexity']:.2f} | "
                f"{row['top1']:.1%} |"
            )
        lines += ["", *_ratios(chosen), ""]
        fewer = _with_fewer_bits(chosen)
        lines += [*fewer, ""] if fewer else []
    return "\n".join(lines).rstrip() + "\n"


def _ratios(rows: list[Row]) -> list[str]:
    """kbit's best point with no more bits than each of the peers', as a part of the peer's divergence."""
    ours = [row for row in rows if row["tool"] == "kbit"]
    lines = []
    for peer in (row for row in rows if row["tool"] != "kbit"):
        able = [row for row in ours if row["linear_bits"] <= peer["linear_bits"] + 1e-9]
        if able:
            best = min(able, key=lambda row: row["kl"])
            low, high = ratio_interval(best, peer)
            goal = GOALS.get(peer["format"])
            lines.append(
                f"| {peer['tool']} {peer['format']} | {peer['linear_bits']:.2f} | {best['method']} {best['format']} | "
                f"{best['linear_bits']:.2f} | {best['kl'] / peer['kl']:.2f} ({low:.2f} to {high:.2f}) | "
                f"{'' if goal is None else f'{goal:.2g}'} |"
            )
    head = [
        "| peer | its bits | kbit's best with no more | bits | KL / its KL (95 %) | goal |",
        "|--|--|--|--|--|--|",
    ]
    return head + lines if lines else []


def _with_fewer_bits(rows: list[Row]) -> list[str]:
    """kbit's best at some bits, as a part of the divergence of the peer's types that have about `FEWER` more."""
    lines = []
    for bits in FEWER_AT:
        able = [row for row in rows if row["tool"] == "kbit" and bits - 0.2 <= row["linear_bits"] < bits + 0.01]
        for peer in rows:
            if able and peer["tool"] == PEER and abs(peer["linear_bits"] - bits - FEWER) <= _NEAR + 1e-9:
                best = min(able, key=lambda row: row["kl"])
                low, high = ratio_interval(best, peer)
                ours = f"{best['method']} {best['format']} | {best['linear_bits']:.2f} | {_digits(best['kl'])}"
                theirs = f"{peer['format']} | {peer['linear_bits']:.2f} | {_digits(peer['kl'])}"
                share = f"{best['kl'] / peer['kl']:.2f} ({low:.2f} to {high:.2f})"
                lines.append(f"| {bits:g} | {ours} | {theirs} | {share} |")
    head = [
        f"| at | kbit's best | bits | KL | {PEER}, {FEWER:g} ± {_NEAR:g} more | bits | KL | KL / its KL (95 %) |",
        "|--|--|--|--|--|--|--|--|",
    ]
    return head + lines if lines else []


def ratio_interval(row: Row, other: Row, level: float = 0.95) -> tuple[float, float]:
    """Paired bootstrap interval of the ratio of two mean divergences: the same windows are drawn for both."""
    ours, theirs = np.array(row["cluster_kl"]), np.array(other["cluster_kl"])
    times = np.random.default_rng(SEED).multinomial(len(ours), np.full(len(ours), 1 / len(ours)), size=DRAWS)
    tail = 50 * (1 - level)
    low, high = np.percentile((times @ ours) / (times @ theirs), [tail, 100 - tail])
    return float(low), float(high)


def draw(rows: list[Row], output: Path) -> None:
    """KL against bits, a panel for each model, both on scales where a method's points lie about a line."""
    import matplotlib

    matplotlib.use("svg" if output.suffix == ".svg" else "agg")
    matplotlib.rcParams["svg.hashsalt"] = "kbit"  # the same rows draw the same file
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(5 * len(models), 4.4), squeeze=False, layout="constrained")
    for axis, model in zip(axes[0], models, strict=True):
        _panel(axis, [row for row in rows if row["model"] == model])
        axis.set_title(model, loc="left", fontsize=10)
    labels: dict[str, Any] = {}
    for axis in axes[0]:
        labels |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None, dpi=150)


def _panel(axis: Any, rows: list[Row]) -> None:
    series: dict[tuple[str, str], list[Row]] = {}
    exact = [row for row in rows if row["kl"] <= 0]  # kept as stored: nowhere on a scale of logarithms
    rows = [row for row in rows if row["kl"] > 0]
    for row in sorted(rows, key=lambda row: row["linear_bits"]):
        series.setdefault((row["tool"], row["method"]), []).append(row)
    for (tool, method), points in series.items():
        best = [
            row
            for row in points
            if row["kl"] == min(other["kl"] for other in points if other["linear_bits"] <= row["linear_bits"])
        ]
        peer = tool != "kbit"
        colour = _PEERS.get(tool, _OTHER) if peer else _COLOURS.get(method, _OTHER)
        label = "llama.cpp + imatrix" if tool == PEER else tool if peer else f"kbit {method}"
        axis.plot([row["linear_bits"] for row in best], [row["kl"] for row in best], color=colour, linewidth=1)
        axis.errorbar(
            [row["linear_bits"] for row in points],
            [row["kl"] for row in points],
            yerr=[2 * (row["kl_stderr"] or 0) for row in points],
            fmt="s" if peer else "o",
            markersize=4,
            linewidth=0.8,
            color=colour,
            label=label,
        )
        if tool == PEER:
            for row in points:
                where = (row["linear_bits"], row["kl"])
                axis.annotate(row["format"], where, (3, 3), textcoords="offset points", fontsize=6, color="#555555")
    for row in exact:
        colour = _COLOURS.get(row["method"], _OTHER)
        at_the_foot = axis.get_xaxis_transform()
        axis.plot(row["linear_bits"], 0.0, "v", color=colour, markersize=5, transform=at_the_foot, clip_on=False)
        axis.annotate(
            "0", (row["linear_bits"], 0.0), (3, 4), xycoords=at_the_foot, textcoords="offset points", fontsize=6
        )
    axis.set_yscale("log")
    axis.set_xlabel("bits per weight of the linear layers, everything stored counted", fontsize=8)
    axis.set_ylabel("KL from the original, nats per token", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, which="both", linewidth=0.2)


def _digits(value: float) -> str:
    return f"{value:.3g}" if value >= 0.1 else f"{value:.4f}" if value >= 0.01 else f"{value:.5f}"
