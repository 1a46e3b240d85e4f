"""Prompt ids to text: prefill, then one token at a time until something says stop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Literal

from kbit.engine.answer_text import AnswerText
from kbit.engine.native_sampler import NativeSampler
from kbit.engine.prompt_cache import DecoderLike, PromptCache, check_prompt
from kbit.engine.repetition import only_repeats
from kbit.engine.sampler import Logits, Sampler, SamplingParams
from kbit.engine.speculative import Speculation, SpeculationReport, SpeculativeTokens
from kbit.host.errors import UsageError

if TYPE_CHECKING:
    from kbit.text.tokenizer import Tokenizer

# Tokens of a prompt that go through the model at once: bounds the memory of activations, (chunk, intermediate size). A
# model whose RoPE depends on the length of the text (dynamic) takes a prompt beyond its max_position_embeddings in one
# piece, and from its beginning.
PREFILL_CHUNK = 512

FinishReason = Literal["stop", "length", "context", "repetition", "interrupted"]


@dataclass(frozen=True)
class GenerationResult:
    """What a generation gave, and how long it took.

    Attributes:
        text: everything that was streamed; no stop string, no special tokens.
        ids: all sampled tokens, an end-of-sequence token included.
        finish_reason: "stop" (end-of-sequence or stop token, or stop string), "length" (max_tokens), "context" (the
            model's context is full), "repetition" (it only repeated itself), "interrupted" (Ctrl-C).
        prompt_tokens: length of the prompt.
        cached_tokens: how many of them were in the prompt cache already and took no time.
        prefill_seconds: from the start to the logits of the prompt's last token.
        time_to_first_token: seconds from the start until the first token was sampled; None if there was none.
        decode_seconds: from the first to the last token.
        seed: what the sampler's generator was seeded with.
        speculation: what drafting did; None without it, or where the prompt was not finished.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    prefill_seconds: float
    time_to_first_token: float | None
    decode_seconds: float
    seed: int
    speculation: SpeculationReport | None = None

    @property
    def completion_tokens(self) -> int:
        """Number of sampled tokens."""
        return len(self.ids)

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Prompt tokens computed per second; None if prefill did not finish."""
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prefill_seconds if self.prefill_seconds > 0 else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens per second after the first one, which belongs to prefill; None with fewer than two tokens."""
        steps = len(self.ids) - 1
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds > 0 else None


def generate(
    decoder: DecoderLike,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    params: SamplingParams | None = None,
    *,
    max_tokens: int = 128,
    stop: Sequence[str] = (),
    stop_token_ids: Collection[int] = (),
    continues_prompt: bool = True,
    prompt_cache: PromptCache | None = None,
    speculation: Speculation | None = None,
    stop_repetition: bool = False,
) -> Generation:
    """Starts a generation; nothing is computed until it is iterated (or `run`).

    Args:
        decoder: the model.
        tokenizer: its tokenizer.
        prompt_ids: at least one token. A lone BOS token is a prompt: it generates unconditionally.
        params: how to choose tokens; greedy by default.
        max_tokens: most tokens to sample, at least 1.
        stop: strings that end the generation; none of their text is shown. They may contain special tokens.
        stop_token_ids: ids that end it, besides the tokenizer's end-of-sequence ids.
        continues_prompt: the text goes on where the prompt ends, so a first word keeps the space before it. False for
            answers that stand on their own (chat).
        prompt_cache: a cache to use and leave filled, for prompts that begin like the last one.
        speculation: who drafts tokens that the model then only checks; None computes one token at a time.
        stop_repetition: end a text that only repeats itself (`only_repeats`).

    Raises:
        UsageError: an empty prompt, one that leaves no room in the model's context or has tokens the model does not
            know, or a limit below 1.
    """
    return Generation(
        decoder,
        tokenizer,
        list(prompt_ids),
        SamplingParams() if params is None else params,
        max_tokens=max_tokens,
        stop=stop,
        stop_token_ids=stop_token_ids,
        continues_prompt=continues_prompt,
        prompt_cache=prompt_cache,
        speculation=speculation,
        stop_repetition=stop_repetition,
    )


class Generation:
    """One running generation: iterate over it for pieces of text as they appear; then read `result`.

    Ctrl-C while the model computes ends the iteration with the text so far and finish_reason "interrupted"; `run` does
    the same for a Ctrl-C in its callback. Made by `generate`.
    """

    def __init__(
        self,
        decoder: DecoderLike,
        tokenizer: Tokenizer,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        max_tokens: int,
        stop: Sequence[str],
        stop_token_ids: Collection[int],
        continues_prompt: bool,
        prompt_cache: PromptCache | None,
        speculation: Speculation | None,
        stop_repetition: bool,
    ) -> None:
        if max_tokens < 1:
            raise UsageError(f"--max-tokens {max_tokens}: expected at least 1")
        check_prompt(prompt_ids, decoder.spec)
        self._context, self._vocab_size = decoder.spec.max_positions, decoder.spec.vocab_size
        self._whole_beyond = decoder.spec.longest_in_pieces
        self._prompt_ids = prompt_ids
        self._max_tokens = max_tokens
        self._end_ids = frozenset(stop_token_ids) | tokenizer.eos_ids
        self._cache = PromptCache(decoder) if prompt_cache is None else prompt_cache
        self._text = AnswerText(tokenizer, prompt_ids if continues_prompt else (), stop)
        self._speculation = speculation
        # Of choice 0, as the batch engine's, so that a seed gives the same there.
        self._sampler = (NativeSampler if speculation is None else Sampler)(params, prompt_ids, choice=0)
        self._stop_repetition = stop_repetition
        self._speculative: SpeculativeTokens | None = None

        self._ids: list[int] = []
        self._shown: list[str] = []
        self._finish_reason: FinishReason | None = None
        self._cached_tokens = 0
        self._prefill_seconds = 0.0
        self._first_token_seconds: float | None = None
        self._last_token_seconds = 0.0
        self._pieces = self._generate()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def run(self, on_text: Callable[[str], object] | None = None) -> GenerationResult:
        """Generates to the end.

        Args:
            on_text: called with each piece of text as it appears.
        """
        try:
            for piece in self:
                if on_text is not None:
                    on_text(piece)
        except KeyboardInterrupt:  # in the callback; the generator catches its own
            self.interrupt()
            for piece in self:
                if on_text is not None:
                    on_text(piece)
        return self.result

    def interrupt(self) -> None:
        """Ends the generation: the next piece, if any, is the text that was held back."""
        self._finish_reason = self._finish_reason or "interrupted"

    @property
    def result(self) -> GenerationResult:
        """The outcome; before the end of the iteration, what there is so far as if interrupted now."""
        first = self._first_token_seconds
        return GenerationResult(
            text="".join(self._shown),
            ids=tuple(self._ids),
            finish_reason=self._finish_reason or "interrupted",
            prompt_tokens=len(self._prompt_ids),
            cached_tokens=self._cached_tokens,
            prefill_seconds=self._prefill_seconds,
            time_to_first_token=first,
            decode_seconds=0.0 if first is None else self._last_token_seconds - first,
            seed=self._sampler.seed,
            speculation=None if self._speculative is None else self._speculative.report,
        )

    def _generate(self) -> Iterator[str]:
        try:
            for token in self._tokens():
                piece = self._text.push(token)
                if piece:
                    self._shown.append(piece)
                    yield piece
                if self._text.matched is not None:
                    self._finish_reason = "stop"
                if self._finish_reason is not None:  # a stop string, or interrupt() while the piece was shown
                    break
        except KeyboardInterrupt:
            self._finish_reason = "interrupted"
        ended = bool(self._ids) and self._ids[-1] in self._end_ids
        rest = self._text.finish(self._ids[-1] if ended else None)
        if self._text.matched is not None and self._finish_reason != "interrupted":
            self._finish_reason = "stop"
        if rest:
            self._shown.append(rest)
            yield rest

    def _tokens(self) -> Iterator[int]:
        """Samples tokens, up to and without one that ends the generation; sets the finish reason at its end."""
        prompt = self._prompt_ids
        start = perf_counter()
        capacity, chunk = min(self._context, len(prompt) + self._max_tokens), PREFILL_CHUNK
        if max(len(prompt), len(self._cache.ids)) > self._whole_beyond:
            # Keys in the cache were rotated for another length than this prompt's: share nothing (a prompt of one token
            # shares none), and leave none behind that a later prompt could not use.
            self._cache.start(prompt[:1], capacity)
        if len(prompt) > self._whole_beyond:
            chunk = len(prompt)
        position = self._cache.start(prompt, capacity)
        self._cached_tokens = position
        for begin in range(position, len(prompt), chunk):
            logits = self._cache.extend(prompt[begin : begin + chunk])
            self._cache.keep()
        self._prefill_seconds = perf_counter() - start
        for token in self._source(logits):
            self._ids.append(token)
            self._last_token_seconds = perf_counter() - start
            if self._first_token_seconds is None:
                self._first_token_seconds = self._last_token_seconds
            if token in self._end_ids:
                self._finish_reason = "stop"
                return
            yield token
            if len(self._ids) >= self._max_tokens:
                self._finish_reason = "length"
                return
            if len(prompt) + len(self._ids) >= self._context:
                self._finish_reason = "context"
                return
            if self._stop_repetition and only_repeats(self._ids):
                self._finish_reason = "repetition"
                return

    def _source(self, logits: Logits) -> Iterator[int]:
        """Tokens for as long as they are asked for, one by one or drafted and checked; logits (V,) are the prompt's."""
        if self._speculation is None or not isinstance(self._sampler, Sampler):
            return plain_tokens(self._cache, self._sampler, logits)
        self._speculative = SpeculativeTokens(
            self._speculation,
            self._cache,
            self._sampler,
            self._prompt_ids,
            room=min(self._max_tokens, self._context - len(self._prompt_ids)),
            end_ids=self._end_ids,
            vocab_size=self._vocab_size,
            one_by_one_from=self._whole_beyond,
        )
        return self._speculative.run(logits)


def plain_tokens(cache: PromptCache, sampler: Sampler | NativeSampler, logits: Logits) -> Iterator[int]:
    """Tokens after a prompt, each from a pass of the model over the one before it, for as long as they are asked for.

    Args:
        cache: with the prompt in it; gets all tokens but the last.
        sampler: chooses them.
        logits: (V,), those after the prompt.
    """
    while True:
        token = sampler.sample(logits)
        yield token
        logits = cache.extend((token,))
