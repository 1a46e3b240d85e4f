"""What `kbit plan` shows people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from kbit.planner.types import Candidate, Recommendation

_ROWS = 15


def print_listing(listing: dict[str, Any]) -> None:
    """The well-known models and GPUs."""
    for model in listing["models"]:
        typer.echo(f"{model['name']:<18}{model['parameters'] / 1e9:>8.3f} billion weights   {model['repository']}")
    typer.echo()
    for gpu in listing["gpus"]:
        bandwidth, memory = gpu["bandwidth_bytes_per_second"] / 1e9, gpu["memory_bytes"] / 1e9
        typer.echo(f"{gpu['name']:<18}{bandwidth:>6.0f} GB/s{memory:>6.0f} GB")


def print_recommendation(console: Any, result: Recommendation, everything: bool) -> None:
    """The table, and what to know about it."""
    from kbit.cli.output import printable, size

    shown = _shown(result, everything)
    if shown:
        console.print(_table(result, shown))
        hidden = len(result.candidates) - len(shown)
        if hidden:
            console.print(f"{hidden} more fit (--all)", highlight=False)
    for line in (_verdict(result), *_rejections(result, everything)):
        console.print(printable(line), highlight=False, markup=False, soft_wrap=True)
    parts = _legend(result, shown)
    if result.constant is not None:
        parts.append(f"memory includes {size(result.constant)} of Python, torch and libraries")
    if result.machine is not None:
        machine = result.machine
        parts.append(
            f"speeds: {machine.machine['cpu']} ({machine.machine['instruction_set']}), {machine.threads} "
            f"thread{'s' if machine.threads != 1 else ''}, {machine.compute} compute, "
            f"{machine.bandwidth / 1e9:.1f} GB/s, timed {machine.created}"
        )
    for line in (*parts, *result.notes):
        console.print(f"- {printable(line)}", highlight=False, markup=False, soft_wrap=True)


def _legend(result: Recommendation, shown: list[Candidate]) -> list[str]:
    """What the columns mean, as far as they are there."""
    lines = []
    if shown:
        lines.append("bits: stored, per weight of the whole model; KV: bits of keys and values")
    for model in {candidate.model.name: candidate.model for candidate in shown}.values():
        if model.active_parameters < model.total_parameters:
            total, active = model.total_parameters / 1e9, model.active_parameters / 1e9
            lines.append(
                f"{model.name}: {total:.3g} billion weights, of which a token goes through {active:.3g} billion"
            )
    for model in {candidate.model.name: candidate.model for candidate in shown if candidate.model.encodes}.values():
        tokens = model.tokens(result.request.context)
        lines.append(f"{model.name}: an encoder; memory and tokens/s are of texts of {tokens:,} tokens, one at a time")
    if any(result.tight(candidate) for candidate in shown):
        lines.append("!: fits only if the prediction is right to 3 %")
    if any(candidate.speed is not None for candidate in shown):
        lines.append("tokens/s: at the end of the context; prompt: tokens/s of reading a prompt that fills it")
    qualities = [candidate.known_quality for candidate in shown]
    if any(quality is not None for quality in qualities):
        text = "loss: nats per token, measured"
        if any(quality is not None and quality.basis != "measured" for quality in qualities):
            text += ", or with ~ by a law fitted to what was measured"
        lines.append(f"{text}; best: how often it is that on other text of the kind")
    return lines


def _shown(result: Recommendation, everything: bool) -> list[Candidate]:
    """The first candidates; of those ordered by the rule, one for each model."""
    if everything:
        return list(result.candidates)
    shown: list[Candidate] = []
    ruled: set[str] = set()
    several = len({candidate.model.name for candidate in result.candidates}) > 3
    for candidate in result.candidates:
        if not candidate.standing.compares and several:
            if candidate.model.name in ruled:
                continue
            ruled.add(candidate.model.name)
        shown.append(candidate)
    return shown[:_ROWS]


def _table(result: Recommendation, shown: list[Candidate]) -> Table:
    from rich.table import Table
    from rich.text import Text

    from kbit.cli.output import printable, size

    request = result.request
    title = f"{size(request.memory)}, {request.context:,} tokens of context"
    if request.min_speed is not None:
        title += f", {request.min_speed:g} tokens/s"
    names = _short_names(result)
    ties = sum(candidate.standing.tied for candidate in result.candidates)
    columns = ["model", "format", "bits", "KV", "memory"]
    timed = any(candidate.speed is not None for candidate in shown)
    compares = any(candidate.standing.probability is not None for candidate in shown)
    columns += ["tokens/s", "prompt"] if timed else []
    columns += ["loss", "best"] if compares else []
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in columns:
        left = name in ("model", "format")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "model", overflow="fold")
    for index, candidate in enumerate(shown):
        row: list[Text | str] = [
            Text(printable(names[candidate.model.name])),
            Text(printable(candidate.label)),
            f"{candidate.bits_per_weight:.2f}",
            candidate.kv.removeprefix("fp"),
            size(result.total(candidate)) + ("!" if result.tight(candidate) else " "),
        ]
        row += _speed(candidate) if timed else []
        row += [_loss(candidate), _standing(candidate, ties > 1)] if compares else []
        table.add_row(*row, style="bold" if index == 0 else None)
    return table


def _short_names(result: Recommendation) -> dict[str, str]:
    """Models by their last part, where that tells them apart."""
    full = {candidate.model.name for candidate in result.candidates}
    short = {name: Path(name).name or name for name in full}
    unique = {name for name in full if list(short.values()).count(short[name]) == 1}
    return {name: short[name] if name in unique else name for name in full}


def _speed(candidate: Candidate) -> list[Text | str]:
    """Decoding with its interval, and the prompt."""
    speed = candidate.speed
    if speed is None:
        return ["", ""]
    prompt = "" if speed.prefill is None else _short(speed.prefill)
    return [f"{_short(speed.decode)} ({_short(speed.low)} to {_short(speed.high)})", prompt]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _loss(candidate: Candidate) -> str:
    """The loss with half its interval; "~" from a law, "*" beyond what was measured."""
    quality = candidate.known_quality
    if quality is None:
        return "?"
    law = "" if quality.basis == "measured" else "~"
    return f"{law}{quality.nll:.3f} ±{(quality.high - quality.low) / 2:.3f}{'*' if quality.extrapolated else ' '}"


def _standing(candidate: Candidate, several: bool) -> str:
    probability = candidate.standing.probability
    if probability is None:
        return ""
    return f"{'tied ' if candidate.standing.tied and several else ''}{100 * probability:.0f} %"


def _verdict(result: Recommendation) -> str:
    """One or two sentences."""
    best = result.best
    if best is None:
        wanted = " and is fast enough" if result.request.min_speed is not None else ""
        return f"Nothing fits{wanted}."
    what = f"{best.model.name} {'as it is' if best.format is None else 'as ' + best.label}, cache {_cache(best)}"
    if result.by_rule:
        return f"By the rule, not by measurement: {what}."
    text = f"Least loss: {what}."
    tied = [c for c in result.candidates if c.standing.tied and c is not best]
    if tied:
        smallest = min(tied, key=lambda candidate: candidate.memory.peak)
        text += f" {len(tied)} more cannot be told from it on this text"
        if smallest.memory.peak < best.memory.peak:
            text += f"; the smallest of them is {smallest.model.name} {smallest.label}"
        text += "."
    return text


def _cache(candidate: Candidate) -> str:
    return f"of {candidate.kv.removeprefix('fp')} bits"


def _rejections(result: Recommendation, everything: bool) -> list[str]:
    lines = [f"{model}: {why}" for model, why in result.rejected]
    if len(lines) > 5 and not everything:
        lines = [*lines[:5], f"and {len(lines) - 5} more that do not fit or are too slow (--all)"]
    return lines
