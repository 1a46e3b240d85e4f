"""What the routes of a server share."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter, time
from typing import Any, cast

from starlette.requests import Request as HttpRequest

from kbit.engine.answers import Event, Finish, Piece, Progress, Request, Usage
from kbit.serve.bridge import Bridge
from kbit.serve.metrics import Metrics
from kbit.serve.models import Models, ServedModel
from kbit.serve.schemas import SamplingFields

# An engine that has work and ends no step for so long is not well.
STALLED_SECONDS = 30.0


@dataclass(eq=False)
class Server:
    """A server's parts.

    Attributes:
        models, bridge, metrics: its own.
        started: when, in seconds since 1970.
        without: routes that are switched off: "metrics", "slots", "page".
    """

    models: Models
    bridge: Bridge
    metrics: Metrics
    started: float
    without: frozenset[str] = frozenset()

    def run(self, model: ServedModel, request: Request) -> AsyncIterator[Event]:
        """What a request is answered, which is counted.

        Raises:
            KbitError: it cannot be taken, or failed.
        """
        return self.bridge.events(model.generating(), request, partial(self.metrics.answered, model.name))


def server_of(http: HttpRequest) -> Server:
    """The server that an HTTP request came to."""
    return cast(Server, http.app.state.server)


def new_id(prefix: str) -> str:
    """A name for an answer."""
    return f"{prefix}{secrets.token_hex(12)}"


def head(prefix: str, kind: str, model: ServedModel) -> dict[str, Any]:
    """How an answer begins."""
    return {
        "id": new_id(prefix),
        "object": kind,
        "created": int(time()),
        "model": model.name,
        "system_fingerprint": f"build-{model.fingerprint}",
    }


def finish_reason(finish: Finish | None) -> str | None:
    """OpenAI's word for why an answer ended."""
    return finish if finish in (None, "stop") else "length"


def usage_dict(usages: list[Usage | None]) -> dict[str, Any]:
    """Tokens of some requests, as OpenAI counts them."""
    known = [usage for usage in usages if usage is not None]
    prompt = sum(usage.prompt_tokens for usage in known)
    completion = sum(usage.completion_tokens for usage in known)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in known)},
    }


def timings(usages: list[Usage | None]) -> dict[str, Any]:
    """What some requests took, for people who tune: kbit's figures, and llama.cpp's, which many programs show.

    The first token comes from the pass over the prompt's end, so the speed of generation counts those after it.
    """
    known = [usage for usage in usages if usage is not None]
    firsts = [usage.first_token_seconds for usage in known if usage.first_token_seconds is not None]
    cached = sum(usage.cached_tokens for usage in known)
    read = sum(usage.prompt_tokens for usage in known) - cached
    written = sum(usage.completion_tokens for usage in known)
    reading = 1e3 * sum((u.first_token_seconds or u.seconds) - u.queue_seconds for u in known)
    writing = 1e3 * sum(u.seconds - u.first_token_seconds for u in known if u.first_token_seconds is not None)
    later = written - len(firsts)
    return {
        "queue_ms": max((usage.queue_seconds for usage in known), default=0.0) * 1e3,
        "total_ms": max((usage.seconds for usage in known), default=0.0) * 1e3,
        "cache_n": cached,
        "prompt_n": read,
        "prompt_ms": reading,
        "prompt_per_token_ms": reading / read if read else 0.0,
        "prompt_per_second": 1e3 * read / reading if reading > 0 else 0.0,
        "predicted_n": written,
        "predicted_ms": writing,
        "predicted_per_token_ms": writing / later if later > 0 else 0.0,
        "predicted_per_second": 1e3 * later / writing if later > 0 and writing > 0 else 0.0,
        **({"first_token_ms": min(firsts) * 1e3} if firsts else {}),
    }


class Meter:
    """What a stream tells while it goes on, as llama.cpp's clients ask for it: how far the prompt is, and the times.

    Args:
        progress, timings: whether each of them is asked for (`return_progress`, `timings_per_token`).
    """

    def __init__(self, *, progress: bool, timings: bool) -> None:
        self._progress, self._timings = progress, timings
        self._last = Progress(0, 0, 0, 0.0)
        self._at = perf_counter()  # when the prompt's first token went through the model, nearly
        self._tokens = 0
        self._first: float | None = None

    def see(self, event: Event) -> None:
        """Notes what comes from the engine."""
        if isinstance(event, Progress):
            self._last, self._at = event, perf_counter() - event.seconds
        elif isinstance(event, Piece):
            self._tokens += 1
            if self._first is None:
                self._first = perf_counter() - self._at

    def progress(self) -> dict[str, Any] | None:
        """What is told of the last `Progress`, or None where it is not asked for."""
        if not self._progress:
            return None
        last = self._last
        told = {"total": last.total, "cache": last.cached, "processed": last.processed}
        return {"prompt_progress": {**told, "time_ms": last.seconds * 1e3}, **self.timings()}

    def timings(self) -> dict[str, Any]:
        """The times so far, where they are asked for; else nothing."""
        if not self._timings:
            return {}
        last = self._last
        seconds = last.seconds if self._first is None else perf_counter() - self._at
        usage = Usage(last.processed, last.cached, self._tokens, 0.0, self._first, seconds)
        return {"timings": timings([usage])}


def meter_of(body: SamplingFields) -> Meter:
    """Of a request's stream."""
    return Meter(progress=body.return_progress, timings=body.timings_per_token)
