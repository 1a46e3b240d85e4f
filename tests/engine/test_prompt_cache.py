"""The prompt cache: which beginnings are kept, and that keeping them changes no token."""

from __future__ import annotations

from collections.abc import Sequence

from generation_cases import FakeDecoder, byte_tokenizer, reciting

from kbit.engine.generate import generate
from kbit.engine.prompt_cache import PromptCache


class TestPromptCache:
    def test_common_beginning_is_kept(self) -> None:
        tokenizer = byte_tokenizer()
        decoder = FakeDecoder(lambda history: (sum(i * t for i, t in enumerate(history, 1)) + 7) % 256)
        cache = PromptCache(decoder)
        prompts: Sequence[str] = ["abcdef", "abcdefgh", "abX", "abX", "Y", "abcdef" * 40]
        shared = [0, 6, 2, 2, 0, 0]
        for prompt, expected in zip(prompts, shared, strict=True):
            ids = tokenizer.encode(prompt)
            alone = generate(decoder, tokenizer, ids, max_tokens=8).run()
            cached = generate(decoder, tokenizer, ids, max_tokens=8, prompt_cache=cache).run()
            assert cached.ids == alone.ids
            assert cached.text == alone.text
            assert cached.cached_tokens == expected
            assert list(cache.ids) == ids + list(cached.ids[:-1])

    def test_answer_in_the_next_prompt_is_cached_too(self) -> None:
        tokenizer = byte_tokenizer()
        decoder = reciting(tokenizer, "ab", "cd", end=False)
        cache = PromptCache(decoder)
        generate(decoder, tokenizer, tokenizer.encode("ab"), max_tokens=2, prompt_cache=cache).run()
        decoder.rule = lambda history: 256
        result = generate(decoder, tokenizer, tokenizer.encode("abcdef"), prompt_cache=cache).run()
        assert result.cached_tokens == 3  # "abc": the last token of an answer has not been through the model

    def test_after_an_interrupt(self) -> None:
        tokenizer = byte_tokenizer()

        def rule(history: list[int]) -> int:
            if len(history) == 5:
                raise KeyboardInterrupt
            return 65

        decoder = FakeDecoder(rule)
        cache = PromptCache(decoder)
        assert generate(decoder, tokenizer, [1, 2, 3], prompt_cache=cache).run().finish_reason == "interrupted"
        decoder.rule = lambda history: sum(history) % 256 if len(history) < 10 else 256
        alone = generate(decoder, tokenizer, [1, 2, 3, 65, 9]).run()
        assert generate(decoder, tokenizer, [1, 2, 3, 65, 9], prompt_cache=cache).run().ids == alone.ids

    def test_grows_by_doubling_within_the_context(self) -> None:
        decoder = FakeDecoder(lambda history: 256, context=100)
        cache = PromptCache(decoder)
        for length in (10, 12, 30, 60):
            generate(decoder, byte_tokenizer(), list(range(length)), max_tokens=10, prompt_cache=cache).run()
        assert decoder.capacities == [20, 40, 80]
        generate(decoder, byte_tokenizer(), list(range(85)), max_tokens=10, prompt_cache=cache).run()
        assert decoder.capacities == [20, 40, 80, 100]
