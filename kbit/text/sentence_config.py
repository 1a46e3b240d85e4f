"""What a sentence-transformers folder says about embeddings: how hidden states become a vector, and prompts.

modules.json names the modules in order: the transformer (in the folder itself), pooling, and perhaps dense layers and
normalisation, each with a folder of its own. (sentence-transformers 5.1, `sentence_transformers/models`.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kbit.host.errors import CheckpointError, UnsupportedError, one_line

# In the order in which sentence-transformers puts several beside each other.
POOLINGS = ("cls", "max", "mean", "mean_sqrt_len", "weightedmean", "lasttoken")
_OLD_KEYS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
_ACTIVATIONS = {
    "Identity": "identity",
    "Tanh": "tanh",
    "ReLU": "relu",
    "GELU": "gelu",
    "SiLU": "silu",
    "Sigmoid": "sigmoid",
}
_MAX_LENGTH = 1 << 24


@dataclass(frozen=True)
class DenseModule:
    """A linear layer on vectors: its folder, sizes, whether it has a bias, and its activation (`kbit.engine.heads`)."""

    folder: str
    in_features: int
    out_features: int
    bias: bool
    activation: str


@dataclass(frozen=True)
class SentenceConfig:
    """How texts become vectors.

    Attributes:
        pooling: of POOLINGS, several beside each other.
        include_prompt: whether a prompt's tokens count in pooling.
        dense: layers on the pooled vector.
        normalize: the vector is divided by its length.
        max_seq_length: longest text in tokens, or None: the model's.
        lower_case: texts are put into lower case first.
        prompts: what to put before texts, by name.
        default_prompt: the name of the one that is put there unless another is asked for, or None.
        published: whether the checkpoint says so (else nothing but mean pooling is assumed).
    """

    pooling: tuple[str, ...] = ("mean",)
    include_prompt: bool = True
    dense: tuple[DenseModule, ...] = ()
    normalize: bool = False
    max_seq_length: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    published: bool = False


def read_sentence_config(files: Mapping[str, bytes], where: str) -> SentenceConfig:
    """Reads it.

    Args:
        files: the checkpoint's `sidecar_files`.
        where: what to call it in errors.

    Raises:
        CheckpointError: a file that is missing or senseless.
        UnsupportedError: a module, pooling or activation that kbit does not have.
    """
    reader = _Reader(files, where)
    transformer = reader.settings("sentence_bert_config.json", {})
    about = reader.settings("config_sentence_transformers.json", {})
    prompts = about.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise reader.error("config_sentence_transformers.json", "prompts", prompts, "an object of texts")
    default = about.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise reader.error(
            "config_sentence_transformers.json",
            "default_prompt_name",
            default,
            f"one of {', '.join(prompts) or 'none'}",
        )
    longest = transformer.get("max_seq_length")
    if longest is not None and not (type(longest) is int and 1 <= longest <= _MAX_LENGTH):
        raise reader.error("sentence_bert_config.json", "max_seq_length", longest, "a whole number")
    lower = reader.flag("sentence_bert_config.json", transformer, "do_lower_case", False)
    found = SentenceConfig(
        max_seq_length=longest, lower_case=lower, prompts=dict(prompts), default_prompt=default, published=False
    )
    return _with_modules(reader, found) if "modules.json" in files else found


@dataclass(frozen=True)
class _Reader:
    files: Mapping[str, bytes]
    where: str

    def json(self, name: str) -> Any:
        if name not in self.files:
            raise CheckpointError(f"{self.where}: {name} is missing, which modules.json names; download it again")
        try:
            return json.loads(self.files[name])
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.where}: {name} is not valid JSON: {one_line(error)}") from None

    def settings(self, name: str, otherwise: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        if name not in self.files and otherwise is not None:
            return otherwise
        value = self.json(name)
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.where}: {name} holds a {type(value).__name__}, not an object")
        return value

    def flag(self, name: str, values: Mapping[str, Any], key: str, otherwise: bool) -> bool:
        value = values.get(key, otherwise)
        if not isinstance(value, bool):
            raise self.error(name, key, value, "true or false")
        return value

    def error(self, name: str, key: str, value: object, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {name}: {key} is {one_line(repr(value))}; it should be {wanted}")


def _with_modules(reader: _Reader, found: SentenceConfig) -> SentenceConfig:
    modules = reader.json("modules.json")
    if not isinstance(modules, list) or not all(
        isinstance(m, dict) and isinstance(m.get("type"), str) and isinstance(m.get("path"), str) for m in modules
    ):
        raise CheckpointError(f"{reader.where}: modules.json is not a list of modules with a type and a path")
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise UnsupportedError(
            f"{reader.where}: modules.json: modules are {', '.join(kinds)}; kbit runs Transformer, Pooling and then "
            "Dense, Normalize or Dropout"
        )
    dense: list[DenseModule] = []
    normalize = False
    for kind, module in zip(kinds[2:], modules[2:], strict=True):
        if kind == "Normalize":
            normalize = True
        elif kind == "Dense" and not normalize:
            dense.append(_dense(reader, module["path"]))
        elif kind != "Dropout":  # (that is for training)
            raise UnsupportedError(
                f"{reader.where}: modules.json: {kind}{' after Normalize' if kind == 'Dense' else ''} is not "
                "supported; kbit runs Transformer, Pooling and then Dense, Normalize or Dropout"
            )
    name = f"{modules[1]['path']}/config.json"
    pooling = reader.settings(name)
    return replace(
        found,
        pooling=_poolings(reader, name, pooling),
        include_prompt=reader.flag(name, pooling, "include_prompt", True),
        dense=tuple(dense),
        normalize=normalize,
        published=True,
    )


def _poolings(reader: _Reader, name: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    named = values.get("pooling_mode")
    if named is None:
        chosen = [kind for kind, key in _OLD_KEYS.items() if reader.flag(name, values, key, False)]
        others = [key for key in values if key.startswith("pooling_mode_") and key not in _OLD_KEYS.values()]
        unknown = [key for key in others if values[key]]
    else:
        listed: Sequence[Any] = named if isinstance(named, list) else [named]
        unknown = [str(kind) for kind in listed if kind not in POOLINGS]
        chosen = [kind for kind in POOLINGS if kind in listed]
    if unknown or not chosen:
        raise UnsupportedError(
            f"{reader.where}: {name}: pooling {one_line(repr(unknown[0])) if unknown else 'by nothing'} is not "
            f"supported; kbit has {', '.join(POOLINGS)}"
        )
    return tuple(chosen)


def _dense(reader: _Reader, folder: str) -> DenseModule:
    name = f"{folder}/config.json"
    values = reader.settings(name)
    sizes = []
    for key in ("in_features", "out_features"):
        size = values.get(key)
        if not (type(size) is int and 1 <= size <= _MAX_LENGTH):
            raise reader.error(name, key, size, "a whole number")
        sizes.append(size)
    activation = str(values.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if activation not in _ACTIVATIONS:
        raise UnsupportedError(
            f"{reader.where}: {name}: activation_function {one_line(activation)} is not supported; kbit has "
            f"{', '.join(_ACTIVATIONS)}"
        )
    bias = reader.flag(name, values, "bias", True)
    return DenseModule(folder, sizes[0], sizes[1], bias, _ACTIVATIONS[activation])
