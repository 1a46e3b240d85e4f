"""From a model's name to something that generates: source, backend, decoder, tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, cast

from kbit.checkpoint.ladder import Ladder
from kbit.checkpoint.prepared_place import mark_used
from kbit.host.errors import UsageError
from kbit.models.decoder import Decoder
from kbit.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from kbit.backends.cpu.backend import NativeBackend
    from kbit.backends.cpu.prepared import PreparedSource
    from kbit.backends.parallel import Group
    from kbit.checkpoint.source import CheckpointSource
    from kbit.graph.backend import Backend, SharedWeights
    from kbit.models.spec import ModelSpec


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in memory.

    Attributes:
        name: what the user called it.
        decoder: the model, prepared for its backend.
        tokenizer: its tokenizer.
        load_seconds: from opening the checkpoint to the last prepared weight, a download not included.
        prepared: the file of prepared weights that it runs on, mapped; None: they were prepared in memory.
        ladder: of a nested model, what it serves.
        bits: of these it runs at; None: all of every matrix, where these differ, or it is not nested.
        load_width: makes the decoder of another number of bits; None where there is no other.
        folders: of the LoRA adapters that its texts may have, by name.
        adapter: which of them all of its texts have where nothing else is said; None: none.
    """

    name: str
    decoder: Decoder
    tokenizer: Tokenizer
    load_seconds: float
    prepared: Path | None = None
    ladder: Ladder = field(default_factory=Ladder)
    bits: float | None = None
    load_width: Callable[[float], Decoder] | None = None
    folders: Mapping[str, str] = field(default_factory=dict)
    adapter: str | None = None

    @property
    def backend_name(self) -> str:
        """Short name of the backend, for reports."""
        return self.decoder.backend.name

    @property
    def backend_description(self) -> str:
        """What computes, and how, for people."""
        return self.decoder.backend.describe()

    @property
    def widths(self) -> tuple[int, ...]:
        """Of a nested model, the whole numbers of bits it serves, widest first; else none."""
        return self.ladder.widths

    def at_width(self, bits: float) -> LoadedModel:
        """The same model at another number of bits, on the same backend, whose caches serve both. Where prepared
        weights are mapped, both share their memory.

        Raises:
            UsageError: it does not serve so many.
        """
        self.ladder.check(self.name, bits)
        if bits == self.bits or self.load_width is None:
            return self
        start = perf_counter()
        decoder = _with_adapters(self.load_width(bits), self.name, self.folders)
        decoder = decoder if self.adapter is None else decoder.with_adapter(self.adapter)
        return replace(self, decoder=decoder, bits=bits, load_seconds=perf_counter() - start)

    def with_adapter(self, name: str) -> LoadedModel:
        """The same model with one of its adapters, and the chat template that is saved with that, if any.

        Raises:
            UsageError: there is no such adapter.
            CheckpointError: its template cannot be read.
        """
        decoder = self.decoder.with_adapter(name)
        tokenizer = with_template_of(self.tokenizer, self.folders[name])
        return replace(self, decoder=decoder, tokenizer=tokenizer, adapter=name)


def with_template_of(tokenizer: Tokenizer, folder: str) -> Tokenizer:
    """A model's tokenizer with the chat template of an adapter's folder, where there is one.

    Raises:
        CheckpointError: it cannot be read.
    """
    from kbit.checkpoint.readers.hf_folder import SIDECAR_NAMES, read_sidecar

    names = [name for name in SIDECAR_NAMES if (Path(folder) / name).is_file()]
    return tokenizer.with_templates_of({name: read_sidecar(Path(folder) / name) for name in names}, folder)


