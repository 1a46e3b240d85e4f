"""Calibrating a model: its text, its factors, and where they are kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.calibration.collected import CUT
from kbit.calibration.measure import measure_factors
from kbit.calibration.measure_both import measure_both, written_texts
from kbit.calibration.place import MANIFEST, calibration_folder, identity_of, layers_of, place_of
from kbit.calibration.request import SEQUENCE, CalibrationRequest
from kbit.calibration.sizes import factor_bytes, text_shape
from kbit.calibration.store import CalibrationFolder
from kbit.checkpoint.source import CheckpointSource
from kbit.host.errors import KbitError, UsageError
from kbit.host.progress import Progress
from kbit.models.families import spec_from_config
from kbit.models.sampled_text import CALIBRATION_SEED, sample_sequences, start_tokens
from kbit.models.spec import ModelSpec
from kbit.text.tokenizer import Tokenizer


def calibrate(
    source: CheckpointSource,
    request: CalibrationRequest,
    *,
    folder: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> CalibrationFolder:
    """Measure what is not there yet.

    Args:
        source: the model.
        request: what to measure, on what.
        folder: where to; None: kbit's cache folder, in a place that follows from model and request.
        threads: workers; None: as many as torch has. The result does not depend on it.
        progress: called after each piece of work.

    Raises:
        CheckpointError, UnsupportedError: a model that cannot be run.
        UsageError: a text with fewer tokens than asked for.
        KbitError: no room on the disk, or a folder with something else in it.
    """
    threads = threads or torch.get_num_threads()
    spec = spec_from_config(source.config, where=f"config of {source.path}")
    shape = text_shape(spec, request.tokens)
    identity = identity_of(source, spec, request)
    kept = CalibrationFolder(folder or place_of(identity), identity)
    missing = [layer for layer in layers_of(spec, request.gradients) if not kept.has(layer)]
    if not missing:
        return kept
    _check_room(kept.path, spec, len(missing), request.gradients)
    ids = kept.ids()
    if ids is None or ids.shape != shape:
        ids = calibration_tokens(source, request, *shape, threads=threads, progress=progress)
        kept.write_ids(ids)
    on_progress = None if progress is None else lambda done, total: progress("calibrating", done, total)
    if spec.encoder is not None:
        written = written_texts(source, ids, threads=threads, progress=progress)
        layer_by_layer = measure_both(source, ids, written, threads=threads, skip=kept.has, progress=on_progress)
    else:
        layer_by_layer = measure_factors(
            source, ids, gradients=request.gradients, cut=CUT, threads=threads, skip=kept.has, progress=on_progress
        )
    for factors in layer_by_layer:
        kept.write(factors)
    return kept


def calibration_tokens(
    source: CheckpointSource,
    request: CalibrationRequest,
    count: int,
    length: int,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> NDArray[np.int64]:
    """The text as sequences of tokens, int64 (count, length).

    Raises:
        UsageError: a text with fewer tokens than asked for.
    """
    if request.texts:
        tokenizer = Tokenizer.from_source(source)
        shares = [count // len(request.texts) + (i < count % len(request.texts)) for i in range(len(request.texts))]
        spec = spec_from_config(source.config, where=f"config of {source.path}")
        begin, end = ([], []) if spec.continues_text else _around(tokenizer)
        inner = length - len(begin) - len(end)
        special = spec.continues_text  # what stands around an encoder's text is put around each sequence
        encoded = (tokenizer.encode(text.text, add_special_tokens=special) for text in request.texts)
        ids = [np.array(each, dtype=np.int64) for each in encoded]
        for text, has, share in zip(request.texts, ids, shares, strict=True):
            if len(has) // inner < share:
                most = min(len(each) // inner for each in ids) * length * len(ids) // SEQUENCE * SEQUENCE
                fewer = f", or use --calibration-tokens {most}" if most else ""
                raise UsageError(
                    f"{text.name} has {len(has):,} tokens, but {share * inner:,} are wanted of it: name another "
                    f"text{fewer}"
                )
        sequences = np.concatenate([_cut(has, share, inner) for has, share in zip(ids, shares, strict=True)])
        ends = [np.tile(np.array(each, dtype=np.int64), (len(sequences), 1)) for each in (begin, end)]
        return np.concatenate([ends[0], sequences, ends[1]], axis=1)
    return sampled_tokens(source, count, length, threads=threads, progress=progress)


def sampled_tokens(
    source: CheckpointSource,
    count: int,
    length: int,
    *,
    first: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> NDArray[np.int64]:
    """Text that the model writes, int64 (count, length): sequences from the one of index `first` on."""
    from kbit.backends.select import select_backend
    from kbit.models.load import load_decoder

    model = load_decoder(source, select_backend("cpu", threads=threads))
    on_progress = None if progress is None else lambda done, total: progress("sampling text", done, total)
    starts = start_tokens(Tokenizer.from_source(source))
    return sample_sequences(
        model, starts, count=count, length=length, seed=CALIBRATION_SEED, first=first, on_progress=on_progress
    )


def forget(source: CheckpointSource) -> int:
    """Remove every calibration of a model that is in the cache folder.

    Returns:
        Bytes that are free again.

    Raises:
        KbitError: they cannot be removed.
    """
    freed, model = 0, source.fingerprint()
    for manifest in calibration_folder().glob(f"*/{MANIFEST}"):
        try:
            if json.loads(manifest.read_text(encoding="utf-8")).get("model") != model:
                continue
            freed += sum(path.stat().st_size for path in manifest.parent.iterdir())
            shutil.rmtree(manifest.parent)
        except (ValueError, AttributeError):
            continue  # no manifest of ours
        except OSError as error:
            raise KbitError(f"{manifest.parent}: cannot be removed ({error.strerror})") from None
    return freed


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens before and after a text, which encoders never read one without."""
    bare, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    before = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    return whole[:before], whole[before + len(bare) :]


def _cut(ids: NDArray[np.int64], count: int, length: int) -> NDArray[np.int64]:
    """Sequences evenly spread over a text."""
    available = len(ids) // length
    sequences: NDArray[np.int64] = ids[: available * length].reshape(available, length)[spread_over(available, count)]
    return sequences


def spread_over(available: int, count: int) -> NDArray[np.int64]:
    """Indices of so many things, evenly spread over all that there are."""
    found: NDArray[np.int64] = np.linspace(0, available - 1, count).round().astype(np.int64)
    return found


def _check_room(path: Path, spec: ModelSpec, layers: int, gradients: bool) -> None:
    needed, free = factor_bytes(spec, layers, gradients), shutil.disk_usage(path).free
    if free < needed + 64_000_000:
        raise KbitError(
            f"{path}: calibration needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free; make room, name "
            "another folder (kbit calibrate --output), or quantize with --method rtn, which needs none"
        )
