"""The speculation loop on fake decoders: the text stays the same to the token, whatever is drafted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation_cases import FakeDecoder, reciting
from hypothesis import given, settings
from hypothesis import strategies as st
from speculative_cases import TOKENIZER, A, FixedDrafter, both, chaotic, guesser, next_after

from kbit.engine.generate import generate
from kbit.engine.ngram import NgramDrafter
from kbit.engine.sampler import SamplingParams
from kbit.engine.speculative import DraftModel, Speculation
from kbit.host.errors import KbitError, UsageError

PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3}
SAMPLED = {"temperature": 1.1, "top_k": 9, "top_p": 0.9, "min_p": 0.05, "seed": 3}


class TestGreedy:
    @pytest.mark.parametrize("right", [0.0, 0.5, 0.9, 1.0])
    @pytest.mark.parametrize("draft_tokens", [1, 2, 3, 8, 64])
    def test_same_tokens_whatever_is_guessed(self, right: float, draft_tokens: int) -> None:
        speculation = Speculation(guesser(next_after, right), draft_tokens)
        _, sped = both(lambda: FakeDecoder(next_after), TOKENIZER, TOKENIZER.encode("de"), speculation, max_tokens=60)
        report = sped.speculation
        assert report is not None
        assert sped.completion_tokens == 60
        if right == 1.0:
            assert report.acceptance_rate == 1.0
        if right == 0.0:
            # The guess b is right by accident where the rule says b.
            assert report.accepted <= sped.ids.count(A + 1)

    def test_passes_and_their_sizes(self) -> None:
        """Drafts of 4, then twice as long to the most allowed, then one token more than held; none beyond the end."""
        wrong_at = 2 + 1 + 5 + 9 + 3  # index in the text of a guess that fails: the fourth of the third draft

        def guess(text: list[int]) -> list[int]:
            ids = list(text)
            for _ in range(20):
                ids.append(next_after(ids) if len(ids) != wrong_at else 0)
            return ids[len(text) :]

        decoder = FakeDecoder(next_after)
        result = generate(
            decoder, TOKENIZER, TOKENIZER.encode("de"), max_tokens=31, speculation=Speculation(FixedDrafter(guess), 8)
        ).run()
        # 1 token from the prompt, 4 + 1, 8 + 1, 3 of 8 + 1, 4 + 1; of the last 7, 6 are drafted.
        assert decoder.steps == [2, 5, 9, 9, 5, 7]
        assert result.completion_tokens == 1 + 5 + 9 + 4 + 5 + 7
        report = result.speculation
        assert report is not None
        assert (report.passes, report.drafted, report.accepted) == (5, 30, 25)
        assert report.acceptance_rate == 25 / 30
        assert report.note is None

    def test_without_guesses_it_is_plain_decoding(self) -> None:
        speculation = Speculation(FixedDrafter(lambda text: []))
        decoder = FakeDecoder(next_after)
        result = generate(decoder, TOKENIZER, TOKENIZER.encode("de"), max_tokens=10, speculation=speculation).run()
        assert decoder.steps == [2] + [1] * 9
        report = result.speculation
        assert report is not None
        assert (report.passes, report.drafted, report.accepted, report.acceptance_rate) == (0, 0, 0, None)

    @settings(max_examples=150, deadline=None)
    @given(data=st.data())
    def test_any_text_any_limits(self, data: st.DataObject) -> None:
        """Small alphabets make everything happen: loops, ends of text within drafts, stop strings across them."""
        letters = data.draw(st.integers(1, 4))
        table = data.draw(st.lists(st.integers(0, letters), min_size=40, max_size=40))
        prompt = data.draw(st.lists(st.integers(A, A + letters - 1), min_size=1, max_size=20))

        def rule(history: list[int]) -> int:
            value = table[(history[-1] * 5 + history[-2 % len(history)] * 3 + len(history) // 7) % 40]
            return 256 if value == letters else A + value

        drafter = data.draw(
            st.sampled_from([NgramDrafter(), guesser(rule, 0.7), DraftModel("d", FakeDecoder(rule)), guesser(rule, 1)])
        )
        context = len(prompt) + data.draw(st.integers(1, 30))
        both(
            lambda: FakeDecoder(rule, context=context),
            TOKENIZER,
            prompt,
            Speculation(drafter, data.draw(st.integers(1, 10))),
            max_tokens=data.draw(st.integers(1, 30)),
            stop=data.draw(st.lists(st.text("abcd", min_size=1, max_size=4), max_size=2)),
            stop_token_ids=data.draw(st.sets(st.integers(A, A + 3), max_size=1)),
        )


class TestChoosing:
    """Guesses that were not drawn at random leave even the random numbers alone: the tokens are those of plain decoding
    under every setting, penalties and their memory included."""

    @pytest.mark.parametrize("drafter", ["ngram", "own rule", "nonsense"])
    @pytest.mark.parametrize(
        "settings", [{}, PENALTIES, SAMPLED, {**SAMPLED, **PENALTIES}, {"temperature": 0.7, "seed": 1}]
    )
    def test_same_tokens_under_every_setting(self, drafter: str, settings: dict[str, Any]) -> None:
        drafters = {
            "ngram": NgramDrafter(),
            "own rule": guesser(lambda ids: int(chaotic(ids).argmax()), 1.0),
            "nonsense": FixedDrafter(lambda text: [1, 2, 3]),
        }
        _, sped = both(
            lambda: FakeDecoder(chaotic),
            TOKENIZER,
            TOKENIZER.encode("defde"),
            Speculation(drafters[drafter], 5),
            SamplingParams(**settings),
            max_tokens=80,
        )
        assert sped.speculation is not None
        assert sped.speculation.drafted > 0
        assert (sped.speculation.accepted > 0) == (drafter != "nonsense")

    @pytest.mark.parametrize("settings", [{}, PENALTIES])
    def test_greedy_with_a_draft_model(self, settings: dict[str, Any]) -> None:
        def cruder(history: list[int]) -> torch.Tensor:
            return (chaotic(history) / 3).round()

        _, sped = both(
            lambda: FakeDecoder(chaotic),
            TOKENIZER,
            TOKENIZER.encode("de"),
            Speculation(DraftModel("cruder", FakeDecoder(cruder)), 4),
            SamplingParams(**settings),
            max_tokens=80,
        )
        assert sped.speculation is not None
        assert 0 < sped.speculation.accepted < sped.speculation.drafted

    @pytest.mark.parametrize("settings", [SAMPLED, {**SAMPLED, **PENALTIES}])
    def test_a_model_that_drafts_for_itself_is_always_right(self, settings: dict[str, Any]) -> None:
        """Where both distributions are equal nothing is rejected; that takes the draft's penalties to count its own
        tokens before they are accepted, and the target's to forget them after."""
        drafter = DraftModel("itself", FakeDecoder(chaotic))
        result = generate(
            FakeDecoder(chaotic),
            TOKENIZER,
            TOKENIZER.encode("de"),
            SamplingParams(**settings),
            max_tokens=80,
            speculation=Speculation(drafter, 6),
        ).run()
        assert result.speculation is not None
        assert result.speculation.acceptance_rate == 1.0

    def test_seeds_repeat(self) -> None:
        def sampled(seed: int) -> tuple[int, ...]:
            drafter = DraftModel("other", FakeDecoder(lambda history: chaotic([7, *history[-1:]])))
            params = SamplingParams(**{**SAMPLED, **PENALTIES, "seed": seed})
            speculation = Speculation(drafter, 4)
            return (
                generate(
                    FakeDecoder(chaotic),
                    TOKENIZER,
                    TOKENIZER.encode("de"),
                    params,
                    max_tokens=60,
                    speculation=speculation,
                )
                .run()
                .ids
            )

        assert sampled(5) == sampled(5)
        assert sampled(5) != sampled(6)


