"""What speculation leaves in the caches: after rejections, interrupts, dropped generations, and between turns."""

from __future__ import annotations

from typing import Any

import pytest
from generation_cases import CHATML, FakeDecoder, byte_tokenizer
from speculative_cases import TOKENIZER, A, guesser, next_after

from kbit.backends.reference.kv_cache import reference_pages
from kbit.engine.conversation import Conversation
from kbit.engine.generate import generate
from kbit.engine.ngram import NgramDrafter
from kbit.engine.prompt_cache import PromptCache
from kbit.engine.sampler import SamplingParams
from kbit.engine.speculative import DraftModel, Speculation


class TestInterrupt:
    @pytest.mark.parametrize("where", ["target", "draft"])
    def test_what_there_is_stays_and_the_caches_stay_usable(self, where: str) -> None:
        armed = [True]

        def rule(history: list[int]) -> int:
            return next_after(history)

        def interrupting(history: list[int]) -> int:
            if armed[0] and len(history) == 12:
                raise KeyboardInterrupt
            return next_after(history)

        decoder = FakeDecoder(interrupting if where == "target" else rule)
        drafter = DraftModel("d", FakeDecoder(interrupting if where == "draft" else rule))
        cache, speculation = PromptCache(decoder), Speculation(drafter, 8)
        options: dict[str, Any] = {"max_tokens": 30, "speculation": speculation, "prompt_cache": cache}
        result = generate(decoder, TOKENIZER, TOKENIZER.encode("de"), **options).run()
        whole = generate(FakeDecoder(rule), TOKENIZER, TOKENIZER.encode("de"), max_tokens=30).run()
        assert result.finish_reason == "interrupted"
        assert 0 < result.completion_tokens < 30
        assert result.ids == whole.ids[: result.completion_tokens]
        assert result.text == TOKENIZER.decode(list(result.ids))
        armed[0] = False
        assert generate(decoder, TOKENIZER, TOKENIZER.encode("de"), **options).run().ids == whole.ids

    def test_in_the_callback_within_an_accepted_run(self) -> None:
        decoder = FakeDecoder(next_after)
        cache = PromptCache(decoder)
        speculation = Speculation(guesser(next_after, 1.0), 8)

        def on_text(piece: str) -> None:
            shown.append(piece)
            if len(shown) == 8:
                raise KeyboardInterrupt

        shown: list[str] = []
        options: dict[str, Any] = {"max_tokens": 30, "prompt_cache": cache}
        result = generate(decoder, TOKENIZER, TOKENIZER.encode("de"), speculation=speculation, **options).run(on_text)
        whole = generate(FakeDecoder(next_after), TOKENIZER, TOKENIZER.encode("de"), max_tokens=30).run()
        assert (result.finish_reason, result.ids) == ("interrupted", whole.ids[:8])
        assert generate(decoder, TOKENIZER, TOKENIZER.encode("de"), **options).run().ids == whole.ids

    def test_a_generation_that_is_dropped_leaves_its_cache_to_the_next(self) -> None:
        decoder = FakeDecoder(next_after)
        cache = PromptCache(decoder)
        options: dict[str, Any] = {"max_tokens": 30, "prompt_cache": cache}
        dropped = generate(
            decoder, TOKENIZER, TOKENIZER.encode("de"), speculation=Speculation(guesser(next_after, 1.0)), **options
        )
        for _ in range(4):
            next(dropped)
        other = generate(decoder, TOKENIZER, TOKENIZER.encode("dcb"), **options)
        first = [next(other) for _ in range(12)]
        del dropped  # closes its generator while the other one runs
        rest = list(other)
        alone = generate(FakeDecoder(next_after), TOKENIZER, TOKENIZER.encode("dcb"), max_tokens=30).run()
        assert "".join(first + rest) == alone.text


class TestCaches:
    def test_rejected_guesses_leave_the_cache(self) -> None:
        """The fake reads its history from the cache, so a wrong token left there would change the text; and the ids
        the prompt cache names are those that are there."""
        decoder = FakeDecoder(next_after)
        cache = PromptCache(decoder)
        for right in (0.0, 0.6, 1.0):
            speculation = Speculation(guesser(next_after, right), 6)
            result = generate(
                decoder, TOKENIZER, TOKENIZER.encode("de"), max_tokens=25, prompt_cache=cache, speculation=speculation
            ).run()
            text = [*TOKENIZER.encode("de"), *result.ids]
            held = list(cache.ids)
            assert text[:-1] == held[: len(text) - 1]
            cached = cache._cache
            assert cached is not None
            assert int(cached.lengths[0]) == len(held)
            keys, _ = reference_pages(cached).read(0, cached.rows[0].pages, len(held))
            assert keys[0, :, 0].long().tolist() == held

    def test_a_draft_model_computes_each_token_once(self) -> None:
        drafting = FakeDecoder(next_after)
        cache = PromptCache(FakeDecoder(next_after))
        speculation = Speculation(DraftModel("d", drafting), 4)
        prompt = TOKENIZER.encode("defgh")
        options: dict[str, Any] = {"prompt_cache": cache, "speculation": speculation}
        first = generate(FakeDecoder(next_after), TOKENIZER, prompt, max_tokens=11, speculation=speculation).run()
        # Prompt and first token, three more; after a draft that held, its last token and the one after it.
        assert drafting.steps == [6, 1, 1, 1, 2, 1, 1, 1]
        assert drafting.capacities == [16]
        drafting.steps.clear()
        longer = [*prompt, *first.ids, A]
        generate(FakeDecoder(next_after), TOKENIZER, longer, max_tokens=2, speculation=speculation).run()
        # Two tokens leave nothing to draft for... but three do: one draft of one token.
        assert drafting.steps == []
        generate(FakeDecoder(next_after), TOKENIZER, longer, max_tokens=3, **options).run()
        assert drafting.steps == [len(longer) + 1 - (len(prompt) + 9)]

    def test_turns_of_a_conversation(self) -> None:
        template = byte_tokenizer(CHATML)
        said = "<user>hi\n<assistant>yo yo yo\n<user>more\n<assistant>yo yo"
        script = template.encode(said)

        def rule(history: list[int]) -> int:
            known = history == script[: len(history)]
            return script[len(history)] if known and len(history) < len(script) and said[len(history)] != "\n" else 256

        def tokens(speculation: Speculation | None) -> list[tuple[str, tuple[int, ...], int]]:
            conversation = Conversation(FakeDecoder(rule), template, "M", speculation=speculation)
            turns = []
            for message in ("hi", "more"):
                result = conversation.reply(message, SamplingParams()).run()
                conversation.add(message, result)
                turns.append((result.text, result.ids, result.cached_tokens))
            return turns

        plain = tokens(None)
        assert [turn[0] for turn in plain] == ["yo yo yo", "yo yo"]
        for drafter in (NgramDrafter(), DraftModel("d", FakeDecoder(rule)), guesser(rule, 0.8)):
            turns = tokens(Speculation(drafter, 4))
            assert [turn[:2] for turn in turns] == [turn[:2] for turn in plain]
            # A guess that was accepted is in the cache already, so a token more may be.
            for ours, theirs in zip(turns, plain, strict=True):
                assert 0 <= ours[2] - theirs[2] <= 1
