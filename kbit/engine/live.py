"""What a batch engine works on, and what it has done: requests under way, counters."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from kbit.engine.answers import Choice, Request, TokenInfo, Usage
from kbit.host.errors import UsageError

if TYPE_CHECKING:
    from kbit.text.tokenizer import Tokenizer


class TooLongError(UsageError):
    """A prompt that the context has no room for.

    Attributes:
        tokens, context: the length of both.
    """

    def __init__(self, tokens: int, context: int) -> None:
        super().__init__(
            f"the prompt has {tokens} tokens, which exceeds the available context size of {context}, answer included: "
            "shorten the prompt"
        )
        self.tokens, self.context = tokens, context


class Live:
    """A request that an engine works on.

    Args:
        request: what to generate.
        tokenizer: the model's.

    Attributes:
        request: as given.
        choices: its answers, of which all but the first begin when the prompt has been read.
        arrived, begun, first_token: when it came, when its first token went through the model, and when the first of
            its answer was chosen, by the clock `time.perf_counter`; None: not yet.
        cached: tokens of the prompt that were in the cache.
        told: how many had been read when `Progress` was last told.
        scored: what is known of the prompt's tokens so far.

    Raises:
        UsageError: a stop string is empty.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request = request
        self.choices = [Choice(request, index, tokenizer) for index in range(max(1, request.choices))]
        self.arrived = perf_counter()
        self.begun: float | None = None
        self.first_token: float | None = None
        self.cached = self.told = 0
        self.scored: list[TokenInfo] = [TokenInfo(request.prompt[0])]

    @property
    def usage(self) -> Usage:
        """What it took so far."""
        now = perf_counter()
        return Usage(
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.cached,
            completion_tokens=sum(len(choice.ids) for choice in self.choices),
            queue_seconds=(self.begun or now) - self.arrived,
            first_token_seconds=None if self.first_token is None else self.first_token - self.arrived,
            seconds=now - self.arrived,
        )


@dataclass
class Counters:
    """What an engine has done since it started.

    Attributes:
        steps: passes.
        sequences: of all passes.
        prompt_tokens, cached_tokens: of the requests that have begun; the latter are part of the former.
        computed_tokens: that went through the model, those computed again included.
        generated_tokens: that were chosen.
        step_seconds: in passes.
        drafts: how often some were guessed for an answer.
        drafted_tokens, accepted_tokens: guesses that were checked, and those of them that became tokens of answers.
    """

    steps: int = 0
    sequences: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    step_seconds: float = 0.0
    drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
