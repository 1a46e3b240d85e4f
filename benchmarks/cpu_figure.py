"""Draw what test_cpu_engine.py measured: decoding by bits for kbit and each peer, and the prompt beside it.

    pytest benchmarks/test_cpu_engine.py -k "decode or prefill" --benchmark-json results.json
    python benchmarks/cpu_figure.py results.json -o docs/cpu.svg
    python benchmarks/cpu_figure.py results.json -o docs/cpu-1.svg --threads 1

Bars are medians, whiskers the least and greatest of the rounds. The machine's name and the threads stand in the title.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

# Series keep their place and colour (of the Okabe-Ito palette, told apart by the colour-blind) whoever is measured.
# llama.cpp keeps the head of this model at 8 bits, onnxruntime at the width of the rest: kbit is shown both ways.
KBIT_8 = "kbit, head at 8 bits"
SERIES = {
    "kbit": "#0072B2",
    KBIT_8: "#56B4E9",
    "llama.cpp": "#E69F00",
    "OpenVINO": "#009E73",
    "onnxruntime": "#CC79A7",
}
PANELS = {"decode": "decode, tokens/s", "prefill": "prompt of 512, tokens/s"}


class FigureError(Exception):
    """A file that cannot be drawn, in one line."""


def read_cases(path: Path) -> list[dict[str, Any]]:
    """The extra_info of every decode and prefill benchmark in a file of pytest-benchmark.

    Raises:
        FigureError: the file is not one, or holds none of them.
    """
    try:
        benchmarks = json.loads(path.read_text())["benchmarks"]
    except OSError as error:
        raise FigureError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise FigureError(f"{path}: not a file that pytest --benchmark-json writes") from None
    cases = [entry["extra_info"] for entry in benchmarks if entry.get("extra_info", {}).get("case") in PANELS]
    if not cases:
        raise FigureError(f"{path}: holds no decode or prefill results; run pytest benchmarks/test_cpu_engine.py")
    return cases


def draw(cases: list[dict[str, Any]], threads: int, output: Path) -> None:
    """One panel per case, grouped by bits."""
    try:
        import matplotlib
    except ImportError:
        raise FigureError("matplotlib is not installed; run pip install matplotlib (or kbit's bench extra)") from None
    matplotlib.use("svg" if output.suffix == ".svg" else "agg")
    matplotlib.rcParams["svg.hashsalt"] = "kbit"  # the same results draw the same file
    import matplotlib.pyplot as plt

    chosen = {case: [entry for entry in cases if entry["case"] == case] for case in PANELS}
    shown = {case: entries for case, entries in chosen.items() if entries}
    figure, axes = plt.subplots(1, len(shown), figsize=(5.2 * len(shown), 3.8), squeeze=False, layout="constrained")
    for axis, (case, entries) in zip(axes[0], shown.items(), strict=True):
        draw_panel(axis, sorted(entries, key=lambda entry: entry["bits"]))
        axis.set_title(PANELS[case], loc="left", fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    facts = cases[0]["machine"]
    isa = facts["isa"][-1] if facts["isa"] else ""
    plural = "s" if threads > 1 else ""
    figure.suptitle(f"SmolLM2-135M on {facts['cpu']} ({isa}), {threads} thread{plural}", fontsize=11, x=0.01, ha="left")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None, dpi=150)


def draw_panel(axis: Any, entries: list[dict[str, Any]]) -> None:
    """Groups of bars, a group for each width."""
    present = [series for series in SERIES if any(row_of(entry, series) for entry in entries)]
    width, labelled = 0.8 / len(present), set()
    for place, entry in enumerate(entries):
        rows = {series: row for series in present if (row := row_of(entry, series)) is not None}
        for index, (series, row) in enumerate(rows.items()):
            x = place + (index - (len(rows) - 1) / 2) * width
            middle = row["median"]
            label = None if series in labelled else series
            labelled.add(series)
            spread = [[middle - row["min"]], [row["max"] - middle]]
            axis.bar(x, middle, 0.92 * width, color=SERIES[series], label=label)
            axis.errorbar(x, middle, yerr=spread, color="#333333", capsize=2, linewidth=0.8)
            axis.annotate(f"{middle:.0f}", (x, row["max"]), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    names = [f"{entry['bits']} bits\n{peer_file(entry)}" for entry in entries]
    axis.set_xticks(range(len(entries)), names, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_ylim(bottom=0)


def row_of(entry: dict[str, Any], series: str) -> dict[str, Any] | None:
    """The row of a series: its engine's first, which is its plainest, except for kbit's other head."""
    if series == KBIT_8:
        rows = [row for row in entry["rows"] if row["engine"] == "kbit" and row["name"].endswith("head 8")]
        return rows[0] if rows and entry["bits"] != 8 else None
    return next((row for row in entry["rows"] if row["engine"] == series), None)


def peer_file(entry: dict[str, Any]) -> str:
    """The type of llama.cpp's file, which says what is compared: "vs Q4_0"."""
    row = row_of(entry, "llama.cpp")
    return f"vs {row['name'].removeprefix('llama.cpp ')}" if row else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, help="an .svg, .png or .pdf file")
    parser.add_argument("--threads", type=int, help="which of the measured thread counts; the largest by default")
    arguments = parser.parse_args()
    try:
        cases = read_cases(arguments.results)
        counts = sorted({entry["threads"] for entry in cases})
        threads = arguments.threads or counts[-1]
        if threads not in counts:
            raise FigureError(f"--threads {threads}: {arguments.results} has {', '.join(map(str, counts))}")
        draw([entry for entry in cases if entry["threads"] == threads], threads, arguments.output)
    except FigureError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