def load_model(
    model: str,
    device: str = "auto",
    threads: int | None = None,
    *,
    backend: str | Backend = "auto",
    compute: str | None = None,
    kv_bits: int | str | None = None,
    bits: float | None = None,
    group: Group | None = None,
    check: Callable[[Tokenizer, CheckpointSource], object] | None = None,
    progress: Callable[[int, int], None] | None = None,
    adapters: Mapping[str, str] | None = None,
) -> LoadedModel:
    """Loads a model.

    Args:
        model: a folder, a .gguf file, a hub id or a catalogue name (`kbit.checkpoint.resolve.open_model`).
        device: "auto", "cpu" or "cuda".
        threads: CPU threads, where torch computes also torch's, for the whole process; None takes one per physical
            core and leaves torch's.
        backend, compute, kv_bits: who computes and how, see `kbit.backends.select.select_backend`. Or a backend there
            is already, which then says all of it: models that take turns should share one, and with it its threads.
        bits: to run a nested model at (`kbit quantize --nested`); None: its widest.
        group: processes among which the model is split (`kbit.backends.parallel`), this one among them. Each loads
            its share; all must then ask for the same tokens. A backend that is given must be of this group.
        check: called with tokenizer and checkpoint before any weight is read, to refuse early what these can tell.
        progress: called as (tensors done, tensors in all) while weights are read and prepared.
        adapters: folders of LoRA adapters, by the names that they get: each text may have one of them
            (`Decoder.with_adapter`, `Batch.adapters`). The weights stay as they are.

    Raises:
        UsageError: no such model or adapter, or a value of the other arguments that does not exist or does not fit the
            rest.
        CheckpointError, UnsupportedError: the model cannot be read or run, or not be split like this.
    """
    from kbit.backends.select import select_backend, set_threads

    # Before the model: a wrong device needs no download to be reported.
    if isinstance(backend, str):
        backend = select_backend(device, backend=backend, threads=threads, compute=compute, kv_bits=kv_bits)
        if group is not None:
            from kbit.backends.parallel import split

            backend = split(backend, group)
    elif getattr(backend, "group", None) is not group:
        raise ValueError(f"the {backend.name} backend was not made for this group of processes")
    if adapters:
        if group is not None:
            raise UsageError("LoRA adapters beside a model that several processes share: run it in one")
        loaded = load_model(model, device, threads, backend=backend, bits=bits, check=check, progress=progress)
        decoder = _with_adapters(loaded.decoder, model, adapters)
        return replace(loaded, decoder=decoder, folders=dict(adapters))
    if backend.name == "native":
        return _load_native(model, cast("NativeBackend", backend), bits, check, progress)
    from kbit.models.check import check_continues
    from kbit.models.families import spec_from_config
    from kbit.models.load import load_decoder
    from kbit.models.opening import open_model
    from kbit.models.shard import shard

    set_threads(threads)
    prefer_tuned(backend)

    def load_width(width: float) -> Decoder:
        with open_model(model, width) as narrower:
            part = narrower if group is None else shard(narrower, group.rank, group.size)
            return load_decoder(part, backend, shared=shared)

    with open_model(model, bits) as source:
        start = perf_counter()
        # Before the weights, not beside them: the library holds Python's lock while it parses (SmolLM2's: 0.1 s). A
        # thread that reads weights while others are prepared gains nothing either: most are small, so the threads
        # would wait for the lock, and preparing takes all cores as it is.
        check_continues(spec_from_config(source.config, where=f"config of {source.path}"), str(source.path))
        tokenizer = Tokenizer.from_source(source)
        if check is not None:
            check(tokenizer, source)
        part = source if group is None else shard(source, group.rank, group.size)
        if bits is None:
            ladder, shared = _served(source, backend)
        else:  # what was narrowed serves what lies below only: the whole is asked
            with open_model(model) as whole:
                ladder, shared = _served(whole, backend)
        decoder = load_decoder(part, backend, progress=progress, shared=shared)
        return LoadedModel(
            model, decoder, tokenizer, perf_counter() - start,
            ladder=ladder, bits=ladder.runs_at(bits), load_width=load_width if ladder else None,
        )  # fmt: skip


def _served(whole: CheckpointSource, backend: Backend) -> tuple[Ladder, SharedWeights | None]:
    """A nested model's widths, and what the backend has of them; None where there is one width, or each takes memory of
    its own. (Processes that share a model have a part each, and a backend each.)"""
    from kbit.graph.backend import SharesWidths

    ladder = Ladder.of(whole)
    return ladder, backend.shared(whole.fingerprint()) if ladder and isinstance(backend, SharesWidths) else None


def _with_adapters(decoder: Decoder, model: str, folders: Mapping[str, str]) -> Decoder:
    """A decoder whose texts may have adapters: itself, where there are none."""
    if not folders:
        return decoder
    from kbit.models.adapters import add_adapters
    from kbit.models.opening import open_model

    with open_model(model) as source:
        return add_adapters(decoder, source.config, folders)


