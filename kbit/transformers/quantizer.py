"""The quantization method "kbit" of transformers: rounding on load, and reading what is k-bit already."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from kbit.checkpoint.readers.kbit_folder import TRANSFORMERS
from kbit.host.errors import UsageError
from kbit.modules.convert import chosen_format, dequantize_, is_linear, packed_linear
from kbit.quantizers.convert import NEEDS_PLUGIN
from kbit.transformers.config import METHOD, KbitConfig
from kbit.transformers.saved import SavedModel, state_to_save
from kbit.transformers.stored import StoredModel


class _Reader(Protocol):
    """A folder that is k-bit already."""

    def prepare(self, model: Any, device_map: Any) -> None:
        """Makes room: before transformers loads what it knows."""

    def load(self, model: Any) -> None:
        """Fills it."""


@register_quantizer(METHOD)
class KbitHfQuantizer(HfQuantizer):  # type: ignore[misc]  # (transformers has no types)
    """See `KbitConfig`, and transformers' `HfQuantizer` for when each method is called."""

    requires_calibration = False
    quantization_config: KbitConfig

    def __init__(self, quantization_config: KbitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._left: set[str] = set()  # weights that are to be rounded
        self._rounded = 0  # that were
        self._reader: _Reader | None = None

    def update_attn_implementation(self, config: Any) -> Any:
        """(The first that is called with the configuration: what keeps others from loading the folder is undone.)"""
        if getattr(config, "transformers_weights", None) == NEEDS_PLUGIN:
            del config.transformers_weights
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, device_map: Any = None, **_: Any
    ) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            kind = SavedModel if config.written_by == TRANSFORMERS else StoredModel
            self._reader = kind(config, model.config.name_or_path, checkpoint_files)
            self._reader.prepare(model, device_map)
            return
        skipped = self.get_modules_to_not_convert(model, config.modules_to_not_convert, model._keep_in_fp32_modules)
        self._left = {
            f"{name}.weight"
            for name, layer in model.named_modules()
            if is_linear(layer) and should_convert_module(name, skipped)
        }
        if not self._left:
            raise UsageError(f"{type(model).__name__}: there is no linear layer to quantize, or all are skipped")

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if self._reader is not None:
            self._reader.load(model)
            self._reader = None
        elif self._rounded == 0:
            raise UsageError(
                f"{model.config.name_or_path}: none of the layers to quantize is in the checkpoint: load it as its own "
                "class"
            )
        self._left.clear()  # layers that the checkpoint lacks, as a new head: plain, to be trained
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        return param_name in self._left

    def get_quantize_ops(self) -> _Round:
        return _Round(self)

    def round(self, model: Any, name: str, weight: torch.Tensor) -> None:
        """Puts a k-bit layer in the place of the one whose weight this is."""
        path, config = name.removesuffix(".weight"), self.quantization_config
        codec = chosen_format(config.bits, config.format)
        layer = packed_linear(model.get_submodule(path), codec, path, config.compute, weight)
        layer.requires_grad_(False)
        model.set_submodule(path, layer)
        self._left.discard(name)
        self._rounded += 1

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        return state_to_save(model, self.quantization_config), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        model = dequantize_(model)
        return model if dtype is None else model.to(dtype)


class _Round(ConversionOps):  # type: ignore[misc]
    """Of a weight that transformers has read: rounded, and put into the model."""

    def __init__(self, quantizer: KbitHfQuantizer) -> None:
        self._quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, missing_keys: set[str] | None = None, **_: Any
    ) -> dict[str, torch.Tensor]:
        for name, values in input_dict.items():
            self._quantizer.round(model, name, values[0] if isinstance(values, list) else values)
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}
