"""The models that are served: by name, loaded when they are first asked for."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

from kbit.api.batching import batch_engine
from kbit.engine.batch_engine import BatchEngine
from kbit.engine.sampling_defaults import SamplingDefaults, sampling_defaults
from kbit.engine.scheduler import BATCH_TOKENS
from kbit.host.errors import KbitError, UsageError
from kbit.serve.errors import ApiError

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource
    from kbit.engine.embed import Embedder
    from kbit.engine.loader import LoadedModel
    from kbit.graph.backend import Backend
    from kbit.serve.grammar import GrammarCompiler
    from kbit.text.tokenizer import Tokenizer

State = Literal["unloaded", "loading", "ready", "failed"]

_WIDTH = re.compile(r"(.+):([2-8])")


@dataclass(frozen=True)
class ModelOptions:
    """How models are run.

    Attributes:
        backend: who computes, for all of them.
        context: tokens of a prompt and its answer at most; None: what model and cache allow.
        cache_bytes: memory for keys and values of each model; None: see above.
        seats: sequences that are computed at once.
        sampling: settings of `SamplingParams`, the seed among them, where neither the request nor anything else says.
        max_tokens: of an answer, where the request does not say; None: as the route has it.
        chat_template: in place of the models' own.
        reasoning: whether models think before they answer, where their templates can say so; "auto": as these do.
        template_variables: for chat templates, where a request does not say (`chat_template_kwargs`).
        tags: words that clients choose models by.
        batch_tokens: most tokens of a pass.
        verbose: answers to chats tell the prompt that the model was given.
    """

    backend: Backend
    context: int | None = None
    cache_bytes: int | None = None
    seats: int = 64
    sampling: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    chat_template: str | None = None
    reasoning: Literal["auto", "on", "off"] = "auto"
    verbose: bool = False
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    tags: Sequence[str] = ()
    batch_tokens: int = BATCH_TOKENS


@dataclass(eq=False)
class ServedModel:
    """A model, loaded or not.

    Attributes:
        name: what clients call it.
        path: what `load_model` is given.
        aliases: all names that clients may call it, `name` among them.
        bits: of weights it is read at or rounded to when it is loaded; None: it stays as it is.
        created: when it was registered, in seconds since 1970.
        state: how far it is.
        error: why it could not be loaded.
        loaded, engine, defaults, grammars: of a model that generates.
        embedder: of one that makes vectors.
        fingerprint: a short name for all that its answers depend on besides requests: files, backend, kbit's version.
        lock: held while it is loaded, and while it makes vectors.
        options: how it was loaded.
    """

    name: str
    path: str
    bits: int | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    aliases: tuple[str, ...] = ()
    state: State = "unloaded"
    error: Exception | None = None
    loaded: LoadedModel | None = None
    engine: BatchEngine | None = None
    defaults: SamplingDefaults | None = None
    grammars: GrammarCompiler | None = None
    embedder: Embedder | None = None
    fingerprint: str = ""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    options: ModelOptions | None = None

    def most_tokens(self, asked: int | None, usual: int | None = None) -> int:
        """Tokens of an answer at most: as asked, else as the command line says, else as is usual, else what fits."""
        said = None if self.options is None else self.options.max_tokens
        for each in (asked, said, usual):
            if each is not None:
                return each
        return self.generating().context

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer.

        Raises:
            ApiError: it has none of this kind.
        """
        self.generating()
        assert self.loaded is not None
        return self.loaded.tokenizer

    def generating(self) -> BatchEngine:
        """Its engine.

        Raises:
            ApiError: it does not generate text.
        """
        if self.engine is None:
            raise ApiError(
                400,
                f"the model {self.name} makes vectors, not text: use /v1/embeddings",
                param="model",
                code="wrong_model",
            )
        return self.engine

    def embedding(self) -> Embedder:
        """What makes its vectors.

        Raises:
            ApiError: it makes none.
        """
        if self.embedder is None:
            raise ApiError(
                400,
                f"the model {self.name} is no embedding model: serve an encoder, such as all-MiniLM-L6-v2",
                param="model",
                code="wrong_model",
            )
        return self.embedder


