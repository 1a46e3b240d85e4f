"""A conversation with a model: messages in turns, and a prompt cache that makes each turn cost only what is new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kbit.engine.chat import Message, render_chat
from kbit.engine.generate import Generation, GenerationResult, generate
from kbit.engine.prompt_cache import DecoderLike, PromptCache
from kbit.engine.sampler import SamplingParams
from kbit.engine.speculative import Speculation
from kbit.host.errors import UsageError

if TYPE_CHECKING:
    from kbit.text.tokenizer import Tokenizer


def require_template(tokenizer: Tokenizer, model: str) -> str:
    """The model's chat template.

    Raises:
        UsageError: it has none, or several and no default.
    """
    if tokenizer.chat_template is None:
        names = ", ".join(tokenizer.chat_templates)
        has = f"has chat templates named {names} and no default" if names else "has no chat template"
        raise UsageError(f"{model}: the model {has}; `kbit run` without --chat continues a text")
    return tokenizer.chat_template


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Message], model: str) -> list[int]:
    """Token ids of a conversation in the model's chat template, up to the answer to come.

    Raises:
        UsageError: the model has no chat template, or its template refuses the messages.
        CheckpointError: the template is broken.
    """
    template = require_template(tokenizer, model)
    text = render_chat(template, messages, special_tokens=tokenizer.special_tokens)
    return tokenizer.encode(text, add_special_tokens=False)


class Conversation:
    """Turns of user and assistant.

    The whole conversation is rendered anew for every turn, since templates may change earlier turns; the tokens it
    shares with the last turn's are still in the cache and are not computed again.

    Args:
        decoder: the model.
        tokenizer: its tokenizer.
        model: what to call it in messages.
        system: text of a system message, or None for the template's own.
        speculation: who drafts the answers, or None.

    Raises:
        UsageError: the model has no chat template.
    """

    def __init__(
        self,
        decoder: DecoderLike,
        tokenizer: Tokenizer,
        model: str,
        system: str | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._model = model
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._messages: list[Message] = list(self._system)
        self._speculation = speculation
        self._cache = PromptCache(decoder)
        self._turns = 0
        require_template(tokenizer, model)

    @property
    def messages(self) -> list[Message]:
        """All that was said, the system message first."""
        return list(self._messages)

    @property
    def system(self) -> str | None:
        """Text of the system message, or None where there is none but the template's own."""
        return self._system[0]["content"] if self._system else None

    def instruct(self, system: str | None) -> None:
        """Gives it another system message, or none; what was said stays, and is read again below it."""
        said = self._messages[len(self._system) :]
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._messages = [*self._system, *said]

    def hand_over(
        self, decoder: DecoderLike, tokenizer: Tokenizer, model: str, speculation: Speculation | None = None
    ) -> None:
        """Goes on with another model, which reads all that was said with the next message.

        Args:
            decoder, tokenizer, model, speculation: as when it was made.

        Raises:
            UsageError: the model has no chat template; the conversation is unchanged.
        """
        require_template(tokenizer, model)
        self._tokenizer, self._model, self._speculation = tokenizer, model, speculation
        self.use(decoder)

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self._messages = list(self._system)

    def use(self, decoder: DecoderLike) -> None:
        """Goes on with another width of the model.

        Its keys and values are others, so the conversation goes through it once, with the next message: every answer is
        then the one that this width would have given from the beginning.
        """
        if decoder is not self._decoder:
            self._decoder = decoder
            self._cache = PromptCache(decoder)

    def reply(
        self,
        text: str,
        params: SamplingParams,
        *,
        max_tokens: int = 512,
        stop: Sequence[str] = (),
        stop_repetition: bool = False,
    ) -> Generation:
        """Starts the answer to a user's message; call `add` with both once it is over.

        With a seed, each turn gets its own (seed + number of the turn), so that equal situations do not get equal
        random numbers and the conversation as a whole is still repeatable.

        Raises:
            UsageError: the conversation leaves no room in the model's context. It is unchanged then.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        ids = chat_prompt(self._tokenizer, messages, self._model)
        context = self._decoder.spec.max_positions
        if len(ids) >= context:
            raise UsageError(
                f"the conversation has {len(ids)} tokens with this message and the model's context is {context}: "
                "shorten the message, or forget the earlier ones (/reset)"
            )
        if params.seed is not None:
            params = replace(params, seed=(params.seed + self._turns) % 2**63)
        return generate(
            self._decoder,
            self._tokenizer,
            ids,
            params,
            max_tokens=max_tokens,
            stop=stop,
            continues_prompt=False,
            prompt_cache=self._cache,
            speculation=self._speculation,
            stop_repetition=stop_repetition,
        )

    def add(self, text: str, result: GenerationResult) -> None:
        """Takes a turn into the conversation: the user's message and the answer, also a cut one."""
        self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": result.text}]
        self._turns += 1
