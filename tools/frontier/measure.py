"""Measuring points: one evaluator for kbit's methods and for peers. Every point is saved as soon as it is there."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from frontier.llama_cpp import LlamaCpp
from frontier.subjects import Subject, evaluation_text
from kbit.backends.select import select_backend
from kbit.calibration.request import CalibrationRequest
from kbit.calibration.run import calibrate
from kbit.checkpoint.source import CheckpointSource
from kbit.evaluate.compare import Comparison, compare
from kbit.evaluate.logits import StoredLogits
from kbit.evaluate.statistics import cluster
from kbit.formats.registry import parse_format
from kbit.host.errors import KbitError, UsageError
from kbit.host.files import read_json_object
from kbit.models.families import spec_from_config
from kbit.models.load import load_decoder
from kbit.models.opening import open_model
from kbit.quantizers.calibrated import CalibratedRounding
from kbit.quantizers.method import Method, MethodInput
from kbit.quantizers.methods import METHODS, get_method
from kbit.quantizers.mixed import Budget, mixed_formats
from kbit.quantizers.outlier_counts import with_outliers
from kbit.quantizers.plan import Plan, make_plan
from kbit.text.tokenizer import Tokenizer
from kbit.text.windows import choose_context, make_windows

Row = dict[str, Any]
PEER = "llama.cpp"
# How a format's name begins that stands for widths that are mixed, and ends where they are found quickly (--fast).
_MIXED, _FAST = "mixed", "-fast"
# Bits of what is no linear layer (embedding, head, norms), in kbit's points and in peers' alike.
OTHER_BITS = 16


class Frontier:
    """The rows of a file, and measuring more of them.

    Args:
        file: JSON lines; rows in it are not measured again.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        lines = file.read_text().splitlines() if file.is_file() else []
        self.rows: list[Row] = [json.loads(line) for line in lines if line.strip()]

    def measure(
        self,
        subject: Subject,
        pairs: Iterable[tuple[str, str]],
        peer: LlamaCpp | None,
        types: Iterable[str],
        say: Callable[[str], None],
        folders: Iterable[Path] = (),
    ) -> None:
        """Measure a model with methods of kbit, (method, format) pairs, as other quantizers' folders have it
        (`tools/peers/quantizers.py`), and in types of llama.cpp.

        Methods that there are not, and formats that a method has no use for, are said and passed over.

        Raises:
            KbitError: the model, its text or a peer's file cannot be read or made.
        """
        with ExitStack() as stack:
            source = stack.enter_context(open_model(subject.path))
            spec = spec_from_config(source.config)
            length = choose_context("gptq", subject.context, spec.max_positions)
            text = evaluation_text(subject)
            windows = make_windows(text, Tokenizer.from_source(source), "gptq", length, subject.tokens)
            digest = hashlib.sha256(windows.ids.tobytes()).hexdigest()[:16]
            # Equals the reference to rounding, and is quicker.
            backend = select_backend("cpu", compute="fp32")
            plain = make_plan(source, parse_format("int8-b64"))
            linear = sum(tensor.source.numel for tensor in plain.tensors if tensor.role == "linear")
            every = sum(tensor.source.numel for tensor in plain.tensors)
            reference = stack.enter_context(StoredLogits(load_decoder(source, backend), windows))
            about = {"model": subject.name, "data": text.name.rsplit("/", 1)[-1], "windows": digest, "context": length}

            def add(row: Row, bits: int, comparison: Comparison, seconds: dict[str, float]) -> None:
                sizes = {
                    "linear_bits": bits / linear,
                    "all_bits": (bits + OTHER_BITS * (every - linear)) / every,
                    **{name: round(value, 1) for name, value in seconds.items()},
                }
                self._add({**about, **row, **sizes, **_figures(comparison)})
                say(f"{subject.name}: {row['tool']} {row['method']} {row['format']}: {bits / linear:.3f} bits, "
                    f"KL {comparison.kl_mean:.5f}")  # fmt: skip

            for method_name, format_name in pairs:
                row = {"tool": "kbit", "method": method_name, "format": format_name}
                method = named_method(method_name)
                if method is None:
                    say(f"there is no method {method_name}: passed over")
                    continue
                row["version"] = method.version
                if self._has({**about, **row}):
                    continue
                try:
                    plan = named_plan(source, format_name, method)
                except UsageError as error:
                    say(str(error))
                    continue
                if isinstance(method, CalibratedRounding):
                    calibrate(source, method.request)  # kept: no part of the time below
                begin, begin_cpu = time.perf_counter(), time.process_time()
                made = method.apply(MethodInput(source, plan))
                decoder = load_decoder(made, backend)
                seconds = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - begin_cpu}
                bits = sum(
                    8 * tensor.nbytes + made.extra_bits(tensor.source.name)
                    for tensor in plan.tensors
                    if tensor.role == "linear"
                )
                add(row, bits, compare(decoder, reference, windows), seconds)
            roles = {tensor.source.name: tensor.role for tensor in plain.tensors}
            for folder in folders:
                made_by = read_json_object(folder / "peer.json")
                row = {"version": 1, **{key: made_by[key] for key in ("tool", "method", "format")}}
                if self._has({**about, **row}):
                    continue
                with open_model(str(folder)) as file:
                    comparison = compare(load_decoder(file, backend), reference, windows)
                    packed = 8 * sum(t.nbytes for name, t in file.tensors.items() if roles.get(name) == "linear")
                add(row, round(made_by.get("linear_bits", packed / linear) * linear), comparison, {})
            if peer is None:
                return
            _check_same(source, peer.original())
            for kind in types:
                row = {"tool": PEER, "method": "imatrix", "format": kind, "version": 1}
                if self._has({**about, **row}):
                    continue
                begin = time.perf_counter()
                path = peer.dequantized(kind)
                seconds = {"seconds": time.perf_counter() - begin}
                with open_model(str(path)) as file:
                    comparison = compare(load_decoder(file, backend), reference, windows)
                bits, kinds = peer.linear_bits(kind)
                add({**row, "types": kinds}, bits, comparison, seconds)

    def _has(self, row: Row) -> bool:
        return any(all(known.get(key) == value for key, value in row.items()) for known in self.rows)

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")


