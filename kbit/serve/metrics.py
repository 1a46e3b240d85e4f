"""Figures for Prometheus, under the names that dashboards of other servers use, with "kbit:" before them."""

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
        return generate_latest(self._registry)


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
