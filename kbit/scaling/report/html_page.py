"""A self-contained HTML page: text, pictures as inline SVG, tables that sort by a click; nothing is loaded.

Everything that comes from outside (names of models, texts, files) is escaped here, and a content security policy
forbids what could slip through: the page runs one script, known by its hash, and opens no connection.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

# A cell: what is shown, or that and what it sorts by.
Cell = str | int | float | tuple[str, float] | None

_STYLE = """
:root { color-scheme: light; --ink: #22252a; --muted: #6d737d; --line: #e3e5e9; --paper: #ffffff; --ground: #f5f6f8; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 8px 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 21px; margin: 48px 0 10px; }
h3 { font-size: 17px; margin: 0 0 6px; }
p { max-width: 76ch; margin: 8px 0; }
.lead { color: var(--muted); margin: 0 0 20px; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin: 16px
0; } .facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px 24px; }
.facts b { display: block; font-size: 22px; font-weight: 600; line-height: 1.25; overflow-wrap: anywhere; }
.facts span { color: var(--muted); font-size: 13.5px; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; max-height: 900px; }
figcaption { color: var(--muted); font-size: 14px; margin-top: 10px; max-width: 90ch; }
.scroll { overflow: auto; max-height: 560px; border: 1px solid var(--line); border-radius: 8px; background:
var(--paper); } table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 13.5px;
font-variant-numeric: tabular-nums; } th, td { padding: 6px 12px; text-align: left; white-space: nowrap; border-bottom:
1px solid var(--line); } td.number, th.number { text-align: right; }
td.wide { white-space: normal; min-width: 22em; }
thead th { position: sticky; top: 0; background: #fafbfc; font-weight: 600; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th button:hover, th button:focus-visible { text-decoration: underline; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tbody tr:hover { background: #f3f6fb; }
input[type=search] { font: inherit; font-size: 14px; padding: 6px 10px; margin: 0 0 10px; width: 320px; max-width: 100%;
  border: 1px solid #c9cdd4; border-radius: 6px; }
pre { background: #f0f2f5; border-radius: 6px; padding: 10px 14px; overflow: auto; font-size: 13.5px; margin: 8px 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 0; font-size: 14.5px; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
nav { font-size: 14px; margin: 12px 0 0; } nav a { color: #0b5cad; margin-right: 14px; white-space: nowrap; }
@media print { body { background: white; } .scroll { max-height: none; } input[type=search] { display: none; } }
""".strip()

# Sorts a table by a column (numbers by their value, empty cells last), and hides rows without the words searched for.
_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const number = head.classList.contains("number");
    const rows = [...body.rows].map(row => [key(row), row]);
    rows.sort(([a], [b]) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      return (number ? a - b : a.localeCompare(b, undefined, {numeric: true})) * (down ? -1 : 1);
    });
    body.append(...rows.map(([, row]) => row));
  }));
  const search = document.querySelector(`input[data-table="${table.id}"]`);
  if (search) search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\\s+/).filter(Boolean);
    for (const row of body.rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every(word => text.includes(word));
    }
  });
}
""".strip()


@dataclass
class Page:
    """A page under construction: parts are added from top to bottom. All text given is plain and gets escaped.

    Args:
        title: heading, and the window's title.
        lead: a line under it.
    """

    title: str
    lead: str
    _parts: list[str] = field(default_factory=list)
    _headings: list[tuple[str, str]] = field(default_factory=list)
    _tables: int = 0

    def heading(self, text: str) -> None:
        """Begins a section, which the top of the page links to."""
        anchor = f"section-{len(self._headings) + 1}"
        self._headings.append((anchor, text))
        self._parts.append(f'<h2 id="{anchor}">{_text(text)}</h2>')

    def paragraphs(self, text: str) -> None:
        """Text as paragraphs: blank lines part them."""
        blocks = [block for block in text.replace("\r\n", "\n").split("\n\n") if block.strip()]
        self._parts.extend(f"<p>{_text(block)}</p>" for block in blocks)

    def box(self, text: str) -> None:
        """Paragraphs that stand out."""
        self._parts.append('<div class="card">')
        self.paragraphs(text)
        self._parts.append("</div>")

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Figures to see first: (value, what it is)."""
        cells = "".join(f"<div><b>{_text(value)}</b><span>{_text(name)}</span></div>" for value, name in facts)
        self._parts.append(f'<div class="card facts">{cells}</div>')

    def picture(self, title: str, caption: str, svg: str) -> None:
        """A picture. `svg` is the only text taken as it is: an <svg> element of our own drawing."""
        self._parts.append(
            f'<figure class="card" role="group" aria-label="{_text(title)}"><h3>{_text(title)}</h3>{svg}'
            f"<figcaption>{_text(caption)}</figcaption></figure>"
        )

    def code(self, text: str) -> None:
        """Text to copy, such as a command."""
        self._parts.append(f"<pre><code>{_text(text)}</code></pre>")

    def definitions(self, entries: Iterable[tuple[str, str]]) -> None:
        """Names and what they are."""
        rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in entries)
        self._parts.append(f"<dl>{rows}</dl>")

    def table(self, heads: Sequence[str], rows: Iterable[Sequence[Cell]], *, search: bool = False) -> None:
        """A table that sorts by a click on a heading.

        Args:
            heads: one for each column; one that begins with "#" (which is not shown) is a column of numbers, one with
                "~" a column of long text.
            rows: cells as text, as numbers, or as (text, number to sort by); None is an empty cell.
            search: put a field above that hides the rows without what is typed.
        """
        self._tables += 1
        name = f"table-{self._tables}"
        if search:
            self._parts.append(
                f'<input type="search" data-table="{name}" placeholder="show rows with, for example: nf 4" '
                'aria-label="show only rows with these words">'
            )
        kinds = [{"#": "number", "~": "wide"}.get(head[:1], "") for head in heads]
        head = "".join(
            f'<th scope="col"{_class(kind)}><button>{_text(text[1:] if kind else text)}</button></th>'
            for text, kind in zip(heads, kinds, strict=True)
        )
        body = "".join(
            "<tr>" + "".join(_cell(cell, kind) for cell, kind in zip(row, kinds, strict=True)) + "</tr>" for row in rows
        )
        self._parts.append(
            f'<div class="scroll"><table id="{name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def html(self) -> str:
        """The whole page."""
        digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
        policy = (
            f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
            "form-action 'none'"
        )
        links = "".join(f'<a href="#{anchor}">{_text(text)}</a>' for anchor, text in self._headings)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{_text(self.title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n<main>\n"
            f'<h1>{_text(self.title)}</h1>\n<p class="lead">{_text(self.lead)}</p>\n<nav>{links}</nav>\n'
            + "\n".join(self._parts)
            + f"\n</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
        )


def _cell(cell: Cell, kind: str) -> str:
    if cell is None:
        return f"<td{_class(kind)}></td>"
    if isinstance(cell, tuple):
        text, value = cell
        return f'<td{_class(kind)} data-value="{value!r}">{_text(text)}</td>'
    return f"<td{_class(kind)}>{_text(str(cell))}</td>"


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _text(text: str) -> str:
    """Escaped; characters that no page may hold (controls, lone surrogates), or that turn text around, become "?"."""
    return escape("".join(char if char.isprintable() or char in "\n\t" else "?" for char in text))
