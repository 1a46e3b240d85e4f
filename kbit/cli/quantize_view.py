"""What `kbit quantize` shows: the plan, and what was done."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource
    from kbit.quantizers.allocate import Allocation
    from kbit.quantizers.plan import Plan


def note_quantized_source(plan: Plan) -> None:
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


def facts_of(
    source: CheckpointSource, plan: Plan, out: Path, disk: int, allocation: Allocation | None
) -> dict[str, Any]:
    """Everything about a plan, for JSON."""
    weighed: dict[str, Any] = {}
    if allocation is not None:
        weighed = {"predicted_kl": allocation.cost, "predicted_kl_half_bit_more": allocation.half_bit_more}
    return {
        "model": str(source.path),
        "output": str(out),
        "format": str(plan.default_format),
        "method": plan.method.name,
        **weighed,
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "bits_per_weight": plan.bits_per_weight(),
        "bits_per_weight_linear": plan.bits_per_weight("linear"),
        "peak_memory_bytes": plan.peak_memory,
        "disk_bytes": disk,
        "quantized_weights": sum(tensor.source.numel for tensor in plan.tensors if tensor.format),
        "tensors": {
            tensor.source.name: {
                "from": tensor.source.stored_as,
                "to": tensor.label,
                "shape": list(tensor.source.shape),
                "bytes": tensor.nbytes,
                "quantized": tensor.format is not None,
            }
            for tensor in plan.tensors
        },
    }


def print_result(facts: dict[str, Any], out: Path) -> None:
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
    widths = Counter(row["to"] for row in facts["tensors"].values() if row["quantized"])
    typer.echo(f"method {facts['method']}, {', '.join(f'{count} x {name}' for name, count in sorted(widths.items()))}")
    measured, predicted = facts.get("measured"), facts.get("predicted_kl")
    said = []
    if measured is not None:
        interval = "" if measured["kl_stderr"] is None else f" +- {1.96 * measured['kl_stderr']:.2g}"
        said.append(
            f"KL divergence from the original {measured['kl_mean']:.3g}{interval} nats per token on "
            f"{measured['tokens']:,} tokens that it wrote"
        )
    if predicted:
        # What half a bit buys is told in proportion: of predictions, the ratio is the safer part.
        left = facts["predicted_kl_half_bit_more"] / predicted * (measured["kl_mean"] if measured else predicted)
        said += [f"predicted {predicted:.3g}", f"half a bit more would leave about {left:.2g}"]
    if said:
        typer.echo("; ".join(said))


def print_plan(facts: dict[str, Any], plan: Plan) -> None:
    """The plan, for people."""
    from kbit.cli.output import size

    typer.echo(f"{'tensor':<52}{'shape':>16}  {'from':<10}{'to':<18}{'bytes':>10}")
    for name, row in facts["tensors"].items():
        shape = " x ".join(str(dim) for dim in row["shape"])
        typer.echo(f"{name:<52}{shape:>16}  {row['from']:<10}{row['to']:<18}{size(row['bytes']):>10}")
    linear = plan.bits_per_weight("linear")
    mixed = "widths           mixed within these bytes, once the model is calibrated\n" if facts["mixed"] else ""
    typer.echo(
        f"\nsize             {size(plan.bytes_before)} -> {size(plan.bytes_after)}\n"
        f"bits per weight  {plan.bits_per_weight():.3f} in all, {linear or 0:.3f} in linear layers\n"
        f"peak memory      about {size(plan.peak_memory)}\n"
        f"disk needed      {size(facts['disk_bytes'])} in {facts['output']}\n"
        f"{mixed}nothing was written (--dry-run)"
    )
