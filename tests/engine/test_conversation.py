"""Conversations: turns that see each other, overflow, seeds, and models without a chat template."""

from __future__ import annotations

import pytest
import torch
from generation_cases import CHATML, FakeDecoder, byte_tokenizer

from kbit.engine.conversation import Conversation
from kbit.engine.sampler import SamplingParams
from kbit.host.errors import UsageError


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
