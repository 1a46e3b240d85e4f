"""`kbit check-gpu`: whether the kernels compute the right thing on this machine's GPU, and how fast."""

from __future__ import annotations

from typing import Annotated

import typer

from kbit.cli.options import JsonOption
from kbit.cli.output import print_json


def check_gpu(
    again: Annotated[bool, typer.Option("--again", help="Also where the GPU has passed already.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the random weights and activations.")] = 0,
    json: JsonOption = False,
) -> None:
    """Run every kernel on this machine's GPU against the reference, whole small models, and a few timings.

    Takes a few minutes. What was found is kept in the cache (KBIT_CACHE), for this GPU, its driver, and these versions
    of torch, triton and kbit: once it has passed, --device auto takes the GPU. Nothing is sent anywhere.

    Exit code 1 if a check failed.

    \b
    Examples:
      kbit check-gpu
      kbit check-gpu --again --json
    """
    from kbit.backends.checked import passed
    from kbit.gpu_check.check import check_machine, refuse_without_gpu
    from kbit.gpu_check.report import markdown

    of = refuse_without_gpu()
    found = None if again else passed(of)
    if found is None:
        found = check_machine(of, seed=seed, said=lambda line: typer.echo(line, err=True))
    if json:
        print_json(found)
    else:
        typer.echo(markdown(found))
    if not found["passed"]:
        raise typer.Exit(1)
