"""The quantization method "kbit" of vLLM: layers without weights of vLLM's, which the loader fills."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.utils.torch_utils import direct_register_custom_op

from kbit.host.errors import UnsupportedError
from kbit.vllm.weight import KbitWeight

METHOD = "kbit"


class KbitVllmConfig(QuantizationConfig):  # type: ignore[misc]  # (vLLM is not checked here)
    """The section quantization_config of a folder of `kbit quantize`, of which the loader reads what is in it."""

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> KbitVllmConfig:
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            raise UnsupportedError(
                f"{prefix}: kbit does not run experts inside vLLM: use kbit serve, or kbit export, and load that"
            )
        return KbitMethod(prefix) if isinstance(layer, (LinearBase, VocabParallelEmbedding)) else None


class KbitMethod(QuantizeMethodBase):  # type: ignore[misc]
    """Of one linear layer, embedding or head.

    Args:
        prefix: the layer's name.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """
        Raises:
            UnsupportedError: the layer is shared among several processes.
        """
        if (input_size_per_partition, sum(output_partition_sizes)) != (input_size, output_size):
            raise UnsupportedError(
                f"{self._prefix}: kbit does not cut matrices inside vLLM (--tensor-parallel-size): use replicas, or "
                "torchrun with kbit run"
            )
        layer.register_parameter("weight", KbitWeight(self._prefix, params_dtype))
        layer.kbit_rows, layer.kbit_columns = output_partition_sizes, input_size
        if isinstance(layer, LinearBase):
            # Where the operator finds the layer by its name, as vLLM's attention does.
            get_current_vllm_config().compilation_config.static_forward_context[self._prefix] = layer

    def process_weights_after_loading(self, layer: Any) -> None:
        device = torch.device(get_current_vllm_config().device_config.device)
        layer.weight.complete(layer.kbit_rows, layer.kbit_columns, device)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if isinstance(layer, LinearBase):
            y: torch.Tensor = torch.ops.vllm.kbit_linear(x, self._prefix, layer.output_size)
        else:  # a head, which vLLM does not compile
            y = layer.weight.product(x)
        return y if bias is None else y + bias

    def embedding(self, layer: Any, ids: torch.Tensor) -> torch.Tensor:
        """Rows of a table: ids (T,) -> (T, H)."""
        rows: torch.Tensor = layer.weight.rows(ids, layer.params_dtype)
        return rows

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        if isinstance(embed_tokens.weight, KbitWeight):
            embed_tokens.weight.names.append(self._prefix)
        return super().tie_weights(layer, embed_tokens)


def _product(x: torch.Tensor, layer: str, rows: int) -> torch.Tensor:
    found: torch.Tensor = get_forward_context().no_compile_layers[layer].weight.product(x)
    return found


def _shape(x: torch.Tensor, layer: str, rows: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def register_method() -> None:
    """Makes vLLM know the method, and the operator through which its compiler sees a product."""
    register_quantization_config(METHOD)(KbitVllmConfig)
    if not hasattr(torch.ops.vllm, "kbit_linear"):
        direct_register_custom_op("kbit_linear", _product, fake_impl=_shape)
