"""What `kbit info` knows of a machine and of a model, as plain values, and how it reads for people."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kbit.checkpoint.ladder import Ladder
from kbit.formats.registry import kind_of
from kbit.host.errors import KbitError

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource
    from kbit.models.block_specs import ExpertsSpec
    from kbit.models.spec import ModelSpec

# Stored types of matrices that are not quantized.
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def machine_summary() -> dict[str, Any]:
    """What runs here, as plain values."""
    import platform

    from kbit import __version__, _native
    from kbit.backends.gpu import gpu_summary
    from kbit.host.cpu import default_threads, instruction_set

    return {
        "kbit": __version__,
        "machine": platform.machine(),
        "instruction_set": instruction_set(),
        "instruction_sets": _native.instruction_sets(),
        "threads": default_threads(),
        "cuda": gpu_summary(),
    }


def summarise(source: CheckpointSource) -> dict[str, Any]:
    """Everything `kbit info` knows, as plain values."""
    from kbit.backends.gpu import gpu_kernels, gpu_summary
    from kbit.checkpoint.surplus import harmless
    from kbit.host.cpu import instruction_set
    from kbit.models.latent import with_latents
    from kbit.quantizers.roles import roles_of

    spec, reason = _runnable(source)
    gpu, lacking = gpu_summary(), None if spec is None else _without_gpu_kernel(spec)
    roles = roles_of(source)
    infos = [info for info in source.tensors.values() if roles[info.name] != "ignored"]
    ignored = {name: harmless(info) for name, info in source.tensors.items() if roles[name] == "ignored"}
    inner = [info for info in infos if roles[info.name] not in ("embedding", "table", "head")]
    config = source.config
    named = config.get("architectures")
    files = {info.file for info in infos}
    ladder = Ladder.of(source)
    return {
        "model": str(source.path),
        "architecture": named[0] if isinstance(named, list) and named else config.get("model_type"),
        "layers": config.get("num_hidden_layers") if spec is None else spec.layers,
        "encoder_layers": None if spec is None or spec.encoder is None else spec.encoder.layers,
        "hidden_size": config.get("hidden_size") if spec is None else spec.hidden_size,
        "heads": config.get("num_attention_heads") if spec is None else spec.heads,
        "kv_heads": config.get("num_key_value_heads", config.get("num_attention_heads"))
        if spec is None
        else spec.kv_heads,
        "attention": None if spec is None or not spec.shapes else _attention(spec),
        "context_length": config.get("max_position_embeddings") if spec is None else spec.context_length,
        "vocabulary": config.get("vocab_size"),
        "tied_embeddings": bool(config.get("tie_word_embeddings")),
        "parameters": sum(info.numel for info in infos),
        "active_parameters": _active(infos, spec),
        "experts": None if spec is None or spec.experts is None else _experts(spec.experts),
        "recurrent_layers": 0 if spec is None else spec.layers - len(spec.attention_layers),
        "state_bytes": 0 if spec is None else spec.state_bytes,
        "cache_bytes_per_token": None if spec is None or reason is not None else _cache_bytes(spec),
        "keeps_latents": spec is not None and with_latents(spec).keeps_latents,
        "bits_per_weight": _bits(infos),
        "bits_per_weight_without_embeddings": _bits(inner),
        "tensor_bytes": sum(info.nbytes for info in infos),
        "file_bytes": sum(file.stat().st_size for file in files),
        "files": sorted(file.name for file in files),
        "formats": _by_format(infos),
        "widths": _ladder(infos, inner, ladder),
        "mixed_widths": ladder.order is not None,
        "uneven_widths": ladder.uneven,
        "packed": _packed(infos),
        "prepared_bytes": _prepared_bytes(source.path),
        "runs_on": {
            "cpu": f"native backend ({instruction_set()})" if reason is None else None,
            "cuda": f"triton backend ({gpu})" if reason is None and gpu and not lacking else None,
        },
        "without_gpu_kernel": lacking,
        "gpu_kernels": gpu_kernels(any(len(info.shape) == 2 and info.stored_as in _FLOATS for info in infos)),
        "cannot_run": reason,
        "ignored_tensors": ignored,
        "tensors": {
            info.name: {
                "format": info.stored_as,
                "shape": list(info.shape),
                "bytes": info.nbytes,
                "bits_per_weight": _bits([info]),
                "role": roles[info.name],
            }
            for info in infos
        },
    }


def _active(infos: list[Any], spec: ModelSpec | None) -> int:
    """Weights that a token goes through: of experts, the chosen ones."""
    from kbit.models.params import parameters

    shares = {} if spec is None else {p.name: p.active for p in parameters(spec)}
    active: float = sum(shares.get(info.name, 1.0) * info.numel for info in infos)
    return round(active)


def _experts(experts: ExpertsSpec) -> dict[str, int]:
    return {
        "experts": experts.routing.experts,
        "chosen": experts.routing.chosen,
        "layers": sum(experts.layers),
        "width": experts.width,
        "shared_width": experts.shared_width,
    }


def _without_gpu_kernel(spec: ModelSpec) -> str | None:
    """What a model has that no kernel of the Triton backend computes, or None."""
    from kbit.kernels.triton.product.limits import MOST_KEY_FEATURES, takes_heads

    if spec.distances is not None or spec.sloped:
        return "scores that depend on the distance"
    if spec.mask == "bidirectional" and any(window is not None for window in spec.windows):
        return "windows to both sides"
    keys = [net.key_dim for net in (spec.delta, spec.scan) if net is not None]
    if any(dim > MOST_KEY_FEATURES for dim in keys):
        return f"recurrent heads with keys of {max(keys)} features"
    odd = [dim for _, dim in spec.attention_sizes if not takes_heads(dim)]
    return f"heads of {odd[0]} features" if odd else None


def _cache_bytes(spec: ModelSpec) -> int | None:
    """Bytes that the CPU keeps of a token of text, in 16 bits; None where nothing is kept between passes."""
    from kbit.graph.pages import PAGE
    from kbit.planner.memory import cache_bytes

    return cache_bytes(spec, PAGE) // PAGE if spec.continues_text else None


def _attention(spec: ModelSpec) -> list[dict[str, int]]:
    """The kinds of heads there are, where layers differ, and how many layers keep keys and values of each."""
    kept = [spec.shape(layer) for layer in range(spec.cache_layers)]
    return [
        {
            "head_dim": dim,
            "kv_heads": count,
            "layers": sum((shape.kv_heads, shape.head_dim) == (count, dim) for shape in spec.shapes),
            "cached_layers": sum((shape.kv_heads, shape.head_dim) == (count, dim) for shape in kept),
        }
        for count, dim in spec.attention_sizes
    ]


def _prepared_bytes(path: Path) -> int | None:
    """Size of the file of prepared weights, if there is one."""
    from kbit.checkpoint.prepared_place import prepared_path

    place = prepared_path(path)
    return place.stat().st_size if place is not None and place.is_file() else None


def _runnable(source: CheckpointSource) -> tuple[ModelSpec | None, str | None]:
    """What the configuration means to kbit, if anything, and why the model cannot run, or None where it can.

    From headers alone: whether a tied head that is stored again equals the embedding, and whether values are finite,
    shows when the model is loaded.
    """
    from kbit.models.check import check_tensors
    from kbit.models.families import spec_from_config

    spec = None
    try:
        spec = spec_from_config(source.config, where=f"config of {source.path}")
        check_tensors(source, spec, read_data=False)
    except KbitError as error:
        return spec, str(error)
    return spec, None


def _bits(infos: list[Any]) -> float | None:
    numel = sum(info.numel for info in infos)
    return 8 * sum(info.nbytes for info in infos) / numel if numel else None


def _by_format(infos: list[Any]) -> dict[str, dict[str, int]]:
    count: Counter[str] = Counter()
    numel: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for info in infos:
        key = info.packed_as or kind_of(info.stored_as)
        count[key] += 1
        numel[key] += info.numel
        nbytes[key] += info.nbytes
    return {key: {"tensors": count[key], "parameters": numel[key], "bytes": nbytes[key]} for key in count}


def _ladder(infos: list[Any], inner: list[Any], ladder: Ladder) -> list[dict[str, Any]]:
    """What a nested model reads at each of its widths, widest first; nothing of one that has a single width."""
    from kbit.checkpoint.narrowed import narrowed_info

    found = []
    for width in ladder.widths:
        widths = ladder.at(width)
        narrower = [narrowed_info(info, widths) for info in infos]
        within = [narrowed_info(info, widths) for info in inner]
        found.append(
            {
                "bits": width,
                "mean_width": ladder.mean(width),
                "bytes": sum(info.nbytes for info in narrower),
                "bits_per_weight": _bits(narrower),
                "bits_per_weight_without_embeddings": _bits(within),
            }
        )
    return found


def _packed(infos: list[Any]) -> dict[str, dict[str, int]]:
    """How tensors are held that another quantizer has packed: by its format and by how kbit holds them, how many."""
    held: dict[str, Counter[str]] = {}
    for info in infos:
        if info.packed_as:
            held.setdefault(info.packed_as, Counter())[info.stored_as] += 1
    return {label: dict(counts) for label, counts in held.items()}


def _how_held(stored_as: str) -> str:
    return f"dequantized to {stored_as}" if stored_as in _FLOATS else f"packed, exactly, as {stored_as}"


def print_machine(machine: dict[str, Any]) -> None:
    others = [name for name in machine["instruction_sets"] if name != machine["instruction_set"]]
    lines = {
        "kbit": machine["kbit"],
        "native kernels": f"{machine['instruction_set']} on {machine['machine']}"
        + (f"; also {', '.join(others)} (environment variable KBIT_CPU_ISA)" if others else ""),
        "threads": f"{machine['threads']} (physical cores this process may use; --threads changes it)",
        "gpu": machine["cuda"] or "none that Triton could use",
    }
    for key, text in lines.items():
        typer.echo(f"{key + ':':<17}{text}")


def _left_out(ignored: dict[str, str]) -> list[str]:
    """One line for every reason."""
    names: dict[str, list[str]] = {}
    for name, reason in ignored.items():
        names.setdefault(reason, []).append(name)
    return [
        f"{len(found)} {'tensor' if len(found) == 1 else 'tensors'} ({found[0]}{'' if len(found) == 1 else ', ...'}): "
        f"{reason}"
        for reason, found in names.items()
    ]


def _per_weight(bits: float | None) -> str:
    return "-" if bits is None else f"{bits:.3f}"


def _facts(summary: dict[str, Any], list_tensors: bool) -> dict[str, str]:
    """The lines about a model as a whole, by what they are about."""
    from kbit.cli.output import size

    kv = "" if summary["kv_heads"] == summary["heads"] else f" ({summary['kv_heads']} for keys and values)"
    tied = ", head tied to the embedding" if summary["tied_embeddings"] else ""
    experts = summary["experts"]
    active = f", {summary['active_parameters'] / 1e6:,.1f} million active for a token" if experts else ""
    layers = f"{summary['layers']} layers"
    if summary["encoder_layers"] is not None:
        layers = f"{summary['encoder_layers']} encoder and {summary['layers']} decoder layers"
    lines = {
        "model": summary["model"],
        "architecture": f"{summary['architecture']}, {layers}, hidden size {summary['hidden_size']}, "
        f"{summary['heads']} heads{kv}",
        "parameters": f"{summary['parameters'] / 1e6:,.1f} million{active}, vocabulary {summary['vocabulary']}{tied}",
        "context": f"{summary['context_length']} tokens",
        "bits per weight": f"{_per_weight(summary['bits_per_weight'])} in all, "
        f"{_per_weight(summary['bits_per_weight_without_embeddings'])} without embeddings and head",
        "files": f"{size(summary['file_bytes'])} in {len(summary['files'])} "
        + ("file" if len(summary["files"]) == 1 else "files"),
    }
    if summary["attention"]:
        lines["attention"] = "; ".join(
            f"{kind['layers']} layers with {kind['kv_heads']} heads of {kind['head_dim']} for keys and values"
            + (f", of which {kind['cached_layers']} keep their own" if kind["cached_layers"] < kind["layers"] else "")
            for kind in summary["attention"]
        )
    tables = [row for row in summary["tensors"].values() if row["role"] == "table"]
    if tables:
        numbers = sum(row["shape"][0] * row["shape"][1] for row in tables)
        lines["per layer"] = f"{numbers / 1e6:,.1f} million of the parameters are looked up by token, a row each"
    if experts:
        shared = f", and one of {experts['shared_width']} features for all" if experts["shared_width"] else ""
        lines["experts"] = (
            f"{experts['chosen']} of {experts['experts']} for each token, of {experts['width']} features, in "
            f"{experts['layers']} layers{shared}"
        )
    if summary["recurrent_layers"]:
        lines["recurrent"] = (
            f"{summary['recurrent_layers']} of {summary['layers']} layers, which keep {size(summary['state_bytes'])} "
            "of a text, whatever its length"
        )
    if summary["cache_bytes_per_token"]:
        what = (
            "a vector of each layer, which keys and values are made of"
            if summary["keeps_latents"]
            else "keys and values"
        )
        lines["cache"] = f"{size(summary['cache_bytes_per_token'])} a token with 16 bits (--kv-bits), {what}"
    if summary["packed"]:
        lines["quantized by"] = "; ".join(
            f"{label}: {', '.join(f'{count} {_how_held(held)}' for held, count in counts.items())}"
            for label, counts in summary["packed"].items()
        )
    if summary["prepared_bytes"] is not None:
        lines["prepared"] = f"{size(summary['prepared_bytes'])} for the CPU engine, in the cache (--forget removes it)"
    if "verified_tensors" in summary:
        lines["checksums"] = f"all {summary['verified_tensors']} stored tensors are as they were written"
    if "forgotten_bytes" in summary:
        lines["forgotten"] = f"{size(summary['forgotten_bytes'])} of prepared weights"
    if summary["cannot_run"] is None:
        lacking = summary["without_gpu_kernel"]
        cuda = summary["runs_on"]["cuda"] or (f"no kernels for {lacking}" if lacking else "no GPU here")
        lines["runs on"] = f"cpu: {summary['runs_on']['cpu']}; cuda: {cuda}"
        if list_tensors:
            lines["gpu kernels"] = "; ".join(f"{what}: {kernel}" for what, kernel in summary["gpu_kernels"].items())
    else:
        lines["cannot run"] = summary["cannot_run"]
    return lines


def print_model(summary: dict[str, Any], list_tensors: bool) -> None:
    """Prints what `summarise` says.

    Args:
        summary: of it.
        list_tensors: each tensor, too, and each GPU kernel.
    """
    from kbit.cli.output import printable, size

    lines = _facts(summary, list_tensors)
    for key, text in [*lines.items(), *(("left out", text) for text in _left_out(summary["ignored_tensors"]))]:
        typer.echo(f"{key + ':':<17}{printable(text)}")
    typer.echo(f"\n{'format':<30}{'tensors':>8}{'parameters':>16}{'bytes':>12}{'bits/weight':>13}")
    for key, row in summary["formats"].items():
        share = 8 * row["bytes"] / row["parameters"] if row["parameters"] else 0.0
        typer.echo(f"{key:<30}{row['tensors']:>8}{row['parameters']:>16,}{size(row['bytes']):>12}{share:>13.3f}")
    if summary["widths"]:
        typer.echo(f"\n{'width (--bits)':<30}{'read':>8}{'bits/weight':>16}{'without embeddings and head':>29}")
        for row in summary["widths"]:
            inside = row["bits_per_weight_without_embeddings"]
            mean = f" (mean width {row['mean_width']:.3f})" if summary["mixed_widths"] else ""
            what = f"{row['bits']}{mean}"
            typer.echo(
                f"{what:<30}{size(row['bytes']):>8}{_per_weight(row['bits_per_weight']):>16}{_per_weight(inside):>29}"
            )
        if summary["uneven_widths"]:
            typer.echo("Some matrices go beyond these: without --bits each is read at its widest.")
        if summary["mixed_widths"]:
            typer.echo("Each matrix has a width of its own: all numbers of bits between are served, too.")
    if list_tensors:
        typer.echo("")
        for name, row in summary["tensors"].items():
            shape = " x ".join(str(dim) for dim in row["shape"])
            typer.echo(f"{name:<52}{shape:>16}  {row['format']:<18}{size(row['bytes']):>10}")
