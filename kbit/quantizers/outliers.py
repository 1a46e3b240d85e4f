"""Outlier features in 16 bits: the proxy quantization of Dettmers and Zettlemoyer (arXiv 2212.09720, section 3).

Some features of a transformer's hidden states are far larger than the rest, and a weight that multiplies one passes its
rounding error on multiplied. Which features these are shows, without any data, in the weights that produce them: a unit
whose incoming weights vary most puts out the largest values. So for each matrix the p percent of its input features are
kept in 16 bits whose producing units have the largest standard deviation of weights.

For measuring only: kbit's kernels have no mixed matrices, so a weight comes as floats, and what it would take is
counted: 16 bits instead of k for each kept weight (p (16 - k) bits per weight on average, as in the paper).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kbit.host.errors import UnsupportedError
from kbit.models.families import spec_from_config
from kbit.quantizers.method import Method, MethodInput, QuantizedSource
from kbit.quantizers.rtn import QuantizedView

if TYPE_CHECKING:
    import torch

    from kbit.checkpoint.source import CheckpointSource
    from kbit.formats.quant_tensor import QuantTensor
    from kbit.quantizers.plan import Plan

# The paper's p: "outliers are between 0.1 and 2 % of all features"; 2 % is what it tests.
SHARE = 0.02


class Outliers(Method):
    """Rounding to nearest, some of each matrix's input features kept in 16 bits.

    Args:
        share: of the input features that is kept.
    """

    name = "outliers"
    about = "rounding to nearest, 2 % of the input features in 16 bits: the paper's proxy quantization"
    version = 1
    measured_only = True

    def __init__(self, share: float = SHARE) -> None:
        self.share = share

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"share": self.share}

    def apply(self, job: MethodInput) -> QuantizedSource:
        return OutlierView(job.source, job.plan, job.read, self.share)


class OutlierView(QuantizedView):
    """Planned weights rounded to nearest, but for their outlying input features, which stay as they are.

    Args:
        source, plan, read: as for QuantizedView.
        share: of the input features that is kept, rounded to whole features and at least one.

    Raises:
        CheckpointError, UnsupportedError: a model whose structure is not known.
    """

    def __init__(
        self,
        source: CheckpointSource,
        plan: Plan,
        read: Callable[[str], torch.Tensor] | None = None,
        share: float = SHARE,
    ) -> None:
        from kbit.models.structure import recorded  # needs numpy, which planning a conversion does not

        super().__init__(source, plan, read)
        self._share = share
        self._config = source.config
        spec = spec_from_config(source.config, where=f"config of {source.path}")
        self._producers = recorded(spec).producers()
        self._embedding = f"{spec.names.embedding}.weight"

    def read_weight(self, name: str) -> torch.Tensor | QuantTensor:
        """A float32 weight (N, K), of the values its codes and its 16-bit columns stand for."""
        return self.read(name)

    def read(self, name: str) -> torch.Tensor:
        if name not in self.formats:
            return super().read(name)
        import torch

        weight = self.read_quantized(name).dequantize()
        kept = self.outliers(name)
        # 16-bit floats hold what a 16-bit checkpoint has; of a float32 one they round as they would be stored.
        weight[:, kept] = self.target(name)[:, kept].to(torch.bfloat16 if self._wide(name) else torch.float16).float()
        return weight

    def extra_bits(self, name: str) -> int:
        """Bits that a planned weight takes beyond those of its format."""
        rows, columns = self.tensors[name].shape
        return rows * self._count(columns) * (16 - self.formats[name].bits)

    def outliers(self, name: str) -> torch.Tensor:
        """The input features of a planned weight that are kept: indices, int64 (p K,), ascending.

        Raises:
            UnsupportedError: a weight whose inputs' producer is not known.
        """
        columns = self.tensors[name].shape[1]
        spread = self._spread(name)
        if len(spread) != columns:  # grouped queries: several heads of o_proj's input come from one of v_proj
            spread = self._repeat(name, spread, columns)
        return spread.topk(self._count(columns)).indices.sort().values

    def _count(self, columns: int) -> int:
        return max(1, round(self._share * columns))

    def _wide(self, name: str) -> bool:
        return self.tensors[name].stored_as == "BF16"

    def _spread(self, name: str) -> torch.Tensor:
        """Standard deviation of the weights of each unit that produces an input feature, float32."""
        producer = self._producers.get(name)
        if producer is None:
            raise UnsupportedError(f"{name}: where its inputs come from is not known, so neither are its outliers")
        # The embedding's rows are tokens and its columns features; a matrix's rows are features.
        return self.target(producer).std(dim=0 if producer == self._embedding else 1)

    def _repeat(self, name: str, spread: torch.Tensor, columns: int) -> torch.Tensor:
        heads = int(self._config.get("num_attention_heads") or 0)
        head_dim = columns // heads if heads else 0
        kv_heads = len(spread) // head_dim if head_dim else 0
        if not kv_heads or heads % kv_heads or head_dim * heads != columns or head_dim * kv_heads != len(spread):
            raise UnsupportedError(f"{name}: {columns} inputs cannot come from {len(spread)} units")
        return spread.view(kv_heads, -1).repeat_interleave(heads // kv_heads, dim=0).reshape(-1)
