"""What a model answers to a Python program, and how it is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from kbit.engine.answers import Finish


class Settings(TypedDict, total=False):
    """How to generate; what is left out is as with `kbit run`: greedy.

    Attributes:
        max_tokens: most tokens to generate; 128 unless given.
        temperature: 0 always takes the most probable token.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the fewest tokens whose probabilities reach this; 1 keeps all.
        min_p: keep tokens at least this fraction as probable as the best; 0 keeps all.
        repetition_penalty: weakens tokens seen in prompt or answer; 1 is off.
        presence_penalty: subtracted from the logits of tokens in the answer.
        frequency_penalty: subtracted for every time a token is in the answer.
        logit_bias: added to the logits of these tokens.
        seed: makes sampling repeatable; None draws a fresh one, which the answer names.
        stop: text, or several, that ends the answer before it appears.
        logprobs: name so many alternatives at each token, with log-probabilities; 0: only the token's own.
        allow_repetition: do not end an answer that has come to only repeat itself.
        adapter: name of one of the LoRA adapters that the model was loaded with; None: the model as it is.
    """

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: str | Sequence[str]
    logprobs: int | None
    allow_repetition: bool
    adapter: str | None


@dataclass(frozen=True)
class Token:
    """A token of a prompt or an answer.

    Attributes:
        id: in the model's vocabulary.
        text: what it stands for; of a part of a character "bytes:\\xe2\\x80".
        logprob: its log-probability in nats by the model's own logits; None: not asked for, or the first of a prompt.
        top: (token id, text, log-probability) of the most probable ones, the best first.
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """An answer, or the text that goes on with a prompt. `str` of it is its text.

    Attributes:
        text: all of it; no stop string, no special tokens.
        tokens: those it consists of, without what ended it.
        finish_reason: "stop" (an end-of-sequence token or a stop string), "length" (`max_tokens`), "context" (the
            model's context is full), "repetition" (it only repeated itself), "cancelled".
        prompt_tokens: of the prompt.
        cached_tokens: those of them that were in the cache, as earlier prompts began alike.
        completion_tokens: that were generated, an end-of-sequence token included.
        seed: what the random numbers were made from; with it the same request gives the same answer.
        first_token_seconds: from the request to its first token; None: there was none.
        seconds: from the request to its end.
    """

    text: str
    tokens: tuple[Token, ...] = field(repr=False)
    finish_reason: Finish
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seed: int
    first_token_seconds: float | None
    seconds: float

    def __str__(self) -> str:
        return self.text
