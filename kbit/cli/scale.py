"""`kbit scale`: accuracy versus bits over models and formats, as a table, pictures and a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from kbit.cli.flag_groups import flag_groups
from kbit.cli.options import ENGINE, JsonOption
from kbit.cli.output import print_json, printable
from kbit.cli.run import INTERRUPTED
from kbit.cli.scale_output import complain, result_dict, show_plan, show_result

if TYPE_CHECKING:
    from kbit.scaling.sweep.plan import SweepPlan, SweepRequest
    from kbit.scaling.sweep.run import SweepResult

_FORMATS = "Formats"
_TEXT = "Text"


@dataclass(frozen=True)
class ScaleFlags:
    """Flags of `kbit scale`."""

    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Folders, .gguf files, hub ids, or names kbit pull lists."),
    ]
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the table, the pictures and the report.")
    ]
    bits: Annotated[str, typer.Option("--bits", metavar="2..8|2,3,4", help="Widths.", rich_help_panel=_FORMATS)] = (
        "2..8"
    )
    dtypes: Annotated[
        str,
        typer.Option(
            "--dtypes",
            metavar="NAMES",
            help="Data types: int, float, dynamic, quantile, nf, lloyd, with what follows the blocks in a format's "
            "name: int-asym, float-paper, nf-dq; float-e3 has three exponent bits. trellis, trellis-l12: without "
            "blocks. nested: one file of all these widths, and a point for each.",
            rich_help_panel=_FORMATS,
        ),
    ] = "nf,int,float"
    block_sizes: Annotated[
        str,
        typer.Option(
            "--block-sizes",
            metavar="N,N,row",
            help="Weights that share a scale; row: one scale per row.",
            rich_help_panel=_FORMATS,
        ),
    ] = "64"
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            metavar="NAMES",
            help="How codes are found. rtn: rounding to nearest; hqq: with offsets for small errors (-asym); outliers: "
            "rtn with 2 % of the input features in 16 bits; trellis and its kin have formats of their own.",
            rich_help_panel=_FORMATS,
        ),
    ] = "rtn"
    embedding_bits: Annotated[
        int | None,
        typer.Option(
            "--embedding-bits",
            metavar="N",
            help="Quantize embeddings and head too, to this many bits.",
            rich_help_panel=_FORMATS,
        ),
    ] = None
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="FILE_OR_NAME",
            help="A UTF-8 text file, the name of a text, or sampled: from the first MODEL (kbit eval --help).",
            rich_help_panel=_TEXT,
        ),
    ] = "wikitext2"
    max_tokens: Annotated[
        int,
        typer.Option("--max-tokens", metavar="N", help="Use at most N tokens of the text.", rich_help_panel=_TEXT),
    ] = 8192
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            metavar="N",
            help="Tokens per window, for all models. [default: what the shortest can take; at most 2048 (gptq), 512 "
            "(llamacpp)]",
            rich_help_panel=_TEXT,
        ),
    ] = None
    convention: Annotated[
        str,
        typer.Option(
            "--convention",
            metavar="gptq|llamacpp",
            help="Whose way of computing perplexity.",
            rich_help_panel=_TEXT,
        ),
    ] = "gptq"
    compute: Annotated[
        str,
        typer.Option(
            "--compute",
            metavar="fp32|bf16|int8",
            help="How all models run, the original included. fp32 shows the error of the weights alone.",
            rich_help_panel=ENGINE,
        ),
    ] = "fp32"
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            metavar="N",
            help="Points measured side by side. [default: as many as cores and memory allow]",
            rich_help_panel=ENGINE,
        ),
    ] = None
    threads: Annotated[
        int, typer.Option("--threads", metavar="N", help="CPU threads of each.", rich_help_panel=ENGINE)
    ] = 1
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            metavar="ADDRESS|local",
            help="Measure on a Ray cluster (pip install 'kbit[cluster]'): auto or host:port for a running one, local "
            "for one on this machine.",
            rich_help_panel=ENGINE,
        ),
    ] = None
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Use and keep what this machine has measured for any folder.")
    ] = True
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Fit laws, and write pictures and report.html.")
    ] = True
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the points, what is known, and the time it would take.")
    ] = False

    def request(self) -> SweepRequest:
        """What to measure.

        Raises:
            UsageError: a flag cannot be read.
        """
        from kbit.scaling.sweep.grid import parse_bits, parse_blocks, split_list
        from kbit.scaling.sweep.plan import SweepRequest

        return SweepRequest(
            models=tuple(self.models),
            out=self.out,
            bits=tuple(parse_bits(self.bits)),
            dtypes=tuple(split_list(self.dtypes, "--dtypes")),
            block_sizes=tuple(parse_blocks(self.block_sizes)),
            methods=tuple(split_list(self.methods, "--methods")),
            data=self.data,
            context=self.context,
            max_tokens=self.max_tokens,
            convention=cast(Any, self.convention),  # checked with the rest of the request
            embedding_bits=self.embedding_bits,
            compute=self.compute,
            jobs=self.jobs,
            threads=self.threads,
            cluster=self.cluster,
            cache=self.cache,
        )


@flag_groups()
def scale(*, flags: ScaleFlags, json: JsonOption = False) -> None:
    """Measure what each bit buys: every MODEL at every width, data type and block size, against the original.

    All run on the same windows of one text. DIR/points.jsonl holds a row for each point: loss, KL divergence from the
    original, top-1 agreement, bits of the linear layers and of the whole model, and the losses by cluster of text that
    error bars are made of. DIR/report.html shows them, with pictures and fitted laws.

    Nothing is measured twice. An interrupted or killed run continues where it stopped when the command is given again,
    more formats or models can be added to a folder later, and what was measured for another folder is taken over. Rows
    of one folder always compare: another text, context or arithmetic needs another folder.

    Combinations that do not exist (three exponent bits in three bits) are listed as left out.

    \b
    Examples:
      kbit scale smollm2-135m-instruct --bits 3,4,5 --max-tokens 4096 -o study/
      kbit scale small/ medium/ large/ --dtypes nf,int,float --block-sizes 64,128 --data mytext.txt -o study/
      kbit scale small/ medium/ large/ --dtypes nf,int,float --block-sizes 64,128 --data mytext.txt -o study/ --dry-run
      kbit scale small/ --bits 2..6 --dtypes nf,nested --methods ldlq2,trellis --data mytext.txt -o study/
      kbit scale small/ --dtypes int,int-asym,lloyd --block-sizes 32,64,row --methods rtn -o study/ --json
      kbit scale small/ medium/ large/ -o study/ --cluster auto --jobs 64
    """
    plan = _plan(flags.request(), quiet=json)
    if flags.dry_run:
        show_plan(plan, json)
        return
    result = _run(plan, quiet=json)
    files, conclusion = _report(result, quiet=json) if flags.report else ([], None)
    if json:
        print_json(result_dict(result, files, conclusion))
    else:
        show_result(result, files, conclusion)
    if result.failures:
        complain(result)
        raise typer.Exit(1)


def _plan(request: SweepRequest, quiet: bool) -> SweepPlan:
    """The plan, with a line on a terminal about what is being done."""
    from rich.console import Console
    from rich.markup import escape

    from kbit.scaling.sweep.plan import plan_sweep

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        return plan_sweep(request)
    with console.status("planning") as line:
        return plan_sweep(request, lambda text: line.update(escape(printable(text))))


def _run(plan: SweepPlan, quiet: bool) -> SweepResult:
    """The sweep, with its progress on stderr."""
    from kbit.cli.scale_view import Silent, progress_view
    from kbit.scaling.sweep.run import run_sweep

    view = Silent() if quiet else progress_view(plan)
    try:
        with view:
            return run_sweep(plan, view.update)
    except KeyboardInterrupt:
        typer.echo(
            f"\nkbit: interrupted; what is measured is in {printable(plan.request.out / 'points.jsonl')}, and the same "
            "command continues",
            err=True,
        )
        raise typer.Exit(INTERRUPTED) from None


def _report(result: SweepResult, quiet: bool) -> tuple[list[Path], str | None]:
    """Laws, pictures and page over all rows of the folder; the files written and the conclusion."""
    import shlex
    import sys

    from rich.console import Console

    from kbit.host.errors import KbitError
    from kbit.scaling.laws.conclusion import conclusion_text
    from kbit.scaling.laws.fit import fit_laws
    from kbit.scaling.report.write import write_report
    from kbit.scaling.sweep.plan import comparable_rows
    from kbit.scaling.sweep.run import write_text

    out = result.plan.request.out
    points, aside = comparable_rows(result.plan)
    if not points:
        return [], None
    if aside:
        typer.echo(
            f"note: {len(aside)} rows of {printable(out / 'points.jsonl')} are out of date: not reported", err=True
        )
    console = Console(stderr=True)
    if not quiet and console.is_terminal:
        console.print("fitting laws and drawing", highlight=False)
    try:
        laws = fit_laws(points)
        text: str | None = conclusion_text(laws)
        write_text(out / "laws.json", _json_text(laws.to_dict()))
    except KbitError as error:  # too little to fit anything
        typer.echo(f"note: {printable(error)}", err=True)
        laws, text = None, None
    left_out = [str(item) for item in result.plan.left_out]
    command = shlex.join(["kbit", *sys.argv[1:]])
    files = write_report(points, out, laws=laws, conclusion=text, left_out=left_out, command=command)
    return [out / "points.jsonl", *([out / "laws.json"] if laws is not None else []), *files], text


def _json_text(value: dict[str, Any]) -> str:
    import json

    return json.dumps(value, indent=1, allow_nan=False) + "\n"
