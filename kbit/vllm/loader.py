"""Folders of `kbit quantize` as models of vLLM: read by kbit, checksums included, under the names that the family
publishes, which each model of vLLM puts where it has them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from kbit.checkpoint.foreign import PLAIN
from kbit.checkpoint.source import CheckpointSource
from kbit.host.errors import CheckpointError, UnsupportedError, UsageError
from kbit.models.check import check_tensors
from kbit.models.families import FAMILIES, spec_from_config
from kbit.models.family import family_of
from kbit.models.opening import open_model
from kbit.models.published import StackedTensor, published_tensors
from kbit.modules.linear import KbitLinear
from kbit.modules.products import check_compute
from kbit.modules.published import packed_parts
from kbit.vllm.method import METHOD
from kbit.vllm.weight import carrying, kbit_weights

_VALUES_AT_ONCE = 1 << 22

logger = init_logger("vllm.kbit")


class KbitModelLoader(BaseModelLoader):  # type: ignore[misc]  # (vLLM is not checked here)
    """--load-format kbit, which is what a folder of `kbit quantize` gets unless another is asked for.

    Args:
        config: of which `model_loader_extra_config` may have "compute": see `KbitLinear`.

    Raises:
        UsageError: it has anything else.
    """

    def __init__(self, config: LoadConfig) -> None:
        super().__init__(config)
        extra = dict(config.model_loader_extra_config or {})
        self._compute = check_compute(extra.pop("compute", "fp32"))
        if extra:
            raise UsageError(f"--model-loader-extra-config: kbit knows only compute, not {', '.join(extra)}")

    def download_model(self, model_config: ModelConfig) -> None:
        open_model(model_config.model).close()

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        """
        Raises:
            CheckpointError: the folder is damaged, or not this model's.
            UnsupportedError: vLLM has its tensors in another form.
        """
        with open_model(model_config.model) as source:
            model.load_weights(self._tensors(source, model_config.dtype))
        weights = kbit_weights(model)
        missing = [name for name, weight in weights.items() if not weight.parts]
        if missing:
            raise CheckpointError(f"{model_config.model}: vLLM found no {', '.join(missing[:5])} in it")
        plain = [name for name, weight in weights.items() if weight.plain]
        if plain:
            logger.warning(
                "%d of %d matrices are held as plain numbers, as the folder has them so, or vLLM's %s changes them "
                "while it loads: %s",
                len(plain), len(weights), type(model).__name__, ", ".join(plain[:5]),
            )  # fmt: skip

    def _tensors(self, source: CheckpointSource, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        where = f"config of {source.path}"
        family, spec = family_of(FAMILIES, source.config, where), spec_from_config(source.config, where=where)
        check_tensors(source, spec)
        for tensor in published_tensors(spec, family.layout):
            if isinstance(tensor, StackedTensor):
                raise UnsupportedError(f"{source.path}: {tensor.name}: kbit does not run experts inside vLLM")
            plain = any(source.tensors[part.parameter.name].stored_as in PLAIN for part in tensor.parts)
            if plain or tensor.transposed:
                values = torch.cat(list(tensor.rows(source, _VALUES_AT_ONCE))).view(tensor.shape)
                yield tensor.name, values.to(dtype)
            else:
                packed, order = packed_parts(source, tensor)
                yield tensor.name, carrying(KbitLinear(packed, order=order, compute=self._compute), dtype)


def _is_kbit_folder(model: str) -> bool:
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == METHOD)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def register_loader() -> None:
    """Makes vLLM know the loader, and take it for folders of `kbit quantize` (as vLLM's own plug-in for GGUF does)."""
    if METHOD in _LOAD_FORMAT_TO_MODEL_LOADER:
        return
    register_model_loader(METHOD)(KbitModelLoader)
    plain = EngineArgs.create_load_config

    @wraps(plain)
    def create_load_config(self: Any) -> Any:
        if self.load_format == "auto" and _is_kbit_folder(self.model):
            self.load_format = METHOD
        return plain(self)

    EngineArgs.create_load_config = create_load_config
