"""kbit export: a model for other programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kbit.cli.flag_groups import flag_groups
from kbit.cli.options import JsonOption
from kbit.host.errors import UsageError

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource, StoredSource

_FORMATS = ("safetensors", "compressed-tensors", "gguf")
_DTYPES = ("fp16", "bf16", "fp32")
_LOSS = "What rounding loses (with --requantize)"


@dataclass(frozen=True)
class ExportFlags:
    """Flags of `kbit export`."""

    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a .gguf file, a hub id, or a name kbit pull lists.")
    ]
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUTPUT", help="What to create.")]
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="|".join(_FORMATS),
            help="A folder of plain floats; of codes, as compressed-tensors (vLLM, transformers) reads them; or a file "
            "for llama.cpp.",
        ),
    ] = "safetensors"
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="|".join(_DTYPES),
            help="What floats become: fp16, bf16, or fp32, which holds every format's values exactly. [default: fp16 "
            "of plain floats; beside codes what they are, exactly]",
        ),
    ] = None
    bits: Annotated[
        float | None,
        typer.Option(
            "--bits",
            metavar="K",
            help="Bits to read a nested model at (kbit quantize --nested), 3.4 too where its widths are mixed. "
            "[default: the widest]",
        ),
    ] = None
    requantize: Annotated[
        str | None,
        typer.Option(
            "--requantize",
            metavar="FORMAT",
            help="Round what the other format cannot hold: int4-b128, int8-row, int4-b128-asym (2 to 8 bits), mxfp4, "
            "nvfp4 or fp8; of GGUF Q8_0, Q5_1, Q5_0, Q4_1 or Q4_0.",
        ),
    ] = None
    data: Annotated[
        str,
        typer.Option(
            "--data", metavar="FILE_OR_NAME", help="The text to measure it on, as of kbit eval.", rich_help_panel=_LOSS
        ),
    ] = "wikitext2"
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", help="Tokens of it.", rich_help_panel=_LOSS)
    ] = 8192
    shard_size: Annotated[
        float | None, typer.Option("--shard-size", help="Largest file of a folder, in GB. [default: 5]")
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Replace OUTPUT if kbit wrote it.")] = False
    no_resume: Annotated[bool, typer.Option("--no-resume", help="Start over instead of continuing.")] = False

    def check(self) -> None:
        """
        Raises:
            UsageError: a value that can be told wrong without opening anything.
        """
        if self.to not in _FORMATS:
            raise UsageError(f"--to {self.to}: kbit exports to {', '.join(_FORMATS)}")
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise UsageError(f"--dtype {self.dtype}: use {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}")
        if self.shard_size is not None and not 0 < self.shard_size < 1e6:
            raise UsageError(f"--shard-size {self.shard_size:g}: use a size in GB above 0")
        if self.shard_size is not None and self.to == "gguf":
            raise UsageError("--shard-size goes with folders: a GGUF file is one; split it with llama-gguf-split")
        if self.requantize is not None and self.to == "safetensors":
            raise UsageError(
                "--requantize goes with --to compressed-tensors and gguf: plain floats hold every format's values"
            )
        if self.requantize is not None and self.to == "compressed-tensors":
            from kbit.formats.grids import Grid

            Grid.parse(self.requantize)


@flag_groups()
def export(*, flags: ExportFlags, json: JsonOption = False) -> None:
    """Write a model as other programs read it.

    As plain floats (transformers, vLLM, llama.cpp's converter) quantized weights become the floats that they stand for,
    so the folder is as large as the original was, and computes what the quantized model computes. A .gguf file becomes
    a folder in the same way.

    compressed-tensors keeps codes as they are where it has a format for them: integers with a scale (kbit's own,
    GPTQ's, AWQ's, GGUF's symmetric types), MXFP4, NVFP4 and FP8. All else is refused, or rounded with --requantize;
    then the divergence from MODEL is measured and told (of a nested model from all its bits, whatever --bits says).

    gguf writes llama.cpp's names, settings and tokenizer, and codes as they are where a type has the numbers: integers
    of others with float16 scales (Q4_0, Q5_0, Q8_0), float offsets (Q4_1, Q5_1), MXFP4. What an architecture or a
    tokenizer's metadata cannot say is refused. A .gguf file is copied, its parts joined.

    \b
    Examples:
      kbit export out/ -o plain/
      kbit export model-Q4_K_M.gguf -o plain/ --dtype bf16
      kbit export out/ -o plain/ --dtype fp32
      kbit export gptq/ -o packed/ --to compressed-tensors
      kbit export nested/ -o plain/ --bits 4
      kbit export out/ -o packed/ --to compressed-tensors --requantize int4-b128 --dtype bf16
      kbit export gptq/ -o model.gguf --to gguf
      kbit export out/ -o model.gguf --to gguf --requantize Q8_0
    """
    from kbit.cli.output import print_json
    from kbit.cli.progress import progress_bars
    from kbit.models.opening import open_model

    flags.check()
    measure = None if flags.requantize is None else _measure(flags, quiet=json)
    with open_model(flags.model, flags.bits) as source, progress_bars() as progress:
        facts = _write(flags, source, lambda done, total: progress("writing", done, total))
    said = facts.pop("said")
    if measure is not None:
        facts |= measure()
        said += f"; KL(MODEL || OUTPUT) {facts['kl_mean']:.6f}"
        said += "" if facts["kl_stderr"] is None else f" +/- {facts['kl_stderr']:.6f}"
        said += f" nats/token on {facts['data']}"
    if json:
        print_json({"model": flags.model, "path": str(flags.output), "to": flags.to, **facts})
        return
    typer.echo(f"{flags.output}: {said}")


def _write(flags: ExportFlags, source: CheckpointSource, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Writes, and says what came of it: facts for JSON, and under "said" a line for people."""
    from kbit.checkpoint.source import StoredSource
    from kbit.cli.output import size
    from kbit.models.export import export_safetensors
    from kbit.models.export_packed import export_compressed_tensors

    shared: dict[str, Any] = {
        "shard_bytes": int((flags.shard_size or 5.0) * 1e9),
        "resume": not flags.no_resume,
        "overwrite": flags.force,
        "progress": progress,
    }
    if flags.to == "safetensors":
        dtype = flags.dtype or "fp16"
        plain = export_safetensors(source, flags.output, dtype, **shared)
        changed = f"rounded to {dtype}: relative error {plain.error:.1e}" if plain.error else "every value exact"
        facts = {"dtype": dtype, "bytes": plain.nbytes, "tensors": plain.tensors, "relative_error": plain.error}
        return {**facts, "said": f"{plain.tensors} tensors, {size(plain.nbytes)}, {changed}"}
    assert isinstance(source, StoredSource)
    if flags.to == "gguf":
        return _write_gguf(flags, source, progress)
    done = export_compressed_tensors(source, flags.output, dtype=flags.dtype, requantize=flags.requantize, **shared)
    changed = f"relative error {done.error:.1e}" if done.error else "every value exact"
    rounds = f" ({done.rounded} rounded to {flags.requantize})" if done.rounded else ""
    facts = {"dtype": flags.dtype, "bytes": done.nbytes, "packed": done.packed, "rounded": done.rounded}
    said = f"{done.packed} matrices of codes{rounds}, {done.plain} tensors of floats, {size(done.nbytes)}, {changed}"
    return {**facts, "plain": done.plain, "relative_error": done.error, "said": said}


def _write_gguf(flags: ExportFlags, source: StoredSource, progress: Callable[[int, int], None]) -> dict[str, Any]:
    from kbit.cli.output import size
    from kbit.models.export_gguf import export_gguf

    done = export_gguf(
        source,
        flags.output,
        dtype=flags.dtype,
        requantize=flags.requantize,
        overwrite=flags.force,
        progress=progress,
    )
    types = ", ".join(f"{count} {name}" for name, count in sorted(done.types.items()))
    changed = f"relative error {done.error:.1e}" if done.error else "every value exact"
    rounds = f" ({done.rounded} rounded to {flags.requantize})" if done.rounded else ""
    facts = {"dtype": flags.dtype, "bytes": done.nbytes, "types": done.types, "rounded": done.rounded}
    said = f"tensors: {types}{rounds}; {size(done.nbytes)}, {changed}"
    return {**facts, "relative_error": done.error, "said": said}


def _measure(flags: ExportFlags, quiet: bool) -> Callable[[], dict[str, Any]]:
    """What measures the output against the model, once it is there. A text that cannot be had or is short is told now.

    Both run in the same way and round nothing: what differs are the weights.
    """
    from kbit.evaluate.evaluation import Request, comparison_dict, evaluate_model, windows_of
    from kbit.models.opening import open_model

    request = Request(
        str(flags.output),
        flags.data,
        flags.model,
        max_tokens=flags.max_tokens,
        compute="fp32",
        reference_backend="native",
    )
    request.check()
    with open_model(flags.model) as source:
        windows_of(request, request.text(), source, None)

    def measure() -> dict[str, Any]:
        evaluation = evaluate_model(request)
        assert evaluation.comparison is not None
        return {
            "data": evaluation.data.name,
            "tokens": evaluation.result.tokens,
            **comparison_dict(evaluation.comparison),
        }

    return measure
