"""`kbit bench`: how fast a model is on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kbit.cli.flag_groups import flag_groups
from kbit.cli.options import (
    DEFAULT_MODEL,
    BackendOption,
    BitsOption,
    ComputeOption,
    DeviceOption,
    JsonOption,
    KvBitsOption,
)

if TYPE_CHECKING:
    from kbit.engine.loader import LoadedModel
    from kbit.planner.bench import Bench

_MOST_TOKENS = 1 << 20


@flag_groups()
def bench(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a .gguf file, a hub id, or a name kbit pull lists.")
    ] = DEFAULT_MODEL,
    *,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="N,...", help="Tokens of prompts to time; 0: none.")
    ] = "512",
    generate: Annotated[
        str, typer.Option("--generate", "-n", metavar="N,...", help="Tokens to decode one by one; 0: none.")
    ] = "64",
    depth: Annotated[
        str, typer.Option("--depth", "-d", metavar="N,...", help="Tokens of context that are there before.")
    ] = "0,512",
    threads: Annotated[
        str | None,
        typer.Option("--threads", "-t", metavar="N,...", help="CPU threads. [default: one per physical core]"),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", "-r", metavar="N", help="Runs of everything, in turns.")] = 5,
    bits: BitsOption = None,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    compute: ComputeOption = None,
    kv_bits: KvBitsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time a model: loading it, prompts (pp) and decoding (tg), by length of the context and number of threads.

    The lines are llama-bench's, and so is what they mean: the model alone, on random tokens. A figure is the median of
    all runs, beside it what their middle half lies between; one more run before them is not counted. Decoding without a
    context is held against the rate at which this machine's memory can be read, which is measured, too; a model that
    fits into the processor's caches goes beyond it.

    \b
    Examples:
      kbit bench
      kbit bench out/ --threads 1,2,4 --depth 0,1024,4096
      kbit bench model.gguf -p 512 -n 128 -r 9 --json
    """
    from kbit.cli.output import print_json
    from kbit.cli.progress import progress_bars
    from kbit.host.errors import UsageError
    from kbit.planner.bench import Case
    from kbit.planner.bench import bench as measure
    from kbit.planner.machine import other_work

    if not 1 <= repeats <= 1000:
        raise UsageError(f"--repeats {repeats}: expected 1 to 1000")
    depths = _numbers("--depth", depth, least=0)
    cases = [Case("prompt", tokens, at) for tokens in _numbers("--prompt", prompt, 0) if tokens for at in depths]
    cases += [Case("decode", tokens, at) for tokens in _numbers("--generate", generate, 0) if tokens for at in depths]
    if not cases:
        raise UsageError("--prompt 0 --generate 0: there is nothing to time")
    counts: list[int | None] = [None] if threads is None else list(_numbers("--threads", threads, 1))
    _check_threads(counts)

    def load(count: int | None, check: Any) -> LoadedModel:
        from kbit.engine.loader import load_model

        return load_model(
            model, device, count, backend=backend, compute=compute, kv_bits=kv_bits, bits=bits, check=check
        )

    busy = other_work()
    with progress_bars() as progress:
        found = measure(load, lambda: _is_prepared(model), cases, counts, repeats, progress)
        peak = _peak()
        read_rates = _read_rates(found, compute, progress)
    result = _result(found, read_rates, peak, busy)
    if as_json:
        print_json(result)
    else:
        _print(result)


def _numbers(flag: str, text: str, least: int) -> list[int]:
    """Whole numbers of a list, each once.

    Raises:
        UsageError: it is none.
    """
    from kbit.host.errors import UsageError

    words = text.split(",")
    if not all(word.strip().isdecimal() and least <= int(word) <= _MOST_TOKENS for word in words):
        raise UsageError(f"{flag} {text}: expected whole numbers from {least} to {_MOST_TOKENS}, as in 128,512")
    return list(dict.fromkeys(int(word) for word in words))


def _check_threads(counts: list[int | None]) -> None:
    from kbit.backends.select import check_threads

    for count in counts:
        if count is not None:
            check_threads(count)


def _is_prepared(model: str) -> bool:
    from kbit.checkpoint.prepared_place import prepared_path
    from kbit.checkpoint.resolve import locate

    place = locate(model)
    path = None if place is None else prepared_path(place)
    return path is not None and path.is_file()


