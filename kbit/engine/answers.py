"""Requests to a batch engine, what it answers, and how far each answer has come."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kbit.engine.answer_text import AnswerText
from kbit.engine.batch_speculation import TextDrafts
from kbit.engine.native_sampler import NativeSampler
from kbit.engine.repetition import only_repeats
from kbit.engine.sampler import Sampler, SamplingParams

if TYPE_CHECKING:
    from kbit.engine.sequence import Sequence
    from kbit.text.tokenizer import Tokenizer

# "stop": an end-of-sequence or stop token, a stop string, or a constraint that allows nothing more; "length":
# max_tokens; "context": the model's context is full; "repetition": the answer only repeated itself; "cancelled": nobody
# waits for it.
Finish = Literal["stop", "length", "context", "repetition", "cancelled"]


class Constraint(Protocol):
    """Which tokens may come next in one answer."""

    def mask(self) -> NDArray[np.bool_]:
        """bool (V,): the tokens that may come next. V is the tokenizer's."""

    def accept(self, token: int) -> None:
        """A token was chosen, one that the mask allows."""

    @property
    def stopped(self) -> bool:
        """The answer is complete, and nothing more may come."""


class ConstraintMaker(Protocol):
    """Makes a constraint for each choice of a request."""

    def __call__(self) -> Constraint:
        """A constraint at its start."""


@dataclass(frozen=True, eq=False)
class Request:
    """What to generate.

    Attributes:
        prompt: token ids, at least 1.
        sampling: how tokens are chosen.
        max_tokens: tokens to generate at most; 0 answers with the prompt's log-probabilities alone.
        choices: how many answers; their random numbers differ.
        stop: strings that end an answer.
        stop_ids: tokens that end one, besides the tokenizer's end-of-sequence tokens.
        ignore_end: end-of-sequence tokens do not end an answer.
        continues_prompt: the text goes on where the prompt ends (`AnswerText`).
        logprobs: how many alternatives to name at each token, with their log-probabilities; 0: only the token's own;
            None: not even that.
        prompt_logprobs: likewise for the tokens of the prompt.
        show_special: special tokens are part of the text.
        constraint: which tokens may come.
        stop_repetition: end an answer that only repeats itself.
        adapter: name of the LoRA adapter that the model has for it; None: the model as it is.
        after_settings: log-probabilities are those that tokens are drawn by, after all settings: of what these leave.
        progress: tell how far the prompt has been read (`Progress`).
        slot: number of the slot whose beginnings it shares (`kbit.engine.slots`); None: those of all without one.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int = 128
    choices: int = 1
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    ignore_end: bool = False
    continues_prompt: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    show_special: bool = False
    constraint: ConstraintMaker | None = None
    stop_repetition: bool = False
    adapter: str | None = None
    after_settings: bool = False
    progress: bool = False
    slot: int | None = None


@dataclass(frozen=True)
class TokenInfo:
    """A token of an answer or a prompt.

    Attributes:
        id: the token.
        start: characters of the answer before it.
        logprob: its log-probability in nats by the model's own logits, before any setting (`Request.after_settings`:
            after them); None: not asked for, or unknown (the first of a prompt).
        top: (token, log-probability) of the most probable ones, the best first.
    """

    id: int
    start: int = 0
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """What a request took.

    Attributes:
        prompt_tokens: of the prompt.
        cached_tokens: those of them that were in the cache.
        completion_tokens: of all choices, end-of-sequence tokens included.
        queue_seconds: until its first token went through the model.
        first_token_seconds: from the arrival until the first token was chosen; None: there was none.
        seconds: from the arrival to now.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_seconds: float
    first_token_seconds: float | None
    seconds: float


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        choice: of which.
        text: what can be shown now.
        tokens: those whose text is all shown.
        finish: why the choice ends with this piece, or None.
        stop: the stop string that was found.
    """

    choice: int
    text: str
    tokens: tuple[TokenInfo, ...] = ()
    finish: Finish | None = None
    stop: str | None = None


@dataclass(frozen=True)
class PromptScored:
    """Log-probabilities of the prompt's tokens, the first without one."""

    tokens: tuple[TokenInfo, ...]


