"""The report of a sweep: every picture and the page, from plain, poor and hostile tables."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path

import pytest
from report_cases import make_point, make_sweep

from kbit.host.errors import KbitError
from kbit.scaling.points import ORIGINAL, Point
from kbit.scaling.report.html_page import Page
from kbit.scaling.report.plots import draw_pictures
from kbit.scaling.report.plots_data import make_views
from kbit.scaling.report.plots_style import rendered
from kbit.scaling.report.write import write_report

HOSTILE = '"><script>alert(1)</script>$\\frac{x}{y}$ <img src=http://x/>&amp;\x1b[31m\u202e\udcff_%s'
VOID = {"meta", "br", "img", "input", "link", "hr"}


class Reader(HTMLParser):
    """Checks that elements close as they open, and keeps what a page would load, run and link."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.tags: Counter[str] = Counter()
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name == "id":
                self.ids[value or ""] += 1
            if name in ("href", "xlink:href"):
                self.links.append(value or "")
            if name in ("src", "action", "data", "srcset"):
                self.loads.append(value or "")
            self.links += [f"#{found}" for found in re.findall(r"url\(#([^)]*)\)", value or "")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(folder: Path) -> Reader:
    page = Reader((folder / "report.html").read_text(encoding="utf-8"))
    assert [name for name, count in page.ids.items() if count > 1] == []
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert page.loads == []
    assert page.tags["script"] == 1
    return page


def names_of(written: list[Path]) -> set[str]:
    return {path.stem for path in written if path.suffix == ".svg"}


@pytest.fixture(scope="module")
def sweep() -> list[Point]:
    return make_sweep()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, sweep: list[Point]) -> tuple[Path, list[Path]]:
    """A report with all that a sweep of one method allows, laws included."""
    from kbit.scaling.laws.fit import fit_laws

    folder = tmp_path_factory.mktemp("report")
    written = write_report(
        sweep, folder, laws=fit_laws(sweep, draws=50), conclusion="First.\n\nSecond.", command="kbit scale a b"
    )
    return folder, written


def test_every_picture_that_the_points_allow(report: tuple[Path, list[Path]]) -> None:
    folder, written = report
    assert names_of(written) == {
        "loss", "frontier", "best-width", "bits", "kl", "by-data-type", "by-block-size", "data-types", "block-sizes",
        "weight-error", "held-out",
    }  # fmt: skip
    assert written[0] == folder / "report.html"
    for path in written:
        content = path.read_bytes()
        if path.suffix == ".png":
            assert content.startswith(b"\x89PNG\r\n\x1a\n")
            assert len(set(content)) > 200  # not one flat colour
        elif path.suffix == ".svg":
            assert ET.fromstring(content).tag.endswith("svg")
    assert (folder / "conclusion.txt").read_text() == "First.\n\nSecond.\n"


def test_page_holds_everything(report: tuple[Path, list[Path]], sweep: list[Point]) -> None:
    folder, written = report
    page = read_page(folder)
    assert page.tags["svg"] == len(names_of(written))
    assert page.tags["figcaption"] == page.tags["svg"]
    for text in ("First.", "Second.", "kbit scale a b", "d" * 64, "native: avx2 kernels", "medium", "int8-b128"):
        assert text in page.text, text
    rows = re.findall(r"<tr>(?=<td)", (folder / "report.html").read_text())
    assert len(rows) > len(sweep)  # all points, the frontier, the laws
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', (folder / "report.html").read_text())
    assert policy is not None
    assert "default-src &#x27;none&#x27;" in policy[1]


def test_equal_points_give_equal_pictures() -> None:
    points = make_sweep(models=(("small", 10**6), ("large", 10**7)), widths=(3, 4), dtypes=("nf",), blocks=(64,))
    drawn = [
        [(picture.name, rendered(picture.figure, "svg")) for picture in islice(draw_pictures(make_views(rows)[0]), 3)]
        for rows in (points, points[::-1])
    ]
    assert drawn[0] == drawn[1]


def test_hostile_names_do_nothing(tmp_path: Path) -> None:
    points = [
        replace(point, model=HOSTILE % point.model, data=HOSTILE % "text", dtype=HOSTILE % point.dtype,
                format=HOSTILE % point.format, method=HOSTILE % "rtn", backend=HOSTILE % "cpu", created=HOSTILE % "now")
        for point in make_sweep(models=(("small", 10**6), ("large", 10**7)), widths=(4,), blocks=(64,))
    ]  # fmt: skip
    written = write_report(
        points, tmp_path, conclusion=HOSTILE, command=HOSTILE, left_out=[HOSTILE], machine={HOSTILE: [HOSTILE]}
    )
    page = read_page(tmp_path)
    raw = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in raw
    assert "<img" not in raw
    assert "\x1b" not in raw
    assert "\u202e" not in raw
    assert "alert(1)" in page.text  # shown, not run
    assert {"loss", "data-types"} <= names_of(written)


