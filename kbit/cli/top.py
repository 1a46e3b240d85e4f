"""`kbit top`: what a running server is doing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kbit.cli.options import JsonOption
from kbit.cli.remote import DEFAULT_URL, KeyOption, server_address, server_key

if TYPE_CHECKING:
    from rich.console import RenderableType


def top(
    url: Annotated[str, typer.Argument(metavar="[URL]", help="Address of the server.")] = DEFAULT_URL,
    interval: Annotated[
        float, typer.Option("--interval", metavar="SECONDS", help="Time between two looks, over which rates are.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, print it and end.")] = False,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Watch a server: requests, tokens per second, what waits, how full the caches of keys and values are.

    All of it is from the server's /metrics and /v1/models, which other programs can read, too. Ctrl-C ends it. --json
    looks once.

    \b
    Examples:
      kbit top
      kbit top http://localhost:9000 --interval 5
      kbit top --once
    """
    from kbit.cli.output import print_json
    from kbit.host.errors import UsageError

    if not 0.1 <= interval <= 3600:
        raise UsageError(f"--interval {interval:g}: expected 0.1 to 3600 seconds")
    url, key = server_address(url), server_key(api_key)
    before = _look(url, key)
    time.sleep(interval)
    after = _look(url, key)
    shown = _compared(before, after)
    if as_json:
        print_json(shown)
        return
    from rich.console import Console

    console = Console()
    if once or not console.is_terminal:
        console = console if console.is_terminal else Console(width=160)  # in a pipe it would be 80
        console.print(_view(url, shown))
        return
    from rich.live import Live

    try:
        with Live(_view(url, shown), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                before, after = after, _look(url, key)
                live.update(_view(url, _compared(before, after)), refresh=True)
    except KeyboardInterrupt:
        return


def _look(url: str, key: str | None) -> dict[str, Any]:
    """Figures of a moment: {"time": ..., "models": [...], "samples": {(name, model): value}}.

    Raises:
        KbitError: nobody answers, or not as a server of kbit's does.
    """
    from json import loads

    from kbit.cli.remote import fetched
    from kbit.host.errors import KbitError, UsageError, one_line

    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ModuleNotFoundError:
        raise UsageError("kbit top needs prometheus_client: pip install 'kbit[serve]'") from None
    moment = time.monotonic()
    try:
        models = loads(fetched(f"{url}/v1/models", key))["data"]
        families = list(text_string_to_metric_families(fetched(f"{url}/metrics", key)))
        states = {str(model["id"]): str(model["state"]) for model in models}
    except (ValueError, KeyError, TypeError) as error:
        raise KbitError(f"{url}: does not answer as kbit serve does ({one_line(error, 100)})") from None
    samples = {
        (sample.name, sample.labels.get("model_name", "")): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }
    return {"time": moment, "models": states, "samples": samples}


def _compared(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What is shown: the figures of the second moment, and rates since the first."""
    samples: dict[tuple[str, str], float] = after["samples"]
    seconds = float(after["time"] - before["time"])

    def value(name: str, model: str = "", of: dict[tuple[str, str], float] = samples) -> float:
        return of.get((f"kbit:{name}", model), 0.0)

    def rate(name: str, model: str) -> float:
        # A server that was started anew counts from zero.
        return max(0.0, value(name, model) - value(name, model, before["samples"])) / seconds

    def mean(name: str, model: str) -> float | None:
        count = value(f"{name}_count", model)
        return value(f"{name}_sum", model) / count if count else None

    models = {}
    for model, state in after["models"].items():
        prompts = value("prefix_cache_queries_total", model)
        models[model] = {
            "state": state,
            "running": int(value("num_requests_running", model)),
            "waiting": int(value("num_requests_waiting", model)),
            "answered": int(value("request_success_total", model)),
            "generated_per_second": rate("generation_tokens_total", model),
            "prompt_per_second": rate("prompt_tokens_total", model),
            "kv_used": value("kv_cache_usage_perc", model),
            "cached_share": value("prefix_cache_hits_total", model) / prompts if prompts else None,
            "preemptions": int(value("num_preemptions_total", model)),
            "first_token_s": mean("time_to_first_token_seconds", model),
        }
    return {
        "models": models,
        "queued": int(value("num_requests_queued")),
        "refused": int(value("admission_rejections_total")),
    }


def _view(url: str, shown: dict[str, Any]) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from kbit.cli.output import printable

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", no_wrap=True)
    table.add_column("state", no_wrap=True)
    titles = ("running", "waiting", "answered", "tokens/s", "prompt/s", "KV", "cached", "preempted", "first token")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for name, row in shown["models"].items():
        first = row["first_token_s"]
        cells = [
            str(row["running"]),
            str(row["waiting"]),
            str(row["answered"]),
            f"{row['generated_per_second']:.1f}",
            f"{row['prompt_per_second']:.0f}",
            f"{row['kv_used']:.1%}",
            "-" if row["cached_share"] is None else f"{row['cached_share']:.0%}",
            str(row["preemptions"]),
            "-" if first is None else f"{first:.2f} s",
        ]
        table.add_row(Text(printable(name)), Text(row["state"]), *cells)
    head = f"{url}: {shown['queued']} queued, {shown['refused']} refused"
    return Group(Text(printable(head)), table)
