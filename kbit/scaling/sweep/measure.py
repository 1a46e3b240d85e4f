"""Measuring one point: quantize a model in memory, run it over the windows, compare it with the original.

`measure` is what a process of a sweep runs, again and again. Between calls it keeps the model it worked on last, so the
weights of a model are read once per process.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kbit.checkpoint.source import CheckpointSource
from kbit.formats.nested import NestedFormat
from kbit.quantizers.calibrated import CalibratedRounding
from kbit.quantizers.method import Method, MethodInput, QuantizedSource
from kbit.quantizers.methods import get_method
from kbit.quantizers.outlier_counts import with_outliers
from kbit.quantizers.plan import Plan, make_plan
from kbit.quantizers.settings import Nesting
from kbit.scaling.points import ORIGINAL, Point
from kbit.scaling.sweep.grid import Cell, dtype_label
from kbit.scaling.sweep.ladder import AtHand, AtWidths, stored_as, widths_at
from kbit.scaling.sweep.metered import Delegating, MeteredSource
from kbit.scaling.sweep.subject import Subject

if TYPE_CHECKING:
    import torch

    from kbit.evaluate.fisher import Diagonal
    from kbit.formats.quant_tensor import QuantTensor
    from kbit.graph.backend import Backend

# Raised when the same model, format, text and arithmetic give other figures than before (a mended measure, a changed
# codebook): points measured before are then measured again.
MEASURE_VERSION = 1

# Gradients of larger models are not taken (kbit.evaluate.fisher): torch needs minutes for each window of theirs, and
# memory that the processes were not planned with. Their points have no expected divergence.
MAX_GRADIENT_PARAMETERS = 1_000_000_000

# (windows done, windows in all, mean loss so far in nats)
OnWindow = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Arithmetic:
    """How models are run: the same for all points of a table, the original included.

    Attributes:
        compute: "fp32", "bf16" or "int8" of the native backend (kbit.backends.select).
        embedding_bits: embeddings and head are quantized to this width, or None.
    """

    compute: str = "fp32"
    embedding_bits: int | None = None

    @property
    def digest_text(self) -> str:
        """What of it decides figures: not the instruction set or the threads, whose results differ by rounding."""
        return f"native, {self.compute}, {'fp32' if self.compute == 'fp32' else 'fp16'} cache"


@dataclass(frozen=True, eq=False)
class Task:
    """One point to measure.

    Attributes:
        key: the point's key.
        subject: the model and its windows.
        cell: method and format.
        arithmetic: how to run it.
        text_name, text_sha256: the text.
        logits: file of the original's logits: read for a quantized model, written for the original; None: an original
            whose logits nobody needs. Beside it, ending in .npz, lies what the original's gradients say of its weights.
        threads: of this task.
        keep_weights: hold the model's weights in memory between tasks.
    """

    key: str
    subject: Subject
    cell: Cell
    arithmetic: Arithmetic
    text_name: str
    text_sha256: str
    logits: Path | None
    threads: int = 1
    keep_weights: bool = True


def point_key(subject: Subject, cell: Cell, arithmetic: Arithmetic, plan: Plan | None) -> str:
    """Hex digest of everything that determines a point's figures.

    Args:
        plan: of the quantized model; None for the original.
    """
    method = ORIGINAL if cell.format is None else f"{cell.method} {get_method(cell.method).version}"
    what = {
        "version": MEASURE_VERSION,
        "model": subject.content,
        "tokenizer": subject.tokenizer,
        "tokens": subject.tokens_digest,
        "method": method,
        "format": cell.label,
        "tensors": [] if plan is None else [(t.source.name, t.source.shape, t.label) for t in plan.tensors],
        "arithmetic": arithmetic.digest_text,
    }
    if isinstance(cell.format, NestedFormat) and cell.method != ORIGINAL:
        nesting = _method(cell).settings.get("nesting")
        what |= {} if nesting is None else {"nesting": nesting}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def plan_cell(source: CheckpointSource, cell: Cell, arithmetic: Arithmetic) -> Plan | None:
    """What a cell's format does to each tensor; None for the original.

    Raises:
        UsageError: the model cannot be quantized, or not like this.
    """
    if cell.format is None:
        return None
    plan = make_plan(source, cell.format, embedding_bits=arithmetic.embedding_bits)
    return with_outliers(source, plan, get_method(cell.method))


def planned_bits(plan: Plan, cell: Cell, *roles: str) -> int:
    """Bits that tensors take in a cell's format, of these roles or of all: of a nested one, what its width reads."""
    total, widths = 0, widths_at(plan, cell.width)
    for tensor in plan.tensors:
        if roles and tensor.role not in roles:
            continue
        if isinstance(tensor.format, NestedFormat):
            rows, columns = tensor.source.shape
            total += tensor.format.nbytes(rows, columns, widths[tensor.source.name])
        else:
            total += tensor.nbytes
    return 8 * total