def _peak() -> int | None:
    from kbit.host.process import peak_rss_bytes

    return peak_rss_bytes()


def _read_rates(found: Bench, compute: str | None, progress: Any) -> dict[int | None, float]:
    """Bytes per second that memory is read at, by threads; none where the native kernels do not run."""
    if found.loaded.backend_name != "native":
        return {}
    from kbit.host.cpu import default_threads
    from kbit.planner.kernel_timing import Timer

    counts = list(dict.fromkeys(row.threads for row in found.timed))
    rates = {}
    for done, count in enumerate(counts, start=1):
        rates[count] = Timer(count or default_threads(), "int8").bandwidth()
        progress("reading memory", done, len(counts))
    return rates


def _result(found: Bench, read_rates: dict[int | None, float], peak: int | None, busy: float | None) -> dict[str, Any]:
    """What --json prints."""
    from statistics import median

    from kbit.host.cpu import default_threads
    from kbit.planner.machine import describe_machine

    loaded = found.loaded
    results = []
    for row in found.timed:
        share = None
        if row.case.kind == "decode" and not row.case.depth and row.threads in read_rates:
            share = row.middle * found.read_bytes / read_rates[row.threads]
        low, high = row.quartiles
        results.append(
            {
                "test": str(row.case),
                "kind": row.case.kind,
                "tokens": row.case.tokens,
                "depth": row.case.depth,
                "threads": row.threads or default_threads(),
                "tokens_per_second": row.middle,
                "quartiles": [low, high],
                "all": row.rates,
                "bandwidth_share": share,
            }
        )
    return {
        "model": loaded.name,
        "family": loaded.decoder.spec.family,
        "backend": loaded.backend_description,
        "bits": loaded.bits,
        "machine": describe_machine(),
        "busy_processors": busy,
        "load_s": median(found.loads),
        "loads_s": found.loads,
        "prepare_s": found.prepared_seconds,
        "weights_bytes": loaded.decoder.weights.nbytes,
        "bytes_read_per_token": found.read_bytes,
        "kv_bytes_per_token": found.kv_bytes,
        "peak_rss_bytes": peak,
        "read_bytes_per_second": {str(count or default_threads()): rate for count, rate in read_rates.items()},
        "results": results,
    }


def _print(result: dict[str, Any]) -> None:
    from kbit.cli.output import printable, size
    from kbit.planner.machine import BUSY

    machine, loads = result["machine"], result["loads_s"]
    typer.echo(printable(f"{result['model']} ({result['family']}) on {machine['cpu']}"))
    typer.echo(printable(result["backend"]))
    times = f" (median of {len(loads)}, {min(loads):.2f} to {max(loads):.2f})" if len(loads) > 1 else ""
    prepare = (
        "" if result["prepare_s"] is None else f"; {result['prepare_s']:.2f} s the first time, preparing the weights"
    )
    typer.echo(f"load {result['load_s']:.2f} s{times}{prepare}")
    read = size(result["bytes_read_per_token"])
    peak = "" if result["peak_rss_bytes"] is None else f"; process at most {size(result['peak_rss_bytes'])}"
    typer.echo(
        f"weights {size(result['weights_bytes'])}, of which a token reads {read}; keys and values "
        f"{size(result['kv_bytes_per_token'])} per token{peak}"
    )
    for count, rate in result["read_bytes_per_second"].items():
        typer.echo(f"memory is read at {rate / 1e9:.1f} GB/s by {count} thread{'s' if count != '1' else ''}")
    if (result["busy_processors"] or 0) > BUSY:
        typer.echo(f"other programs keep {result['busy_processors']:.1f} processors busy: these figures are disturbed")
    middle = f"middle half of {len(result['results'][0]['all'])} runs"
    typer.echo(f"\n{'threads':>7}  {'test':<16}{'tokens/s':>10}  {middle:<26}of bandwidth")
    for row in result["results"]:
        low, high = row["quartiles"]
        share = "" if row["bandwidth_share"] is None else f"{row['bandwidth_share']:.0%}"
        spread = f"{low:.1f} to {high:.1f}"
        typer.echo(
            f"{row['threads']:>7}  {row['test']:<16}{row['tokens_per_second']:>10.1f}  {spread:<26}{share}".rstrip()
        )
