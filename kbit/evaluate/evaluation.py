"""One evaluation from start to end: open, tokenise, cut, run, compare; and its result as plain data."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kbit.backends.select import set_threads
from kbit.checkpoint.source import CheckpointSource
from kbit.engine.loader import prefer_tuned
from kbit.evaluate.compare import KL_PERCENTILES, Comparison, check_vocabularies, compare
from kbit.evaluate.perplexity import PerplexityResult, Progress, evaluate_perplexity
from kbit.evaluate.request import EngineRequest
from kbit.evaluate.sampled_data import evaluation_text, is_sampled
from kbit.graph.backend import Backend
from kbit.host.errors import KbitError, UsageError
from kbit.host.process import peak_rss_bytes
from kbit.models.check import check_continues
from kbit.models.decoder import Decoder
from kbit.models.families import spec_from_config
from kbit.models.load import load_decoder
from kbit.models.opening import open_model
from kbit.models.shard import shard
from kbit.text.datasets import TextData
from kbit.text.tokenizer import Tokenizer
from kbit.text.windows import CONVENTIONS, Convention, Windows, choose_context, make_windows

if TYPE_CHECKING:
    from kbit.backends.parallel import Group


@dataclass(frozen=True)
class Request(EngineRequest):
    """What to evaluate, and who computes (EngineRequest).

    Attributes:
        model, reference: a folder, a .gguf file, a hub id or a name `kbit pull` lists.
        data: a text file, the name of a text (kbit.text.datasets), or "sampled": by the reference
            (kbit.evaluate.sampled_data).
        max_tokens: use at most so many tokens of the text, rounded down to whole windows.
        context: tokens per window (default: the convention's, reduced to what the models can take).
        convention: "gptq" or "llamacpp" (kbit.text.windows).
    """

    model: str
    data: str = "wikitext2"
    reference: str | None = None
    max_tokens: int | None = None
    context: int | None = None
    convention: str = "gptq"

    def check(self) -> None:
        """
        Raises:
            UsageError: a value that can be told wrong without opening anything.
        """
        super().check()
        parse_convention(self.convention)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"--max-tokens {self.max_tokens}: expected at least 1")
        if self.reference is None and is_sampled(self.data):
            raise UsageError("--data sampled: the text is sampled from the original: name it with --reference")

    def text(self, status: Callable[[str], None] = lambda _: None) -> TextData:
        """The text.

        Args:
            status: told how far sampling one is.

        Raises:
            UsageError, KbitError: see `evaluation_text`.
        """
        return evaluation_text(self.data, self.reference or self.model, self.max_tokens, status)


@dataclass(frozen=True, eq=False)
class Evaluation:
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
        shown: dict[str, Any] = {
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
            shown |= {
                "reference": self.request.reference,
                "reference_backend": self.reference_backend,
                **comparison_dict(self.comparison),
            }
        return shown


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
    request: Request,
    progress: Progress | None = None,
    status: Callable[[str], None] | None = None,
    group: Group | None = None,
) -> Evaluation:
    """Measure a model's perplexity on a text and, given a reference, how far it is from that.

    What can be wrong with the request is checked before any weight is read.

    Args:
        progress: called after every window.
        status: told what is being done before the first window.
        group: processes among which the models are split (`kbit.backends.parallel`), this one among them; all must
            ask for the same.

    Raises:
        UsageError: a wrong option, too short a text, or models with different tokenizers.
        KbitError: data or checkpoints that cannot be read.
    """
    say = status or (lambda _: None)
    with ExitStack() as stack:
        with nullcontext() if group is None else group.together():
            backend, reference_backend = _backends(request, group)
            source = stack.enter_context(open_model(request.model, request.bits))
            other = None if request.reference is None else stack.enter_context(open_model(request.reference))
            for each in filter(None, (source, other)):  # before a text is fetched or sampled
                check_continues(spec_from_config(each.config, where=f"config of {each.path}"), str(each.path))
            text = request.text(say)
            say("tokenising")
            windows = windows_of(request, text, source, other)
        if group is not None:
            _check_same_windows(windows, group)
        reference = None
        with nullcontext() if group is None else group.together():
            say("loading the model")
            decoder = _load(source, backend, group)
            if other is not None:
                say("loading the reference")
                reference = _load(other, reference_backend, group)
        started = time.perf_counter()
        comparison = None if reference is None else compare(decoder, reference, windows, progress)
        result = evaluate_perplexity(decoder, windows, progress) if comparison is None else comparison.model
        seconds = time.perf_counter() - started
    exact = None if reference is None else reference_backend.describe()
    return Evaluation(request, text, windows, backend.describe(), exact, seconds, result, comparison)


def _backends(request: Request, group: Group | None) -> tuple[Backend, Backend]:
    """Who runs the model, and who would run a reference; of a group, this process's share of both.

    Raises:
        UsageError, UnsupportedError: an impossible choice.
    """
    request.check()
    set_threads(request.threads)
    backend, reference_backend = request.backends()
    if group is not None:
        from kbit.backends.parallel import split

        backend = split(backend, group)
        reference_backend = reference_backend if request.reference is None else split(reference_backend, group)
    prefer_tuned(backend)
    return backend, reference_backend


def windows_of(
    request: Request, text: TextData, source: CheckpointSource, reference: CheckpointSource | None
) -> Windows:
    """The text in tokens, cut as the convention wants it and the models can take it.

    Raises:
        UsageError: see evaluate_model.
    """
    sources = [source] if reference is None else [source, reference]
    longest = min(_longest_window(each, request.context) for each in sources)
    convention = parse_convention(request.convention)
    context = choose_context(convention, request.context, longest)
    windows = make_windows(text, Tokenizer.from_source(source), convention, context, request.max_tokens)
    if reference is not None:
        _check_same_tokens(source, reference, windows, text, request.max_tokens)
    return windows


def _load(source: CheckpointSource, backend: Backend, group: Group | None) -> Decoder:
    """A model, or this process's share of it."""
    return load_decoder(source if group is None else shard(source, group.rank, group.size), backend)


def _check_same_windows(windows: Windows, group: Group) -> None:
    """
    Raises:
        KbitError: some process reads other tokens than the first; together they would compute nonsense.
    """
    digest = hashlib.sha256(repr(windows.ids.shape).encode() + windows.ids.tobytes()).hexdigest()
    first = group.decided_by_first(lambda: digest)
    with group.together():
        if digest != first:
            raise KbitError(
                "this process has another text or another tokenizer than the first: give all the same files"
            )


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
    check_continues(spec, str(source.path))
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