def test_one_model_alone_has_no_lines_over_sizes(tmp_path: Path) -> None:
    written = write_report(make_sweep(models=(("only", 10**6),), widths=(3, 4)), tmp_path)
    assert "loss" not in names_of(written)
    assert {"bits", "frontier", "data-types"} <= names_of(written)
    read_page(tmp_path)


@pytest.mark.parametrize(
    "points",
    [
        [make_point(format=ORIGINAL)],
        [make_point()],
        [make_point("a", ORIGINAL), make_point("b", ORIGINAL, linear_parameters=10**7, nll=2.0)],
        [make_point(kl=0.0), make_point(format="int8-b64", kl=0.0)],
        [make_point(nll=math.inf), make_point(format="nf3-b64", nll=1e9, kl=1e9), make_point(format="int8-b64")],
        [make_point(cluster_tokens=(1200.0,), cluster_nll=(1.0,), cluster_kl=(1.0,)), make_point(format="nf3-b64")],
        [make_point(format="int4-b64", block_size=0), make_point(format="nf3-b64", weight_error=0.0)],
    ],
    ids=["original", "one", "originals", "no divergence", "infinite loss", "one cluster", "rows as blocks"],
)
def test_poor_tables_make_a_page(tmp_path: Path, points: list[Point]) -> None:
    written = write_report(points, tmp_path)
    assert written[0].name == "report.html"
    read_page(tmp_path)


def test_nothing_measured_is_an_error(tmp_path: Path) -> None:
    for points in ([], [make_point(nll=math.nan)]):
        with pytest.raises(KbitError, match="no measured points"):
            write_report(points, tmp_path)


def test_two_texts_make_two_sections(tmp_path: Path) -> None:
    points = make_sweep(models=(("small", 10**6),), widths=(3, 4), dtypes=("nf",), blocks=(64,))
    other = [replace(point, data_sha256="e" * 64, data="other.txt", key=point.key + "2") for point in points[1:]]
    written = write_report(points + other, tmp_path)
    assert {"bits", "bits-2"} <= names_of(written)
    page = read_page(tmp_path)
    assert "Text 1: book.txt" in page.text
    assert "Text 2: other.txt" in page.text


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KbitError, match="cannot be written"):
        write_report([make_point()], tmp_path / "file")


SORTING = """
const cell = text => ({textContent: text, dataset: text === "" ? {} : {value: text}});
const row = value => ({cells: [cell(value)], textContent: value, hidden: false});
const body = {rows: ["10", "", "9", "-1e3"].map(row), append(...rows) { this.rows = rows; }};
const listeners = {};
const head = {attributes: {}, classList: {contains: name => name === "number"},
  getAttribute(name) { return this.attributes[name] ?? null; }, removeAttribute(name) { delete this.attributes[name]; },
  setAttribute(name, value) { this.attributes[name] = value; },
  querySelector: () => ({addEventListener: (name, act) => { listeners[name] = act; }})};
const search = {value: "", addEventListener: (name, act) => { listeners[name] = act; }};
const table = {id: "t", tBodies: [body], tHead: {rows: [{cells: [head]}]}};
globalThis.document = {querySelectorAll: () => [table], querySelector: () => search};
"""
CHECKS = """
const shown = () => body.rows.map(row => row.cells[0].textContent + (row.hidden ? "!" : "")).join(",");
listeners.click(); console.log(shown());
listeners.click(); console.log(shown());
search.value = "1"; listeners.input(); console.log(shown());
"""


def test_the_script_sorts_and_searches(tmp_path: Path) -> None:
    """Run in node with a document of one column: numbers by value, empty cells last both ways; then rows without "1"."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    script = re.search(r"<script>(.*?)</script>", Page("t", "l").html(), re.DOTALL)
    assert script is not None
    (tmp_path / "check.js").write_text(f"{SORTING}\n{script[1]}\n{CHECKS}")
    result = subprocess.run([node, str(tmp_path / "check.js")], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["-1e3,9,10,", "10,9,-1e3,", "10,9!,-1e3,!"]


def test_types_that_share_no_block_size_are_not_compared() -> None:
    points = [make_point(format=f"nf{bits}-b64", kl=4.0**-bits) for bits in (3, 4, 5)]
    points += [make_point(format=f"int{bits}-b128", kl=4.0**-bits) for bits in (3, 4)]
    names = {picture.name for picture in draw_pictures(make_views(points)[0])}
    assert "bits" in names
    assert not {"data-types", "block-sizes"} & names
