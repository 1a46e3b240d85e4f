"""The models that a plan chooses from: what the user named, or what is at hand.

A plan needs a model's shape, which its config.json says, and what its tensors are kept in now. Nothing is downloaded,
and no weight is read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kbit.checkpoint.ladder import Ladder
from kbit.checkpoint.readers.kbit_folder import MANIFEST_NAME
from kbit.formats.nested import NestedFormat
from kbit.formats.quant_format import QuantFormat
from kbit.formats.registry import parse_format
from kbit.formats.trellis import TrellisFormat
from kbit.host.errors import KbitError, UsageError
from kbit.models.check import check_continues, stored_spec
from kbit.models.families import spec_from_config
from kbit.models.spec import ModelSpec
from kbit.planner.shapes import KNOWN_MODELS
from kbit.planner.weights import (
    Weight,
    active_parameters,
    narrowed_weights,
    parameters,
    planned_weights,
    stored_weights,
)
from kbit.quantizers.calibrated import CalibratedRounding
from kbit.quantizers.methods import METHODS
from kbit.quantizers.settings import Nesting
from kbit.scaling.points import Point

_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
# Of encoder-decoders, whose two halves and beams were not modelled.
_INSTEAD = (
    "kbit plan knows decoders and encoders: kbit quantize MODEL --bits 4 --dry-run prints what the weights take at a "
    "width, and kbit eval --data PAIRS.tsv what these bits cost"
)


@dataclass(frozen=True, eq=False)
class PlanModel:
    """A model to choose.

    Attributes:
        name: what the user called it, or its short name.
        spec: its shape.
        weights: its tensors as they are now.
        dtype: what embeddings and head stay in when they are kept.
        gguf: it lies in a GGUF file.
        fixed: it is k-bit already and cannot be quantized again.
        known: it is a built-in shape: there is no file.
        measured: its name among the measured points, or None.
        tokenizer: digest of its tokenizer (as in Point.tokenizer), or None where there is none to look at.
        training_tokens: D, where its folder says.
        ladder: of a nested model, the widths it serves.
        file, bits: of a nested model at one of its rungs, what the user called it, and its bits.
        made: of what `kbit quantize` wrote in one format, with a method as it is by default: (method, format as points
            call it).
    """

    name: str
    spec: ModelSpec
    weights: tuple[Weight, ...]
    dtype: str
    gguf: bool = False
    fixed: bool = False
    known: bool = False
    measured: str | None = None
    tokenizer: str | None = None
    training_tokens: int | None = None
    ladder: Ladder = field(default_factory=Ladder)
    file: str | None = None
    bits: float | None = None
    made: tuple[str, str] | None = None

    @property
    def encodes(self) -> bool:
        """Whether it reads whole texts and goes on with none."""
        return not self.spec.continues_text

    def tokens(self, context: int) -> int:
        """Tokens of a text to plan for where `context` are asked for: an encoder's are no more than it reads."""
        return min(context, self.spec.context_length) if self.encodes else context

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers, N."""
        return parameters(self.weights, "linear")

    @property
    def total_parameters(self) -> int:
        """All weights, a tied head once."""
        return parameters(self.weights)

    @property
    def active_parameters(self) -> int:
        """Those that a token goes through: of experts, the chosen ones."""
        return active_parameters(self.weights)

    def in_format(self, format: QuantFormat | TrellisFormat | None, embedding_bits: int | None) -> tuple[Weight, ...]:
        """Its tensors in a format, as `kbit quantize` would write them; as they are for None.

        Args:
            format: of linear layers.
            embedding_bits: of embeddings and head; None or 16 keep them.
        """
        if format is None:
            return self.weights
        kept: QuantFormat | str = self.dtype
        if embedding_bits is not None and embedding_bits != 16:
            like = format if isinstance(format, QuantFormat) else QuantFormat()
            kept = like.at_width(embedding_bits)
        return planned_weights(self.spec, format, embedding=kept, head=kept)


def find_models(names: Sequence[str], points: Iterable[Point] = ()) -> tuple[list[PlanModel], list[str]]:
    """The models to choose from, smallest first.

    Args:
        names: folders, .gguf files, config.json files, hub ids in the local cache, names of kbit's catalogue, names of
            KNOWN_MODELS. Empty: what kbit's and the hub's caches hold, and the built-in shapes.
        points: measured points, to recognise models in.

    Returns:
        The models, and notes on what could not be looked at (only where nothing was named).

    Raises:
        UsageError: a name that is none of these.
        KbitError: a model that cannot be read, or a family that kbit does not run.
    """
    points = list(points)
    if names:
        found = [at for name in dict.fromkeys(names) for at in _at_widths(_named(name))]
        notes: list[str] = []
    else:
        found, notes = _at_hand()
    found = [_recognise(model, points) for model in found]
    return sorted(found, key=lambda model: (model.total_parameters, model.name)), notes


def _named(name: str) -> PlanModel:
    if not name.strip():
        raise UsageError(
            "the model's name is empty: give a folder, a .gguf file, a config.json or a name kbit plan lists"
        )
    path = Path(os.path.expanduser(name))
    if path.suffix == ".json" and path.is_file():
        return _from_config(path)
    if path.is_dir():
        has_weights = any(path.glob("*.safetensors")) or any(path.glob("*.gguf"))
        return _from_checkpoint(name, path) if has_weights else _from_config(path / "config.json")
    if path.is_file():
        return _from_checkpoint(name, path)
    if name.lower() in KNOWN_MODELS:
        return _known(name.lower())
    from kbit.checkpoint.pull import CATALOGUE, cached_path

    if name in CATALOGUE:
        if not cached_path(name).is_file():
            raise UsageError(f"{name}: not in the cache yet; kbit pull {name}")
        return _from_checkpoint(name, cached_path(name))
    if "/" in name and (folder := _hub_folder(name)) is not None:
        return (
            _from_checkpoint(name, folder)
            if any(folder.glob("*.safetensors"))
            else _from_config(folder / "config.json", name)
        )
    raise UsageError(
        f"{name}: no such folder or file, not in the hub's cache, and not a name kbit plan knows "
        f"({', '.join((*CATALOGUE, *KNOWN_MODELS))})"
    )


def _at_widths(model: PlanModel) -> list[PlanModel]:
    """A nested model at each width that it serves, and half-way between where its widths are mixed; others as they
    are."""
    if not model.ladder:
        return [model]
    widest, narrowest = model.ladder.widths[0], model.ladder.widths[-1]
    step = 1.0 if model.ladder.order is None else 0.5
    served = [widest - step * place for place in range(round((widest - narrowest) / step) + 1)]
    return [
        replace(
            model,
            name=f"{model.name} --bits {width:g}",
            weights=narrowed_weights(model.weights, model.ladder.at(width)),
            file=model.name,
            bits=width,
            made=None if model.made is None or width != int(width) else (model.made[0], f"{model.made[1]}@{width:g}"),
        )
        for width in served
    ]


def _at_hand() -> tuple[list[PlanModel], list[str]]:
    """Models in kbit's cache and the hub's, and the built-in shapes."""
    from kbit.checkpoint.pull import CATALOGUE, cached_path

    found, notes = [], []
    candidates: list[tuple[str, Path]] = []
    with suppress(KbitError):  # there is no cache folder
        candidates += [(name, cached_path(name)) for name in CATALOGUE if cached_path(name).is_file()]
    candidates += _hub_models()
    for name, path in candidates:
        try:
            found.append(_from_checkpoint(name, path))
        except KbitError as error:
            notes.append(f"{name}: left aside ({error})")
    return found + [_known(name) for name in KNOWN_MODELS], notes


def _from_checkpoint(name: str, path: Path) -> PlanModel:
    from kbit.models.opening import open_model

    with open_model(str(path)) as source:
        spec = spec_from_config(source.config, where=f"config of {source.path}")
        _check_planned(spec, str(source.path))
        spec = stored_spec(source, spec)
        missing = [tensor for tensor in spec.expected_tensors() if tensor not in source.tensors]
        if missing:
            raise KbitError(f"{source.path}: {missing[0]} is missing; download the model again")
        weights, ladder = stored_weights(source, spec), Ladder.of(source)
        section = source.config.get("quantization_config")
        fixed = isinstance(section, dict) and section.get("quant_method") == "kbit"
        gguf = source.path.suffix == ".gguf"
        tokenizer = source.sidecar_files().get("tokenizer.json")
        linear = {source.tensors[weight.name].stored_as for weight in weights if weight.role == "linear"}
    embedding = weights[0].kept
    return PlanModel(
        name=name,
        spec=spec,
        weights=weights,
        dtype=embedding if isinstance(embedding, str) else "fp16",
        gguf=gguf,
        fixed=fixed,
        tokenizer=None if tokenizer is None else hashlib.sha256(tokenizer).hexdigest(),
        training_tokens=None if gguf else _training_tokens(path),
        ladder=ladder,
        made=_made(path / MANIFEST_NAME, linear) if fixed else None,
    )


def _made(manifest: Path, formats: set[str]) -> tuple[str, str] | None:
    """(method, format) of a folder that kbit wrote, if its linear layers have one, and the method is the usual one."""
    from kbit.host.files import read_json_object

    method = read_json_object(manifest).get("method")
    known = METHODS.get(method["name"]) if isinstance(method, dict) and isinstance(method.get("name"), str) else None
    if known is None or len(formats) != 1:
        return None
    (text,) = formats
    format = parse_format(text)
    if isinstance(format, NestedFormat) and isinstance(known, CalibratedRounding):
        known = known.nested(Nesting.of(format.low, format.bits, mixed=True))
    return (known.name, text) if method == known.identity else None


def _from_config(path: Path, name: str | None = None) -> PlanModel:
    from kbit.host.files import read_json_object

    config = read_json_object(path)
    spec = spec_from_config(config, where=str(path))
    _check_planned(spec, str(path))
    stored = config.get("torch_dtype", config.get("dtype"))
    dtype = _DTYPES.get(stored if isinstance(stored, str) else "", "bf16")
    weights = planned_weights(spec, dtype, embedding=dtype, head=dtype)
    tokenizer = path.parent / "tokenizer.json"
    digest = hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.is_file() else None
    return PlanModel(
        name=name or str(path.parent if path.name == "config.json" and path.parent.name else path),
        spec=spec,
        weights=weights,
        dtype=dtype,
        tokenizer=digest,
        training_tokens=_training_tokens(path.parent),
    )


def _check_planned(spec: ModelSpec, where: str) -> None:
    """
    Raises:
        UnsupportedError: an encoder-decoder.
    """
    if spec.encoder is not None:
        check_continues(spec, where, _INSTEAD)


def _known(name: str) -> PlanModel:
    model = KNOWN_MODELS[name]
    spec = spec_from_config(dict(model.config), where=f"shape of {name}")
    weights = planned_weights(spec, model.dtype, embedding=model.dtype, head=model.dtype)
    return PlanModel(name, spec, weights, model.dtype, known=True)


def _recognise(model: PlanModel, points: Sequence[Point]) -> PlanModel:
    """The model with its name among the points: one that ends alike and has as many weights in its linear layers.

    Of what `kbit quantize` wrote, the one that was measured as this one was made, if there is just one.
    """
    if model.fixed:
        made_from = {
            point.model
            for point in points
            if (point.method, point.format) == model.made
            and (point.linear_parameters, point.tokenizer) == (model.linear_parameters, model.tokenizer)
        }
        return replace(model, measured=made_from.pop()) if len(made_from) == 1 else model
    short = Path(model.name).name or model.name
    for point in points:
        same_size = point.linear_parameters == model.linear_parameters
        if same_size and (point.model == model.name or Path(point.model).name == short):
            return replace(model, measured=point.model)
    return model


def _training_tokens(folder: Path) -> int | None:
    """Tokens a model was trained on, where its folder has a training.json that says so."""
    from kbit.host.files import read_json_object

    try:
        value: Any = read_json_object(folder / "training.json").get("training_tokens")
    except KbitError:
        return None
    return value if type(value) is int and value > 0 else None


def _hub_folder(repository: str) -> Path | None:
    """The folder of a repository's latest snapshot in the hub's cache, or None; never downloads."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(repository, "config.json")
    except HFValidationError:
        return None
    return Path(path).parent if isinstance(path, str) else None


def _hub_models() -> list[tuple[str, Path]]:
    """(repository, folder) of everything in the hub's cache that has a config.json and safetensors."""
    from huggingface_hub.constants import HF_HUB_CACHE

    root = Path(HF_HUB_CACHE)
    names = sorted(path.name for path in root.glob("models--*--*")) if root.is_dir() else []
    repositories = [name.removeprefix("models--").replace("--", "/", 1) for name in names]
    folders = [(repository, _hub_folder(repository)) for repository in repositories]
    return [(name, folder) for name, folder in folders if folder is not None and any(folder.glob("*.safetensors"))]
