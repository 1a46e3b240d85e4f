"""SmolLM2-135M from its GGUF: the decoder against transformers on the same dequantized weights, and quantized again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kbit.backends.reference.backend import ReferenceBackend
from kbit.checkpoint.gguf.source import GGUFSource
from kbit.checkpoint.source import CheckpointSource, TensorInfo
from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.models.decoder import Decoder
from kbit.models.load import load_decoder

pytestmark = pytest.mark.usefixtures("one_thread")

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

# float32 on both sides, summed in other orders: n eps per product, n <= 1536, through 30 layers; see
# test_decoder_parity.py.
RELATIVE = 1e-4


class Held(CheckpointSource):
    """A checkpoint's tensors in memory, as float32 or as QuantTensor."""

    def __init__(self, source: CheckpointSource, data: Mapping[str, torch.Tensor | QuantTensor]) -> None:
        self.path = source.path
        self.config = source.config
        self.data = data
        self.infos = source.tensors

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.infos

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        x = self.data[name]
        assert isinstance(x, torch.Tensor)
        return x[start:stop]

    def read_weight(self, name: str) -> torch.Tensor | QuantTensor:
        return self.data[name]

    def sidecar_files(self) -> Mapping[str, bytes]:
        return {}

    def fingerprint(self) -> str:
        return ""


@dataclass
class Smol:
    source: CheckpointSource
    weights: dict[str, torch.Tensor]
    paragraph: torch.Tensor  # int64 (1, T)


@pytest.fixture(scope="module")
def smol(smollm2_gguf: Path, data_dir: Path) -> Iterator[Smol]:
    with GGUFSource(smollm2_gguf) as source:
        weights = {name: source.read(name) for name in source.tensors}
        tokenizer = tokenizers.Tokenizer.from_str(source.sidecar_files()["tokenizer.json"].decode("utf-8"))
        lines = (data_dir / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8").splitlines()
        paragraph = next(line for line in lines if len(line) > 600 and not line.lstrip().startswith("="))
        ids = tokenizer.encode(paragraph, add_special_tokens=False).ids[:160]
        assert len(ids) == 160
        yield Smol(source, weights, torch.tensor([ids]))


def in_transformers(source: CheckpointSource, weights: Mapping[str, torch.Tensor]) -> Any:
    """A LlamaForCausalLM that shares these tensors' memory."""
    config = transformers.LlamaConfig(**source.config, attn_implementation="eager")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(dict(weights), strict=False, assign=True)
    model.tie_weights()
    # A buffer that no checkpoint holds.
    model.model.rotary_emb = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    assert not any(parameter.is_meta for parameter in model.parameters())
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)  # no end token: run on
    return model.eval()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    worst = float((ours - theirs).abs().max() / theirs.abs().max())
    assert worst <= RELATIVE, f"logits differ by {worst:.2e} of the largest"


@torch.no_grad()
def greedy(decoder: Decoder, prompt: torch.Tensor, count: int) -> list[int]:
    cache, new, tokens = decoder.new_cache(1, prompt.shape[1] + count), prompt, []
    for _ in range(count):
        new = decoder.forward(new, cache, last_only=True).argmax(-1)
        tokens.append(int(new))
    return tokens


@torch.no_grad()
def test_same_weights_same_logits_same_text(smol: Smol) -> None:
    theirs = in_transformers(smol.source, smol.weights)
    ours = load_decoder(Held(smol.source, smol.weights), ReferenceBackend())
    assert ours.weights.head is ours.weights.embedding
    # 135 million parameters, held once
    assert ours.weights.nbytes == 4 * 134_515_008

    logits = ours.forward(smol.paragraph, ours.new_cache(1, 160))
    assert_close(logits, theirs(smol.paragraph).logits)
    # It reads English: README of the data folder gives a perplexity of 36 for 512-token windows.
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], smol.paragraph[0, 1:])
    assert float(loss) < 4.5

    prompt = smol.paragraph[:, :32]
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32)
    assert greedy(ours, prompt, 32) == expected[0, 32:].tolist()


@torch.no_grad()
def test_quantized_to_nf4(smol: Smol) -> None:
    """Every matrix in nf4-b64, the tied embedding too: expanded, packed, and dequantized in transformers."""
    format = QuantFormat.parse("nf4-b64")
    packed = {
        name: quantize_blockwise(weight, format) if weight.ndim == 2 else weight
        for name, weight in smol.weights.items()
    }
    dequantized = {name: x.dequantize() if isinstance(x, QuantTensor) else x for name, x in packed.items()}
    prompt = smol.paragraph[:, :48]
    expected = in_transformers(smol.source, dequantized)(prompt).logits

    expanded = load_decoder(Held(smol.source, packed), ReferenceBackend(expand=True))
    assert_close(expanded.forward(prompt, expanded.new_cache(1, 48)), expected)
    lean = load_decoder(Held(smol.source, packed), ReferenceBackend(expand=False))
    assert_close(lean.forward(prompt, lean.new_cache(1, 48)), expected)
    # 4 bits a weight and 16 a block of 64 against 32 a weight; the norms stay float32.
    assert lean.weights.nbytes == pytest.approx(expanded.weights.nbytes * 4.25 / 32, rel=0.01)
