"""kbit info: what a model is, tensor by tensor, without loading it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kbit.host.errors import KbitError, UsageError

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource
    from kbit.models.spec import ModelSpec

# Stored types of matrices that are not quantized.
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_PICTURE = "Picture"


def info(
    model: Annotated[
        str | None,
        typer.Argument(help="A folder, a .gguf file, a hub id, or a name kbit pull lists; without one: this machine."),
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw errors, sensitivity and bits of every matrix into FILE (.png, .svg, or .html with a table).",
            rich_help_panel=_PICTURE,
        ),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            "--bits",
            metavar="K,...",
            help="Widths to try on the weights: a list (3,4), a range (2..8), or formats (nf4-b64,int4-b32). "
            "[default: 4]",
            rich_help_panel=_PICTURE,
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="MODEL",
            help="What a quantized MODEL was made of: draw the error of what is stored.",
            rich_help_panel=_PICTURE,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FILE_OR_NAME",
            help="Text to measure sensitivity on, as kbit eval takes it, or none. [default: wikitext2]",
            rich_help_panel=_PICTURE,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            metavar="N",
            help="Tokens of it to use, in windows of up to 256. [default: 1024]",
            rich_help_panel=_PICTURE,
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every stored tensor with its checksum again.")
    ] = False,
    forget: Annotated[
        bool, typer.Option("--forget", help="Remove what the CPU engine has kept of MODEL: its prepared weights.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")] = False,
) -> None:
    """Show a model's shape, size and bits per weight, without loading it; or what kbit uses of this machine.

    Bits per weight count everything stored: codes, scales, offsets, codebooks, and whatever stayed in 16 bits.

    The first run of a model on the CPU keeps its weights, rearranged for the kernels, in the cache folder
    (KBIT_PREPARED names another, or says "off"), so that later runs only map them. That file is shown here, and
    --forget removes it.

    With --plot, the weights are read after all: rounded to the widths of --bits (or compared with --reference), and
    run on a little text to see how much an error in each matrix would change the predictions (KL divergence). The two
    together predict what quantizing each matrix costs.

    \b
    Examples:
      kbit info
      kbit info smollm2-135m-instruct
      kbit info out/ --tensors
      kbit info out/ --json
      kbit info out/ --verify
      kbit info out/ --forget
      kbit info smollm2-135m-instruct --plot layers.png --bits 3,4
      kbit info out/ --plot layers.html --reference smollm2-135m-instruct
    """
    from kbit.checkpoint.resolve import open_model
    from kbit.cli.output import print_json

    picture = {"--bits": bits, "--reference": reference, "--data": data, "--max-tokens": max_tokens}
    if plot is None:
        for flag, value in picture.items():
            if value is not None:
                raise UsageError(f"{flag} is for the picture: give --plot FILE as well")
    elif model is None:
        raise UsageError(
            "--plot draws a model: name one, for example kbit info smollm2-135m-instruct --plot layers.png"
        )
    else:
        from kbit.cli.layer_picture import check_request, draw

        request = check_request(plot, bits, reference, data, max_tokens)
    if model is None:
        if verify or forget:
            raise UsageError(f"{'--verify' if verify else '--forget'} is for a model: name one")
        machine = machine_summary()
        if json:
            print_json(machine)
        else:
            _print_machine(machine)
        return
    with open_model(model) as source:
        summary = summarise(source)
        if verify:
            summary["verified_tensors"] = _verify(source)
        if forget:
            summary["forgotten_bytes"] = _forget(model)
            summary["prepared_bytes"] = None
        if plot is not None:
            summary["plot"] = draw(source, model, request, quiet=json)
    if json:
        print_json(summary)
        return
    _print_for_people(summary, tensors)
    if plot is not None:
        from kbit.cli.layer_picture import print_costliest

        print_costliest(summary["plot"])


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
    from kbit.host.cpu import instruction_set
    from kbit.quantizers.roles import roles_of

    spec, reason = _runnable(source)
    gpu = gpu_summary()
    infos = list(source.tensors.values())
    roles = roles_of(source)
    inner = [info for info in infos if roles[info.name] not in ("embedding", "head")]
    config = source.config
    named = config.get("architectures")
    files = {info.file for info in infos}
    return {
        "model": str(source.path),
        "architecture": named[0] if isinstance(named, list) and named else config.get("model_type"),
        "layers": config.get("num_hidden_layers"),
        "hidden_size": config.get("hidden_size"),
        "heads": config.get("num_attention_heads"),
        "kv_heads": config.get("num_key_value_heads", config.get("num_attention_heads")),
        "context_length": config.get("max_position_embeddings") if spec is None else spec.context_length,
        "vocabulary": config.get("vocab_size"),
        "tied_embeddings": bool(config.get("tie_word_embeddings")),
        "parameters": sum(info.numel for info in infos),
        "bits_per_weight": _bits(infos),
        "bits_per_weight_without_embeddings": _bits(inner),
        "tensor_bytes": sum(info.nbytes for info in infos),
        "file_bytes": sum(file.stat().st_size for file in files),
        "files": sorted(file.name for file in files),
        "formats": _by_format(infos),
        "prepared_bytes": _prepared_bytes(source.path),
        "runs_on": {
            "cpu": f"native backend ({instruction_set()})" if reason is None else None,
            "cuda": f"triton backend ({gpu})" if reason is None and gpu else None,
        },
        "gpu_kernels": gpu_kernels(any(len(info.shape) == 2 and info.stored_as in _FLOATS for info in infos)),
        "cannot_run": reason,
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


def _prepared_bytes(path: Path) -> int | None:
    """Size of the file of prepared weights, if there is one."""
    from kbit.checkpoint.prepared_place import prepared_path

    place = prepared_path(path)
    return place.stat().st_size if place is not None and place.is_file() else None


def _forget(model: str) -> int:
    from kbit.checkpoint.prepared_place import forget
    from kbit.checkpoint.resolve import locate

    place = locate(model)
    return 0 if place is None else forget(place)


def _verify(source: CheckpointSource) -> int:
    """How many tensors were compared with their checksums.

    Raises:
        UsageError: the model has none.
        CheckpointError: one differs.
    """
    from kbit.checkpoint.readers.kbit_folder import KbitFolder

    if not isinstance(source, KbitFolder):
        raise UsageError(
            f"{source.path}: --verify compares with the checksums that kbit writes, and this model has none (kbit pull "
            "compares the catalogue's)"
        )
    return source.verify()


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
        count[info.stored_as] += 1
        numel[info.stored_as] += info.numel
        nbytes[info.stored_as] += info.nbytes
    return {key: {"tensors": count[key], "parameters": numel[key], "bytes": nbytes[key]} for key in count}


def _print_machine(machine: dict[str, Any]) -> None:
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


def _print_for_people(summary: dict[str, Any], list_tensors: bool) -> None:
    from kbit.cli.output import printable, size

    def bits(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    kv = "" if summary["kv_heads"] == summary["heads"] else f" ({summary['kv_heads']} for keys and values)"
    tied = ", head tied to the embedding" if summary["tied_embeddings"] else ""
    lines = {
        "model": summary["model"],
        "architecture": f"{summary['architecture']}, {summary['layers']} layers, hidden size {summary['hidden_size']}, "
        f"{summary['heads']} heads{kv}",
        "parameters": f"{summary['parameters'] / 1e6:,.1f} million, vocabulary {summary['vocabulary']}{tied}",
        "context": f"{summary['context_length']} tokens",
        "bits per weight": f"{bits(summary['bits_per_weight'])} in all, "
        f"{bits(summary['bits_per_weight_without_embeddings'])} without embeddings and head",
        "files": f"{size(summary['file_bytes'])} in {len(summary['files'])} "
        + ("file" if len(summary["files"]) == 1 else "files"),
    }
    if summary["prepared_bytes"] is not None:
        lines["prepared"] = f"{size(summary['prepared_bytes'])} for the CPU engine, in the cache (--forget removes it)"
    if "verified_tensors" in summary:
        lines["checksums"] = f"all {summary['verified_tensors']} stored tensors are as they were written"
    if "forgotten_bytes" in summary:
        lines["forgotten"] = f"{size(summary['forgotten_bytes'])} of prepared weights"
    if summary["cannot_run"] is None:
        cuda = summary["runs_on"]["cuda"] or "no GPU here"
        lines["runs on"] = f"cpu: {summary['runs_on']['cpu']}; cuda: {cuda}"
        if list_tensors:
            lines["gpu kernels"] = "; ".join(f"{what}: {kernel}" for what, kernel in summary["gpu_kernels"].items())
    else:
        lines["cannot run"] = summary["cannot_run"]
    for key, text in lines.items():
        typer.echo(f"{key + ':':<17}{printable(text)}")
    typer.echo(f"\n{'format':<22}{'tensors':>8}{'parameters':>16}{'bytes':>12}{'bits/weight':>13}")
    for key, row in summary["formats"].items():
        share = 8 * row["bytes"] / row["parameters"] if row["parameters"] else 0.0
        typer.echo(f"{key:<22}{row['tensors']:>8}{row['parameters']:>16,}{size(row['bytes']):>12}{share:>13.3f}")
    if list_tensors:
        typer.echo("")
        for name, row in summary["tensors"].items():
            shape = " x ".join(str(dim) for dim in row["shape"])
            typer.echo(f"{name:<52}{shape:>16}  {row['format']:<18}{size(row['bytes']):>10}")
