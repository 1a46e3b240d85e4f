"""Drafters and decoders that the tests of speculative decoding share."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from generation_cases import byte_tokenizer, rows_of

from kbit.engine.generate import Generation, GenerationResult, generate
from kbit.engine.sampler import Guess, Sampler, SamplingParams
from kbit.engine.speculative import Speculation

TOKENIZER = byte_tokenizer()
A = TOKENIZER.encode("a")[0]  # the letters follow one another


def next_after(history: list[int], letters: int = 6) -> int:
    """A text without end that repeats itself now and then."""
    return A + (7 * history[-1] + 3 * history[-2 % len(history)] + len(history) // 5) % letters


def chaotic(history: list[int]) -> torch.Tensor:
    """Logits (257,) that depend on the last two tokens; twelve tokens are likely."""
    logits = torch.full((257,), -20.0)
    generator = torch.Generator().manual_seed(sum(256**i * t for i, t in enumerate(history[-2:])))
    logits[A : A + 12] = 2 * torch.randn(12, generator=generator)
    return logits


class FixedDrafter:
    """Guesses whatever a function of the text says."""

    name = "fixed"
    context = None

    def __init__(self, guess: Callable[[list[int]], Sequence[int]]) -> None:
        self.guess = guess

    def start(self, prompt_ids: Sequence[int], *, room: int, end_ids: Collection[int], vocab_size: int) -> None:
        pass

    def propose(self, text: Sequence[int], most: int, sampler: Sampler) -> list[Guess]:
        return [(token, None) for token in self.guess(list(text))[:most]]


class TokenByToken:
    """A decoder that computes the tokens of a pass behind the prompt one after the other.

    The reference backend's products round differently for one row than for several, so the texts of two ways of cutting
    may part where two tokens are equally good to the last bits. Here every way of cutting has the same logits.
    """

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder
        self.spec = decoder.spec
        self.new_cache = decoder.new_cache

    def extend(self, ids: Sequence[int], cache: Any, last_only: bool = True) -> Any:
        return rows_of(self.forward(torch.tensor([ids], dtype=torch.int64), cache, last_only=last_only))

    def forward(
        self, ids: torch.Tensor, cache: Any, lengths: torch.Tensor | None = None, last_only: bool = False
    ) -> torch.Tensor:
        assert lengths is None
        if int(cache.lengths[0]) == 0:  # the prompt, which every way of decoding computes in one pass
            return torch.as_tensor(self.decoder.forward(ids, cache, last_only=last_only))
        rows = [self.decoder.forward(token[:, None], cache, last_only=True) for token in ids.unbind(1)]
        return rows[-1] if last_only else torch.cat(rows, dim=1)


def both(
    make: Callable[[], Any],
    tokenizer: Any,
    prompt: Sequence[int],
    speculation: Speculation,
    params: SamplingParams | None = None,
    plain: GenerationResult | None = None,
    **options: Any,
) -> tuple[GenerationResult, GenerationResult]:
    """The same generation without and with speculation, each on a decoder of its own making; asserts that they agree in
    everything a user sees. `plain`: the one without, where it is known from before."""

    def started(speculation: Speculation | None) -> Generation:
        return generate(make(), tokenizer, prompt, params, speculation=speculation, **options)

    plain, sped = plain or started(None).run(), started(speculation).run()
    assert sped.ids == plain.ids
    assert (sped.text, sped.finish_reason, sped.prompt_tokens) == (plain.text, plain.finish_reason, plain.prompt_tokens)
    assert plain.speculation is None
    assert sped.speculation is not None
    assert sped.speculation.accepted <= sped.speculation.drafted
    return plain, sped


def guesser(rule: Callable[[list[int]], int], right: float, count: int = 20) -> FixedDrafter:
    """A drafter that continues a text by the model's own rule, each token right with probability `right`."""
    chance = random.Random(1)

    def guess(text: list[int]) -> list[int]:
        ids = list(text)
        for _ in range(count):
            ids.append(rule(ids) if chance.random() < right else A + 1)
        return ids[len(text) :]

    return FixedDrafter(guess)
