"""A model in a Python program: `kbit.load`."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, TypeAlias, cast, overload

from kbit.api.batching import batch_engine
from kbit.api.calls import AsyncStream, Runner, Stream, named_tokens
from kbit.api.results import Completion, Settings, Token
from kbit.api.settings import request_of
from kbit.engine.answers import Request
from kbit.engine.sampler import SamplingParams
from kbit.engine.sampling_defaults import SamplingDefaults
from kbit.host.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kbit.checkpoint.source import CheckpointSource
    from kbit.engine.chat import Message
    from kbit.engine.embed import Embedder, Embeddings, Long
    from kbit.engine.loader import LoadedModel
    from kbit.text.tokenizer import Tokenizer

# Several (and no Sequence[str], which a single text is as well).
Texts: TypeAlias = "list[str] | tuple[str, ...]"


class Model:
    """A model that is ready: made by `load`.

    Any number of threads and coroutines may use it at once: what they ask for is computed together, as `kbit serve`
    does it, and the answer to a request does not depend on the others.

    Args:
        name: what the user calls it.
        loaded: of a model that goes on with texts.
        defaults: how its authors recommend to sample.
        runner: who answers.
        make_embedder: opens what makes its vectors.
    """

    def __init__(
        self,
        name: str,
        loaded: LoadedModel | None,
        defaults: SamplingDefaults | None,
        runner: Runner | None,
        make_embedder: Callable[[], Embedder],
    ) -> None:
        self.name = name
        self._loaded, self._defaults, self._runner = loaded, defaults, runner
        self._make_embedder = make_embedder
        self._embedder: Embedder | None = None
        self._embedding = threading.Lock()
        self._closed = False
        # (Also at the interpreter's end, before what the thread needs is gone.)
        self._stop: Callable[[], object] = (lambda: None) if runner is None else weakref.finalize(self, runner.stop)

    def __repr__(self) -> str:
        return f"<kbit.Model {self.name}: {self.description}>"

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Model:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Ends the engine's thread, and lets go of the weights; requests that are not answered fail."""
        self._closed = True
        self._stop()
        self._loaded = self._runner = self._embedder = None

    @property
    def description(self) -> str:
        """What computes, and how, for people."""
        if self._loaded is None:
            return "closed" if self._closed else "an encoder"
        return self._loaded.backend_description

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer: `encode` and `decode`.

        Raises:
            UnsupportedError: the model does not go on with texts.
        """
        return self._generating()[0].tokenizer

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together.

        Raises:
            UnsupportedError: the model does not go on with texts.
        """
        return self._generating()[1].engine.context

    @property
    def widths(self) -> tuple[int, ...]:
        """Of a nested model (`kbit quantize --nested`) the widths it serves, widest first."""
        return () if self._loaded is None else self._loaded.widths

    @property
    def bits(self) -> float | None:
        """Of a nested model the bits it runs at; None where it runs whole, and its matrices' widest widths differ."""
        return None if self._loaded is None else self._loaded.bits

    @property
    def recommended(self) -> Settings:
        """How the model's authors recommend to sample, else the usual: `model.chat(..., **model.recommended)`."""
        if self._defaults is None:
            return {}
        usual, params = asdict(SamplingParams()), asdict(self._defaults.params)
        return cast(Settings, {name: value for name, value in params.items() if value != usual[name]})

    @overload
    def generate(self, prompt: str, **settings: Unpack[Settings]) -> Completion: ...
    @overload
    def generate(self, prompt: Texts, **settings: Unpack[Settings]) -> list[Completion]: ...

    def generate(self, prompt: str | Texts, **settings: Unpack[Settings]) -> Completion | list[Completion]:
        """Goes on with a text, or with several at once.

        Args:
            prompt: a text, or a list of them.
            settings: see `Settings`.

        Raises:
            UsageError: a setting out of range, an empty prompt, or one that the context has no room for.
            UnsupportedError: the model does not go on with texts.
        """
        if isinstance(prompt, str):
            return self.stream(prompt, **settings).finish()
        streams: list[Stream] = []
        try:
            streams += [Stream(self._generating()[1], request) for request in self._texts(prompt, settings)]
            return [stream.finish() for stream in streams]
        finally:
            for stream in streams:
                stream.close()

    def stream(self, prompt: str, **settings: Unpack[Settings]) -> Stream:
        """Goes on with a text, piece by piece: `for piece in model.stream(...)`.

        Args, Raises: see `generate`.
        """
        return Stream(self._generating()[1], self._text(prompt, settings))

    def chat(self, messages: str | Sequence[Message], **settings: Unpack[Settings]) -> Completion:
        """Answers a conversation, in the model's own chat template.

        Args:
            messages: each {"role": ..., "content": ...}; or the text of one message of a user.
            settings: see `Settings`.

        Raises:
            UsageError: as `generate`; the model has no chat template, or it refuses these messages.
        """
        return self.stream_chat(messages, **settings).finish()

    def stream_chat(self, messages: str | Sequence[Message], **settings: Unpack[Settings]) -> Stream:
        """Answers a conversation, piece by piece.

        Args, Raises: see `chat`.
        """
        return Stream(self._generating()[1], self._conversation(messages, settings))

    @overload
    async def agenerate(self, prompt: str, **settings: Unpack[Settings]) -> Completion: ...
    @overload
    async def agenerate(self, prompt: Texts, **settings: Unpack[Settings]) -> list[Completion]: ...

    async def agenerate(self, prompt: str | Texts, **settings: Unpack[Settings]) -> Completion | list[Completion]:
        """`generate` for coroutines."""
        if isinstance(prompt, str):
            return await self.astream(prompt, **settings).finish()
        runner = self._generating()[1]
        streams = [AsyncStream(runner, request) for request in self._texts(prompt, settings)]
        try:
            for stream in streams:
                stream.start()
            return [await stream.finish() for stream in streams]
        finally:
            for stream in streams:
                await stream.aclose()

    def astream(self, prompt: str, **settings: Unpack[Settings]) -> AsyncStream:
        """`stream` for coroutines: `async for piece in model.astream(...)`."""
        return AsyncStream(self._generating()[1], self._text(prompt, settings))

    async def achat(self, messages: str | Sequence[Message], **settings: Unpack[Settings]) -> Completion:
        """`chat` for coroutines."""
        return await self.astream_chat(messages, **settings).finish()

    def astream_chat(self, messages: str | Sequence[Message], **settings: Unpack[Settings]) -> AsyncStream:
        """`stream_chat` for coroutines."""
        return AsyncStream(self._generating()[1], self._conversation(messages, settings))

    def logprobs(self, text: str | Sequence[int], top: int = 0) -> tuple[Token, ...]:
        """How probable each token of a text is, by the model's own logits.

        Args:
            text: a text, or its token ids.
            top: how many of the most probable tokens to name in each place.

        Raises:
            UsageError: an empty text, one that is longer than the context, or tokens that the model does not know.
            UnsupportedError: the model does not go on with texts.
        """
        stream = Stream(self._generating()[1], self._scoring(text, top))
        stream.finish()
        return named_tokens(stream.scored, self.tokenizer)

    async def alogprobs(self, text: str | Sequence[int], top: int = 0) -> tuple[Token, ...]:
        """`logprobs` for coroutines."""
        stream = AsyncStream(self._generating()[1], self._scoring(text, top))
        await stream.finish()
        return named_tokens(stream.scored, self.tokenizer)

    def embed(
        self, texts: str | Sequence[str], *, prompt_name: str | None = None, long: Long = "truncate"
    ) -> Embeddings:
        """Vectors of texts, as the checkpoint's sentence-transformers files say; float32 (N, D) in `.vectors`.

        Args:
            texts: a text, or several.
            prompt_name: put the model's prompt of this name before every text.
            long: what becomes of a text that is too long: "truncate", "windows" or "refuse".

        Raises:
            UsageError: no text, a text that is refused, a prompt that the model does not have.
            CheckpointError, UnsupportedError: the model cannot be read or run as one that embeds.
        """
        many = [texts] if isinstance(texts, str) else list(texts)
        if not many or not all(isinstance(each, str) and each.strip() for each in many):
            raise UsageError("embed: give at least one text, and none that is empty")
        if long not in ("truncate", "windows", "refuse"):
            raise UsageError(f"long {long!r}: use truncate, windows or refuse")
        with self._embedding:
            if self._closed:
                raise UsageError("this model was closed: load it again")
            if self._embedder is None:
                self._embedder = self._make_embedder()
            return self._embedder.embed(many, self._embedder.prompt(prompt_name), long)

    async def aembed(
        self, texts: str | Sequence[str], *, prompt_name: str | None = None, long: Long = "truncate"
    ) -> Embeddings:
        """`embed` for coroutines."""
        return await asyncio.to_thread(self.embed, texts, prompt_name=prompt_name, long=long)

    def _generating(self) -> tuple[LoadedModel, Runner]:
        if self._closed:
            raise UsageError("this model was closed: load it again")
        if self._loaded is None or self._runner is None:
            raise UnsupportedError(f"{self.name} predicts no next token, so it goes on with no text: use embed")
        return self._loaded, self._runner

    def _texts(self, prompts: Texts, settings: Settings) -> list[Request]:
        return [self._text(prompt, settings) for prompt in prompts]

    def _text(self, prompt: str, settings: Settings) -> Request:
        if not isinstance(prompt, str):
            raise UsageError(f"a prompt is a text, and this is a {type(prompt).__name__}")
        loaded, _ = self._generating()
        return request_of(loaded.tokenizer.encode(prompt), settings, loaded.decoder.spec, continues_prompt=True)

    def _conversation(self, messages: str | Sequence[Message], settings: Settings) -> Request:
        from kbit.engine.conversation import chat_prompt

        loaded, _ = self._generating()
        name = settings.get("adapter")
        if name is not None:
            loaded = loaded.with_adapter(name)  # (its chat template)
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        ids = chat_prompt(loaded.tokenizer, turns, self.name)
        return request_of(ids, settings, loaded.decoder.spec, continues_prompt=False)

    def _scoring(self, text: str | Sequence[int], top: int) -> Request:
        loaded, _ = self._generating()
        if type(top) is not int or not 0 <= top <= loaded.decoder.spec.vocab_size:
            raise UsageError(f"top {top!r}: expected a whole number from 0 to {loaded.decoder.spec.vocab_size}")
        ids = loaded.tokenizer.encode(text) if isinstance(text, str) else list(text)
        return Request(tuple(ids), SamplingParams(seed=0), max_tokens=0, prompt_logprobs=top)


