"""One evaluation from start to end: open, tokenise, cut, run, compare; and its result as plain data."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from kbit.checkpoint.resolve import open_model
from kbit.checkpoint.source import CheckpointSource
from kbit.engine.loader import prefer_tuned
from kbit.engine.process import peak_rss_bytes
from kbit.engine.tokenizer import Tokenizer
from kbit.errors import UsageError
from kbit.evaluate.compare import KL_PERCENTILES, Comparison, check_vocabularies, compare
from kbit.evaluate.datasets import TextData, resolve_data
from kbit.evaluate.perplexity import PerplexityResult, Progress, evaluate_perplexity
from kbit.evaluate.windows import CONVENTIONS, Convention, Windows, choose_context, make_windows
from kbit.models.families import spec_from_config
from kbit.models.load import load_decoder
from kbit.ops.backend import Backend
from kbit.ops.select import select_backend, set_threads


@dataclass(frozen=True)
class Request:
    """What to evaluate.

    Attributes:
        model, reference: a folder, a .gguf file, a hub id or a name `kbit pull` lists.
        data: a text file or the name of a text (kbit.evaluate.datasets).
        max_tokens: use at most so many tokens of the text, rounded down to whole windows.
        context: tokens per window (default: the convention's, reduced to what the models can take).
        convention: "gptq" or "llamacpp" (kbit.evaluate.windows).
        device: "auto", "cpu" or "cuda".
        threads: CPU threads, also of torch for the whole process; None takes one per physical core and leaves torch's.
        backend, compute, kv_bits: who runs the model, and how (`kbit.ops.select.select_backend`).
        reference_backend: who runs the reference: "reference" (exactly), or "native", computing as the model does.
    """

    model: str
    data: str = "wikitext2"
    reference: str | None = None
    max_tokens: int | None = None
    context: int | None = None
    convention: str = "gptq"
    device: str = "auto"
    threads: int | None = None
    backend: str = "auto"
    compute: str | None = None
    kv_bits: int | None = None
    reference_backend: str = "reference"


@dataclass(frozen=True, eq=False)
class EvaluationReport:
    """What one evaluation measured.

    Attributes:
        request: what was asked for.
        data: the text.
        windows: the windows it was cut into.
        backend: one line about what ran the model.
        reference_backend: the same about the reference, where there is one.
        seconds: time spent running the models.
        result: the model's losses.
        comparison: the model against the reference, where there is one.
    """

    request: Request
    data: TextData
    windows: Windows
    backend: str
    reference_backend: str | None
    seconds: float
    result: PerplexityResult
    comparison: Comparison | None

    def to_dict(self) -> dict[str, Any]:
        """Numbers and strings for JSON. Errors are None where a single cluster leaves them unknown."""
        result = self.result
        report: dict[str, Any] = {
            "model": self.request.model,
            "data": self.data.name,
            "data_origin": self.data.origin,
            "data_sha256": self.data.sha256,
            "data_layout": self.data.layout,
            "data_note": self.data.note,
            "convention": result.convention,
            "context": result.context,
            "windows": result.windows,
            "tokens": result.tokens,
            "text_tokens": self.windows.stream_tokens,
            "perplexity": result.perplexity,
            "perplexity_stderr": result.perplexity_stderr,
            "perplexity_stderr_tokens": result.perplexity_stderr_tokens,
            "stderr_clusters": result.clusters,
            "mean_nll": result.mean_nll,
            "backend": self.backend,
            "seconds": self.seconds,
            "tokens_per_second": self.windows.count * (self.windows.context - 1) / max(self.seconds, 1e-9),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        if self.comparison is not None:
            report |= {
                "reference": self.request.reference,
                "reference_backend": self.reference_backend,
                **comparison_dict(self.comparison),
            }
        return report


def comparison_dict(comparison: Comparison) -> dict[str, Any]:
    """The figures of a comparison under their JSON names (kl_p99, delta_nll_ci95, ...)."""
    interval = comparison.delta_nll_interval()
    percentiles = {f"kl_p{percent:g}": comparison.kl_percentile(percent) for percent in KL_PERCENTILES}
    return {
        "reference_perplexity": comparison.reference.perplexity,
        "reference_perplexity_stderr": comparison.reference.perplexity_stderr,
        "kl_mean": comparison.kl_mean,
        "kl_stderr": comparison.kl_stderr,
        **percentiles,
        "kl_max": comparison.kl_max,
        "top1_agreement": comparison.top1_agreement,
        "top1_stderr": comparison.top1_stderr,
        "delta_nll": comparison.delta_nll,
        "delta_nll_stderr": comparison.delta_nll_stderr,
        "delta_nll_ci95": None if interval is None else list(interval),
    }


def evaluate_model(
    request: Request, progress: Progress | None = None, status: Callable[[str], None] | None = None
) -> EvaluationReport:
    """Measure a model's perplexity on a text and, given a reference, how far it is from that.

    What can be wrong with the request is checked before any weight is read.

    Args:
        progress: called after every window.
        status: told what is being done before the first window.

    Raises:
        UsageError: a wrong option, too short a text, or models with different tokenizers.
        KbitError: data or checkpoints that cannot be read.
    """
    say = status or (lambda _: None)
    convention = parse_convention(request.convention)
    if request.max_tokens is not None and request.max_tokens < 1:
        raise UsageError(f"--max-tokens {request.max_tokens}: expected at least 1")
    set_threads(request.threads)
    backend, reference_backend = _backends(request)
    text = resolve_data(request.data)
    with ExitStack() as stack:
        source = stack.enter_context(open_model(request.model))
        other = None if request.reference is None else stack.enter_context(open_model(request.reference))
        sources = [source] if other is None else [source, other]
        longest = min(_longest_window(each, request.context) for each in sources)
        context = choose_context(convention, request.context, longest)
        say("tokenising")
        windows = make_windows(text, Tokenizer.from_source(source), convention, context, request.max_tokens)
        if other is not None:
            _check_same_tokens(source, other, windows, text, request.max_tokens)
        say("loading the model")
        decoder = load_decoder(source, backend)
        comparison = None
        if other is None:
            started = time.perf_counter()
            result = evaluate_perplexity(decoder, windows, progress)
        else:
            say("loading the reference")
            reference = load_decoder(other, reference_backend)
            started = time.perf_counter()
            comparison = compare(decoder, reference, windows, progress)
            result = comparison.model
        seconds = time.perf_counter() - started
    exact = None if other is None else reference_backend.describe()
    return EvaluationReport(request, text, windows, backend.describe(), exact, seconds, result, comparison)


def _backends(request: Request) -> tuple[Backend, Backend]:
    """Who runs the model, and who the reference.

    Raises:
        UsageError: an impossible choice.
    """
    how: dict[str, Any] = {"threads": request.threads, "compute": request.compute, "kv_bits": request.kv_bits}
    backend = select_backend(request.device, backend=request.backend, **how)
    prefer_tuned(backend)
    if request.reference_backend == "reference":
        return backend, select_backend(request.device, backend="reference")
    if request.reference_backend != "native":
        raise UsageError(f"--reference-backend {request.reference_backend}: use reference or native")
    if backend.name == "native":
        return backend, backend
    return backend, select_backend(request.device, backend="native", threads=request.threads)


def parse_convention(name: str) -> Convention:
    """The convention of that name, or a UsageError that lists them."""
    for convention in CONVENTIONS:
        if name == convention:
            return convention
    raise UsageError(f"--convention {name}: choose one of {', '.join(CONVENTIONS)}")


def _longest_window(source: CheckpointSource, context: int | None) -> int:
    """Tokens per window a model can take: its context length, or less where windows cannot be cut into pieces.

    Raises:
        UsageError: `context` asks for more than such a model's pieces allow.
    """
    spec = spec_from_config(source.config, where=f"config of {source.path}")
    longest = spec.longest_in_pieces  # as windows go through the model (kbit.evaluate.logits)
    if spec.rope.depends_on_length and context is not None and context > longest:
        raise UsageError(
            f"--context {context}: {source.path} has {spec.rope.kind} RoPE, whose rotation depends on the length of "
            f"the text beyond {longest} tokens, and is evaluated up to there only: use --context {longest} or less"
        )
    return longest


def _check_same_tokens(
    source: CheckpointSource, reference: CheckpointSource, windows: Windows, text: TextData, max_tokens: int | None
) -> None:
    """Raises UsageError unless both models read the text as the same tokens out of equally large vocabularies."""
    sizes = [spec_from_config(each.config).vocab_size for each in (source, reference)]
    check_vocabularies(*sizes)
    theirs = make_windows(text, Tokenizer.from_source(reference), windows.convention, windows.context, max_tokens)
    if theirs.ids.shape != windows.ids.shape or (theirs.ids != windows.ids).any():
        raise UsageError(
            f"the tokenizers of the model and the reference differ ({windows.stream_tokens} and "
            f"{theirs.stream_tokens} tokens of {text.name}, vocabularies of {sizes[0]} and {sizes[1]}): "
            "compare models that share a tokenizer"
        )
