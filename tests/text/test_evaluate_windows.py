"""Both conventions against plain re-statements of them on token lists."""

from __future__ import annotations

import pytest

from kbit.host.errors import UsageError
from kbit.text.datasets import TextData
from kbit.text.windows import (
    CONVENTIONS,
    Convention,
    Windows,
    adds_bos,
    choose_context,
    cut_windows,
    make_windows,
    stream_text,
)

BOS = 1


class Letters:
    """A tokenizer of single characters (id = code point) that may put BOS first."""

    def __init__(self, bos: bool) -> None:
        self.bos_id: int | None = BOS
        self.bos = bos

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * (self.bos and add_special_tokens) + [ord(letter) for letter in text]


def _text(text: str, layout: str = "plain") -> TextData:
    return TextData("sample", text, "wikitext" if layout == "wikitext" else "plain", "", "sample.txt")


def _scored(windows: Windows) -> list[tuple[list[int], int]]:
    """(context the model sees, token it must predict) of every scored prediction, read off a Windows."""
    found = []
    for row in windows.ids.tolist():
        positions = range(windows.first_scored, windows.context - 1)
        found += [(row[: position + 1], row[position + 1]) for position in positions]
    return found


def _gptq(tokens: list[int], length: int) -> list[tuple[list[int], int]]:
    """logits = model(batch); loss(logits[:, :-1], batch[:, 1:]) for batch = tokens[i * length : (i + 1) * length]."""
    found = []
    for window in range(len(tokens) // length):
        batch = tokens[window * length : (window + 1) * length]
        inputs, labels = batch[:-1], batch[1:]
        for index, label in enumerate(labels):
            found.append((inputs[: index + 1], label))
    return found


def _llamacpp(tokens: list[int], n_ctx: int, add_bos: bool) -> list[tuple[list[int], int]]:
    """Chunks of n_ctx, BOS in the first place, logits first .. n_ctx - 2 scored with first = n_ctx / 2."""
    found = []
    for chunk in range(len(tokens) // n_ctx):
        start = chunk * n_ctx
        evaluated = list(tokens[start : start + n_ctx])
        if add_bos:
            evaluated[0] = BOS
        first = n_ctx // 2
        scored = range(n_ctx - 1 - first)
        found += [(evaluated[: first + j + 1], tokens[start + first + j + 1]) for j in scored]
    return found


@pytest.mark.parametrize("length", [2, 3, 7, 16])
@pytest.mark.parametrize("count", [16, 50, 64])
def test_gptq_equals_its_restatement(length: int, count: int) -> None:
    tokens = list(range(100, 100 + count))
    windows = cut_windows(tokens, "gptq", length, bos_id=BOS)
    assert _scored(windows) == _gptq(tokens, length)
    assert windows.scored == len(_scored(windows)) == count // length * (length - 1)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("length", [3, 4, 7, 16])
def test_llamacpp_equals_its_restatement(length: int, bos: bool) -> None:
    tokens = list(range(100, 150))
    windows = cut_windows(tokens, "llamacpp", length, bos_id=BOS if bos else None)
    assert _scored(windows) == _llamacpp(tokens, length, bos)
    assert windows.scored == len(_scored(windows))


def test_llamacpp_scores_255_of_512() -> None:
    windows = cut_windows(list(range(1024)), "llamacpp", 512)
    assert (windows.first_scored, windows.scored_per_window, windows.count) == (256, 255, 2)


@pytest.mark.parametrize("bos", [True, False])
def test_bos_stands_once_in_gptq_and_in_every_chunk_of_llamacpp(bos: bool) -> None:
    text = "abcdefgh" * 4
    gptq = make_windows(_text(text), Letters(bos), "gptq", 8)
    llamacpp = make_windows(_text(text), Letters(bos), "llamacpp", 8)
    starts = [ord("a"), ord("h"), ord("h"), ord("h")] if bos else [ord("a")] * 4
    assert gptq.ids[:, 0].tolist() == ([BOS, *starts[1:]] if bos else starts)
    assert llamacpp.ids[:, 0].tolist() == ([BOS] * 4 if bos else starts)
    # Apart from the first column the two hold the same stream.
    assert (gptq.ids[:, 1:] == llamacpp.ids[:, 1:]).all()
    assert gptq.stream_tokens == len(text) + bos


def test_adds_bos_asks_the_tokenizer() -> None:
    assert adds_bos(Letters(True))
    assert not adds_bos(Letters(False))
    none = Letters(True)
    none.bos_id = None
    assert not adds_bos(none)


def test_wikitext_is_joined_as_the_papers_join_its_rows() -> None:
    text = " \n = Title = \n \n One . \n Two . \n"
    assert stream_text(_text(text, "wikitext"), "gptq") == "\n\n = Title = \n\n\n\n\n One . \n\n\n Two . \n"
    assert stream_text(_text(text, "wikitext"), "llamacpp") == text[:-1]


def test_other_texts_are_left_alone() -> None:
    assert stream_text(_text("one\ntwo\n\nthree\n"), "gptq") == "one\ntwo\n\nthree\n"
    assert stream_text(_text("one\ntwo\n\n"), "llamacpp") == "one\ntwo\n"


def test_the_tail_is_dropped() -> None:
    windows = cut_windows(list(range(23)), "gptq", 10)
    assert windows.ids.tolist() == [list(range(10)), list(range(10, 20))]
    assert windows.stream_tokens == 23


@pytest.mark.parametrize(("most", "count"), [(10, 1), (19, 1), (20, 2), (1000, 5)])
def test_max_tokens_rounds_down_to_windows(most: int, count: int) -> None:
    assert cut_windows(list(range(50)), "gptq", 10, max_tokens=most).count == count


def test_max_tokens_below_one_window() -> None:
    with pytest.raises(UsageError, match="--max-tokens 9 is less than one window of 10 tokens"):
        cut_windows(list(range(50)), "gptq", 10, max_tokens=9)


def test_a_text_shorter_than_one_window_says_both_numbers() -> None:
    with pytest.raises(UsageError, match="sample has 5 tokens, one window needs 8"):
        make_windows(_text("abcd"), Letters(True), "gptq", 8)


@pytest.mark.parametrize(
    ("convention", "context", "most", "expected"),
    [
        ("gptq", None, None, 2048),
        ("gptq", None, 8192, 2048),
        ("gptq", None, 256, 256),
        ("llamacpp", None, 8192, 512),
        ("llamacpp", None, 256, 256),
        ("gptq", 4096, 4096, 4096),
        ("llamacpp", 3, None, 3),
        ("gptq", 2, None, 2),
    ],
)
def test_context(convention: Convention, context: int | None, most: int | None, expected: int) -> None:
    assert choose_context(convention, context, most) == expected


def test_context_beyond_the_model() -> None:
    with pytest.raises(UsageError, match="--context 257 exceeds the model's maximum of 256"):
        choose_context("gptq", 257, 256)


@pytest.mark.parametrize(("convention", "context"), [("gptq", 1), ("llamacpp", 2), ("gptq", 0), ("gptq", -5)])
def test_context_too_short_to_score(convention: Convention, context: int) -> None:
    with pytest.raises(UsageError, match=f"--context {context} is too short"):
        choose_context(convention, context, None)


def test_an_unknown_convention_lists_the_known() -> None:
    with pytest.raises(UsageError, match="--convention hf: choose one of gptq, llamacpp"):
        cut_windows([1, 2, 3], "hf", 2)  # type: ignore[arg-type]
    assert CONVENTIONS == ("gptq", "llamacpp")