def load(
    model: str | PathLike[str],
    *,
    bits: float | None = None,
    device: str = "auto",
    backend: str = "auto",
    compute: str | None = None,
    kv_bits: int | str | None = None,
    threads: int | None = None,
    context: int | None = None,
    cache_bytes: int | None = None,
    seats: int = 64,
    adapters: Mapping[str, str | PathLike[str]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Loads a model.

    Args:
        model: as on the command line: a folder, a .gguf file, a hub id, or a name that `kbit pull --list` shows.
        bits: of a nested model those to run at (3.5, too, where its widths are mixed), its widest unless given. Of a
            model that is not quantized by kbit: its linear layers are rounded to nearest, `nf` in blocks of 64, once,
            and kept in the cache folder (what `kbit serve MODEL:4` serves; `quantize` is more accurate).
        device: "auto", "cpu" or "cuda".
        backend, compute, kv_bits, threads: as the flags of `kbit run` of these names.
        context: tokens that a prompt and its answer may have together; None: as many as model and cache allow.
        cache_bytes: memory for keys and values; None: for 32768 tokens or one whole context, at most a quarter of what
            is free.
        seats: most answers that are written at once.
        adapters: folders of LoRA adapters as PEFT saves them, by the names that requests call them
            (`Settings.adapter`); the weights stay as they are.
        progress: called as (tensors done, tensors in all) while weights are read and prepared.

    Raises:
        UsageError: no such model, or a value that does not exist.
        CheckpointError, UnsupportedError: the model cannot be read or run.
    """
    from kbit.backends.select import select_backend

    def chosen(kv: int | str | None) -> Any:
        return select_backend(device, backend=backend, threads=threads, compute=compute, kv_bits=kv)

    who, name = chosen(kv_bits), fspath(model)  # a wrong device needs no download to be reported
    path, generates = _opened(name, bits)

    def make_embedder() -> Embedder:
        from kbit.engine.embed import Embedder
        from kbit.engine.loader import open_prepared

        # Nothing of a text is kept, so its keys and values need not be small.
        computing = chosen(32) if who.name == "native" else who
        with open_prepared(path, computing, bits=bits if path == name else None) as source:
            return Embedder(source, computing)

    if not generates:
        if adapters:
            raise UnsupportedError(f"{name} is an encoder, which takes no adapters: open the adapter's folder instead")
        made = Model(name, None, None, None, make_embedder)
        made._embedder = make_embedder()
        return made
    from kbit.engine.loader import load_model
    from kbit.engine.sampling_defaults import sampling_defaults

    defaults: SamplingDefaults | None = None

    def look(_: Tokenizer, source: CheckpointSource) -> None:
        nonlocal defaults
        defaults = sampling_defaults(source, name)

    folders = {each: fspath(folder) for each, folder in (adapters or {}).items()}
    loaded = load_model(
        path, backend=who, bits=bits if path == name else None, check=look, progress=progress, adapters=folders
    )
    runner = Runner(batch_engine(loaded, context=context, cache_bytes=cache_bytes, seats=seats))
    return Model(name, loaded, defaults, runner, make_embedder)


def _opened(model: str, bits: float | None) -> tuple[str, bool]:
    """(what to load, whether it goes on with texts) of a model and a width."""
    from kbit.checkpoint.ladder import Ladder
    from kbit.models.check import check_continues
    from kbit.models.families import spec_from_config
    from kbit.models.opening import open_model

    with open_model(model) as source:
        spec = spec_from_config(source.config, where=f"config of {source.path}")
        if spec.encoder is not None:
            check_continues(spec, str(source.path))  # which says why
        section = source.config.get("quantization_config") or {}
        rounds = bits is not None and not Ladder.of(source) and section.get("quant_method") != "kbit"
    if rounds:
        from kbit.quantizers.widths import rounded, whole_bits

        assert bits is not None
        return str(rounded(model, whole_bits(model, bits))), spec.continues_text
    return model, spec.continues_text
