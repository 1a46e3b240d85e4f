"""SmolLM2-135M in 4 bits on the native backend: the reference's logits and text in fp32, and what int8 adds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.reference.backend import ReferenceBackend
from kbit.checkpoint.gguf.source import GGUFSource
from kbit.formats.quant_format import QuantFormat
from kbit.graph.backend import Backend
from kbit.models.decoder import Decoder
from kbit.models.load import load_decoder
from kbit.quantizers.plan import make_plan
from kbit.quantizers.rtn import QuantizedView
from kbit.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

# float32 on both sides, summed in other orders: n eps per product, n <= 1536, through 30 layers; see
# test_decoder_parity.py.
RELATIVE = 1e-4

TEXT = """\
A lighthouse stands where the land runs out. In the evening its keeper climbs the two hundred steps, trims the lamp, and
writes the hour into a book that goes back to the year the tower was built. Ships have carried better instruments for a
long time, and most of them no longer look for the light at all. The keeper knows this. He says that a light is not a
question of who needs it, and that somebody who is lost does not know beforehand that he will be. When the fog comes in
from the north, the beam ends a few yards from the glass, and the horn takes over: four seconds of sound, a minute of
silence, all through the night until the wind turns and the coast comes back piece by piece."""


@pytest.fixture(scope="module")
def source(smollm2_gguf: Path) -> QuantizedView:
    with GGUFSource(smollm2_gguf) as original:
        kept = {name: original.read(name) for name in original.tensors}
        plan = make_plan(original, QuantFormat.parse("nf4-b64"))
        view = QuantizedView(original, plan, kept.__getitem__)
        packed = {name: view.read_weight(name) for name in kept}
        view.read_weight = packed.__getitem__  # type: ignore[method-assign]
        return view


@pytest.fixture(scope="module")
def ids(smollm2_gguf: Path) -> torch.Tensor:
    with GGUFSource(smollm2_gguf) as original:
        return torch.tensor([Tokenizer.from_source(original).encode(TEXT)])


@pytest.fixture(scope="module")
def load(source: QuantizedView) -> Callable[[Backend], Decoder]:
    return lambda backend: load_decoder(source, backend)


@pytest.fixture(scope="module")
def expected(load: Callable[[Backend], Decoder], ids: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """The reference's logits of the text (1, T, V), and its continuation."""
    decoder = load(ReferenceBackend())
    return decoder.forward(ids, decoder.new_cache(1, ids.shape[1])), greedy(decoder, ids)


def greedy(decoder: Decoder, prompt: torch.Tensor, count: int = 24) -> list[int]:
    cache, new, tokens = decoder.new_cache(1, prompt.shape[1] + count), prompt, []
    for _ in range(count):
        new = decoder.forward(new, cache, last_only=True).argmax(-1)
        tokens.append(int(new))
    return tokens


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL(expected || found) in nats per token."""
    log_p, log_q = (x[0].double().log_softmax(-1) for x in (expected, found))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_fp32_computes_the_reference(
    load: Callable[[Backend], Decoder], ids: torch.Tensor, expected: tuple[torch.Tensor, list[int]]
) -> None:
    decoder = load(NativeBackend(2, compute="fp32", kv="fp32"))
    found = decoder.forward(ids, decoder.new_cache(1, ids.shape[1]))
    assert float((found - expected[0]).abs().max() / expected[0].abs().max()) <= RELATIVE
    assert greedy(decoder, ids) == expected[1]


def test_int8_adds_little(
    smollm2_gguf: Path,
    load: Callable[[Backend], Decoder],
    ids: torch.Tensor,
    expected: tuple[torch.Tensor, list[int]],
) -> None:
    """With its fp16 cache, less than 5 % of the divergence that 4 bits cost."""
    with GGUFSource(smollm2_gguf) as original:
        unquantized = load_decoder(original, ReferenceBackend())
    whole = unquantized.forward(ids, unquantized.new_cache(1, ids.shape[1]))
    decoder = load(NativeBackend(2))
    found = decoder.forward(ids, decoder.new_cache(1, ids.shape[1]))
    own, added = divergence(whole, expected[0]), divergence(expected[0], found)
    assert 0 < added < 0.05 * own, f"4 bits cost {own:.4f} nats per token, int8 compute adds {added:.5f}"
    # 4.25 bits a weight instead of 32, but for the embedding (a fifth of the weights), which is no part of the plan.
    assert decoder.weights.nbytes < 0.4 * unquantized.weights.nbytes


def test_threads_and_pieces_change_no_bit(load: Callable[[Backend], Decoder], ids: torch.Tensor) -> None:
    results = []
    for threads, cut in ((1, 100), (3, 1)):
        decoder = load(NativeBackend(threads))
        cache = decoder.new_cache(1, ids.shape[1])
        decoder.forward(ids[:, :cut], cache, last_only=True)
        results.append(decoder.forward(ids[:, cut:], cache, last_only=True))
    assert torch.equal(*results)
