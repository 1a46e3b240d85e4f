"""The models that are served: by name, loaded when they are first asked for."""

from __future__ import annotations

import asyncio
import gc
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakSet

from kbit.checkpoint.readers.lora_file import check_adapter
from kbit.engine.batch_engine import BatchEngine
from kbit.engine.scheduler import BATCH_TOKENS
from kbit.host.errors import KbitError, UsageError
from kbit.host.memory import available_memory
from kbit.serve.errors import ApiError
from kbit.serve.loading import LoadPlan, load, plan_load, planned_bytes, put_beside

if TYPE_CHECKING:
    from kbit.engine.embed import Embedder
    from kbit.engine.loader import LoadedModel
    from kbit.engine.sampling_defaults import SamplingDefaults
    from kbit.graph.backend import Backend
    from kbit.serve.grammar import GrammarCompiler
    from kbit.text.tokenizer import Tokenizer

State = Literal["unloaded", "loading", "ready", "failed"]

_WIDTH = re.compile(r"(.+):([0-9]{1,3}(?:\.[0-9]{1,6})?)")


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
        memory: bytes that all loaded models may take together, by what is planned of them; None: on the CPU, what is
            free when the server starts.
        speculate: who guesses tokens where few answers are being written: "ngram", "self" or "self:BITS"; None: nobody.
        slot_folder: where slots are saved; None: there are none, and `id_slot` is only a hint.
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
    memory: int | None = None
    speculate: str | None = None
    slot_folder: Path | None = None


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
        adapter: of a LoRA adapter served as a model, its name; then `path` is its folder, and all that is loaded is
            the model's that it is beside.
        plan: what it takes, while it is loaded.
    """

    name: str
    path: str
    bits: float | None = None
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
    adapter: str | None = None
    plan: LoadPlan | None = None

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
        adapters: (name, folder) pairs of LoRA adapters, each served as a model of its own on the first one's weights.

    Attributes:
        options: as given.
        progress: of the model that is being loaded: tensors done, tensors in all.
        evictions: how often a model was let go of for another.

    Raises:
        UsageError: none, or two of one name; a folder that holds no adapter.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, str]],
        options: ModelOptions,
        *,
        any_name: bool = False,
        adapters: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.options = options
        self.progress = (0, 0)
        self.evictions = 0
        self._limit = options.memory
        if self._limit is None and options.backend.name == "native":
            self._limit = available_memory()
        self._loading = asyncio.Lock()
        self._handed: dict[str, WeakSet[ServedModel]] = {}
        self._used: dict[str, float] = {}  # when somebody last asked for it
        self._any_name = any_name
        self._models: dict[str, ServedModel] = {}
        self._aliases: dict[str, ServedModel] = {}
        for names, path in named:
            aliases = tuple(dict.fromkeys(names.split(",")))
            taken = next((name for name in aliases if name in self._aliases), None)
            if taken is not None:
                raise UsageError(f"{taken}: two models have this name: write NAME=MODEL for one of them")
            width = _WIDTH.fullmatch(path)
            model = ServedModel(aliases[0], width[1] if width else path, float(width[2]) if width else None)
            model.aliases = aliases
            self._models[model.name] = model
            self._aliases.update(dict.fromkeys(aliases, model))
        self._adapters: dict[str, ServedModel] = {}
        for name, folder in adapters:
            if name in self._aliases:
                raise UsageError(f"{name}: two models have this name: write --adapter NAME={folder} with another")
            model = ServedModel(name, str(check_adapter(folder)), aliases=(name,), adapter=name)
            self._models[name] = self._adapters[name] = self._aliases[name] = model
        if not named:
            raise UsageError("there is no model to serve: name one")

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def with_engines(self) -> list[tuple[ServedModel, BatchEngine]]:
        """Those that are loaded and generate text, each engine once."""
        return [(model, model.engine) for model in self if model.engine is not None and model.adapter is None]

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
        """The model of a name, which is loaded if need be; others that nobody uses may make room for it.

        Returns:
            What is loaded of it now. It is not let go of while somebody holds this.

        Raises:
            ApiError: there is none, or no memory for it now.
            KbitError: it cannot be loaded.
        """
        model = self.named(name)
        base = model if model.adapter is None else self.first
        async with base.lock:
            if base.state == "failed" and base.error is not None:
                raise base.error
            if base.state != "ready":
                base.state = "loading"
                try:
                    await self._load(base)
                except KbitError as error:
                    base.state, base.error = "failed", error
                    raise
                except BaseException:
                    base.state = "unloaded"
                    raise
                base.state = "ready"
        handed = copy(model)
        self._handed.setdefault(base.name, WeakSet()).add(handed)
        self._used[base.name] = monotonic()
        return handed

    async def _load(self, model: ServedModel) -> None:
        """Loads a model once there is room for it: one at a time, as each counts what the others take.

        Raises:
            ApiError, KbitError: see `ready`.
        """
        beside = self._adapters if model is self.first else {}
        folders = {name: adapter.path for name, adapter in beside.items()}
        async with self._loading:
            plan = await asyncio.to_thread(plan_load, model, self.options, self._limit, folders)
            await self._make_room(model, plan)
            first = model is self.first
            await asyncio.to_thread(load, model, plan, self.options, self._told, folders, first=first)
            model.plan = plan
            for name, adapter in beside.items():
                put_beside(adapter, model, name)

    async def _make_room(self, model: ServedModel, plan: LoadPlan) -> None:
        """Lets go of models that nobody uses, the one that was used longest ago first, until another one fits.

        Raises:
            KbitError: it is too large for the memory there is, and the first.
            ApiError: it is too large, or those that are in use leave no room for it.
        """
        if self._limit is None:
            return
        needed = max(planned_bytes([plan]), plan.loading)
        limit = f"{self._limit / 1e6:.0f} MB that there are for models (--memory)"
        if needed > self._limit:
            text = (
                f"{model.name} needs {needed / 1e6:.0f} MB, of which keys and values {(plan.cache or 0) / 1e6:.0f}, "
                f"more than the {limit}: give more, or a smaller --cache-size or --parallel"
            )
            if model is self.first:
                raise KbitError(text)
            raise ApiError(503, text, code="model_too_large", param="model")
        while True:
            loaded = {each.name: each.plan for each in self if each.plan is not None}
            taken = planned_bytes(list(loaded.values()))
            # What a rung of the same file has in memory is not loaded again.
            there = max((each.weights for each in loaded.values() if each.path == plan.path), default=0)
            loading = max(0, plan.loading - there)
            if max(planned_bytes([*loaded.values(), plan]), taken + loading) <= self._limit:
                return
            idle = [name for name in loaded if self._idle(self._models[name])]
            if not idle:
                raise ApiError(
                    503,
                    f"{model.name} needs {needed / 1e6:.0f} MB; {', '.join(loaded)}, which requests use, have "
                    f"{taken / 1e6:.0f} MB of the {limit}: try again when they are done",
                    param="model", code="no_memory", headers={"Retry-After": "10"},
                )  # fmt: skip
            self._let_go(self._models[min(idle, key=lambda name: self._used.get(name, 0.0))])
            await asyncio.to_thread(gc.collect)

    def _idle(self, model: ServedModel) -> bool:
        """Whether no request has a model, or is about to."""
        if model.state != "ready" or model.lock.locked() or (model.engine is not None and len(model.engine)):
            return False
        if self._handed.get(model.name):
            gc.collect()  # what was held by a request that is over, by way of its error
        return not self._handed.get(model.name)

    def _let_go(self, model: ServedModel) -> None:
        beside = self._adapters.values() if model is self.first else ()
        for each in (model, *beside):
            each.loaded = each.engine = each.defaults = each.grammars = each.embedder = each.plan = None
            each.state = "unloaded"
        self.evictions += 1

    def _told(self, done: int, total: int) -> None:
        self.progress = done, total


def served_adapter(adapter: str) -> tuple[str, str]:
    """(name, folder) of NAME=FOLDER.

    Raises:
        UsageError: it is written in another way.
    """
    name, equals, folder = adapter.partition("=")
    if not equals or not folder or not re.fullmatch(r"[\w.:-]+", name):
        raise UsageError(f"--adapter {adapter}: write NAME=FOLDER, the name that clients say and the adapter's folder")
    return name, folder


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
