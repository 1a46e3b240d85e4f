"""Flags of `kbit quantize`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from kbit.cli.options import ThreadsOption
from kbit.quantizers.request import QuantizeRequest


@dataclass(frozen=True)
class QuantizeFlags(QuantizeRequest):
    """Flags of `kbit quantize`."""

    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a hub id, or a name kbit pull lists.")]
    bits: Annotated[
        float | None,
        typer.Option(
            "--bits", help="Bits per weight, 2 to 8; 3.25, say, is a mean over the linear layers.  [default: 4]"
        ),
    ] = None
    size: Annotated[
        str | None, typer.Option("--size", metavar="80MB", help="Size of the weight files, instead of --bits.")
    ] = None
    max_kl: Annotated[
        float | None,
        typer.Option("--max-kl", metavar="NATS", help="The fewest bits that cost no more KL divergence per token."),
    ] = None
    uniform: Annotated[
        bool, typer.Option("--uniform", help="One width for all linear layers; so does naming a data type or format.")
    ] = False
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="Data type: int, float, dynamic, quantile, nf or lloyd.  [default: nf at 3 and 4 bits, int at 8, "
            "lloyd otherwise]",
        ),
    ] = None
    block_size: Annotated[
        int | None,
        typer.Option(
            "--block-size", help="Weights that share a scale: 16 to 4096, 0 for one scale per row.  [default: 64]"
        ),
    ] = None
    asymmetric: Annotated[bool, typer.Option("--asym", help="int only: an offset per block.")] = False
    exponent_bits: Annotated[int | None, typer.Option("--exponent-bits", help="float only.  [default: 2]")] = None
    float_grid: Annotated[
        str | None, typer.Option("--float-grid", help="float only: ocp, paper or bnb.  [default: ocp]")
    ] = None
    scale_dtype: Annotated[str | None, typer.Option("--scale-dtype", help="fp16, bf16 or fp32.  [default: fp16]")] = (
        None
    )
    double_quant: Annotated[
        bool, typer.Option("--double-quant", help="8-bit scales with one fp32 factor per 256 blocks.")
    ] = False
    nested: Annotated[
        str | None,
        typer.Option(
            "--nested",
            metavar="2..8",
            help="One file for several widths, each of which reads its own bytes only: kbit run --bits 3.4, and "
            "/bits 3 in kbit chat. Calibrated, widths are mixed unless --uniform.",
        ),
    ] = None
    anchor: Annotated[
        int | None,
        typer.Option(
            "--anchor",
            metavar="K",
            help="The width of --nested that counts most where widths compete.  [default: 4, or the nearest]",
        ),
    ] = None
    format: Annotated[
        str | None,
        typer.Option("--format", help="The whole format in one string (nf4-b64-dq), instead of the flags above."),
    ] = None
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="How codes are found: auto (ldlq2 where it can), ldlq2-tuned (much slower), ldlq2, gptq, search, awq, "
            "hqq, rtn (no calibration, seconds); trellis, trellis-tuned, trellis-plain (codes that take fewer bits, "
            "and longer to decode). kbit scale --methods takes the same.",
        ),
    ] = "auto"
    fast: Annotated[
        bool,
        typer.Option("--fast", help="trellis: windows of 12 bits in place of 16, found in a fraction of the time."),
    ] = False
    time_budget: Annotated[
        str | None,
        typer.Option(
            "--time-budget",
            metavar="10m",
            help="auto takes the most accurate method that is estimated to be done in this time (90s, 10m, 1h30m).",
        ),
    ] = None
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            metavar="TEXT",
            help="A text file or a named text to calibrate on; repeatable.  [default: sampled from the model itself]",
        ),
    ] = None
    calibration_tokens: Annotated[
        int | None, typer.Option("--calibration-tokens", help="Tokens to calibrate on.  [default: by the model's size]")
    ] = None
    inputs_only: Annotated[
        bool, typer.Option("--inputs-only", help="Calibrate without gradients: sooner, and less accurate.")
    ] = False
    static_scales: Annotated[
        bool,
        typer.Option("--static-scales", help="ldlq2, gptq: choose scales for the weights before errors are passed on."),
    ] = False
    act_order: Annotated[
        bool,
        typer.Option(
            "--act-order", help="ldlq2, gptq: round the most important columns first; implies --static-scales."
        ),
    ] = False
    embedding_bits: Annotated[
        int | None,
        typer.Option(
            "--embedding-bits",
            help="Bits of embeddings and head; 16 keeps them.  [default: 6 with a calibrated method, else 16]",
        ),
    ] = None
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            help="PATTERN=FORMAT (or =keep, =f16, =bf16, =f32; =stored for what the model holds quantized already) for "
            "matching tensor names; repeatable.",
        ),
    ] = None
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to create.  [default: <model>-<format>]")
    ] = None
    shard_size: Annotated[float, typer.Option("--shard-size", help="Largest output file, in GB.")] = 5.0
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure",
            help="After a calibrated method, say how far the result is from the original.",
        ),
    ] = True
    save_plan: Annotated[
        Path | None,
        typer.Option(
            "--save-plan",
            metavar="FILE",
            help="Write the plan to a JSON file (a format per matrix, what it costs), for editing, and stop.",
        ),
    ] = None
    plan_file: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="Quantize as a file from --save-plan says, edited or not."),
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Continue an interrupted run, or discard it and start over.")
    ] = True
    force: Annotated[bool, typer.Option("--force", help="Replace a finished model in the output folder.")] = False
    threads: ThreadsOption = None
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="cpu|cuda",
            help="Who rounds to nearest and searches for trellis codes: the CPU, or a GPU. The same bytes result.",
        ),
    ] = "cpu"
