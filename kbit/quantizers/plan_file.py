"""A plan as a file that people can edit: what becomes of every matrix, a line each, and what that is predicted to cost.

    {
     "kbit_plan": 1,
     "model": "path/to/model",
     "fingerprint": "...",
     "method": {"name": "ldlq2"},
     "calibration": {"text": "sampled", "tokens": null, "gradients": true},
     "format": "nf3-b64",
     "predicted_kl": 0.0213,
     "bytes": 2034000,
     "tensors": {
      "model.layers.0.self_attn.q_proj.weight": {"to": "nf4-b64", "bytes": 147456, "predicted_kl": 0.00031},
      ...
     }
    }

"to" is a format, or "keep", "f16", "bf16", "f32", or "stored" (quantized as the model has it); a line may say just
that: `"...weight": "nf4-b64"`. Bytes and predictions are for people and are not read. Every matrix of the model has a
line; norms and biases need none. Without "fingerprint" the plan serves any model that has its matrices. Imports no
torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kbit.checkpoint.source import CheckpointSource
from kbit.formats.codec import Codec
from kbit.formats.nested import NestedFormat
from kbit.host.errors import KbitError, UsageError
from kbit.host.files import read_json_object, write_durably
from kbit.quantizers.calibrated import CalibratedRounding
from kbit.quantizers.method import Method
from kbit.quantizers.plan import Plan, parse_target
from kbit.quantizers.settings import Nesting
from kbit.quantizers.stored import STORED

VERSION = 1
# What "method" may say besides the name: options of rounding, that nested widths are not mixed, and their anchor.
_OPTIONS, _UNIFORM, _ANCHOR = ("act_order", "static_scales"), "uniform", "anchor"


@dataclass(frozen=True)
class PlanFile:
    """What a plan file asks for.

    Attributes:
        path: of the file.
        fingerprint: of the model that it was made for; None: any.
        format: the model's format as its configuration names it.
        method: the method's name.
        texts, tokens, gradients: to calibrate on, as `CalibrationRequest.of` takes them; None where the method does
            not calibrate.
        targets: by the tensor's name, a format or how to keep it.
        act_order, static_scales: of the method (`CalibratedRounding.with_options`).
        uniform: nested matrices are not to have widths of their own.
        anchor: of nested widths the one that counts most; None: the usual one.
    """

    path: Path
    fingerprint: str | None
    format: Codec
    method: str
    texts: tuple[str, ...] | None
    tokens: int | None
    gradients: bool
    targets: Mapping[str, Codec | str]
    act_order: bool = False
    static_scales: bool = False
    uniform: bool = False
    anchor: int | None = None

    def check_model(self, source: CheckpointSource) -> None:
        """Refuse a model that the plan was not made for.

        Raises:
            UsageError: it is another one, or lacks a tensor of the plan.
        """
        for name, target in self.targets.items():
            info = source.tensors.get(name)
            if info is None:
                raise UsageError(f"{self.path}: {name}: {source.path} has no such tensor; kbit info lists its names")
            if not isinstance(target, str) and len(info.shape) != 2:
                raise UsageError(f"{self.path}: {name} has shape {info.shape}: only matrices can be quantized")
        if self.fingerprint is not None and self.fingerprint != source.fingerprint():
            raise UsageError(
                f"{self.path}: was made for another model than {source.path}, or the model's files have changed since; "
                'make the plan again with --save-plan, or remove its "fingerprint" to use it all the same'
            )

    def check_complete(self, plan: Plan) -> None:
        """Refuse a file that leaves open what becomes of a matrix.

        Raises:
            UsageError: a matrix of the plan made with these targets has no line.
        """
        for tensor in plan.tensors:
            if len(tensor.source.shape) == 2 and tensor.source.name not in self.targets:
                raise UsageError(f'{self.path}: has no line for {tensor.source.name}: give it a format, or "keep"')


def read_plan_file(path: Path) -> PlanFile:
    """A plan file.

    Raises:
        KbitError: it cannot be read or is not JSON.
        UsageError: an entry is missing or says what kbit does not know; the message names it.
    """
    found = read_json_object(path)
    version = found.get("kbit_plan")
    if version != VERSION:
        what = "is no plan of kbit's" if version is None else f"is a plan of version {version!r}, not {VERSION}"
        raise UsageError(f"{path}: {what}; kbit quantize MODEL --save-plan writes one")
    method, calibration = found.get("method"), found.get("calibration")
    if not isinstance(method, dict) or not isinstance(method.get("name"), str):
        raise UsageError(f'{path}: "method" names no method; write {{"name": "ldlq2"}}')
    lines, fingerprint = found.get("tensors"), found.get("fingerprint")
    if not isinstance(lines, dict):
        raise UsageError(f'{path}: "tensors" is missing')
    if fingerprint is not None and not isinstance(fingerprint, str):
        raise UsageError(f'{path}: "fingerprint" is no text')
    texts, tokens, gradients = _calibration(path, calibration)
    default = _target(path, '"format"', found.get("format"))
    if isinstance(default, str):
        raise UsageError(f'{path}: "format": {default} is no k-bit format')
    targets = {
        name: _target(path, name, line.get("to") if isinstance(line, dict) else line) for name, line in lines.items()
    }
    known = (*_OPTIONS, _UNIFORM)
    options = {option: method.get(option, False) for option in known}
    anchor = method.get(_ANCHOR)
    if anchor is not None and type(anchor) is not int:
        raise UsageError(f'{path}: "{_ANCHOR}" {str(anchor)[:40]} of "method" is no width; write one of the format\'s')
    if not set(method) <= {"name", *known, _ANCHOR} or not all(isinstance(value, bool) for value in options.values()):
        raise UsageError(
            f'{path}: "method" is a name, a width as "{_ANCHOR}", and true or false for any of {", ".join(known)}'
        )
    return PlanFile(
        path, fingerprint, default, method["name"], texts, tokens, gradients, targets, anchor=anchor, **options
    )


def write_plan_file(
    path: Path, source: CheckpointSource, plan: Plan, method: Method, costs: Mapping[str, float]
) -> None:
    """Write a plan for people to read and edit.

    Args:
        path: of the file; replaced if it is there.
        source: the model.
        plan: of it.
        method: who is to round.
        costs: predicted divergence of each quantized matrix, by name, where it is known.

    Raises:
        KbitError: it cannot be written.
    """
    lines: dict[str, dict[str, Any]] = {}
    for tensor in plan.tensors:
        if len(tensor.source.shape) == 2:
            lines[tensor.source.name] = {"to": STORED if tensor.as_stored else tensor.label, "bytes": tensor.nbytes}
            if tensor.source.name in costs:
                lines[tensor.source.name]["predicted_kl"] = float(f"{costs[tensor.source.name]:.4g}")
    head: dict[str, Any] = {
        "kbit_plan": VERSION,
        "model": str(source.path),
        "fingerprint": source.fingerprint(),
        "method": {"name": method.name},
    }
    if isinstance(method, CalibratedRounding):
        request = method.request
        head["method"] |= {option: True for option in _OPTIONS if getattr(method.rounding, option)}
        if method.nesting is not None and not method.nesting.mixed and method.request.gradients:
            head["method"][_UNIFORM] = True
        if method.nesting is not None and isinstance(plan.default_format, NestedFormat):
            usual = Nesting.of(plan.default_format.low, plan.default_format.bits)
            if method.nesting.anchor != usual.anchor:
                head["method"][_ANCHOR] = method.nesting.anchor
        texts = [text.name for text in request.texts] or "sampled"
        head["calibration"] = {"text": texts, "tokens": request.tokens, "gradients": request.gradients}
    head["format"] = str(plan.default_format)
    if costs:
        head["predicted_kl"] = float(f"{sum(costs.values()):.4g}")
    head["bytes"] = plan.bytes_after
    rows = [f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items()]
    tensors = ",\n".join(f"  {json.dumps(name)}: {json.dumps(line)}" for name, line in lines.items())
    text = "{\n" + "".join(rows) + ' "tensors": {\n' + tensors + "\n }\n}\n"
    try:
        write_durably(path, text.encode())
    except OSError as error:
        raise KbitError(f"{path}: cannot be written ({error.strerror}); choose another --save-plan") from None


def _target(path: Path, name: str, value: object) -> Codec | str:
    """What becomes of a tensor."""
    if not isinstance(value, str):
        raise UsageError(f'{path}: {name}: needs a format such as "nf4-b64", or "keep"')
    try:
        return parse_target(value)
    except KbitError as error:
        raise UsageError(f"{path}: {name}: {error}") from None


def _calibration(path: Path, value: object) -> tuple[tuple[str, ...] | None, int | None, bool]:
    """Texts, tokens, and whether gradients are measured."""
    if value is None:
        return None, None, True
    given = value if isinstance(value, dict) else {}
    texts, tokens, gradients = given.get("text", "sampled"), given.get("tokens"), given.get("gradients", True)
    texts = [texts] if isinstance(texts, str) else texts
    good = isinstance(texts, list) and all(isinstance(text, str) for text in texts) and isinstance(gradients, bool)
    if not isinstance(value, dict) or not good or not (tokens is None or type(tokens) is int):
        raise UsageError(
            f'{path}: "calibration" is not understood; write {{"text": "sampled", "tokens": null, "gradients": true}}'
        )
    return tuple(texts), tokens, gradients
