"""The generation loop, on a fake decoder whose every answer is known."""

from __future__ import annotations

import pytest
import torch
from generation_cases import FakeDecoder, byte_tokenizer, reciting, start
from hypothesis import given, settings
from hypothesis import strategies as st

from kbit.engine.generate import generate
from kbit.engine.sampler import SamplingParams
from kbit.engine.stop import StopMatcher
from kbit.graph.cache import Cache
from kbit.host.errors import KbitError, UsageError
from kbit.text.tokenizer import Tokenizer


class TestLoop:
    def test_text_ids_and_counts(self) -> None:
        generation = start("hello \U0001f600!")
        pieces = list(generation)
        result = generation.result
        assert pieces == [*"hello ", "\U0001f600", "!"]
        assert result.text == "hello \U0001f600!"
        assert result.ids == (*byte_tokenizer().encode("hello \U0001f600!"), 256)
        assert (result.finish_reason, result.prompt_tokens, result.completion_tokens) == ("stop", 6, 12)
        assert result.time_to_first_token is not None
        assert 0 < result.prefill_seconds <= result.time_to_first_token
        assert result.decode_seconds > 0
        assert result.decode_tokens_per_second == pytest.approx(11 / result.decode_seconds)
        assert result.prefill_tokens_per_second == pytest.approx(6 / result.prefill_seconds)

    def test_max_tokens(self) -> None:
        result = start("hello", end=False, max_tokens=3).run()
        assert (result.text, result.finish_reason, result.completion_tokens) == ("hel", "length", 3)
        assert start("hello", max_tokens=6).run().finish_reason == "stop"
        assert start("h", max_tokens=1).run().decode_tokens_per_second is None

    def test_cut_in_a_character(self) -> None:
        assert start("a\U0001f600", max_tokens=4).run().text == "a\ufffd"

    def test_context(self) -> None:
        result = start("hello", prompt="prompt", context=9).run()
        assert (result.text, result.finish_reason) == ("hel", "context")

    def test_stop_token_ids(self) -> None:
        tokenizer = byte_tokenizer()
        result = start("hello", stop_token_ids=tokenizer.encode("l")).run()
        assert (result.text, result.finish_reason, result.completion_tokens) == ("he", "stop", 3)

    def test_prefill_in_chunks_gives_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tokenizer, prompt = byte_tokenizer(), "x" * 23
        for chunk, steps in [(1, [1] * 23), (7, [7, 7, 7, 2]), (23, [23]), (512, [23])]:
            decoder = reciting(tokenizer, prompt, "ok")
            monkeypatch.setattr("kbit.engine.generate.PREFILL_CHUNK", chunk)
            result = generate(decoder, tokenizer, tokenizer.encode(prompt)).run()
            assert result.text == "ok"
            assert decoder.steps == steps + [1, 1]

    def test_cache_is_no_larger_than_needed(self) -> None:
        tokenizer = byte_tokenizer()
        for max_tokens, expected in [(10, 16), (10**9, 1000)]:
            decoder = reciting(tokenizer, "prompt", "ok")
            generate(decoder, tokenizer, tokenizer.encode("prompt"), max_tokens=max_tokens).run()
            assert decoder.capacities == [expected]

    def test_seeded_sampling_repeats(self) -> None:
        tokenizer = byte_tokenizer()
        decoder = FakeDecoder(lambda history: torch.zeros(257))
        params = SamplingParams(temperature=1.0, seed=5)
        a, b = (generate(decoder, tokenizer, [1], params, max_tokens=30).run() for _ in range(2))
        assert a.ids == b.ids
        assert len(set(a.ids)) > 10

    def test_first_word_keeps_its_space(self) -> None:
        from tokenizer_cases import sentencepiece

        tokenizer = Tokenizer(sentencepiece(), eos_ids=frozenset({2}))
        ids = tokenizer.encode("hello")
        answer = [*tokenizer.encode("hello", add_special_tokens=False), 2]
        for continues, expected in [(True, " hello"), (False, "hello")]:
            decoder = FakeDecoder(lambda history: answer[len(history) - len(ids)])
            decoder.spec.vocab_size = tokenizer.vocab_size
            assert generate(decoder, tokenizer, ids, continues_prompt=continues).run().text == expected

    def test_lone_bos_is_a_prompt(self) -> None:
        tokenizer = byte_tokenizer()
        assert generate(FakeDecoder(lambda h: 256), tokenizer, [256]).run().finish_reason == "stop"


