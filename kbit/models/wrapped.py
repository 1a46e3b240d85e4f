"""The language model inside a checkpoint of several kinds of input: Gemma 3 from 4B on, Mistral Small 3.1 and later.

Such a checkpoint describes its parts in objects of its configuration (`text_config`), and keeps each under a prefix.
Text alone runs through the language model as if there were nothing else, so that is what is read; the tensors of the
other parts, which are for pictures and sound, are left out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kbit.checkpoint.source import CheckpointSource, StoredSource, TensorInfo
from kbit.host.errors import CheckpointError
from kbit.host.notes import note

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kbit.formats.stored import AnyStored

# Kinds of model whose language model computes the same with and without the rest, and what kind that is if the
# configuration does not say.
_WRAPPERS = {"gemma3": "gemma3_text", "mistral3": "mistral", "llava": "llama"}
# What the configuration of the whole says of its language model, where that one's own does not.
_INHERITED = ("dtype", "torch_dtype", "quantization_config", "tie_word_embeddings")
# Prefixes of the language model before transformers 4.52 and since, and what they stand for.
_LANGUAGE = (
    (re.compile(r"^language_model\.(model|lm_head)\."), r"\1."),
    (re.compile(r"^model\.language_model\."), "model."),
)
_OTHER_PARTS = re.compile(r"^(model\.)?(vision_tower|vision_model|multi_modal_projector|image_newline)(\.|$)")


def unwrapped(source: CheckpointSource) -> CheckpointSource:
    """The language model of a checkpoint that has other parts, or the checkpoint itself where it has none.

    Raises:
        CheckpointError: `text_config` is no object.
    """
    kind = source.config.get("model_type")
    if not isinstance(kind, str) or kind not in _WRAPPERS or not isinstance(source, StoredSource):
        return source
    text = source.config.get("text_config", {})
    if not isinstance(text, dict):
        raise CheckpointError(f"config of {source.path}: text_config should be an object that describes the text model")
    inherited = {key: source.config[key] for key in _INHERITED if key in source.config}
    model = LanguageModel(source, {"model_type": _WRAPPERS[kind], **inherited, **text})
    if model.left_out:
        note(f"{source.path}: the language model is used; {len(model.left_out)} tensors for pictures are left out")
    return model


class LanguageModel(StoredSource):
    """The tensors of the language model, under the names that they have where it stands alone. Closes its source.

    Args:
        source: the whole.
        config: of the language model.

    Attributes:
        left_out: names of tensors of other parts.
    """

    def __init__(self, source: StoredSource, config: dict[str, Any]) -> None:
        self.path = source.path
        # An entry for the class of the whole would not fit, and model_type says enough.
        self.config = {key: value for key, value in config.items() if key != "architectures"}
        self._source = source
        self.left_out = tuple(name for name in source.tensors if _OTHER_PARTS.match(name))
        others = frozenset(self.left_out)
        self._stored = {_name(name): name for name in source.tensors if name not in others}
        if not any(name.startswith("lm_head.") for name in self._stored):
            # The whole and its language model may disagree (Mistral 3), and the whole's word was what counted.
            self.config["tie_word_embeddings"] = True
        self._infos = {name: replace(source.tensors[stored], name=name) for name, stored in self._stored.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read_array_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        return self._source.read_array_rows(self._stored[name], start, stop)

    def read_stored(self, name: str) -> AnyStored:
        return self._source.read_stored(self._stored[name])

    def sidecar_files(self) -> Mapping[str, bytes]:
        return self._source.sidecar_files()

    def token_table(self) -> memoryview | None:
        return self._source.token_table()

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self._source.fingerprint()} language model".encode()).hexdigest()

    def close(self) -> None:
        self._source.close()


def _name(stored: str) -> str:
    for pattern, plain in _LANGUAGE:
        if pattern.match(stored):
            return pattern.sub(plain, stored)
    return stored
