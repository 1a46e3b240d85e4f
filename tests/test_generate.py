"""The generation loop: on a fake decoder whose every answer is known, on real models, and through the commands."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from kbit.engine.conversation import Conversation
from kbit.engine.generate import Generation, generate
from kbit.engine.prompt_cache import PromptCache
from kbit.engine.sampler import SamplingParams
from kbit.engine.stop import StopMatcher
from kbit.engine.tokenizer import Tokenizer
from kbit.errors import KbitError, UsageError
from kbit.ops.kv_cache import KVCache

CHATML = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def byte_tokenizer(chat_template: str | None = None) -> Tokenizer:
    """Token i is byte i, roughly: every byte is one token; </s> (256) ends a generation."""
    backend = Backend(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    templates = {} if chat_template is None else {"default": chat_template}
    return Tokenizer(backend, eos_ids=frozenset({256}), chat_templates=templates)


class FakeDecoder:
    """A decoder whose next token is a function of all tokens so far, read from the cache.

    The ids are stored as "keys", so a cache that is truncated, filled or counted wrongly changes the answer.
    """

    def __init__(self, rule: Callable[[list[int]], int | torch.Tensor], context: int = 1000) -> None:
        self.rule = rule
        self.spec = SimpleNamespace(max_positions=context, vocab_size=257)
        self.steps: list[int] = []  # tokens of each forward pass
        self.capacities: list[int] = []

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        self.capacities.append(capacity)
        return KVCache(1, batch, 1, 1, capacity)

    def forward(
        self, ids: torch.Tensor, cache: KVCache, lengths: torch.Tensor | None = None, last_only: bool = False
    ) -> torch.Tensor:
        assert ids.shape[0] == 1
        assert last_only
        assert lengths is None
        new = torch.tensor([ids.shape[1]])
        cache.reserve(new)
        start = int(cache.lengths[0])
        cache.keys[0][0, 0, start : start + ids.shape[1], 0] = ids[0].float()
        cache.advance(new)
        self.steps.append(ids.shape[1])
        answer = self.rule(cache.keys[0][0, 0, : int(cache.lengths[0]), 0].long().tolist())
        if isinstance(answer, torch.Tensor):
            return answer[None, None]
        return torch.nn.functional.one_hot(torch.tensor([[answer]]), self.spec.vocab_size).float()


def reciting(tokenizer: Tokenizer, prompt: str, answer: str, end: bool = True, **options: Any) -> FakeDecoder:
    """A decoder that follows exactly this prompt with exactly this answer."""
    ids = tokenizer.encode(prompt)
    script = ids + tokenizer.encode(answer) + [256] * end

    def rule(history: list[int]) -> int:
        assert history == script[: len(history)]
        return script[len(history)]

    return FakeDecoder(rule, **options)


def start(answer: str, prompt: str = "prompt", *, end: bool = True, context: int = 1000, **options: Any) -> Generation:
    tokenizer = byte_tokenizer()
    decoder = reciting(tokenizer, prompt, answer, end, context=context)
    return generate(decoder, tokenizer, tokenizer.encode(prompt), **options)


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

    def test_prefill_in_chunks_gives_the_same(self) -> None:
        tokenizer, prompt = byte_tokenizer(), "x" * 23
        for chunk, steps in [(1, [1] * 23), (7, [7, 7, 7, 2]), (23, [23]), (512, [23])]:
            decoder = reciting(tokenizer, prompt, "ok")
            result = generate(decoder, tokenizer, tokenizer.encode(prompt), prefill_chunk=chunk).run()
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
        from tests.test_tokenizer import sentencepiece

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
        with pytest.raises(UsageError, match="prefill chunk of 0"):
            start("x", prefill_chunk=0)

    def test_logits_that_are_not_finite(self) -> None:
        tokenizer = byte_tokenizer()
        decoder = FakeDecoder(lambda h: 5 if len(h) < 4 else torch.full((257,), torch.nan))
        generation = generate(decoder, tokenizer, [1])
        with pytest.raises(KbitError, match="not finite.*after 3 tokens"):
            generation.run()

    def test_no_memory_for_the_cache(self) -> None:
        decoder = FakeDecoder(lambda h: 5)

        def no_memory(batch: int, capacity: int) -> KVCache:
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


class TestConversation:
    def test_turns_see_each_other_and_cost_only_what_is_new(self) -> None:
        tokenizer = byte_tokenizer(CHATML)
        said = "<system>S\n<user>hi\n<assistant>yo\n<user>more\n<assistant>ok"
        script = tokenizer.encode(said)

        def rule(history: list[int]) -> int:
            assert history == script[: len(history)]
            return script[len(history)] if len(history) < len(script) and said[len(history)] != "\n" else 256

        conversation = Conversation(FakeDecoder(rule), tokenizer, "M", system="S")
        first = conversation.reply("hi", SamplingParams()).run()
        conversation.add("hi", first)
        second = conversation.reply("more", SamplingParams()).run()
        conversation.add("more", second)
        assert (first.text, second.text) == ("yo", "ok")
        assert second.cached_tokens == len("<system>S\n<user>hi\n<assistant>yo")
        conversation.reset()
        assert conversation.reply("hi", SamplingParams()).run().prompt_tokens == first.prompt_tokens

    def test_overflow_leaves_the_conversation_as_it_was(self) -> None:
        conversation = Conversation(FakeDecoder(lambda h: 256, context=40), byte_tokenizer(CHATML), "M")
        with pytest.raises(UsageError, match=r"conversation has 57 tokens .* context is 40: .*/reset"):
            conversation.reply("x" * 39, SamplingParams())
        result = conversation.reply("x", SamplingParams()).run()
        assert (result.prompt_tokens, result.finish_reason) == (len("<user>x\n<assistant>"), "stop")

    def test_turns_have_their_own_seeds(self) -> None:
        conversation = Conversation(FakeDecoder(lambda h: torch.zeros(257)), byte_tokenizer(CHATML), "M")
        seeds = []
        for _ in range(2):
            result = conversation.reply("a", SamplingParams(1.0, seed=2**63 - 1), max_tokens=2).run()
            conversation.add("a", result)
            seeds.append(result.seed)
        assert seeds == [2**63 - 1, 0]

    def test_no_template(self) -> None:
        with pytest.raises(UsageError, match="M: the model has no chat template; `kbit run` without --chat"):
            Conversation(FakeDecoder(lambda h: 0), byte_tokenizer(), "M")


def kbit(*arguments: str, stdin: str = "", check: int = 0) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-m", "kbit.cli.main", *arguments],
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == check, done.stderr
    return done


@pytest.fixture(scope="module")
def novels_folder(data_dir: Path) -> str:
    return str(data_dir / "models" / "novels-2m")


ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
}


class TestBeyondTheOriginalContext:
    """Prompts longer than max_position_embeddings (16) where RoPE extends it, or 16 times factor where M is all."""

    @pytest.fixture(params=ROPE)
    def model(self, request: pytest.FixtureRequest, tmp_path: Path, write_model: Callable[..., Path]) -> Any:
        from kbit.engine.loader import load_model

        kind = request.param
        positions = 16 if kind in ("dynamic", "yarn") else 64
        folder = write_model(
            tmp_path / "m",
            dtype=torch.float32,
            max_position_embeddings=positions,
            rope_theta=100.0,
            rope_scaling={"rope_type": kind, **ROPE[kind]},
        )
        return load_model(str(folder), "cpu")

    @staticmethod
    def logits(model: Any, ids: list[int], chunk: int, cache: PromptCache) -> tuple[list[torch.Tensor], int]:
        """The logits that each of 8 greedy tokens was chosen from, and how many prompt tokens were in the cache."""
        seen: list[torch.Tensor] = []
        extend = cache.extend

        def watched(tokens: Sequence[int]) -> torch.Tensor:
            seen.append(extend(tokens))
            return seen[-1]

        cache.extend = watched  # type: ignore[method-assign]
        generation = generate(
            model.decoder, model.tokenizer, ids, max_tokens=8, prefill_chunk=chunk, prompt_cache=cache
        )
        result = generation.run()
        cache.extend = extend  # type: ignore[method-assign]
        assert result.completion_tokens == 8
        return seen[-8:], result.cached_tokens

    def test_chunks_and_shared_beginnings_give_the_same(self, model: Any) -> None:
        ids = [(7 * index) % 251 for index in range(45)]
        cache = PromptCache(model.decoder)
        dynamic = model.decoder.spec.rope.depends_on_length
        # Short, past the original context with the answer (12 + 8 > 16), long, and back.
        for length, shared in ((5, 0), (12, 5), (45, 12), (44, 43), (10, 9)):
            expected, _ = self.logits(model, ids[:length], 512, PromptCache(model.decoder))
            found, cached = self.logits(model, ids[:length], 7, cache)
            # Within M a beginning is shared as ever; beyond it dynamic RoPE begins anew.
            assert cached == (shared if not dynamic or length == 12 else 0)
            for ours, theirs in zip(found, expected, strict=True):
                # Sums of at most 80 float32 terms in another order, some dozen operations deep.
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))

    def test_the_end_of_the_context(self, model: Any) -> None:
        result = generate(model.decoder, model.tokenizer, [1] * 60, max_tokens=50).run()
        assert (result.finish_reason, result.completion_tokens) == ("context", 4)
        with pytest.raises(UsageError, match="the prompt has 64 tokens and the model's context is 64"):
            generate(model.decoder, model.tokenizer, [1] * 64)


class TestRealModels:
    def test_novels_continue_a_sentence(self, novels_folder: str) -> None:
        from kbit.engine.loader import load_model

        loaded = load_model(novels_folder, "cpu")
        ids = loaded.tokenizer.encode("The old man looked at her and")
        result = generate(loaded.decoder, loaded.tokenizer, ids, max_tokens=40).run()
        # Chunked prefill, a cache that is reused, and no cache must not change greedy tokens.
        cache = PromptCache(loaded.decoder)
        for _ in range(2):
            again = generate(
                loaded.decoder, loaded.tokenizer, ids, max_tokens=40, prefill_chunk=3, prompt_cache=cache
            ).run()
            assert again.ids == result.ids
        assert again.cached_tokens == len(ids) - 1
        assert result.text == loaded.tokenizer.decode([*ids, *result.ids])[len(loaded.tokenizer.decode(ids)) :]
        assert result.completion_tokens == 40

    def test_capital_of_france(self, smollm2_gguf: Path) -> None:
        from kbit.engine.loader import load_model

        loaded = load_model(str(smollm2_gguf), "cpu")
        ids = loaded.tokenizer.encode("The capital of France is")
        assert "Paris" in generate(loaded.decoder, loaded.tokenizer, ids, max_tokens=5).run().text
        conversation = Conversation(loaded.decoder, loaded.tokenizer, "smollm2")
        question = "What is the capital of France?"
        result = conversation.reply(question, SamplingParams(), max_tokens=20).run()
        assert result.text == "The capital of France is Paris."
        assert result.finish_reason == "stop"
        conversation.add(question, result)
        second = conversation.reply("And of Germany?", SamplingParams(), max_tokens=12)
        fresh = Conversation(loaded.decoder, loaded.tokenizer, "smollm2")
        fresh.add(question, result)
        assert second.run().ids == fresh.reply("And of Germany?", SamplingParams(), max_tokens=12).run().ids
        assert second.result.cached_tokens > 30


class TestCommands:
    def test_run_json(self, novels_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
        code, stdout, stderr = in_process(
            ["run", "Once upon", "-m", novels_folder, "--max-tokens", "5", "--json"], monkeypatch
        )
        report = json.loads(stdout)
        assert (code, stdout.count("\n"), stderr) == (0, 1, "")
        assert set(report) >= {
            *("text", "prompt_tokens", "completion_tokens", "prefill_tokens_per_second", "decode_tokens_per_second"),
            *("time_to_first_token_s", "load_s", "peak_rss_bytes", "backend", "finish_reason", "model"),
        }
        assert (report["completion_tokens"], report["finish_reason"]) == (5, "length")
        assert report["peak_rss_bytes"] > 50e6
        assert report["text"]

    def test_run_streams_text_to_stdout_and_figures_to_stderr(
        self, novels_folder: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flags = ["-m", novels_folder, "--max-tokens", "6", "--temperature", "0.9", "--seed", "4", "--stop", "\x01"]
        done = kbit("run", "-", *flags, "--threads", "1", stdin="Once upon\n")
        report = json.loads(in_process(["run", "Once upon", *flags, "--json"], monkeypatch)[1])
        assert done.stdout == report["text"] + "\n"
        assert done.stderr.strip().endswith("reference backend")
        assert f"{report['prompt_tokens']} prompt tokens in " in done.stderr
        assert " · 6 tokens at " in done.stderr

    def test_commands_import_nothing_heavy(self) -> None:
        """`kbit --help` imports every command: it must not pay for torch, jinja2 or tokenizers."""
        code = (
            "import sys, kbit.cli.run, kbit.cli.chat; print(sorted({'torch', 'jinja2', 'tokenizers'} & {*sys.modules}))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "[]\n"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((" ",), "the prompt is empty"),
            (("-",), "the prompt from standard input is empty"),
            (("x", "--top-p", "1.5"), "--top-p 1.5: expected a probability"),
            (("x", "--temperature", "-1"), "--temperature -1.0: expected"),
            (("x", "--max-tokens", "0"), "--max-tokens 0: expected at least 1"),
            (("x", "--threads", "0"), "--threads 0: expected at least 1"),
            (("x", "--stop", ""), "--stop '': a stop string needs"),
            (("x", "--system", "s"), "--system needs --chat"),
            (("x", "--chat"), "no chat template; `kbit run` without --chat"),
            (("word " * 300,), "tokens and the model's context is 256, answer included: shorten"),
            (("x", "--device", "abacus"), "--device abacus"),
        ],
    )
    def test_run_usage_errors(
        self, novels_folder: str, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In this process, through the command's entry, which is where errors become a line and exit code 2."""
        code, stdout, stderr = in_process(["run", "-m", novels_folder, *arguments], monkeypatch)
        assert (code, stdout) == (2, "")
        assert message in stderr
        assert stderr.count("\n") == 1

    def test_a_prompt_too_long_is_refused_before_weights_are_read(
        self, novels_folder: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(*_: object) -> None:
            pytest.fail("weights were read")

        monkeypatch.setattr("kbit.models.load.load_decoder", load)
        code, _, stderr = in_process(["run", "-", "-m", novels_folder], monkeypatch, b"word " * 300)
        assert (code, "tokens and the model's context is 256, answer included: shorten" in stderr) == (2, True)

    def test_a_prompt_is_encoded_once(self, novels_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
        texts = []
        encode = Tokenizer.encode

        def noting(self: Tokenizer, text: str, *options: bool) -> list[int]:
            texts.append(text)
            return encode(self, text, *options)

        monkeypatch.setattr(Tokenizer, "encode", noting)
        assert in_process(["run", "Once upon", "-m", novels_folder, "--max-tokens", "1"], monkeypatch)[0] == 0
        assert texts == ["Once upon"]

    def test_prompt_that_is_not_utf8(self, monkeypatch: pytest.MonkeyPatch) -> None:
        code, _, stderr = in_process(["run", "-"], monkeypatch, stdin=b"ab\xff")
        assert (code, "not UTF-8 at byte 2" in stderr) == (2, True)
        code, _, stderr = in_process(["run", "ab\udcff"], monkeypatch)
        assert (code, "not valid UTF-8 at character 2" in stderr) == (2, True)

    def test_chat_with_piped_input(self, novels_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # The small model has no chat template: give it one.
        folder = tmp_path / "chatty"
        folder.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).symlink_to(Path(novels_folder) / name)
        (folder / "chat_template.jinja").write_text(CHATML)
        lines = "/help\nHello there\n\n/etc/hosts holds what?\n/reset\nHello there\r\n/exit\nnever read\n"
        flags = ["-m", str(folder), "--system", "S", "--temperature", "0", "--max-tokens", "6"]
        code, stdout, stderr = in_process(["chat", *flags], monkeypatch, lines.encode())
        assert code == 0
        assert "/reset   forget the conversation" in stderr
        assert "conversation forgotten" in stderr
        assert stderr.count("stopped after 6 tokens") == 3
        report = json.loads(in_process(["run", "Hello there", "--chat", *flags, "--json"], monkeypatch)[1])
        answer = report["text"] + "\n"
        # The answer to a first message is that of `kbit run --chat`; after /reset nothing earlier is left.
        assert stdout.startswith(answer)
        assert stdout.endswith(answer)
        assert len(stdout) > 2 * len(answer)
        code, _, stderr = in_process(["chat", *flags], monkeypatch, b"ab\xff\n")
        assert (code, "a message from standard input is not UTF-8 at byte 2" in stderr) == (2, True)
        with monkeypatch.context() as patch:  # endless lines are not read to their end, which never comes
            patch.setattr("kbit.cli.chat.MAX_PROMPT_BYTES", 1 << 20)
            code, _, stderr = in_process(["chat", *flags], patch, b"x" * ((1 << 20) + 1))
            assert (code, "a message from standard input is longer than 1 MiB" in stderr) == (2, True)
        # A message that does not fit ends a script with a usage error.
        code, _, stderr = in_process(["chat", *flags], monkeypatch, b"word " * 400)
        assert code == 2
        assert "the model's context is 256: shorten the message" in stderr

    def test_chat_without_template(self, novels_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
        code, _, stderr = in_process(["chat", "-m", novels_folder], monkeypatch)
        assert (code, "has no chat template" in stderr) == (2, True)

    def test_ctrl_c_ends_a_script_with_what_there_is(self, novels_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from kbit.cli import run as command

        shown = []

        def interrupted_show(text: str) -> None:
            shown.append(text)
            if len(shown) == 3:
                raise KeyboardInterrupt

        monkeypatch.setattr(command, "show", interrupted_show)
        code, _, stderr = in_process(["run", "Once upon", "-m", novels_folder], monkeypatch)
        assert code == 130
        assert shown[-1] == "\n"
        assert "interrupted · reference backend" in stderr

    def test_terminal_gets_no_control_characters(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from kbit.cli.options import show

        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        for stream, expected in [(Terminal(), "a\ufffd[31m\n\tb\u4f60"), (io.StringIO(), "a\x1b[31m\n\tb\r\u4f60")]:
            monkeypatch.setattr(sys, "stdout", stream)
            show("a\x1b[31m\n\tb\r\u4f60")
            assert stream.getvalue() == expected


def in_process(arguments: list[str], monkeypatch: pytest.MonkeyPatch, stdin: bytes = b"") -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command without the cost of a process."""
    from kbit.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "argv", ["kbit", *arguments])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0), out.getvalue(), err.getvalue()