def named_method(name: str) -> Method | None:
    """A method; of "ldlq2:TEXT" calibrated on that text instead of one sampled from the model.

    Returns:
        None where there is no such method, or it is not calibrated.

    Raises:
        KbitError: the text cannot be had.
    """
    plain, colon, text = name.partition(":")
    method = get_method(plain) if plain in METHODS else None
    if not colon or method is None:
        return method
    return method.calibrated_on(CalibrationRequest.of([text])) if isinstance(method, CalibratedRounding) else None


def named_plan(source: CheckpointSource, format_name: str, method: Method) -> Plan:
    """One format for all linear layers; or, of "mixed3.25", widths of that many bits of them on average, all counted;
    of "mixed3.25-fast" in the formats that --fast takes.

    Raises:
        UsageError: the method has no use for it.
    """
    if not format_name.startswith(_MIXED):
        return with_outliers(source, make_plan(source, parse_format(format_name), method=method), method)
    if not isinstance(method, CalibratedRounding):
        raise UsageError(f"{method.name} does not weigh widths: {format_name} passed over")
    bits = float(format_name.removeprefix(_MIXED).removesuffix(_FAST))
    format = method.format(4, fast=format_name.endswith(_FAST))
    plain = with_outliers(
        source, make_plan(source, format or parse_format("nf4-b64"), method=method), method, planes=True
    )
    linear = sum(tensor.source.numel for tensor in plain.tensors if tensor.role == "linear")
    kept = sum(tensor.nbytes for tensor in plain.tensors if tensor.role != "linear")
    found = mixed_formats(source, plain, method, Budget(nbytes=int(linear * bits / 8) + kept), ())
    formats = {name: choice.format for name, choice in found.chosen.items()}
    return make_plan(source, plain.default_format, formats=formats, method=method)


def _check_same(source: CheckpointSource, path: Path) -> None:
    """
    Raises:
        KbitError: a file holds other weights than the model it was made from.
    """
    with open_model(str(path)) as file:
        for name in file.tensors:
            if not file.read(name).allclose(source.read(name), rtol=1e-6, atol=1e-9):
                raise KbitError(f"{path}: {name} is not that of {source.path}")


def _figures(comparison: Comparison) -> Row:
    """What is kept of a comparison: the figures, and sums by window for intervals."""
    kl = cluster(comparison.kl)
    return {
        "tokens": comparison.model.tokens,
        "kl": comparison.kl_mean,
        "kl_stderr": comparison.kl_stderr,
        "kl_p99.9": comparison.kl_percentile(99.9),
        "perplexity": comparison.model.perplexity,
        "original_perplexity": comparison.reference.perplexity,
        "top1": comparison.top1_agreement,
        "cluster_tokens": int(kl.sizes[0]) if np.ptp(kl.sizes) == 0 else kl.sizes.tolist(),
        "cluster_kl": [float(f"{value:.6g}") for value in kl.sums],
    }
