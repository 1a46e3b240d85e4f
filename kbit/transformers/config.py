"""KbitConfig: what transformers is told, and what it keeps in config.json, of a k-bit model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from kbit.checkpoint.ladder import ORDER
from kbit.checkpoint.readers.kbit_folder import LAYOUT_VERSION, WRITTEN_BY
from kbit.host.errors import UnsupportedError
from kbit.modules.convert import chosen_format
from kbit.modules.products import check_compute

METHOD = "kbit"


@register_quantization_config(METHOD)
class KbitConfig(QuantizationConfigMixin):  # type: ignore[misc]  # (transformers has no types)
    """How a model is rounded as it is loaded: every nn.Linear, to nearest, but for the head of a language model.

    Args:
        bits: per weight, 2 to 8; scales come on top.
        format: instead of `bits`, the whole format, as `kbit quantize --format` takes it ("int3-b32").
        modules_to_not_convert: names of layers to leave, or regular expressions of them; None: the head, and what is
            tied to the embeddings.
        compute: how products are computed on the CPU: "fp32", which rounds nothing, or "int8", which is faster.
        stored: of a folder that is quantized already, what its config.json says.

    Raises:
        UsageError: a format, or a way to compute, that does not exist.
        UnsupportedError: a folder of a newer kbit.
    """

    def __init__(
        self,
        bits: int = 4,
        format: str | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        compute: str = "fp32",
        **stored: Any,
    ) -> None:
        self.quant_method = METHOD
        self.format = format if "tensors" in stored else str(chosen_format(bits, format))
        self.bits = bits if "tensors" in stored else chosen_format(bits, format).bits
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)
        self.compute = check_compute(compute)
        self.version: int = stored.get("version", LAYOUT_VERSION)
        self.tensors: Mapping[str, Any] = stored.get("tensors", {})
        self.codebooks: Mapping[str, Any] = stored.get("codebooks", {})
        self.order: Mapping[str, Any] | None = stored.get(ORDER)
        self.written_by: str | None = stored.get(WRITTEN_BY)
        if self.version != LAYOUT_VERSION:
            raise UnsupportedError(
                f"quantization_config: layout version {self.version!r}; this kbit reads {LAYOUT_VERSION}: update kbit"
            )

    def to_dict(self) -> dict[str, Any]:
        """What config.json keeps."""
        return {name: value for name, value in self.__dict__.items() if value is not None}