@dataclass(frozen=True)
class Progress:
    """How far the prompt has been read; the first says what was in the cache.

    Attributes:
        processed: tokens that have been through the model, those in the cache among them.
        cached: those in the cache.
        total: tokens of the prompt.
        seconds: since its first token went through the model; 0 for the first.
    """

    processed: int
    cached: int
    total: int
    seconds: float


@dataclass(frozen=True)
class Failed:
    """The request could not be answered, for this reason."""

    error: Exception


@dataclass(frozen=True)
class Done:
    """All choices are finished."""

    usage: Usage


Event: TypeAlias = "Piece | PromptScored | Progress | Failed | Done"


class Choice:
    """One answer in the making.

    Args:
        request: to which.
        index: which of the request's answers.
        tokenizer: the model's.

    Attributes:
        request, index: as given.
        sampler: chooses its tokens.
        distribution: says by which probabilities, where the request asks for these.
        constraint: what may come, or None.
        ids: the tokens so far.
        sequence: what the scheduler knows of it, once it has one.
        finish: why it ended, or None.
        drafts: of guesses at its tokens.
    """

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer) -> None:
        self.request = request
        self.index = index
        self.sampler = NativeSampler(request.sampling, request.prompt, choice=index)
        self.distribution: Sampler | None = None
        if request.after_settings and request.logprobs is not None:
            self.distribution = Sampler(request.sampling, request.prompt, index)
        self.constraint = None if request.constraint is None else request.constraint()
        self.ids: list[int] = []
        self.sequence: Sequence | None = None
        self.finish: Finish | None = None
        self.drafts = TextDrafts()
        self._text = AnswerText(
            tokenizer,
            request.prompt if request.continues_prompt else (),
            request.stop,
            show_special=request.show_special,
        )
        self._ends = request.stop_ids if request.ignore_end else request.stop_ids | tokenizer.eos_ids
        self._shown = 0
        self._held: deque[tuple[TokenInfo, int]] = deque()  # with the characters there are up to its end

    def take(self, token: int, info: TokenInfo, room: int) -> Piece:
        """One more token, and what can be shown by that.

        Args:
            token: as chosen.
            info: its log-probabilities.
            room: tokens that the context has room for after this one.
        """
        self.ids.append(token)
        if token in self._ends:
            return self._end("stop", token)
        before = self._text.decoded
        text = self._text.push(token)
        self._held.append((TokenInfo(token, before, info.logprob, info.top), self._text.decoded))
        if self._text.matched is not None or (self.constraint is not None and self.constraint.stopped):
            return self._end("stop", None, text)
        if len(self.ids) >= self.request.max_tokens:
            return self._end("length", None, text)
        if room <= 0:
            return self._end("context", None, text)
        if self.request.stop_repetition and only_repeats(self.ids):
            return self._end("repetition", None, text)
        self._shown += len(text)
        return Piece(self.index, text, self._released(self._shown))

    def cut(self, finish: Finish) -> Piece:
        """Ends it here."""
        return self._end(finish, None)

    def _end(self, finish: Finish, end: int | None, text: str = "") -> Piece:
        text += self._text.finish(end)
        self._shown += len(text)
        if self._text.matched is not None and finish != "cancelled":
            finish = "stop"
        self.finish = finish
        if self._text.matched is None:
            tokens = tuple(info for info, _ in self._held)
        else:
            tokens = tuple(info for info, _ in self._held if info.start < self._shown)
        self._held.clear()
        return Piece(self.index, text, tokens, finish, self._text.matched)

    def _released(self, shown: int) -> tuple[TokenInfo, ...]:
        released = []
        while self._held and self._held[0][1] <= shown:
            released.append(self._held.popleft()[0])
        return tuple(released)