class Models:
    """All models of a server.

    Args:
        named: (name, model as a user writes it) pairs, the first of which answers where no model is named. A model
            may have several names, with commas between.
        options: how they are run.
        any_name: a name that none has stands for the first.

    Attributes:
        options: as given.
        progress: of the model that is being loaded: tensors done, tensors in all.

    Raises:
        UsageError: none, or two of one name.
    """

    def __init__(self, named: Sequence[tuple[str, str]], options: ModelOptions, *, any_name: bool = False) -> None:
        self.options = options
        self.progress = (0, 0)
        self._any_name = any_name
        self._models: dict[str, ServedModel] = {}
        self._aliases: dict[str, ServedModel] = {}
        for names, path in named:
            aliases = tuple(dict.fromkeys(names.split(",")))
            taken = next((name for name in aliases if name in self._aliases), None)
            if taken is not None:
                raise UsageError(f"{taken}: two models have this name: write NAME=MODEL for one of them")
            width = _WIDTH.fullmatch(path)
            model = ServedModel(aliases[0], width[1] if width else path, int(width[2]) if width else None)
            model.aliases = aliases
            self._models[model.name] = model
            self._aliases.update(dict.fromkeys(aliases, model))
        if not self._models:
            raise UsageError("there is no model to serve: name one")

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    @property
    def first(self) -> ServedModel:
        """The one that answers where none is named."""
        return next(iter(self._models.values()))

    def named(self, name: str | None) -> ServedModel:
        """The model of a name, loaded or not.

        Raises:
            ApiError: there is none.
        """
        if not name:
            return self.first
        found = self._aliases.get(name)
        if found is None and self._any_name:
            return self.first
        if found is None:
            known = ", ".join(self._aliases)
            raise ApiError(
                404, f"there is no model {name[:200]!r}: this server has {known}", param="model", code="model_not_found"
            )
        return found

    async def ready(self, name: str | None) -> ServedModel:
        """The model of a name, which is loaded if need be.

        Raises:
            ApiError: there is none.
            KbitError: it cannot be loaded.
        """
        model = self.named(name)
        async with model.lock:
            if model.state == "failed" and model.error is not None:
                raise model.error
            if model.state != "ready":
                model.state = "loading"
                try:
                    await asyncio.to_thread(load, model, self.options, self._told)
                except KbitError as error:
                    model.state, model.error = "failed", error
                    raise
                except BaseException:
                    model.state = "unloaded"
                    raise
                model.state = "ready"
        return model

    def _told(self, done: int, total: int) -> None:
        self.progress = done, total


def load(model: ServedModel, options: ModelOptions, progress: Callable[[int, int], None] | None = None) -> None:
    """Loads a model. Not on the event loop: it takes a while.

    Args:
        model: which.
        options: how.
        progress: see `load_model`.

    Raises:
        KbitError: it cannot be.
    """
    from kbit.models.families import spec_from_config
    from kbit.models.opening import open_model
    from kbit.quantizers.widths import at_width

    path, bits = (model.path, None) if model.bits is None else at_width(model.path, model.bits)
    with open_model(path, bits) as source:
        model.fingerprint = _fingerprint(source, options)
        spec = spec_from_config(source.config, where=f"config of {source.path}")
        if not spec.continues_text and spec.encoder is None:
            from kbit.engine.embed import Embedder

            model.embedder = Embedder(source, options.backend)
            return
    from kbit.engine.loader import load_model

    def note(tokenizer: Tokenizer, source: CheckpointSource) -> None:
        found = sampling_defaults(source, model.path)
        if options.sampling:
            params = replace(found.params, **options.sampling)
            found = SamplingDefaults(params, f"{found.origin}, and what the command line says")
        model.defaults = found
        _refuse_too_large(model, options, source)

    loaded = load_model(path, backend=options.backend, bits=bits, check=note, progress=progress)
    if options.chat_template is not None:
        loaded.tokenizer.chat_templates = {"default": options.chat_template}
    from kbit.serve.grammar import GrammarCompiler

    model.loaded, model.options = loaded, options
    model.grammars = GrammarCompiler(loaded.tokenizer, loaded.decoder.spec.vocab_size)
    model.engine = batch_engine(
        loaded,
        context=options.context,
        cache_bytes=options.cache_bytes,
        seats=options.seats,
        batch_tokens=options.batch_tokens,
    )


def _refuse_too_large(model: ServedModel, options: ModelOptions, source: CheckpointSource) -> None:
    """Ends what a limit leaves no memory for, before weights are read.

    Raises:
        KbitError: a limit leaves this process less than the model takes, with the cache that was asked for; where none
            was asked for, it will take a part of what is left.
    """
    backend = options.backend
    if backend.name != "native":
        return
    from kbit.backends.cpu.backend import NativeBackend
    from kbit.planner.fits import Wanted, refuse_what_does_not_fit

    assert isinstance(backend, NativeBackend)
    wanted = Wanted(
        1, batch=options.seats, kv=backend.kv.partition(",")[0], compute=backend.compute,
        threads=backend.context.threads, cache=options.cache_bytes or 0,
    )  # fmt: skip
    refuse_what_does_not_fit(source, wanted, model.path)


def _fingerprint(source: CheckpointSource, options: ModelOptions) -> str:
    from kbit import __version__

    words = [__version__, options.backend.name, options.backend.describe(), source.fingerprint()]
    return blake2b("\n".join(words).encode(), digest_size=6).hexdigest()


def served_name(model: str) -> tuple[str, str]:
    """(name, model) of an argument: NAME=MODEL, NAME,NAME=MODEL, or a MODEL whose name is the last part of it.

    Raises:
        UsageError: one of them is empty.
    """
    name, equals, path = model.partition("=")
    if equals and re.fullmatch(r"[\w.:-]+(,[\w.:-]+)*", name):
        if not path:
            raise UsageError(f"{model}: there is no model after the =")
        return name, path
    last = re.split(r"[/\\]", model.rstrip("/\\"))[-1]
    name = last.removesuffix(".gguf")
    if not name.strip(". "):
        raise UsageError(f"{model}: a name for clients does not show in this: write NAME=MODEL")
    return name, model
