"""WikiText files: their rows, and the official test split from a copy whose blank lines were stripped.

Published perplexities are functions of the exact text. Two things commonly differ between copies of
WikiText-2's `wiki.test.raw` although every word is the same: line ends (CRLF) and the blank lines around
headings, which some mirrors drop. Both change the token stream, so both change perplexity. `kbit.text.datasets`
takes care of the line ends; this module puts the blank lines back, and only when the
result has the digest of the official file.
"""

from __future__ import annotations

import hashlib
import re

# Digest of wiki.test.raw in wikitext-2-raw-v1.zip (4,358 lines, of which 1,467 are blank).
WIKITEXT2_TEST_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
WIKITEXT2_TEST_TEXT_LINES = 2_891

_HEADING = re.compile(r" (?:= )+.*(?: =)+ ")
_TITLE = re.compile(r" = (?!= ).* = ")
_BLANK = " "
# Two sentences of the article "Constant k filter" happen to look like titles.
_NOT_TITLES = (" = 1 rad / s and a nominal impedance k = ", " = 1 henry and capacitance C = ")
# The one article that follows its predecessor after one blank line instead of two.
_SINGLE_GAP_TITLE = " = The Hustler ( film ) = "


def looks_like_wikitext(text: str) -> bool:
    """Whether a text has WikiText's layout: its first line that is not blank is an article title, ` = Title = `."""
    for line in text.split("\n", 64)[:64]:
        if line.strip():
            return _TITLE.fullmatch(line) is not None
    return False


def wikitext_rows(text: str) -> list[str]:
    """A WikiText file as the rows of its Hugging Face data set: one per line, blank lines as empty strings.

    Rows keep their newline, as the data set's rows do (row 1 of the test split is ` = Robert Boulter = \\n`);
    the GPTQ papers join these rows with two newlines.
    """
    lines = text.split("\n")
    tail = lines.pop()  # what stands after the last newline: empty in a well-formed file
    rows = [f"{line}\n" if line.strip() else "" for line in lines]
    if tail.strip():
        rows.append(tail)
    return rows


def restore_wikitext2_test(text: str) -> str | None:
    """The official wiki.test.raw from a copy without blank lines, or None where `text` is not such a copy.

    WikiText sets a heading off by one blank line on either side and an article by a further one. The restored
    text is returned only if its sha256 is the official file's, so a guess can never pass for the real text.

    Args:
        text: file content with "\\n" line ends.
    """
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) != WIKITEXT2_TEST_TEXT_LINES:
        return None
    restored: list[str] = []
    for number, line in enumerate(lines):
        heading = _HEADING.fullmatch(line) is not None and line not in _NOT_TITLES
        if heading:
            restored.append(_BLANK)
            if number > 0 and _TITLE.fullmatch(line) and line != _SINGLE_GAP_TITLE:
                restored.append(_BLANK)
        restored.append(line)
        if heading:
            restored.append(_BLANK)
    official = "\n".join([*restored, _BLANK, ""])
    digest = hashlib.sha256(official.encode("utf-8")).hexdigest()
    return official if digest == WIKITEXT2_TEST_SHA256 else None
