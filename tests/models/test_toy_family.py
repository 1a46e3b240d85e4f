"""A family added by one file: it runs on every backend that has what it needs, and the others refuse it by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import toy_family
from decoder_cases import DictSource, quantized, tame_tensors
from half_precision_cases import assert_close

from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.reference.backend import ReferenceBackend
from kbit.graph.batch import Batch
from kbit.graph.ops import Attention, refuse_attention
from kbit.host.errors import UnsupportedError, UsageError
from kbit.models.decoder import Decoder
from kbit.models.families import FAMILIES, spec_from_config
from kbit.models.load import load_decoder
from kbit.models.params import parameters

pytestmark = pytest.mark.usefixtures("one_thread")

# float32 sums of at most 77 terms in another order, three layers deep; see test_decoder_parity.py.
RELATIVE = 1e-5


@pytest.fixture(autouse=True)
def _toy() -> Iterator[None]:
    toy_family.install()
    yield
    del FAMILIES["toy"]


def toy(backend: NativeBackend | ReferenceBackend, format: str | None = None) -> Decoder:
    config = toy_family.toy_config()
    tensors = tame_tensors(config)
    return load_decoder(DictSource(config, tensors if format is None else quantized(tensors, format)), backend)


def ids_of(tokens: int) -> list[int]:
    return torch.randint(0, 131, (tokens,), generator=torch.Generator().manual_seed(4)).tolist()


@pytest.mark.parametrize("format", [None, "nf4-b16", "int3-b16-asym"])
@pytest.mark.parametrize("tokens", [1, 2, 40, 300, 700])
def test_reference_and_native_agree(format: str | None, tokens: int) -> None:
    """Also where a text is longer than what causal models are fed at once (512 tokens) and spans several chunks."""
    ids = ids_of(tokens)
    expected, native = toy(ReferenceBackend(), format), toy(NativeBackend(2, compute="fp32", kv="fp32"), format)
    wanted = torch.tensor(expected.extend(ids, expected.new_cache(1, tokens), last_only=False))
    found = torch.tensor(native.extend(ids, native.new_cache(1, tokens), last_only=False))
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= RELATIVE


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_batch_is_its_rows(threads: int) -> None:
    """Whatever else is in the batch and whoever computes, bit for bit."""
    native = toy(NativeBackend(threads, compute="fp32", kv="fp32"))
    one = toy(NativeBackend(1, compute="fp32", kv="fp32"))
    rows, lengths = [ids_of(150), ids_of(29)], torch.tensor([150, 29])
    batch = torch.tensor([rows[0], rows[1] + [0] * 121])
    together = native.forward(batch, native.new_cache(2, 150), lengths)
    for row, (ids, length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
        alone = torch.tensor(one.extend(ids, one.new_cache(1, length), last_only=False))
        assert torch.equal(together[row, :length], alone)


@pytest.mark.parametrize("name", ["reference", "native"])
def test_every_token_sees_the_whole_text(name: str) -> None:
    backend = ReferenceBackend() if name == "reference" else NativeBackend(2, compute="fp32", kv="fp32")
    model, ids = toy(backend), ids_of(30)
    before = torch.tensor(model.extend(ids, model.new_cache(1, 30), last_only=False))
    ids[-1] = (ids[-1] + 1) % 131
    after = torch.tensor(model.extend(ids, model.new_cache(1, 30), last_only=False))
    assert bool((before[:-1] != after[:-1]).any(dim=1).all())


def test_a_text_is_not_continued() -> None:
    for model in (toy(ReferenceBackend()), toy(NativeBackend(1))):
        cache = model.new_cache(1, 8)
        model.extend([1, 2, 3], cache)
        with pytest.raises(UsageError, match="sees the whole text, which therefore cannot be continued"):
            model.extend([4], cache)
        with pytest.raises(UsageError, match="use an empty cache"):
            model.forward(torch.tensor([[4]]), cache)
        assert model.spec.longest_in_pieces == 0


def test_what_is_declared() -> None:
    """Every tensor once, with the norm after attention and without the one after the MLP, which the family lacks."""
    declared = parameters(spec_from_config(toy_family.toy_config(num_hidden_layers=1)))
    assert [(parameter.slot, parameter.role, parameter.cut) for parameter in declared] == [
        ("embedding", "embedding", None),
        ("attention_norm", "norm", None),
        ("attention_norm", "bias", None),
        ("q", "linear", (0, "heads")),
        ("q", "bias", (0, "heads")),
        ("k", "linear", (0, "kv_heads")),
        ("k", "bias", (0, "kv_heads")),
        ("v", "linear", (0, "kv_heads")),
        ("v", "bias", (0, "kv_heads")),
        ("o", "linear", (1, "heads")),
        ("o", "bias", None),
        ("attention_post_norm", "norm", None),
        ("attention_post_norm", "bias", None),
        ("mlp_norm", "norm", None),
        ("mlp_norm", "bias", None),
        ("gate", "linear", (0, "features")),
        ("up", "linear", (0, "features")),
        ("down", "linear", (1, "features")),
        ("final_norm", "norm", None),
        ("final_norm", "bias", None),
    ]


def test_attention_that_a_backend_lacks_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="prefix attention has no window"):
        Attention(0, 1, 1, 8, 1.0, 4, mask="prefix")
    attention = Attention(0, 1, 1, 8, 1.0, None, mask="prefix")
    with pytest.raises(UnsupportedError, match="the native backend has no attention with mask 'prefix', only causal"):
        refuse_attention(attention, "native", mask=("causal",))


def test_triton_runs_it() -> None:
    """As the reference does, to the rounding of half precision (test_triton_backend.py), a text alone and a batch."""
    pytest.importorskip("triton")
    from triton_interpreter import install

    install()
    from kbit.backends.triton.backend import TritonBackend

    config = toy_family.toy_config(num_hidden_layers=1, head_dim=16)
    source = DictSource(config, tame_tensors(config))
    ours, expected = (load_decoder(source, backend) for backend in (TritonBackend("cpu"), ReferenceBackend()))
    for lengths in ([3, 3], [9, 2]):
        texts = [ids_of(length) for length in lengths]
        batch = Batch.of(texts, [0, 0], "all")
        found, wanted = (torch.as_tensor(model.run(batch, model.new_cache(2, 9))) for model in (ours, expected))
        assert_close(found, wanted, source)


def test_triton_refuses_a_prefix_by_name() -> None:
    pytest.importorskip("triton")
    from triton_interpreter import install

    install()
    from kbit.backends.triton.backend import TritonBackend

    config = toy_family.toy_config(num_hidden_layers=1, head_dim=16)
    prefix = replace(spec_from_config(config), mask="prefix")
    backend = TritonBackend("cpu")
    weights = load_decoder(DictSource(config, tame_tensors(config)), backend).weights
    with pytest.raises(
        UnsupportedError, match="the triton backend has no attention with mask 'prefix', only causal or"
    ):
        Decoder(prefix, backend, weights)


def test_a_prefix_sees_itself_and_the_text_goes_on() -> None:
    """The same family with another mask: a beginning as if bidirectional, then token by token, alike on both backends."""
    config = toy_family.toy_config()
    source, ids, found = DictSource(config, tame_tensors(config)), ids_of(90), []
    for backend in (ReferenceBackend(), NativeBackend(2, compute="fp32", kv="fp32")):
        whole = load_decoder(source, backend)
        model = Decoder(replace(whole.spec, mask="prefix"), backend, whole.weights)
        cache = model.new_cache(1, 90)
        start = torch.as_tensor(model.run(Batch.of([ids[:80]], [0], "all", [80]), cache))
        bidirectional = torch.tensor(whole.extend(ids[:80], whole.new_cache(1, 80), last_only=False))
        assert float((start - bidirectional).abs().max() / start.abs().max()) <= RELATIVE
        rest = [torch.tensor(model.extend([token], cache)) for token in ids[80:]]
        found.append(torch.cat([start, *rest]))
        at_once = model.run(Batch.of([ids], [0], "all", [80]), model.new_cache(1, 90))
        assert float((torch.as_tensor(at_once) - found[-1]).abs().max() / start.abs().max()) <= RELATIVE
    assert float((found[0] - found[1]).abs().max() / found[0].abs().max()) <= RELATIVE
