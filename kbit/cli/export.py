"""kbit export: a model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kbit.cli.options import JsonOption


def export(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a hub id, or a name kbit pull lists.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to create.")],
    to: Annotated[str, typer.Option("--to", help="safetensors: a folder of plain floats.")] = "safetensors",
    dtype: Annotated[
        str, typer.Option("--dtype", help="fp16, bf16, or fp32, which holds every format's values exactly.")
    ] = "fp16",
    shard_size: Annotated[float, typer.Option("--shard-size", help="Largest output file, in GB.")] = 5.0,
    force: Annotated[bool, typer.Option("--force", help="Replace OUTPUT if kbit wrote it.")] = False,
    no_resume: Annotated[bool, typer.Option("--no-resume", help="Start over instead of continuing.")] = False,
    json: JsonOption = False,
) -> None:
    """Write a model as transformers, vLLM and llama.cpp's converter read it.

    Weights that are quantized become the floats that they stand for, so the folder is as large as the original was, and
    computes what the quantized model computes. A .gguf file becomes a folder in the same way.

    \b
    Examples:
      kbit export out/ -o plain/
      kbit export model-Q4_K_M.gguf -o plain/ --dtype bf16
      kbit export out/ -o plain/ --dtype fp32
    """
    from kbit.cli.output import print_json, size
    from kbit.cli.progress import progress_bars
    from kbit.host.errors import UsageError
    from kbit.models.opening import open_model

    if to != "safetensors":
        raise UsageError(f"--to {to}: kbit exports to safetensors only")
    if dtype not in ("fp16", "bf16", "fp32"):
        raise UsageError(f"--dtype {dtype}: use fp16, bf16 or fp32")
    if not 0 < shard_size < 1e6:
        raise UsageError(f"--shard-size {shard_size:g}: use a size in GB above 0")
    from kbit.models.export import export_safetensors

    with open_model(model) as source, progress_bars() as progress:
        done = export_safetensors(
            source,
            output,
            dtype,
            shard_bytes=int(shard_size * 1e9),
            resume=not no_resume,
            overwrite=force,
            progress=lambda done, total: progress("writing", done, total),
        )
    if json:
        facts = {"model": model, "path": str(output), "dtype": dtype, "bytes": done.nbytes, "tensors": done.tensors}
        print_json({**facts, "relative_error": done.error})
        return
    change = f"rounded to {dtype}: relative error {done.error:.1e}" if done.error else "every value exact"
    typer.echo(f"{output}: {done.tensors} tensors, {size(done.nbytes)}, {change}")
