"""Figures for Prometheus: under the names of vLLM's dashboards, with "kbit:" before them, and under llama-server's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kbit.engine.answers import Usage
from kbit.engine.batch_engine import BatchEngine
from kbit.engine.engine_thread import EngineThread
from kbit.serve.models import Models

_Figure = tuple[str, Callable[[BatchEngine], float]]
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """What `/metrics` tells.

    Args:
        models: those that are served.
        thread: the engine's.
    """

    def __init__(self, models: Models, thread: EngineThread) -> None:
        self._models, self._thread = models, thread
        self._reading = self._writing = 0.0  # seconds, of prompts and of answers
        self._longest = self._embedded = self._embeddings = 0
        self._registry = CollectorRegistry()
        self._registry.register(_Engines(models, thread))

        def histogram(name: str, about: str) -> Histogram:
            return Histogram(f"kbit:{name}", about, ["model_name"], buckets=_SECONDS, registry=self._registry)

        self._queue = histogram("request_queue_time_seconds", "From a request's arrival to its first step.")
        self._first = histogram("time_to_first_token_seconds", "From a request's arrival to its first token.")
        self._whole = histogram("e2e_request_latency_seconds", "From a request's arrival to its end.")
        self._each = histogram("time_per_output_token_seconds", "Mean time between tokens of a request.")
        self._success = Counter(
            "kbit:request_success", "Requests that were answered.", ["model_name"], registry=self._registry
        )
        self._refused = Counter(
            "kbit:admission_rejections", "Requests that were refused as too much waited.", registry=self._registry
        )

    def answered(self, model: str, usage: Usage) -> None:
        """Counts a request that is done."""
        first = usage.seconds if usage.first_token_seconds is None else usage.first_token_seconds
        self._reading += first - usage.queue_seconds
        self._writing += usage.seconds - first
        self._longest = max(self._longest, usage.prompt_tokens + usage.completion_tokens)
        self._success.labels(model).inc()
        self._queue.labels(model).observe(usage.queue_seconds)
        self._whole.labels(model).observe(usage.seconds)
        if usage.first_token_seconds is not None:
            self._first.labels(model).observe(usage.first_token_seconds)
            if usage.completion_tokens > 1:
                each = (usage.seconds - usage.first_token_seconds) / (usage.completion_tokens - 1)
                self._each.labels(model).observe(each)

    def refused(self) -> None:
        """Counts a request that the queue had no room for."""
        self._refused.inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry) + self._llama_text().encode()

    def embedded(self, tokens: int) -> None:
        """Counts a request for vectors of texts with so many tokens."""
        self._embedded += tokens
        self._embeddings += 1

    def _llama_text(self) -> str:
        """What llama-server's dashboards ask for, of all models together."""
        engines = [engine for _, engine in self._models.with_engines()]
        done = [engine.counters for engine in engines]
        read = self._embedded + sum(each.prompt_tokens - each.cached_tokens for each in done)
        written = sum(each.generated_tokens for each in done)
        steps = sum(each.steps for each in done)
        waiting = self._thread.queued + sum(engine.waiting for engine in engines)
        figures: list[tuple[str, str, str, float]] = [
            ("prompt_tokens_total", "counter", "Tokens of prompts that were computed.", read),
            ("prompt_tokens_cached_total", "counter", "Those that were cached.", sum(e.cached_tokens for e in done)),
            ("prompt_seconds_total", "counter", "Time that prompts took.", self._reading),
            ("tokens_predicted_total", "counter", "Tokens that were generated.", written),
            (
                "tokens_predicted_seconds_total",
                "counter",
                "Time that answers took, after their first token.",
                self._writing,
            ),
            ("n_decode_total", "counter", "Passes of the models.", steps + self._embeddings),
            ("n_tokens_max", "counter", "Tokens of the longest prompt with its answer.", self._longest),
            (
                "spec_decode_num_draft_tokens_total",
                "counter",
                "Guesses that were checked.",
                sum(e.drafted_tokens for e in done),
            ),
            (
                "spec_decode_num_accepted_tokens_total",
                "counter",
                "Guesses that held.",
                sum(e.accepted_tokens for e in done),
            ),
            ("spec_decode_num_drafts_total", "counter", "How often was guessed.", sum(e.drafts for e in done)),
            ("prompt_tokens_seconds", "gauge", "Tokens of prompts a second.", _ratio(read, self._reading)),
            ("predicted_tokens_seconds", "gauge", "Tokens of answers a second.", _ratio(written, self._writing)),
            ("requests_processing", "gauge", "Sequences that have pages.", sum(engine.running for engine in engines)),
            ("requests_deferred", "gauge", "Requests and sequences that wait.", waiting),
            (
                "n_busy_slots_per_decode",
                "gauge",
                "Sequences of a pass, the mean.",
                _ratio(sum(e.sequences for e in done), steps),
            ),
        ]
        lines = []
        for name, kind, about, value in figures:
            lines += [f"# HELP llamacpp:{name} {about}", f"# TYPE llamacpp:{name} {kind}", f"llamacpp:{name} {value}"]
        return "\n".join(lines) + "\n"


def _ratio(count: float, by: float) -> float:
    return count / by if by else 0.0


class _Engines(Collector):
    """What the engines say of themselves when they are asked."""

    def __init__(self, models: Models, thread: EngineThread) -> None:
        self._models = models
        self._thread = thread

    def collect(self) -> Iterable[Metric]:
        engines = [(model.name, engine) for model, engine in self._models.with_engines()]
        yield from self._gauges()
        gauges: dict[str, _Figure] = {
            "num_requests_running": ("Sequences that have pages.", lambda e: e.running),
            "num_requests_waiting": ("Sequences that wait for pages or a seat.", lambda e: e.waiting),
            "kv_cache_usage_perc": (
                "Part of the pages that sequences use.",
                lambda e: 1 - e.pool.available / max(1, e.pool.count),
            ),
        }
        for name, (about, value) in gauges.items():
            gauge = GaugeMetricFamily(f"kbit:{name}", about, labels=["model_name"])
            for model, engine in engines:
                gauge.add_metric([model], value(engine))
            yield gauge
        counters: dict[str, _Figure] = {
            "num_preemptions": ("Sequences that lost their pages to others.", lambda e: e.preemptions),
            "prefix_cache_queries": ("Tokens of prompts.", lambda e: e.counters.prompt_tokens),
            "prefix_cache_hits": ("Tokens of prompts that were cached.", lambda e: e.counters.cached_tokens),
            "prompt_tokens": ("Tokens of prompts.", lambda e: e.counters.prompt_tokens),
            "generation_tokens": ("Tokens that were generated.", lambda e: e.counters.generated_tokens),
            "spec_decode_num_draft_tokens": ("Guesses that were checked.", lambda e: e.counters.drafted_tokens),
            "spec_decode_num_accepted_tokens": ("Guesses that held.", lambda e: e.counters.accepted_tokens),
            "engine_steps": ("Passes of the model.", lambda e: e.counters.steps),
        }
        for name, (about, value) in counters.items():
            counter = CounterMetricFamily(f"kbit:{name}", about, labels=["model_name"])
            for model, engine in engines:
                counter.add_metric([model], value(engine))
            yield counter

    def _gauges(self) -> Iterator[Metric]:
        queued = GaugeMetricFamily("kbit:num_requests_queued", "Requests that have not begun.")
        queued.add_metric([], self._thread.queued)
        yield queued
