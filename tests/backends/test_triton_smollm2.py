"""SmolLM2's first two layers on the Triton kernels, real weights and real text: the reference's hidden states and logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from decoder_cases import DictSource, quantized

from kbit.backends.reference.backend import ReferenceBackend
from kbit.checkpoint.gguf.source import GGUFSource
from kbit.models.load import load_decoder
from kbit.text.tokenizer import Tokenizer

pytest.importorskip("triton")

from kbit.backends.triton.backend import TritonBackend

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

TEXT = "The keeper climbs the two hundred steps, trims the lamp, and writes"
LAYERS = 2


@pytest.fixture(scope="module")
def original(smollm2_gguf: Path) -> tuple[DictSource, torch.Tensor]:
    """The embedding, the first layers and the last norm, and the text's tokens (1, T)."""
    with GGUFSource(smollm2_gguf) as source:
        later = tuple(f"model.layers.{index}." for index in range(LAYERS, source.config["num_hidden_layers"]))
        tensors = {name: source.read(name) for name in source.tensors if not name.startswith(later)}
        ids = torch.tensor([Tokenizer.from_source(source).encode(TEXT)])
        return DictSource({**source.config, "num_hidden_layers": LAYERS}, dict(tensors)), ids


def test_equals_the_reference(device: str, original: tuple[DictSource, torch.Tensor]) -> None:
    """4 bits, a prompt and a token: within what half precision does to factors, products and probabilities.

    Each layer rounds about ten times, to within 2^-11 of a value each time; sqrt(20) of them are 2^-11 * 4.5, and the
    largest of a thousand deviations is about three times the typical.
    """
    source, ids = original
    source = DictSource(source.config, quantized(source.data, "nf4-b64"))
    ours, theirs = load_decoder(source, TritonBackend(device)), load_decoder(source, ReferenceBackend())
    caches = ours.new_cache(1, 64), theirs.new_cache(1, 64)
    for part in (ids[:, :-1], ids[:, -1:]):
        found, expected = ours.hidden_states(part, caches[0]).cpu(), theirs.hidden_states(part, caches[1])
        worst = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert float(worst.max()) <= 14 * 2.0**-11
    found, expected = ours.logits(found).cpu(), theirs.logits(expected)
    assert int(found.argmax()) == int(expected.argmax())
    assert float((found - expected).norm() / expected.norm()) <= 14 * 2.0**-11