def _load_native(
    model: str,
    backend: NativeBackend,
    bits: float | None,
    check: Callable[[Tokenizer, CheckpointSource], object] | None,
    progress: Callable[[int, int], None] | None,
) -> LoadedModel:
    """`load_model` for the CPU engine: from an earlier run's prepared weights, or preparing them for later ones."""
    from kbit.backends.cpu.prepared import find
    from kbit.checkpoint.resolve import locate
    from kbit.models.check import check_continues
    from kbit.models.families import spec_from_config
    from kbit.models.load import load_decoder
    from kbit.models.opening import open_model

    place = locate(model)
    start = perf_counter()
    prepared = None if place is None else find(place, open_model)

    def load_width(width: float) -> Decoder:
        if prepared is not None:
            narrower = prepared.at_width(width)
            narrower.prefetch()
            return load_decoder(narrower, backend)
        with open_model(model, width) as read:
            return load_decoder(read, backend)

    with prepared or open_model(model) as source:
        ladder = Ladder.of(source)
        if bits is not None:
            ladder.check(model, bits)
        check_continues(spec_from_config(source.config, where=f"config of {source.path}"), str(source.path))
        tokenizer = Tokenizer.from_source(source)
        if check is not None:
            check(tokenizer, source)
        if prepared is None and place is not None:
            prepared = _prepare(source, place, backend, progress)
        if bits is None or bits == ladder.runs_at(None):
            if prepared is not None:
                prepared.prefetch()
            decoder = load_decoder(prepared or source, backend, progress=None if prepared else progress)
        else:
            decoder = load_width(bits)
        file = None if prepared is None else prepared.prepared
        if file is not None:
            mark_used(file)
        return LoadedModel(
            model, decoder, tokenizer, perf_counter() - start, file,
            ladder, ladder.runs_at(bits), load_width if ladder else None,
        )  # fmt: skip


def _prepare(
    source: CheckpointSource, place: Path, backend: NativeBackend, progress: Callable[[int, int], None] | None
) -> PreparedSource | None:
    """Prepares the weights into a file; None where none is kept."""
    from kbit.backends.cpu.prepared_writing import make
    from kbit.checkpoint.source import StoredSource
    from kbit.models.load import numbers_of
    from kbit.models.opening import open_model

    if not isinstance(source, StoredSource):
        return None
    spec = _check(source, backend)
    names, numbers = spec.expected_tensors(), numbers_of(spec)
    bias = spec.names.logit_bias
    if spec.encoder is not None and bias is not None and bias in source.tensors:
        names, numbers = {**names, bias: source.tensors[bias].shape}, {*numbers, bias}
    return make(source, place, names, backend.context, progress, open_model, numbers)


def _check(source: CheckpointSource, backend: Backend) -> ModelSpec:
    """What of a checkpoint is prepared: all that its configuration describes, for whichever command comes next; without
    a head, where that is not there (all-mpnet-base-v2's), so that hidden states can be read.

    Raises:
        CheckpointError, UnsupportedError: it cannot be loaded.
    """
    from kbit.models import encoder_decoder
    from kbit.models.check import stored_spec
    from kbit.models.families import spec_from_config
    from kbit.models.load import check_loadable

    published = spec_from_config(source.config, where=f"config of {source.path}")
    if published.encoder is not None:
        return encoder_decoder.check_loadable(source, backend)
    return check_loadable(source, backend, stored_spec(source, published))


@contextmanager
def open_prepared(
    model: str,
    backend: Backend,
    check: Callable[[CheckpointSource], None] | None = None,
    bits: float | None = None,
) -> Iterator[CheckpointSource]:
    """Opens a checkpoint for a model that is no decoder; on the CPU engine with its weights prepared, where they can be
    kept: from an earlier run, or preparing them now.

    Args:
        model: as for `load_model`.
        backend: who computes.
        check: called with the checkpoint before anything is prepared, to refuse early.
        bits: to read a nested model at; None: its widest.

    Raises:
        UsageError: no such model, or one that does not serve so many bits.
        CheckpointError, UnsupportedError: it cannot be read or run.
    """
    from kbit.checkpoint.narrowed import narrowed
    from kbit.models.opening import open_model

    if backend.name != "native":
        with open_model(model, bits) as source:
            if check is not None:
                check(source)
            yield source
        return
    from kbit.backends.cpu.prepared import find
    from kbit.checkpoint.resolve import locate

    place = locate(model)
    prepared = None if place is None else find(place, open_model)
    with prepared or open_model(model) as source:
        if bits is not None:
            Ladder.of(source).check(model, bits)
        if check is not None:
            check(source)
        if prepared is None and place is not None:
            prepared = _prepare(source, place, cast("NativeBackend", backend), None)
        if prepared is not None:
            mark_used(prepared.prepared)
            prepared = prepared if bits is None else prepared.at_width(bits)
            prepared.prefetch()
        yield prepared or (source if bits is None else narrowed(source, bits))


def prefer_tuned(backend: Backend) -> None:
    """Lets a GPU backend's kernels use what `kbit tune` found for its GPU, if anything."""
    if backend.name == "triton":
        from kbit.tuning.stored import use_tuned

        use_tuned(backend.device)