def measure(task: Task, on_window: OnWindow | None = None) -> Point:
    """Measure a point.

    Raises:
        KbitError: the model has changed since the sweep was planned, cannot be quantized like this, or gives NaN.
    """
    import torch

    from kbit.evaluate.compare import compare
    from kbit.evaluate.shared_logits import SharedLogits
    from kbit.models.load import load_decoder

    if torch.get_num_threads() != task.threads:
        torch.set_num_threads(task.threads)
    model = _model(task)
    subject, cell = task.subject, task.cell
    if cell.format is None:
        return _measure_original(task, model, on_window)
    plan = plan_cell(model.source, cell, task.arithmetic)
    assert plan is not None
    assert task.logits is not None
    reference = SharedLogits(subject.windows, subject.vocab_size, task.logits)
    planned = [tensor for tensor in plan.tensors if tensor.format is not None]
    linear = frozenset(tensor.source.name for tensor in planned if tensor.role == "linear")
    started = time.perf_counter()
    quantized, plan = model.quantized(cell, plan)
    widths = widths_at(plan, cell.width)
    formats = {tensor.source.name: stored_as(tensor.format, widths.get(tensor.source.name)) for tensor in planned}
    diagonal = _diagonal(task.logits)
    metered = MeteredSource(quantized, formats, linear, time.perf_counter() - started, diagonal)
    decoder = load_decoder(metered, model.backend)
    started = time.perf_counter()
    comparison = compare(decoder, reference, subject.windows, on_window)
    seconds = time.perf_counter() - started
    point = _point(task, model.backend.describe(), comparison.model.nll, comparison.kl, comparison.top1_agreement)
    extra = {tensor.source.name: quantized.extra_bits(tensor.source.name) for tensor in planned}
    return replace(
        point,
        linear_bits=planned_bits(plan, cell, "linear") + sum(extra[name] for name in linear),
        total_bits=planned_bits(plan, cell) + sum(extra.values()),
        weight_error=metered.error,
        weight_gain=metered.gain,
        expected_kl=metered.expected_kl,
        quantize_seconds=metered.seconds,
        evaluate_seconds=seconds,
    )


def _measure_original(task: Task, model: _Model, on_window: OnWindow | None) -> Point:
    import numpy as np

    from kbit.evaluate.perplexity import evaluate_perplexity
    from kbit.evaluate.shared_logits import WritingLogits
    from kbit.models.load import load_decoder

    windows = task.subject.windows
    decoder = load_decoder(model, model.backend)
    started = time.perf_counter()
    if task.logits is None:
        result = evaluate_perplexity(decoder, windows, on_window)
    else:
        with WritingLogits(decoder, windows, task.logits) as writing:
            result = evaluate_perplexity(writing, windows, on_window)
    seconds = time.perf_counter() - started
    if task.logits is not None:
        _take_gradients(task, model)
    point = _point(task, model.backend.describe(), result.nll, np.zeros_like(result.nll), 1.0)
    return replace(point, evaluate_seconds=seconds)


def _take_gradients(task: Task, model: _Model) -> None:
    """Write what the model's gradients say of its weights beside its logits, unless it is there or the model too large.

    Raises:
        KbitError: it cannot be written, or gradients are NaN.
    """
    from kbit.evaluate.fisher import measure_diagonal, write_diagonal
    from kbit.host.errors import KbitError

    assert task.logits is not None
    path = task.logits.with_suffix(".npz")
    if path.exists() or task.subject.parameters > MAX_GRADIENT_PARAMETERS:
        return
    try:
        # The weights as they are stored, not as this process holds them: half the memory.
        write_diagonal(path, measure_diagonal(model.source, task.subject.windows))
    except OSError as error:
        raise KbitError(f"{path}: cannot be written ({error.strerror or error}); choose another --out") from error


def _diagonal(logits: Path) -> Mapping[str, Diagonal]:
    """What `_take_gradients` wrote; nothing where it was not taken."""
    from kbit.evaluate.fisher import read_diagonal

    path = logits.with_suffix(".npz")
    return read_diagonal(path) if path.exists() else {}