class TestEnds:
    @pytest.mark.parametrize("answer", ["", "a", "ab", "abcdefgh"])
    def test_end_of_sequence_in_an_accepted_run(self, answer: str) -> None:
        prompt = TOKENIZER.encode("prompt")
        text = [*prompt, *TOKENIZER.encode(answer), 256, *TOKENIZER.encode("never shown")]
        _, sped = both(
            lambda: FakeDecoder(lambda history: text[len(history)]),
            TOKENIZER,
            prompt,
            Speculation(FixedDrafter(lambda ids: text[len(ids) :]), 4),
        )
        assert (sped.text, sped.finish_reason) == (answer, "stop")
        assert sped.ids[-1] == 256

    @pytest.mark.parametrize("max_tokens", range(1, 14))
    def test_max_tokens(self, max_tokens: int) -> None:
        speculation = Speculation(guesser(next_after, 1.0), 4)
        _, sped = both(lambda: FakeDecoder(next_after), TOKENIZER, [A], speculation, max_tokens=max_tokens)
        assert (sped.completion_tokens, sped.finish_reason) == (max_tokens, "length")

    @pytest.mark.parametrize("context", range(4, 18))
    def test_context(self, context: int) -> None:
        """Drafts never reach beyond the cache, which is made for the prompt and the tokens that may be asked for."""
        decoders: list[FakeDecoder] = []

        def make() -> FakeDecoder:
            decoders.append(FakeDecoder(next_after, context=context))
            return decoders[-1]

        speculation = Speculation(guesser(next_after, 1.0), 8)
        _, sped = both(make, TOKENIZER, TOKENIZER.encode("def"), speculation, max_tokens=50)
        assert (sped.completion_tokens, sped.finish_reason) == (context - 3, "context")
        assert decoders[1].capacities == [context]
        assert sum(decoders[1].steps) <= context - 1  # the last token never goes through the model

    @pytest.mark.parametrize("stop", ["cd", "defg", "b", "gh", "a", "hx"])
    def test_stop_strings(self, stop: str) -> None:
        text = TOKENIZER.encode("promptabcdefgh") + [256]
        drafter = FixedDrafter(lambda ids: text[len(ids) :])
        both(
            lambda: reciting(TOKENIZER, "prompt", "abcdefgh"),
            TOKENIZER,
            TOKENIZER.encode("prompt"),
            Speculation(drafter, 3),
            stop=[stop],
        )

    def test_logits_that_are_not_finite(self) -> None:
        def rule(history: list[int]) -> int | torch.Tensor:
            return A if len(history) < 6 else torch.full((257,), torch.nan)

        speculation = Speculation(FixedDrafter(lambda text: [A] * 8), 8)
        with pytest.raises(KbitError, match="not finite.*after 5 tokens"):
            generate(FakeDecoder(rule), TOKENIZER, [A], speculation=speculation).run()


