"""Generation with real decoders: extended RoPE contexts of a random model, and trained models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kbit.engine.conversation import Conversation
from kbit.engine.generate import generate
from kbit.engine.prompt_cache import PromptCache
from kbit.engine.sampler import SamplingParams
from kbit.host.errors import UsageError

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
            seen.append(torch.from_numpy(extend(tokens)))
            return seen[-1]

        cache.extend = watched  # type: ignore[method-assign]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kbit.engine.generate.PREFILL_CHUNK", chunk)
            result = generate(model.decoder, model.tokenizer, ids, max_tokens=8, prompt_cache=cache).run()
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


class TestLongRope:
    """Phi-3's two sets of frequencies: where a text passes the original length (32), its keys are turned anew, once."""

    @pytest.fixture(params=["reference", "native"])
    def model(self, request: pytest.FixtureRequest, published: Callable[[str], Path]) -> Any:
        from kbit.engine.loader import load_model

        precise = {"compute": "fp32", "kv_bits": "32"} if request.param == "native" else {}
        return load_model(str(published("phi3-longrope")), "cpu", backend=request.param, **precise)

    @pytest.mark.usefixtures("one_thread")
    @pytest.mark.parametrize("length", [11, 32, 33, 40])
    def test_text_is_that_of_transformers(self, model: Any, length: int) -> None:
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(model.name, dtype=torch.float32)
        ids = [(7 * index) % 251 for index in range(length)]
        prompt = torch.tensor([ids])
        expected = theirs.generate(
            prompt, max_new_tokens=23, do_sample=False, attention_mask=torch.ones_like(prompt), eos_token_id=None
        )
        found = generate(model.decoder, model.tokenizer, ids, SamplingParams(temperature=0), max_tokens=23).run()
        assert list(found.ids) == expected[0, length:].tolist()

    def test_a_later_prompt_starts_where_it_may(self, model: Any) -> None:
        """What was kept for a long text is of no use to a short one, nor the other way round."""
        cache, greedy = PromptCache(model.decoder), SamplingParams(temperature=0)
        ids = [(5 * index) % 251 for index in range(45)]
        for length in (10, 45, 12, 30, 31):
            kept = generate(
                model.decoder, model.tokenizer, ids[:length], greedy, max_tokens=6, prompt_cache=cache
            ).run()
            fresh = generate(model.decoder, model.tokenizer, ids[:length], greedy, max_tokens=6).run()
            assert kept.ids == fresh.ids


class TestRealModels:
    def test_novels_continue_a_sentence(self, novels_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from kbit.engine.loader import load_model

        loaded = load_model(novels_folder, "cpu")
        ids = loaded.tokenizer.encode("The old man looked at her and")
        result = generate(loaded.decoder, loaded.tokenizer, ids, max_tokens=40).run()
        # Chunked prefill, a cache that is reused, and no cache must not change greedy tokens.
        cache = PromptCache(loaded.decoder)
        monkeypatch.setattr("kbit.engine.generate.PREFILL_CHUNK", 3)
        for _ in range(2):
            again = generate(loaded.decoder, loaded.tokenizer, ids, max_tokens=40, prompt_cache=cache).run()
            assert again.ids == result.ids
        assert again.cached_tokens == len(ids) - 1
        assert result.text == loaded.tokenizer.decode([*ids, *result.ids])[len(loaded.tokenizer.decode(ids)) :]
        assert result.completion_tokens == 40

    def test_capital_of_france(self, smollm2_gguf: Path) -> None:
        from kbit.engine.loader import load_model

        # In fp32: int8 turns the answer's first token, a near tie, the other way.
        loaded = load_model(str(smollm2_gguf), "cpu", compute="fp32")
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
