"""Loading a served model: what it will take is known before, and then it is taken."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from kbit.api.batching import batch_engine, usual_tokens
from kbit.engine.sampling_defaults import SamplingDefaults, sampling_defaults
from kbit.host.errors import UnsupportedError, UsageError
from kbit.host.notes import note

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource
    from kbit.engine.loader import LoadedModel
    from kbit.models.spec import ModelSpec
    from kbit.serve.models import ModelOptions, ServedModel
    from kbit.text.tokenizer import Tokenizer

# Where nobody says how large a cache is, it takes at most so much of the memory that there is for all models.
_CACHE_SHARE = 4


@dataclass(frozen=True)
class LoadPlan:
    """What a model will take, before it is loaded.

    Attributes:
        path, bits: what `load_model` is given.
        weights: bytes; those of models with the same path (rungs of a nested file) are the same memory.
        cache: of keys and values; None: the backend's own choice.
        rest: of a pass's buffers, the tokenizer, and adapters.
        loading: at loading's worst moment.
    """

    path: str
    bits: float | None
    weights: int
    cache: int | None
    rest: int
    loading: int


def planned_bytes(plans: Collection[LoadPlan]) -> int:
    """What some models take together, when they are loaded."""
    weights: dict[str, int] = {}
    for plan in plans:
        weights[plan.path] = max(plan.weights, weights.get(plan.path, 0))
    return sum(weights.values()) + sum((plan.cache or 0) + plan.rest for plan in plans)


def plan_load(
    model: ServedModel, options: ModelOptions, limit: int | None, adapters: Mapping[str, str] | None = None
) -> LoadPlan:
    """What it takes to load a model. Not on the event loop: a width may have to be made first.

    Args:
        model, options, adapters: of `load`.
        limit: bytes that all models may take; None: as many as they like.

    Raises:
        KbitError: the model cannot be opened.
    """
    from kbit.graph.backend import HoldsPrepared
    from kbit.models.families import spec_from_config
    from kbit.models.opening import open_model
    from kbit.quantizers.widths import at_width

    path, bits = (model.path, None) if model.bits is None else at_width(model.path, model.bits)
    factors = sum(file.stat().st_size for folder in (adapters or {}).values() for file in Path(folder).glob("*.safe*"))
    with _prepared(path, options) or open_model(path, bits) as source:
        spec = spec_from_config(source.config, where=f"config of {source.path}")
        stored = sum(info.nbytes for info in source.tensors.values())
        if not spec.continues_text:
            return LoadPlan(path, bits, stored, None, factors, 2 * stored)
        try:
            weights, cache, rest, loading = _predicted(source, spec, options, limit)
        except UnsupportedError:  # a format, a cache or a backend whose sizes the planner does not know
            return LoadPlan(path, bits, stored, options.cache_bytes, factors, stored)
        loading = weights if isinstance(source, HoldsPrepared) else loading
    return LoadPlan(path, bits, weights, cache, rest + factors, loading)


def _prepared(path: str, options: ModelOptions) -> CheckpointSource | None:
    """The weights that an earlier run prepared, if there are any."""
    if options.backend.name != "native":
        return None
    from kbit.backends.cpu.prepared import find
    from kbit.checkpoint.resolve import locate
    from kbit.models.opening import open_model

    place = locate(path)
    return None if place is None else find(place, open_model)


def _predicted(
    source: CheckpointSource, spec: ModelSpec, options: ModelOptions, limit: int | None
) -> tuple[int, int | None, int, int]:
    """Bytes of weights, cache, all else, and of loading's worst moment."""
    from kbit.backends.cpu.backend import NativeBackend
    from kbit.planner.memory import predict_memory
    from kbit.planner.weights import stored_weights

    backend = options.backend
    if not isinstance(backend, NativeBackend):
        raise UnsupportedError(f"the sizes of the {backend.name} backend are not planned")
    weights, kv = stored_weights(source, spec), backend.kv.partition(",")[0]

    def use(context: int, batch: int) -> tuple[int, int, int, int]:
        found = predict_memory(
            spec, weights, context=context, batch=batch, kv=kv, compute=backend.compute, threads=backend.context.threads
        )
        return found.weights, found.cache, found.workspace + found.tokenizer, found.loading

    matrices, _, rest, loading = use(1, options.seats)
    cache = options.cache_bytes
    if cache is None and limit is not None:
        _, most, _, _ = use(usual_tokens(spec.max_positions), 1)
        _, least, _, _ = use(1, 1)
        cache = max(least, min(most, limit // _CACHE_SHARE))
    return matrices, cache, rest, loading


def load(
    model: ServedModel,
    plan: LoadPlan,
    options: ModelOptions,
    progress: Callable[[int, int], None] | None = None,
    adapters: Mapping[str, str] | None = None,
    *,
    first: bool = True,
) -> None:
    """Loads a model. Not on the event loop: it takes a while.

    Args:
        model: which.
        plan: of `plan_load`.
        options: how.
        progress, adapters: see `load_model`.
        first: it is the server's first model. Of the others, those that cannot guess (a narrowest width has none below
            it) are served without, which a note tells: who asks for one gave no flag.

    Raises:
        KbitError: it cannot be.
    """
    from kbit.models.families import spec_from_config
    from kbit.models.opening import open_model

    with open_model(plan.path, plan.bits) as source:
        model.fingerprint = _fingerprint(source, options)
        spec = spec_from_config(source.config, where=f"config of {source.path}")
        if not spec.continues_text and spec.encoder is None:
            if adapters:
                raise UsageError(f"--adapter: {model.path} is an encoder, which takes none: leave it out")
            from kbit.engine.embed import Embedder

            model.embedder = Embedder(source, options.backend)
            return
    from kbit.engine.loader import load_model
    from kbit.serve.grammar import GrammarCompiler

    def note(tokenizer: Tokenizer, source: CheckpointSource) -> None:
        found = sampling_defaults(source, model.path)
        if options.sampling:
            params = replace(found.params, **options.sampling)
            found = SamplingDefaults(params, f"{found.origin}, and what the command line says")
        model.defaults = found
        _refuse_too_large(model, options, source)

    loaded = load_model(
        plan.path, backend=options.backend, bits=plan.bits, check=note, progress=progress, adapters=adapters
    )
    if options.chat_template is not None:
        loaded.tokenizer.chat_templates = {"default": options.chat_template}
    model.loaded, model.options = loaded, options
    model.grammars = GrammarCompiler(loaded.tokenizer, loaded.decoder.spec.vocab_size)
    model.engine = batch_engine(
        loaded,
        context=options.context,
        cache_bytes=plan.cache,
        seats=options.seats,
        batch_tokens=options.batch_tokens,
        speculate=options.speculate if first else _that_can_guess(loaded, options.speculate, model.name),
    )


def _that_can_guess(loaded: LoadedModel, speculate: str | None, name: str) -> str | None:
    """Who guesses for a model; None where nobody can, or was asked to."""
    from kbit.engine.batch_speculation import batch_drafter

    try:
        if speculate is not None:
            batch_drafter(loaded, speculate)
    except UsageError as error:
        note(f"{name} is served without guesses: {error}")
        return None
    return speculate


def put_beside(adapter: ServedModel, base: ServedModel, name: str) -> None:
    """Gives an adapter all that was loaded of the model that it is beside; its chat template may be its own.

    Raises:
        KbitError: that cannot be read.
    """
    assert base.loaded is not None
    adapter.loaded = base.loaded.with_adapter(name)
    if base.options is not None and base.options.chat_template is not None:
        adapter.loaded = replace(adapter.loaded, tokenizer=base.loaded.tokenizer)
    adapter.options, adapter.engine = base.options, base.engine
    adapter.defaults, adapter.grammars = base.defaults, base.grammars
    digest = blake2b(f"{base.fingerprint} {name}".encode(), digest_size=6)
    for file in sorted(Path(adapter.path).iterdir()):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    adapter.fingerprint = digest.hexdigest()
    adapter.state = "ready"


def _refuse_too_large(model: ServedModel, options: ModelOptions, source: CheckpointSource) -> None:
    """Ends what a limit leaves no memory for, before weights are read.

    Raises:
        KbitError: a limit leaves this process less than the model takes, with the cache that was asked for; where none
            was asked for, it will take a part of what is left.
    """
    from kbit.backends.cpu.backend import NativeBackend
    from kbit.planner.fits import Wanted, refuse_what_does_not_fit

    backend = options.backend
    if not isinstance(backend, NativeBackend):
        return
    wanted = Wanted(
        1, batch=options.seats, kv=backend.kv.partition(",")[0], compute=backend.compute,
        threads=backend.context.threads, cache=options.cache_bytes or 0,
    )  # fmt: skip
    refuse_what_does_not_fit(source, wanted, model.path)


def _fingerprint(source: CheckpointSource, options: ModelOptions) -> str:
    from kbit import __version__

    words = [__version__, options.backend.name, options.backend.describe(), source.fingerprint()]
    return blake2b("\n".join(words).encode(), digest_size=6).hexdigest()