class TestErrors:
    def test_prompts(self) -> None:
        with pytest.raises(UsageError, match="the prompt is empty"):
            start("x", prompt="")
        with pytest.raises(UsageError, match="prompt has 10 tokens and the model's context is 10.*shorten the prompt"):
            start("x", prompt="p" * 10, context=10)
        for ids, culprit in (([1, 300], 300), ([1, 257], 257), ([-2, 1], -2), ([-2, 300], -2)):
            with pytest.raises(UsageError, match=f"token id {culprit} is outside the model's vocabulary of 257"):
                generate(FakeDecoder(lambda h: 0), byte_tokenizer(), ids)

    def test_limits(self) -> None:
        with pytest.raises(UsageError, match="--max-tokens 0"):
            start("x", max_tokens=0)
        with pytest.raises(UsageError, match="--stop ''"):
            start("x", stop=["a", ""])

    def test_logits_that_are_not_finite(self) -> None:
        tokenizer = byte_tokenizer()
        decoder = FakeDecoder(lambda h: 5 if len(h) < 4 else torch.full((257,), torch.nan))
        generation = generate(decoder, tokenizer, [1])
        with pytest.raises(KbitError, match="not finite.*after 3 tokens"):
            generation.run()

    def test_no_memory_for_the_cache(self) -> None:
        decoder = FakeDecoder(lambda h: 5)

        def no_memory(batch: int, capacity: int) -> Cache:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

        decoder.new_cache = no_memory  # type: ignore[method-assign]
        with pytest.raises(KbitError, match="KV cache of 129 tokens: lower --max-tokens"):
            generate(decoder, byte_tokenizer(), [1]).run()


class TestStopStrings:
    @pytest.mark.parametrize(
        ("answer", "stops", "expected"),
        [
            ("one two three", ["two"], "one "),
            ("one two three", ["three", " two"], "one"),
            ("aaab", ["aab"], "a"),
            ("abababc", ["ababc"], "ab"),
            ("xyz", ["yzq"], "xyz"),
            ("stop", ["stop"], ""),
            ("abcd", ["abcd", "bc"], "a"),
            ("abcd", ["abc", "bc"], ""),
            ("a\u00e9\U0001f600b", ["\U0001f600"], "a\u00e9"),
            ("line\n\nnext", ["\n\n"], "line"),
            ("no match at all", [], "no match at all"),
        ],
    )
    def test_cut(self, answer: str, stops: list[str], expected: str) -> None:
        result = start(answer, stop=stops).run()
        assert result.text == expected
        assert result.finish_reason == "stop"

    def test_reason_and_tokens(self) -> None:
        tokenizer = byte_tokenizer()
        result = start("abcdef", end=False, stop=["cd"], max_tokens=5).run()
        assert (result.text, result.finish_reason) == ("ab", "stop")
        assert result.ids == tuple(tokenizer.encode("abcd"))

    def test_nothing_is_shown_and_taken_back(self) -> None:
        assert list(start("xabyabc!", stop=["abc"])) == ["x", "aby"]
        assert list(start("xab", stop=["abc"])) == ["x", "ab"]

    @settings(max_examples=300, deadline=None)
    @given(data=st.data())
    def test_against_searching_the_whole_text(self, data: st.DataObject) -> None:
        alphabet = st.sampled_from("ab\u00e9")
        stops = data.draw(st.lists(st.text(alphabet, min_size=1, max_size=5), max_size=3))
        chunks = data.draw(st.lists(st.text(alphabet, max_size=6), max_size=8))
        text = "".join(chunks)
        # The first stop string to be complete wins, of several complete there the longest.
        ends = [(text.find(s) + len(s), -len(s)) for s in stops if s in text]
        expected = text[: min(ends)[0] + min(ends)[1]] if ends else text
        matcher = StopMatcher(stops)
        shown = [matcher.push(chunk) for chunk in chunks]
        assert expected.startswith("".join(shown))
        assert "".join(shown) + matcher.finish() == expected
        assert (matcher.matched is not None) == bool(ends)

    @settings(max_examples=300, deadline=None)
    @given(data=st.data())
    def test_special_tokens_against_searching_the_whole_text(self, data: st.DataObject) -> None:
        specials = ["<s>", "ab"]  # the second is spelled like text
        alphabet = st.sampled_from("ab<s>")
        words = st.text(alphabet, min_size=1, max_size=4)
        stops = data.draw(st.lists(words | st.sampled_from(["<s>", "a<s>", "<s>b", "<s><s>"]), max_size=3))
        chunks = data.draw(
            st.lists(st.tuples(words, st.just(False)) | st.tuples(st.sampled_from(specials), st.just(True)), max_size=8)
        )
        characters = [(char, special) for text, special in chunks for char in text]
        full = [(number, char) for number, (char, _) in enumerate(characters)]
        plain = [(number, char) for number, (char, special) in enumerate(characters) if not special]
        found = []
        for stop in stops:
            seen = full if any(token in stop for token in specials) else plain
            at = "".join(char for _, char in seen).find(stop)
            if at >= 0:
                found.append((seen[at + len(stop) - 1][0], -len(stop), seen[at][0]))
        end = min(found)[2] if found else len(characters)
        matcher = StopMatcher(stops, specials)
        shown = "".join(matcher.push(text, special=special) for text, special in chunks) + matcher.finish()
        assert shown == "".join(char for char, special in characters[:end] if not special)
        assert (matcher.matched is not None) == bool(found)

    @pytest.mark.parametrize(
        ("stops", "expected"),
        [
            (["<end>"], "one two"),
            (["two<end>"], "one "),
            (["<end> thr"], "one two"),
            (["two three"], "one "),  # as it is shown
            (["e</s>"], "one two thre"),  # the token that ends the answer anyway
            (["<end>!", "three</s>!"], "one two three"),
        ],
    )
    def test_special_tokens(self, stops: list[str], expected: str) -> None:
        """A stop string that is or contains a special token, as the markers of a chat are."""
        tokenizer = byte_tokenizer()
        tokenizer._backend.add_special_tokens(["<end>"])
        tokenizer = Tokenizer(tokenizer._backend, eos_ids=tokenizer.eos_ids)
        answer, prompt = tokenizer.encode("one two<end> three"), tokenizer.encode("prompt")
        script = [*prompt, *answer, 256]
        decoder = FakeDecoder(lambda history: script[len(history)])
        decoder.spec.vocab_size = 258
        result = generate(decoder, tokenizer, prompt, stop=stops).run()
        assert (result.text, result.finish_reason) == (expected, "stop")

    def test_long_stop_strings_cost_no_more(self) -> None:
        """Linear work: a million steps at most for 20,000 characters, where naive matching takes 10^8 per string."""
        matcher = StopMatcher(["a" * 10_000 + "b"])
        shown = "".join(matcher.push("a") for _ in range(20_000))
        assert len(shown) == 10_000
        assert matcher.push("b") == ""
        assert matcher.matched is not None


