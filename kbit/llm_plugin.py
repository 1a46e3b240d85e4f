"""kbit's models in the program `llm` (https://llm.datasette.io), which finds this module by its entry point.

    pip install llm .
    llm -m kbit/smollm2-135m-instruct "What is the capital of France?"

docs/recipes.md has the rest. Models load when they are first asked, and the last one asked stays.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llm
from pydantic import Field

from kbit.host.errors import KbitError, UnsupportedError

if TYPE_CHECKING:
    from kbit.api.model import Model
    from kbit.api.results import Settings

if not hasattr(llm, "Message"):
    raise UnsupportedError("kbit's models need llm 0.32 or later, and this is an older one: pip install 'llm>=0.32'")

MAX_TOKENS = 512  # as in `kbit chat`


class KbitModel(llm.Model):  # type: ignore[misc]  # (what llm has of types is not checked here)
    """One of this machine's models, for llm.

    Args:
        name: what follows "kbit/" in its name.
        model: what `kbit.load` takes for it.
    """

    can_stream = True

    class Options(llm.Options):  # type: ignore[misc]
        """What `llm -o NAME VALUE` sets."""

        temperature: float | None = Field(
            None, description="0 always takes the most probable token; unless given, as the model's authors recommend."
        )
        top_p: float | None = Field(
            None, description="Keep the fewest tokens whose probabilities reach this; 1 keeps all."
        )
        seed: int | None = Field(None, description="The same request with a seed gets the same answer.")
        max_tokens: int = Field(MAX_TOKENS, description="Most tokens to generate.")

    def __init__(self, name: str, model: str) -> None:
        self.model_id = f"kbit/{name}"
        self._model = model

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
        """The answer to a conversation, in pieces where they are wanted.

        Args:
            prompt: llm's Prompt; its messages are those of the whole conversation.
            stream: whether to yield pieces as they come.
            response: llm's Response, which is told the tokens used.
            conversation: llm's own record of it: not needed.

        Raises:
            KbitError and its kinds: as `kbit.load` and `Model.chat`, and for parts that are no text. (Tools and schemas
                llm itself refuses.)
        """
        messages = [_message(message) for message in prompt.messages]
        model = _loaded(self._model)  # (held until the answer is there, should another model take its place)
        with model.stream_chat(messages, **_settings(prompt.options, model)) as pieces:
            if stream:
                yield from pieces
            else:
                yield pieces.finish().text
            done = pieces.result
        response.set_usage(input=done.prompt_tokens, output=done.completion_tokens)
        response.response_json = {"finish_reason": done.finish_reason, "seed": done.seed}


def _message(message: Any) -> dict[str, Any]:
    """kbit's form of an llm.Message."""
    texts = []
    for part in message.parts:
        if not isinstance(getattr(part, "text", None), str):
            raise UnsupportedError(f"a message has a {type(part).__name__}: kbit's models in llm read texts only")
        texts.append(part.text)
    return {"role": message.role, "content": "".join(texts)}


def _settings(options: Any, model: Model) -> Settings:
    """As `kbit serve` has them: a request that names a temperature gets that, without the other defaults."""
    given: Settings = {"max_tokens": options.max_tokens, "seed": options.seed}
    if options.temperature is not None:
        given["temperature"] = options.temperature
    else:
        given = {**model.recommended, **given}
    if options.top_p is not None:
        given["top_p"] = options.top_p
    return given


_kept: tuple[str, Model] | None = None
_loading = threading.Lock()


def _loaded(name: str) -> Model:
    """A model, which takes the place of the one before it: that one goes with its last answer."""
    global _kept
    from kbit.api.model import load

    with _loading:
        if _kept is None or _kept[0] != name:
            _kept = None  # before the next one needs memory
            _kept = (name, load(name))
        return _kept[1]


def local_names() -> dict[str, str]:
    """{name in llm: what `kbit.load` takes} of what `kbit list` finds and `kbit pull --list` shows."""
    from kbit.checkpoint.local_models import local_models
    from kbit.checkpoint.pull import CATALOGUE

    found = {name: name for name in CATALOGUE}
    for folders in ([Path()], []):
        try:
            for model in local_models(folders):
                # (Absolute: folders of rounded models in the cache, of which the last part tells enough.)
                name = model.path.name if Path(model.name).is_absolute() else model.name
                found.setdefault(name, model.name if model.place == "hub" else str(model.path.resolve()))
            break
        except KbitError:  # the current folder cannot be read: llm's other models must not suffer
            continue
    return found


@llm.hookimpl  # type: ignore[untyped-decorator,unused-ignore]
def register_models(register: Callable[[Any], None]) -> None:
    """Called by llm, at every start: opens no model."""
    for name, model in local_names().items():
        register(KbitModel(name, model))
