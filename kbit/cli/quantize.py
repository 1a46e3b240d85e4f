"""kbit quantize: a checkpoint in, a k-bit folder out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kbit.cli.flag_groups import flag_groups
from kbit.cli.options import JsonOption, ThreadsOption
from kbit.host.errors import UsageError

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource
    from kbit.formats.codec import Codec
    from kbit.quantizers.method import Method
    from kbit.quantizers.plan import Plan

_MAX_SHARD_GB = 1_000_000


@dataclass(frozen=True)
class QuantizeFlags:
    """Flags of `kbit quantize`."""

    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a hub id, or a name kbit pull lists.")]
    bits: Annotated[int | None, typer.Option("--bits", help="Bits per code, 2 to 8.  [default: 4]")] = None
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
    format: Annotated[
        str | None,
        typer.Option("--format", help="The whole format in one string (nf4-b64-dq), instead of the flags above."),
    ] = None
    method: Annotated[
        str, typer.Option("--method", help="How codes are found; kbit scale --methods takes the same.")
    ] = "rtn"
    embedding_bits: Annotated[
        int | None, typer.Option("--embedding-bits", help="Quantize embeddings and head too, to this many bits.")
    ] = None
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--override", help="PATTERN=FORMAT (or =keep, =f16, =bf16, =f32) for matching tensor names; repeatable."
        ),
    ] = None
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to create.  [default: <model>-<format>]")
    ] = None
    shard_size: Annotated[float, typer.Option("--shard-size", help="Largest output file, in GB.")] = 5.0
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Continue an interrupted run, or discard it and start over.")
    ] = True
    force: Annotated[bool, typer.Option("--force", help="Replace a finished model in the output folder.")] = False
    threads: ThreadsOption = None
    device: Annotated[
        str,
        typer.Option(
            "--device", metavar="cpu|cuda", help="Who rounds: the CPU, or a GPU. The result is the same, byte for byte."
        ),
    ] = "cpu"

    def codec(self) -> Codec:
        """The format of linear weights.

        Raises:
            UsageError: a setting that does not exist, or one that --format says already.
        """
        from kbit.formats.quant_format import QuantFormat, default_dtype
        from kbit.formats.registry import parse_format

        fields: dict[str, Any] = {
            "dtype": self.dtype.lower() if self.dtype else None,
            "bits": self.bits,
            "block_size": self.block_size,
            "asymmetric": self.asymmetric or None,
            "exponent_bits": self.exponent_bits,
            "grid": self.float_grid,
            "scale_dtype": self.scale_dtype,
            "double_quant": self.double_quant or None,
        }
        given = {name: value for name, value in fields.items() if value is not None}
        if self.format is None:
            given = {"bits": 4, **given}
            return QuantFormat(**{"dtype": default_dtype(given["bits"]), **given})
        if given:
            field = next(iter(given)).replace("_", " ")
            raise UsageError(f"--format {self.format}: says everything; drop the flag that gives its {field}")
        return parse_format(self.format)

    def check(self) -> None:
        """Look for mistakes that show before the model is opened.

        Raises:
            UsageError: a flag is out of range.
            UnsupportedError: --device cuda where there is no GPU.
        """
        from kbit.formats.quant_format import MAX_BITS, MIN_BITS

        if not 0 < self.shard_size <= _MAX_SHARD_GB:
            raise UsageError(f"--shard-size {self.shard_size}: use a size in GB, above 0 and at most {_MAX_SHARD_GB}")
        bits = self.embedding_bits
        if bits is not None and bits != 16 and not MIN_BITS <= bits <= MAX_BITS:
            raise UsageError(f"--embedding-bits {bits}: use {MIN_BITS} to {MAX_BITS}, or 16 to keep them")
        if self.device not in ("cpu", "cuda"):
            raise UsageError(f"--device {self.device}: use cpu or cuda")
        if self.device == "cuda":
            from kbit.backends.select import select_backend

            select_backend("cuda")

    def plan(self, source: CheckpointSource, codec: Codec, method: Method) -> Plan:
        """What becomes of every tensor."""
        from kbit.quantizers.plan import make_plan

        return make_plan(
            source,
            codec,
            embedding_bits=self.embedding_bits,
            overrides=[_split_override(text) for text in self.override or ()],
            shard_bytes=int(self.shard_size * 1e9),
            method=method,
        )


@flag_groups()
def quantize(*, flags: QuantizeFlags, json: JsonOption = False) -> None:
    """Convert a model to k-bit weights, by rounding to nearest unless another method is named.

    Tensors are read and written one at a time, so memory does not grow with the model. A killed run continues
    where it stopped when the same command is given again, and OUTPUT appears only once it is complete.

    \b
    Examples:
      kbit quantize smollm2-135m-instruct --bits 4
      kbit quantize smollm2-135m-instruct --bits 3 --dtype nf --block-size 64 -o out/
      kbit quantize path/to/model --format nf4-b64-dq --embedding-bits 8
      kbit quantize path/to/model --bits 3 --override '*.down_proj.weight=nf4-b32' --dry-run
      kbit quantize path/to/model --bits 4 --device cuda
    """
    from kbit.checkpoint.resolve import open_model
    from kbit.checkpoint.writer import check_output_folder, finished_plan
    from kbit.cli.output import print_json
    from kbit.quantizers.methods import get_method
    from kbit.quantizers.plan import check_disk

    codec = flags.codec()
    flags.check()
    method = get_method(flags.method, to_store=True)
    with open_model(flags.model) as source:
        _check_runnable(source)
        plan = flags.plan(source, codec, method)
        out = flags.output or Path(f"{_short_name(flags.model)}-{codec}")
        disk = check_disk(plan, out)
        if finished_plan(out) != plan.plan_id:
            check_output_folder(out, overwrite=flags.force)
        facts = _facts(source, plan, out, disk)
        _note_quantized_source(plan)
        if flags.dry_run:
            if json:
                print_json({**facts, "dry_run": True})
            else:
                _print_plan(facts, plan)
            return
        facts.update(_convert(source, plan, out, flags))
    if json:
        print_json(facts)
    else:
        _print_result(facts, out)


def _check_runnable(source: CheckpointSource) -> None:
    """Refuse now what kbit could not run after the conversion."""
    from kbit.models.check import check_tensors
    from kbit.models.families import spec_from_config

    check_tensors(source, spec_from_config(source.config, where=f"config of {source.path}"))


def _note_quantized_source(plan: Plan) -> None:
    """Say on stderr what surprises people whose source is quantized already (most GGUF files)."""
    formats = {
        tensor.source.stored_as for tensor in plan.tensors if not tensor.source.stored_as.startswith(("F", "BF"))
    }
    if formats:
        typer.echo(
            f"note: the source is quantized already ({', '.join(sorted(formats))}): its errors stay, and what is kept "
            "takes 16 bits (--embedding-bits 8 quantizes embeddings and head)",
            err=True,
        )


def _convert(source: CheckpointSource, plan: Plan, out: Path, flags: QuantizeFlags) -> dict[str, Any]:
    import time

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from kbit.backends.select import set_threads
    from kbit.quantizers.convert import convert, on_gpu
    from kbit.quantizers.plan import TensorPlan

    set_threads(flags.threads)
    begin = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("quantizing", total=len(plan.tensors))

        def on_tensor(tensor: TensorPlan) -> None:
            bar.update(task, advance=1, description=f"{tensor.source.name} {tensor.label}")

        encode = on_gpu() if flags.device == "cuda" else None
        done = convert(
            source, plan, out, resume=flags.resume, overwrite=flags.force, on_tensor=on_tensor, encode=encode
        )
        bar.update(task, completed=len(plan.tensors), description="done")
    return {
        "seconds": time.perf_counter() - begin,
        "written_tensors": done.written,
        "resumed_tensors": done.resumed,
        "already_complete": done.already_complete,
    }


def _facts(source: CheckpointSource, plan: Plan, out: Path, disk: int) -> dict[str, Any]:
    return {
        "model": str(source.path),
        "output": str(out),
        "format": str(plan.default_format),
        "method": plan.method.name,
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "bits_per_weight": plan.bits_per_weight(),
        "bits_per_weight_linear": plan.bits_per_weight("linear"),
        "peak_memory_bytes": plan.peak_memory,
        "disk_bytes": disk,
        "tensors": {
            tensor.source.name: {
                "from": tensor.source.stored_as,
                "to": tensor.label,
                "shape": list(tensor.source.shape),
                "bytes": tensor.nbytes,
            }
            for tensor in plan.tensors
        },
    }


def _print_result(facts: dict[str, Any], out: Path) -> None:
    """What was done, for people."""
    from kbit.cli.output import size

    if facts["already_complete"]:
        typer.echo(f"{out}: already complete, nothing to do (--force makes it anew)")
        return
    again = f", {facts['resumed_tensors']} tensors kept from an interrupted run" if facts["resumed_tensors"] else ""
    typer.echo(
        f"{out}: {size(facts['bytes_before'])} -> {size(facts['bytes_after'])}, "
        f"{facts['bits_per_weight']:.3f} bits per weight ({facts['bits_per_weight_linear']:.3f} in linear layers), "
        f"{facts['seconds']:.1f} s{again}"
    )


def _print_plan(facts: dict[str, Any], plan: Plan) -> None:
    from kbit.cli.output import size

    typer.echo(f"{'tensor':<52}{'shape':>16}  {'from':<10}{'to':<18}{'bytes':>10}")
    for name, row in facts["tensors"].items():
        shape = " x ".join(str(dim) for dim in row["shape"])
        typer.echo(f"{name:<52}{shape:>16}  {row['from']:<10}{row['to']:<18}{size(row['bytes']):>10}")
    linear = plan.bits_per_weight("linear")
    typer.echo(
        f"\nsize             {size(plan.bytes_before)} -> {size(plan.bytes_after)}\n"
        f"bits per weight  {plan.bits_per_weight():.3f} in all, {linear or 0:.3f} in linear layers\n"
        f"peak memory      about {size(plan.peak_memory)}\n"
        f"disk needed      {size(facts['disk_bytes'])} in {facts['output']}\n"
        "nothing was written (--dry-run)"
    )


def _split_override(text: str) -> tuple[str, str]:
    pattern, equals, format = text.rpartition("=")
    if not equals:
        raise UsageError(f"--override {text!r}: write PATTERN=FORMAT, for example '*.down_proj.weight=int8-b64'")
    return pattern, format


def _short_name(model: str) -> str:
    name = Path(model).name or Path(model).resolve().name
    return name.removesuffix(".gguf")