class TestInterrupt:
    def test_in_the_model(self) -> None:
        tokenizer = byte_tokenizer()
        ids, answer = tokenizer.encode("p"), tokenizer.encode("abc")

        def rule(history: list[int]) -> int:
            if len(history) == 4:
                raise KeyboardInterrupt
            return answer[len(history) - 1]

        # "bc" is held back as a possible stop string: an interrupted answer still shows it.
        generation = generate(FakeDecoder(rule), tokenizer, ids, stop=["bcd"])
        assert list(generation) == ["a", "bc"]
        result = generation.result
        assert (result.text, result.finish_reason, result.completion_tokens) == ("abc", "interrupted", 3)

    def test_in_prefill(self) -> None:
        def rule(history: list[int]) -> int:
            raise KeyboardInterrupt

        result = generate(FakeDecoder(rule), byte_tokenizer(), [1, 2]).run()
        assert (result.text, result.ids, result.finish_reason) == ("", (), "interrupted")
        assert result.time_to_first_token is None
        assert result.prefill_tokens_per_second is None

    def test_in_the_callback(self) -> None:
        shown = []

        def on_text(piece: str) -> None:
            shown.append(piece)
            if piece == "b":
                raise KeyboardInterrupt

        result = start("abcdef").run(on_text)
        assert shown == ["a", "b"]
        assert (result.text, result.finish_reason) == ("ab", "interrupted")

    def test_result_before_the_end(self) -> None:
        generation = start("abc")
        assert next(generation) == "a"
        assert (generation.result.text, generation.result.finish_reason) == ("a", "interrupted")


def test_a_text_that_only_repeats_itself_is_ended() -> None:
    generation = start("ab" * 200, max_tokens=300, stop_repetition=True)
    result = generation.run()
    assert result.finish_reason == "repetition"
    assert result.text == "ab" * 48
    assert start("ab" * 200, max_tokens=300).run().finish_reason == "length"
