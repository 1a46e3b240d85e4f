"""A nested model drafting for itself: the text of the full width, to the token; and widths that change within a chat."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_cases import in_process
from generation_cases import CHATML
from nested_cases import write_nested
from speculative_cases import both

from kbit.backends.cpu.backend import NativeBackend
from kbit.engine.draft_widths import asks_for_self, draft_bits
from kbit.engine.loader import LoadedModel, load_model
from kbit.engine.ngram import NgramDrafter
from kbit.engine.sampler import SamplingParams
from kbit.engine.self_speculation import SelfDrafter
from kbit.engine.speculative import Speculation
from kbit.host.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ("The old man looked at her and", "It was a dark night. It was a dark night. It was")
SAMPLED = SamplingParams(temperature=0.8, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=2)


@pytest.fixture(scope="module")
def folder(novels_folder: str, make_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The novels model at 2 to 8 bits, rounded to nearest, with a chat template."""

    def make(path: Path) -> None:
        write_nested(novels_folder, path, "2..8")
        (path / "chat_template.jinja").write_text(CHATML)

    return make_once("novels-nested", make)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(str(folder), backend=NativeBackend(1))


@pytest.mark.parametrize("bits", [None, 2, 4, 7])
@pytest.mark.parametrize("params", [None, SAMPLED])
def test_the_text_is_that_of_the_full_width(
    loaded: LoadedModel, bits: int | None, params: SamplingParams | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy: the same to the token. Sampled: the same whenever the seed is, whatever came before."""
    if bits == 7:  # planes alone
        monkeypatch.setattr(NgramDrafter, "find", lambda *_: [])
    for prompt in PROMPTS:
        ids = loaded.tokenizer.encode(prompt)
        if params is None:
            speculation = Speculation(SelfDrafter(loaded, bits))
            _, sped = both(lambda: loaded.decoder, loaded.tokenizer, ids, speculation, max_tokens=60)
            assert sped.speculation is not None
            assert sped.speculation.drafted > 0
            if bits == 7:
                assert (sped.speculation.acceptance_rate or 0) > 0.9
        else:
            from kbit.engine.generate import generate

            texts = {
                generate(
                    loaded.decoder, loaded.tokenizer, ids, params, max_tokens=40,
                    speculation=Speculation(SelfDrafter(loaded, bits)),
                ).run().text
                for _ in range(2)
            }  # fmt: skip
            assert len(texts) == 1


def test_a_narrower_model_can_draft_for_itself(loaded: LoadedModel) -> None:
    at_four = loaded.at_width(4)
    drafter = SelfDrafter(at_four)
    assert drafter.name == "self:3"
    ids = loaded.tokenizer.encode(PROMPTS[0])
    both(lambda: at_four.decoder, loaded.tokenizer, ids, Speculation(drafter), max_tokens=30)
    drafter.follow(loaded)
    assert drafter.name == "self:4,3"
    both(lambda: loaded.decoder, loaded.tokenizer, ids, Speculation(drafter), max_tokens=30)


def test_widths_that_cannot_draft_are_refused(loaded: LoadedModel, novels_folder: str) -> None:
    assert [asks_for_self(text) for text in ("self", "self:3", "selfish", "ngram")] == [True, True, False, False]
    assert (draft_bits("self"), draft_bits("self:3")) == (None, 3)
    with pytest.raises(UsageError, match="write self, or self:3"):
        draft_bits("self:three")
    with pytest.raises(UsageError, match="can draft at 2 to 7 bits"):
        SelfDrafter(loaded, 8)
    with pytest.raises(UsageError, match="can draft at 2 to 3 bits"):
        SelfDrafter(loaded.at_width(4), 5)
    plain = load_model(novels_folder, backend=NativeBackend(1))
    with pytest.raises(UsageError, match=r"has no width below the one it runs at; make .* kbit quantize --nested 2..8"):
        SelfDrafter(plain)


def test_no_drafts_where_they_do_not_pay(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a width whose guesses fail, drafts stop, but for a short one now and then."""
    drafter = SelfDrafter(loaded, 2)
    record = drafter._widths[0].record
    record.held, record.judged = [0.0] * len(record.held), [1e4] * len(record.judged)
    monkeypatch.setattr(NgramDrafter, "find", lambda *_: [])
    ids = loaded.tokenizer.encode(PROMPTS[0])
    _, sped = both(lambda: loaded.decoder, loaded.tokenizer, ids, Speculation(drafter), max_tokens=150)
    assert sped.speculation is not None
    assert 0 < sped.speculation.drafted <= 2 * 3


def test_commands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["-m", str(folder), "--max-tokens", "12", "--json"]
    plain, sped, narrow = (
        json.loads(in_process(["run", PROMPTS[0], *flags, *more], monkeypatch)[1])
        for more in ([], ["--speculate", "self"], ["--bits", "2"])
    )
    assert sped["text"] == plain["text"] != narrow["text"]
    assert sped["speculation"]["drafter"] == "self:4,3"
    for arguments, message in (
        (["--bits", "9"], "serves 2 to 8 bits; choose one of these"),
        (["--speculate", "self:8"], "can draft at 2 to 7 bits"),
        (["--speculate", "self:x"], "write self, or self:3"),
    ):
        code, _, stderr = in_process(["run", "x", *flags, *arguments], monkeypatch)
        assert (code, message in stderr) == (2, True), stderr


def test_a_chat_changes_its_width(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After /bits, answers are those of a chat that was at this width from the beginning."""
    flags = ["-m", str(folder), "--temperature", "0", "--max-tokens", "8", "--speculate", "self"]
    hello = b"Hello there\n"
    code, stdout, stderr = in_process(
        ["chat", *flags], monkeypatch, hello + b"/bits\n/bits 3\n/bits 3\n/reset\n" + hello
    )
    assert code == 0, stderr
    assert "8 of 8, 7, 6, 5, 4, 3, 2 bits" in stderr
    assert stderr.count("3 bits; what was said before is read again") == 1
    assert "3 bits already" in stderr
    eight = in_process(["chat", *flags], monkeypatch, hello)[1]
    three = in_process(["chat", *flags, "--bits", "3"], monkeypatch, hello)[1]
    assert stdout == eight + three
    assert eight != three
    code, _, stderr = in_process(["chat", *flags], monkeypatch, b"/bits 9\n")
    assert (code, "serves 2 to 8 bits" in stderr) == (2, True)
