"""What `kbit quantize` shows: the plan, and what was done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource
    from kbit.quantizers.allocate import Allocation
    from kbit.quantizers.plan import Plan, TensorPlan


def note_quantized_source(plan: Plan) -> None:
    """Say on stderr what surprises people whose source is quantized already (most GGUF files)."""
    held = [t for t in plan.tensors if t.source.packed_as or not t.source.stored_as.startswith(("F", "BF"))]
    if all(tensor.as_stored for tensor in held):
        return
    names = ", ".join(sorted({tensor.source.packed_as or tensor.source.stored_as for tensor in held}))
    kept = (
        ", and what is kept takes 16 bits (--embedding-bits 8 quantizes embeddings and head, --override "
        "'PATTERN=stored' leaves tensors as they are)"
        if any(tensor.format is None for tensor in held)
        else ""
    )
    typer.echo(f"note: the source is quantized already ({names}): its errors stay{kept}", err=True)


def note_plan(plan: Plan, costs: Mapping[str, float]) -> None:
    """Say on stderr what mixed widths came to: a line for each role and format."""
    from kbit.cli.output import size
    from kbit.formats.registry import kind_of

    groups: dict[tuple[str, str], list[TensorPlan]] = {}
    for tensor in plan.tensors:
        if tensor.format is not None:
            groups.setdefault((tensor.role, kind_of(tensor.label)), []).append(tensor)
    lines = []
    for role, label in sorted(
        groups, key=lambda key: (key[0], groups[key][0].nbytes / groups[key][0].source.numel, key[1])
    ):
        tensors = groups[role, label]
        nbytes = sum(tensor.nbytes for tensor in tensors)
        known = [costs[tensor.source.name] for tensor in tensors if tensor.source.name in costs]
        cost = f"predicted KL {sum(known):.2g}" if known else "not predicted"
        lines.append(f"  {role:<10}{label:<16}{len(tensors):>5} x  {size(nbytes):>10}   {cost}")
    apart = sum(tensor.format.outliers for tensor in plan.tensors if tensor.format)
    if apart:
        lines.append(f"  {apart} large weights are kept apart, in 16 bits each with their places")
    typer.echo(
        f"plan: {size(plan.bytes_after)}, {plan.bits_per_weight():.3f} bits per weight, predicted KL "
        f"{sum(costs.values()):.3g}\n" + "\n".join(lines),
        err=True,
    )


def facts_of(
    source: CheckpointSource,
    plan: Plan,
    out: Path,
    disk: int,
    allocation: Allocation | None,
    costs: Mapping[str, float],
) -> dict[str, Any]:
    """Everything about a plan, for JSON; `costs`: predicted divergence by tensor, where it is known."""
    weighed: dict[str, Any] = {}
    if costs:
        weighed = {"predicted_kl": sum(costs.values())}
    if allocation is not None:
        weighed["predicted_kl_half_bit_more"] = allocation.half_bit_more
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
                **({"predicted_kl": costs[tensor.source.name]} if tensor.source.name in costs else {}),
            }
            for tensor in plan.tensors
        },
    }


def print_result(facts: dict[str, Any], out: Path) -> None:
    """What was done, for people."""
    from kbit.cli.output import printable, size
    from kbit.formats.registry import kind_of

    where = printable(out)
    if facts["already_complete"]:
        typer.echo(f"{where}: already complete, nothing to do (--force makes it anew)")
        return
    again = f", {facts['resumed_tensors']} tensors kept from an interrupted run" if facts["resumed_tensors"] else ""
    typer.echo(
        f"{where}: {size(facts['bytes_before'])} -> {size(facts['bytes_after'])}, "
        f"{facts['bits_per_weight']:.3f} bits per weight ({facts['bits_per_weight_linear']:.3f} in linear layers), "
        f"{facts['seconds']:.1f} s{again}"
    )
    widths = Counter(kind_of(row["to"]) for row in facts["tensors"].values() if row["quantized"])
    typer.echo(f"method {facts['method']}, {', '.join(f'{count} x {name}' for name, count in sorted(widths.items()))}")
    for note in facts["notes"]:
        typer.echo(f"note: {note}")
    measured, predicted = facts.get("measured"), facts.get("predicted_kl")
    said = []
    if measured is not None:
        interval = "" if measured["kl_stderr"] is None else f" +- {1.96 * measured['kl_stderr']:.2g}"
        at = "" if measured["bits"] is None else f"at {measured['bits']} bits "
        said.append(
            f"{at}KL divergence from the original {measured['kl_mean']:.3g}{interval} nats per token on "
            f"{measured['tokens']:,} tokens that it wrote"
        )
    if predicted:
        # What half a bit buys is told in proportion: of predictions, the ratio is the safer part.
        left = facts["predicted_kl_half_bit_more"] / predicted * (measured["kl_mean"] if measured else predicted)
        said += [f"predicted {predicted:.3g}", f"half a bit more would leave about {left:.2g}"]
    if said:
        typer.echo("; ".join(said))


def print_plan(facts: dict[str, Any], plan: Plan, *, unknown: bool, saved: Path | None) -> None:
    """The plan, for people.

    Args:
        facts: of it.
        plan: itself.
        unknown: its widths will be mixed, nobody knows yet how.
        saved: file that it was written to.
    """
    from kbit.cli.output import size

    weighed = "predicted_kl" in facts
    cost = f"{'predicted KL':>14}" if weighed else ""
    typer.echo(f"{'tensor':<52}{'shape':>16}  {'from':<10}{'to':<18}{'bytes':>10}{cost}")
    for name, row in facts["tensors"].items():
        shape = " x ".join(str(dim) for dim in row["shape"])
        cost = f"{row['predicted_kl']:>14.2g}" if "predicted_kl" in row else ""
        typer.echo(f"{name:<52}{shape:>16}  {row['from']:<10}{row['to']:<18}{size(row['bytes']):>10}{cost}")
    linear = plan.bits_per_weight("linear")
    said = [
        f"\nsize             {size(plan.bytes_before)} -> {size(plan.bytes_after)}",
        f"bits per weight  {plan.bits_per_weight():.3f} in all, {linear or 0:.3f} in linear layers",
        f"peak memory      about {size(plan.peak_memory)}",
        f"disk needed      {size(facts['disk_bytes'])} in {facts['output']}",
    ]
    if unknown:
        said.append("widths           mixed within these bytes, once the model is calibrated")
    if weighed:
        more = facts.get("predicted_kl_half_bit_more")
        said.append(
            f"predicted KL     {facts['predicted_kl']:.3g}" + (f"; {more:.2g} with half a bit more" if more else "")
        )
    if saved is None:
        said.append("nothing was written (--dry-run)")
    else:
        said.append(f"{saved}: the plan; edit it, and quantize with --plan {saved}")
    typer.echo("\n".join(said))
