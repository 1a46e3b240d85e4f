"""docs/recipes.md and what runs it: every block is found, compiles, and tells which packages it needs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "judges"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))


def test_blocks_of_the_page() -> None:
    import recipes

    found = recipes.blocks(recipes.PAGE.read_text(encoding="utf-8"))
    lines = recipes.PAGE.read_text(encoding="utf-8").splitlines()
    for block in found:
        assert lines[block.line - 1] == block.code.splitlines()[0]
        assert recipes.ADDRESS in block.code or block.heading == "llm"
        if block.language == "python":
            compile(block.code, block.heading, "exec")
            assert block.needs
    assert [block.needs[0] for block in found if block.needs] == [
        "llm", "openai", "openai", "anthropic", "langchain_core.prompts", "llama_index.core.llms", "kbit.evaluate.lm_eval_model",
    ]  # fmt: skip
    assert sum(line in ("```python", "```sh") for line in lines) == len(found)


def test_a_python_that_lacks_a_package_is_told_from_one_that_has_it() -> None:
    import recipes

    assert recipes.versions(sys.executable, ["json", "numpy"]).startswith("numpy ")
    assert recipes.versions(sys.executable, ["numpy", "no_such_module"]) is None
