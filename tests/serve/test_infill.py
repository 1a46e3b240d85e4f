"""The prompts of /infill: where the marks stand, and what of long texts is looked at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kbit.serve.errors import ApiError
from kbit.serve.infill import InfillBody, _prompt

PREFIX, SUFFIX, MIDDLE, REPOSITORY, FILE = range(1000, 1005)
MARKS = {"<|fim_prefix|>": PREFIX, "<|fim_suffix|>": SUFFIX, "<|fim_middle|>": MIDDLE}
FILES = {"<|repo_name|>": REPOSITORY, "<|file_sep|>": FILE}


def model(tokens: dict[str, int], context: int = 200) -> Any:
    """A model whose tokens are characters, besides these."""
    tokenizer = SimpleNamespace(
        bos_id=None, token_id=tokens.get, encode=lambda text, add_special_tokens=True: [ord(each) for each in text]
    )
    return SimpleNamespace(name="code", tokenizer=tokenizer, generating=lambda: SimpleNamespace(context=context))


def shown(ids: list[int]) -> str:
    names = {value: name for name, value in {**MARKS, **FILES}.items()}
    return "".join(names.get(each) or chr(each) for each in ids)


def test_marks_stand_around_the_texts() -> None:
    body = InfillBody(input_prefix="def f(", input_suffix="):", prompt="a, ")
    assert shown(_prompt(body, model(MARKS))) == "<|fim_prefix|>def f(a, <|fim_suffix|>):<|fim_middle|>"


def test_other_files_come_first() -> None:
    body = InfillBody(input_prefix="x", input_extra=[{"filename": "a.h", "text": "int a;"}])
    text = shown(_prompt(body, model({**MARKS, **FILES})))
    assert text == "<|repo_name|>myproject\n<|file_sep|>a.h\nint a;<|file_sep|>filename\n" + (
        "<|fim_prefix|>x<|fim_suffix|><|fim_middle|>"
    )
    assert shown(_prompt(body, model(MARKS))).startswith("\n\nint a;<|fim_prefix|>x")


def test_what_is_near_the_gap_is_looked_at() -> None:
    """Half of the context, of which what follows has a quarter, or more where little comes before."""
    before, after = "a" * 300 + "<", ">" + "b" * 300
    text = shown(_prompt(InfillBody(input_prefix=before, input_suffix=after), model(MARKS)))
    assert text == f"<|fim_prefix|>{'a' * 74}<<|fim_suffix|>>{'b' * 24}<|fim_middle|>"
    text = shown(_prompt(InfillBody(input_prefix="<", input_suffix=after), model(MARKS)))
    assert text == f"<|fim_prefix|><<|fim_suffix|>>{'b' * 98}<|fim_middle|>"


def test_a_model_that_cannot_is_told() -> None:
    with pytest.raises(ApiError, match="not trained to fill in"):
        _prompt(InfillBody(input_prefix="x"), model({"<|fim_prefix|>": PREFIX}))