def _point(task: Task, backend: str, nll: object, kl: object, top1: float) -> Point:
    """The row, with the bits of the original and no error: what differs for a quantized model is filled in after."""
    import numpy as np

    from kbit.evaluate.statistics import cluster

    subject, cell, format = task.subject, task.cell, task.cell.format
    losses, divergences = np.asarray(nll), np.asarray(kl)
    by_loss, by_kl = cluster(losses), cluster(divergences)
    return Point(
        key=task.key,
        model=subject.name,
        model_id=subject.content,
        tokenizer=subject.tokenizer,
        method=cell.method,
        format=cell.format_name,
        dtype=ORIGINAL if format is None else dtype_label(format),
        bits=round(subject.linear_bits / subject.linear_parameters) if format is None else cell.bits,
        block_size=cell.block_size,
        linear_parameters=subject.linear_parameters,
        parameters=subject.parameters,
        linear_bits=subject.linear_bits,
        total_bits=subject.total_bits,
        training_tokens=subject.training_tokens,
        data=task.text_name,
        data_sha256=task.text_sha256,
        convention=subject.windows.convention,
        context=subject.windows.context,
        tokens=int(losses.size),
        text_bytes=subject.text_bytes,
        backend=backend,
        nll=float(losses.mean()),
        kl=float(divergences.mean()),
        top1=top1,
        weight_error=0.0,
        cluster_tokens=tuple(by_loss.sizes.tolist()),
        cluster_nll=tuple(by_loss.sums.tolist()),
        cluster_kl=tuple(by_kl.sums.tolist()),
        quantize_seconds=0.0,
        evaluate_seconds=0.0,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


class _Model(Delegating):
    """An open model with the backend that runs it and, unless told otherwise, its weights in memory."""

    def __init__(self, source: CheckpointSource, subject: Subject, backend: Backend, keep: bool) -> None:
        super().__init__(source)
        self.subject, self.backend, self._keep = subject, backend, keep
        self._weights: dict[str, torch.Tensor] = {}
        self._ladder: tuple[Cell, str, QuantizedSource, Plan] | None = None

    def read(self, name: str) -> torch.Tensor:
        if not self._keep:
            return self.source.read(name)
        if name not in self._weights:
            self._weights[name] = _compact(self.source.read(name), self.source.tensors[name].stored_as)
        return self._weights[name].float()

    def read_weight(self, name: str) -> torch.Tensor | QuantTensor:
        return self.read(name)

    def quantized(self, cell: Cell, plan: Plan) -> tuple[QuantizedSource, Plan]:
        """The model in a cell's format, and its plan. Of a nested one, which is rounded for all widths together, the
        last is kept."""
        whole, width = replace(cell, width=None), cell.width
        if width is not None and self._ladder is not None and self._ladder[:2] == (whole, plan.plan_id):
            return AtWidths(self._ladder[2], widths_at(self._ladder[3], width)), self._ladder[3]
        self._ladder = None
        method, planned = _method(cell), plan
        if isinstance(method, CalibratedRounding) and method.mixes_nested:
            from kbit.quantizers.nested_order import ordered

            planned = ordered(self.source, plan, method)
        made = method.apply(MethodInput(self.source, planned, self.read))
        if width is None:
            return made, planned
        self._ladder = (whole, plan.plan_id, AtHand(made), planned)
        return AtWidths(self._ladder[2], widths_at(planned, width)), planned


def _method(cell: Cell) -> Method:
    """A cell's method: of nested formats as `kbit quantize --nested` takes it."""
    method = get_method(cell.method)
    if isinstance(cell.format, NestedFormat) and isinstance(method, CalibratedRounding):
        return method.nested(Nesting.of(cell.format.low, cell.format.bits, mixed=True))
    return method


def _compact(weight: torch.Tensor, stored_as: str) -> torch.Tensor:
    """The same values in half the memory, where the file holds them in 16 bits."""
    import torch

    kinds = {"F16": torch.float16, "BF16": torch.bfloat16}
    return weight.to(kinds.get(stored_as, torch.float32))


_last: _Model | None = None


def _model(task: Task) -> _Model:
    """The model of a task: the last one again, or opened now in its place.

    Raises:
        KbitError: it cannot be opened, or is another one than was planned for.
    """
    global _last
    from kbit.backends.cpu.backend import NativeBackend
    from kbit.backends.select import select_backend
    from kbit.host.errors import KbitError
    from kbit.models.opening import open_model
    from kbit.scaling.sweep.subject import content_digest

    subject, compute = task.subject, task.arithmetic.compute
    if _last is not None:
        backend = _last.backend
        same = isinstance(backend, NativeBackend) and (backend.compute, backend.threads) == (compute, task.threads)
        if _last.subject.content == subject.content and _last.subject.location == subject.location and same:
            return _last
        forget_model()
    source = open_model(subject.location)
    if content_digest(source) != subject.content:
        source.close()
        raise KbitError(f"{subject.location}: changed while the sweep ran, or is another model on this machine")
    backend = select_backend("cpu", backend="native", threads=task.threads, compute=compute)
    _last = _Model(source, subject, backend, task.keep_weights)
    return _last


def forget_model() -> None:
    """Let go of the model this process worked on last."""
    global _last
    if _last is not None:
        _last.close()
        _last = None
