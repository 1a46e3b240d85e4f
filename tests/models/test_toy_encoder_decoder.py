"""An encoder-decoder runs on the runners that decoders run on, prompts, pieces, batches and beams."""

from __future__ import annotations

import pytest
import torch
from toy_encoder_decoder import VOCABULARY, ToyModel, plain_logits, toy_tensors

from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.reference.backend import ReferenceBackend
from kbit.graph.batch import Batch

pytestmark = pytest.mark.usefixtures("one_thread")

# float32 sums of at most 77 terms in another order, six blocks deep; see test_decoder_parity.py.
RELATIVE = 1e-5
TENSORS = toy_tensors()


def backend_of(name: str) -> NativeBackend | ReferenceBackend:
    return ReferenceBackend() if name == "reference" else NativeBackend(2, compute="fp32", kv="fp32")


def ids_of(tokens: int, seed: int = 4) -> list[int]:
    return torch.randint(0, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= RELATIVE


@pytest.mark.parametrize("name", ["reference", "native"])
@pytest.mark.parametrize(("source", "text"), [(1, 1), (37, 5), (3, 70), (150, 140)])
def test_it_is_what_plain_torch_makes_of_it(name: str, source: int, text: int) -> None:
    model, before, after = ToyModel(backend_of(name), TENSORS), ids_of(source), ids_of(text, 5)
    (found,) = model.logits([after], model.encode([before], text))
    assert_close(found, plain_logits(TENSORS, before, after))


@pytest.mark.parametrize("name", ["reference", "native"])
def test_a_batch_in_pieces_is_its_texts(name: str) -> None:
    """Bit for bit on the native backend; and with one token at a time by the way that generation goes (`extend`)."""
    model = ToyModel(backend_of(name), TENSORS)
    sources, texts = [ids_of(140), ids_of(1, 6), ids_of(29, 7)], [ids_of(9), ids_of(9, 8), ids_of(9, 9)]
    cache = model.encode(sources, 9)
    pieces = [model.logits([text[at:to] for text in texts], cache) for at, to in ((0, 5), (5, 8), (8, 9))]
    together = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
    for row, (source, text) in enumerate(zip(sources, texts, strict=True)):
        alone = model.encode([source], 9)
        steps = []
        for token in text:
            alone.reserve([1])
            steps.append(torch.as_tensor(model.decoder.extend([token], alone, last_only=True)))
        assert_close(together[row], plain_logits(TENSORS, source, text))
        if name == "native":
            assert torch.equal(together[row], torch.cat(steps))
        else:
            assert_close(torch.cat(steps), together[row])


@pytest.mark.parametrize("name", ["reference", "native"])
def test_beams_share_their_source(name: str) -> None:
    """Rows that are selected keep the encoder's text that they belong to, and its pages are shared."""
    model = ToyModel(backend_of(name), TENSORS)
    sources, text = [ids_of(70), ids_of(90, 6)], ids_of(4, 5)
    cache = model.encode(sources, 8)
    model.logits([text, text], cache)
    cache.select([1, 1, 0])
    assert cache.encoder is not None
    assert cache.encoder.rows[0].pages == cache.encoder.rows[1].pages
    found = model.logits([[3], [4], [3]], cache)
    for row, (source, token) in enumerate(((1, 3), (1, 4), (0, 3))):
        assert_close(found[row], plain_logits(TENSORS, sources[source], [*text, token])[-1:])


def test_an_encoder_alone_returns_its_hidden_states() -> None:
    """It has no head, so `forward` is `hidden`."""
    found = {}
    for name in ("reference", "native"):
        model = ToyModel(backend_of(name), TENSORS)
        texts = model.encode([ids_of(5)], 1).encoder
        assert texts is not None
        texts.truncate(0)
        texts.reserve([5])
        hidden = torch.as_tensor(model.encoder.forward(Batch.of([ids_of(5)], [0], "all"), texts))
        assert torch.equal(torch.as_tensor(model.encoder.logits(hidden)), hidden)
        found[name] = hidden
    assert found["native"].shape == (5, 48)
    assert_close(found["native"], found["reference"])
