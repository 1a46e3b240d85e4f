"""`kbit eval` of an encoder-decoder: what it writes for the sources of a file, beside the references there."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kbit.cli.text_to_text import TextToTextFlags
from kbit.host.errors import UsageError

if TYPE_CHECKING:
    from kbit.cli.eval import EvalFlags
    from kbit.evaluate.pairs import PairsEvaluation

_TASKS = ("translation", "summarization")


def writes_from_sources(model: str) -> bool:
    """Whether a model is an encoder-decoder; one that cannot be read is left to who complains."""
    from kbit.models.families import spec_from_config
    from kbit.models.opening import open_model

    with open_model(model) as source:
        return spec_from_config(source.config, where=f"config of {source.path}").encoder is not None


def run_pairs(asked: EvalFlags, *, as_json: bool) -> None:
    """Measures and prints.

    Raises:
        UsageError, CheckpointError, UnsupportedError: see `kbit.evaluate.pairs` and `kbit.engine.text_to_text`.
    """
    from kbit.engine.text_to_text import TextToText
    from kbit.evaluate.pairs import evaluate_pairs, not_installed, read_pairs

    flags = _checked(asked)
    languages = (asked.source, asked.target)
    if len(missing := not_installed()) == 2:
        raise UsageError(missing[0])
    pairs = read_pairs(Path(str(asked.data)), asked.limit)
    with flags.opened(
        lambda source, backend: TextToText(source, backend, task=asked.task, languages=languages)
    ) as model:
        settings = model.with_settings(flags.beams, flags.max_tokens, flags.length_penalty)
        found = evaluate_pairs(model, pairs, settings, "truncate")
    if as_json:
        from kbit.cli.output import print_json

        print_json(
            {
                "model": flags.model,
                "data": asked.data,
                "task": asked.task,
                "beams": settings.beams,
                **asdict(found),
                "backend": model.model.backend.name,
                "backend_description": model.model.backend.describe(),
            }
        )
        return
    _print(found, flags.model, str(asked.data), model.model.backend.describe())


def _checked(asked: EvalFlags) -> TextToTextFlags:
    """The flags of generation, once those of `kbit eval` are known to make sense here.

    Raises:
        UsageError: one does not.
    """
    from kbit.cli.eval import refuse

    others = {
        "--reference": asked.reference,
        "--context": asked.context,
        "--convention": asked.convention,
        "--task-data": asked.task_data,
        "--items": asked.items,
        "--against": asked.against,
    }
    refuse(others, "goes with models that continue texts")
    if asked.task not in (None, *_TASKS):
        raise UsageError(f"--task {asked.task}: use one of {', '.join(_TASKS)}")
    if asked.limit is not None and asked.limit < 1:
        raise UsageError(f"--limit {asked.limit}: expected at least 1")
    if (asked.source, asked.target) != (None, None) and asked.task != "translation":
        raise UsageError("--from and --to need --task translation")
    flags = TextToTextFlags(
        asked.model,
        beams=asked.beams,
        max_tokens=asked.max_tokens,
        device=asked.device,
        backend=asked.backend,
        threads=asked.threads,
        compute=asked.compute,
        kv_bits=asked.kv_bits,
        bits=asked.bits,
    )
    flags.check()
    return flags


def _print(found: PairsEvaluation, model: str, data: str, backend: str) -> None:
    lines = {"model": model, "data": f"{data}, {found.pairs} pairs"}
    for name, label, value in (("bleu", "BLEU", found.bleu), ("chrf", "chrF", found.chrf)):
        if value is not None:
            lines[label] = f"{value:.2f} ({found.signatures[name]})"
    if found.rouge:
        scores = ", ".join(f"{kind.removeprefix('rouge')} {value:.2f}" for kind, value in found.rouge.items())
        lines["ROUGE"] = f"{scores} ({found.signatures['rouge']})"
    for reason in found.missing:
        lines[f"no {reason.split()[0]}"] = reason
    if found.unfinished:
        lines["cut off"] = f"{found.unfinished} texts, by the most tokens that one may have"
    lines["backend"] = backend
    lines["time"] = f"{found.seconds:.1f} s"
    for key, text in lines.items():
        typer.echo(f"{key + ':':<17}{text}")
