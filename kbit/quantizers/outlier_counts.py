"""How many single weights of each matrix are kept apart, which only the weights themselves tell."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from kbit.formats.quant_format import QuantFormat
from kbit.formats.trellis import TrellisFormat
from kbit.quantizers.plan import Plan, TensorPlan, with_formats

if TYPE_CHECKING:
    import torch

    from kbit.checkpoint.source import CheckpointSource
    from kbit.host.progress import Progress
    from kbit.quantizers.method import Method

# Of the models that are open: a plan is made more than once.
_counted: WeakKeyDictionary[CheckpointSource, dict[str, int]] = WeakKeyDictionary()


def with_outliers(
    source: CheckpointSource,
    plan: Plan,
    method: Method,
    *,
    planes: bool = False,
    fixed: Collection[str] = (),
    progress: Progress | None = None,
) -> Plan:
    """A plan whose linear layers keep as many weights apart as pay (`kbit.formats.outlier_weights`), where the method
    does so. A format that says a number stays as it is.

    Reads the weights of the matrices in question, once for a source.

    Args:
        source: the plan's.
        plan: to be completed.
        method: who will round.
        planes: those in planes formats, too; else trellises alone.
        fixed: names of matrices that stay as they are.
        progress: told of matrices.

    Raises:
        CheckpointError: weights cannot be read.
    """
    if not method.keeps_outliers:
        return plan
    kinds = (TrellisFormat, QuantFormat) if planes else (TrellisFormat,)

    def is_open(tensor: TensorPlan) -> bool:
        linear = tensor.role == "linear" and not tensor.as_stored and tensor.source.name not in fixed
        return linear and isinstance(tensor.format, kinds) and not tensor.format.outliers

    open_ended = {tensor.source.name: tensor.format for tensor in plan.tensors if tensor.format and is_open(tensor)}
    if not open_ended:
        return plan
    counts = _counts(source, open_ended, progress)
    return with_formats(source, plan, {name: format.keeping(counts[name]) for name, format in open_ended.items()})


def _counts(source: CheckpointSource, names: Collection[str], progress: Progress | None) -> dict[str, int]:
    from kbit.formats.outlier_weights import worthwhile

    known = _counted.setdefault(source, {})
    missing = [name for name in names if name not in known]
    for done, name in enumerate(missing):
        rows, columns = source.tensors[name].shape

        def read_rows(start: int, stop: int, name: str = name) -> torch.Tensor:
            return source.read_rows(name, start, stop)

        known[name] = worthwhile(read_rows, (rows, columns))
        if progress is not None:
            progress("looking for outliers", done + 1, len(missing))
    return known
