"""The code on a page of the documentation, to be run."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def python_blocks(page: str) -> list[tuple[int, str]]:
    """(line, code) of every Python block of a page. The lines of a traceback are those of the page."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = []
    for block in _BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        found.append((line + 1, "\n" * line + block[1]))
    return found


def run_page(page: str, replaced: dict[str, str]) -> dict[str, object]:
    """Runs a page's blocks one after another, in one namespace.

    Args:
        page: its file.
        replaced: texts in the code that stand for others here, such as the name of a model.

    Returns:
        The names there are in the end.
    """
    names: dict[str, object] = {"__name__": "page"}
    blocks = python_blocks(page)
    assert blocks
    code = "".join(block for _, block in blocks)
    for old in replaced:
        assert old in code, f"{page} does not say {old}"
    for _, block in blocks:
        for old, new in replaced.items():
            block = block.replace(old, new)
        exec(compile(block, str(DOCS / page), "exec"), names)
    return names
