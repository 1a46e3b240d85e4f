"""What a LoRA adapter's folder holds, as PEFT saves it: pairs of factors, and tensors that it replaces.

(Hu et al. 2021, arXiv 2106.09685; names and scales: PEFT's documentation of its checkpoint format.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbit.checkpoint.foreign import refuse_pointers
from kbit.checkpoint.readers.floats import to_float32
from kbit.checkpoint.readers.hf_folder import SIDECAR_NAMES
from kbit.checkpoint.readers.safetensors_file import SafetensorsFile
from kbit.host.errors import CheckpointError, UnsupportedError, UsageError, one_line
from kbit.host.files import read_json_object

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
# What PEFT puts into the names of tensors that it saves whole.
_WRAPPED = re.compile(r"\.(modules_to_save\.default|original_module|base_layer)(?=\.)")


@dataclass(frozen=True)
class Lora:
    """Where the two factors of one matrix are.

    Attributes:
        down, up: names of A (R, K) and B (N, R) in the file.
        scale: their product's factor.
        transposed: the product is the transpose of what is added.
    """

    down: str
    up: str
    scale: float
    transposed: bool


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter, and no model that stands beside one."""
    weights = {path.name for path in folder.glob("*.safetensors")} - {WEIGHTS}
    has = (folder / WEIGHTS).is_file() or ((folder / PICKLE).is_file() and not (folder / "config.json").is_file())
    return (folder / CONFIG).is_file() and has and not weights and not any(folder.glob("*.gguf"))


def check_adapter(folder: str | Path) -> Path:
    """An adapter's folder.

    Raises:
        UsageError: it is none.
    """
    path = Path(folder)
    if not is_adapter(path):
        raise UsageError(f"{folder}: no LoRA adapter: name a folder with {CONFIG} and {WEIGHTS}")
    return path


def base_of(folder: Path) -> str:
    """What an adapter's configuration says of its base: a path, seen from here or from the adapter, or a hub id.

    Raises:
        CheckpointError: it does not say.
    """
    base = read_json_object(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base.strip():
        raise CheckpointError(
            f"{folder / CONFIG}: base_model_name_or_path is missing: write there which model the adapter is of, a "
            "folder or a hub id"
        )
    beside = folder / base
    return str(beside) if not Path(base).exists() and beside.exists() else base


class LoraFile:
    """An adapter's factors, by the names of its base's tensors.

    Args:
        path: the adapter's folder.

    Attributes:
        path, settings: the folder, and its configuration.
        file: the tensors.
        loras: the factors of each matrix that has some.
        replaced: of tensors of the base that are replaced, the stored name.

    Raises:
        CheckpointError: something is missing or damaged; the message names the file.
        UnsupportedError: an adapter of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_pointers(path, [WEIGHTS, CONFIG, *SIDECAR_NAMES])
        if not (path / WEIGHTS).is_file():
            raise UnsupportedError(
                f"{path}: its adapter is a pickle, and loading those can run code: {_unpickle(path)}"
            )
        self.settings = read_json_object(path / CONFIG)
        _check(path, self.settings)
        self.file = SafetensorsFile(path / WEIGHTS)
        try:
            self.loras, self.replaced = self._sorted()
        except BaseException:
            self.file.close()
            raise

    def _sorted(self) -> tuple[dict[str, Lora], dict[str, str]]:
        """The factors by the base's names, and what replaces tensors of the base."""
        factors: dict[str, dict[str, str]] = {}
        embeddings: set[str] = set()
        replaced: dict[str, str] = {}
        for stored in self.file.tensors:
            name = stored
            while name.startswith(_PREFIX):
                name = name.removeprefix(_PREFIX)
            found = _LORA.fullmatch(name)
            if found is None:
                replaced[_WRAPPED.sub("", name)] = stored
                continue
            factors.setdefault(f"{found[1]}.weight", {})[found[3]] = stored
            if found[2]:
                embeddings.add(f"{found[1]}.weight")
        loras = {}
        for name, both in factors.items():
            if set(both) != {"A", "B"}:
                raise CheckpointError(f"{self.file.path}: {next(iter(both.values()))} has no counterpart")
            rank = self.file.tensors[both["A"]].shape[0]
            transposed = name in embeddings or bool(self.settings.get("fan_in_fan_out"))
            loras[name] = Lora(
                both["A"], both["B"], _scale(self.settings, name.removesuffix(".weight"), rank), transposed
            )
        if not loras and not replaced:
            raise CheckpointError(f"{self.file.path}: it holds no tensors")
        return loras, replaced

    def values(self, stored: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows [start, stop) of a tensor of the file, in float32."""
        tensor = self.file.tensors[stored]
        return to_float32(self.file.read_array(stored, start, tensor.shape[0] if stop is None else stop), tensor.dtype)

    def close(self) -> None:
        """Lets go of the file."""
        self.file.close()


def _check(path: Path, settings: Mapping[str, Any]) -> None:
    """
    Raises:
        UnsupportedError: an adapter that is more than pairs of factors.
    """
    kind = settings.get("peft_type")
    reason = None
    if kind != "LORA":
        reason = f"its kind is {one_line(str(kind), 40)}"
    for key, what in (
        ("use_dora", "it is a DoRA"),
        ("lora_bias", "its factors have biases"),
        ("target_parameters", "it changes experts that are stacked in one tensor"),
        ("trainable_token_indices", "it changes single rows of the embedding"),
        ("alora_invocation_tokens", "it is active from some token on only"),
        ("megatron_config", "it is of a Megatron model"),
    ):
        if settings.get(key):
            reason = f"{what} ({key})"
    if reason is not None:
        raise UnsupportedError(
            f"{path}: an adapter that kbit does not merge: {reason}; merge it with peft: "
            f'AutoPeftModelForCausalLM.from_pretrained("{path}").merge_and_unload().save_pretrained("OUT")'
        )


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / R, or alpha / sqrt(R); alpha may be another for modules whose names end like a pattern."""
    alpha = settings.get("lora_alpha", 8)
    for pattern, own in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = own
            break
    return float(alpha) / (sqrt(rank) if settings.get("use_rslora") else rank)


def _unpickle(path: Path) -> str:
    """What to do about pickled factors: torch loads numbers without running what a pickle holds."""
    return (
        "convert it once: python -c 'from safetensors.torch import save_file as s; from torch import load as l; "
        f's(l("{path / PICKLE}", weights_only=True), "{path / WEIGHTS}")\''
    )