class TestLimitsOfDrafting:
    def test_a_draft_model_with_a_shorter_context(self) -> None:
        drafting = FakeDecoder(next_after, context=12)
        _, sped = both(
            lambda: FakeDecoder(next_after),
            TOKENIZER,
            TOKENIZER.encode("de"),
            Speculation(DraftModel("short", drafting), 4),
            max_tokens=30,
        )
        report = sped.speculation
        assert report is not None
        assert report.note == "no drafts beyond 12 tokens: the draft model's context ends there"
        assert report.accepted > 0
        assert sum(drafting.steps) <= 12
        # A prompt that is too long for it from the beginning.
        _, sped = both(
            lambda: FakeDecoder(next_after),
            TOKENIZER,
            TOKENIZER.encode("d" * 12),
            Speculation(DraftModel("short", drafting), 4),
            max_tokens=10,
        )
        assert sped.speculation is not None
        assert (sped.speculation.drafted, sped.speculation.note) == (0, report.note)

    @pytest.mark.parametrize("extra", [-100, 40])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_a_draft_model_with_other_padding(self, extra: int, temperature: float) -> None:
        """Columns beyond the model's vocabulary are never proposed, and missing ones have probability 0."""

        def padded(history: list[int]) -> torch.Tensor:
            logits = chaotic(history)
            return torch.cat([logits, torch.full((extra,), 9.0)]) if extra > 0 else logits[:extra]

        drafting = FakeDecoder(padded)
        drafting.spec.vocab_size = 257 + extra
        params = SamplingParams(temperature, seed=0)
        result = generate(
            FakeDecoder(chaotic),
            TOKENIZER,
            TOKENIZER.encode("de"),
            params,
            max_tokens=40,
            speculation=Speculation(DraftModel("padded", drafting), 4),
        ).run()
        assert result.speculation is not None
        assert result.speculation.acceptance_rate == 1.0  # the columns both have are equal

    @pytest.mark.parametrize("draft_tokens", [0, -1, 65])
    def test_draft_tokens_out_of_range(self, draft_tokens: int) -> None:
        with pytest.raises(UsageError, match=f"--draft-tokens {draft_tokens}: expected 1 to 64"):
            Speculation(NgramDrafter(), draft_tokens)

    def test_a_damaged_draft_model_is_named(self) -> None:
        drafting = FakeDecoder(lambda history: torch.full((257,), torch.nan))
        speculation = Speculation(DraftModel("broken", drafting))
        with pytest.raises(KbitError, match="draft model broken: the model produced logits that are not finite"):
            generate(FakeDecoder(next_after), TOKENIZER, [A], speculation=speculation).run()
