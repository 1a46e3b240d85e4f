"""Layers with states of fixed size: what they compute, in any pieces and batch, and going back to a state that was kept."""

from __future__ import annotations

import pytest
import torch
from toy_recurrent import VOCABULARY, ToyModel, plain_logits, toy_tensors

from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.reference.backend import ReferenceBackend
from kbit.graph.batch import Batch
from kbit.graph.block_table import BlockTable
from kbit.graph.cache import Cache
from kbit.graph.pages import OutOfPagesError
from kbit.graph.prefix_keys import prefix_keys
from kbit.host.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

# float32 sums of at most 51 terms in another order, three layers deep; a state forgets, so that its errors stay those of
# a few tokens. See test_decoder_parity.py.
RELATIVE = 1e-5
TENSORS = toy_tensors()
BACKENDS = ["reference", "native"]


def model_on(name: str, threads: int = 2) -> ToyModel:
    backend = ReferenceBackend() if name == "reference" else NativeBackend(threads, compute="fp32", kv="fp32")
    return ToyModel(backend, TENSORS)


def ids_of(tokens: int, seed: int = 4) -> list[int]:
    return torch.randint(0, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_same(name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Bit for bit on the native backend; torch's own products depend on how many rows they have."""
    if name == "native":
        assert torch.equal(found, wanted)
    else:
        assert_close(found, wanted)


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= RELATIVE


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 3, 5, 70, 600])
def test_it_is_what_the_paper_writes(name: str, tokens: int) -> None:
    """Also where a text takes several passes (of 512 tokens on the native backend)."""
    model, ids = model_on(name), ids_of(tokens)
    (found,) = model.logits([ids], model.new_cache(1, tokens))
    assert_close(found, plain_logits(TENSORS, ids))


@pytest.mark.parametrize("name", BACKENDS)
def test_pieces_and_batches_do_not_matter(name: str) -> None:
    texts = [ids_of(41), ids_of(41, 5), ids_of(41, 6)]
    together = model_on(name, 3)
    cache = together.new_cache(3, 64)
    cuts = [(0, 17), (17, 18), (18, 20), (20, 41)]
    pieces = [together.logits([text[a:b] for text in texts], cache) for a, b in cuts]
    found = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
    alone = model_on(name, 1)
    for row, text in enumerate(texts):
        cache = alone.new_cache(1, 41)
        steps = []
        for token in text:
            cache.reserve([1])
            steps.append(torch.as_tensor(alone.runner.extend([token], cache, last_only=True)))
        assert_same(name, torch.cat(steps), found[row])


@pytest.mark.parametrize("name", BACKENDS)
def test_going_back_to_a_kept_state(name: str) -> None:
    """As speculation does: keep, draft, go back, go on with what was accepted; drafts leave no trace."""
    model, ids, drafts = model_on(name), ids_of(20), ids_of(5, 8)
    cache = model.new_cache(1, 64)
    model.logits([ids[:12]], cache)
    cache.snapshot()
    model.logits([drafts], cache)
    with pytest.raises(UsageError, match="17 tokens after 14 of them was not kept: it can go back to 12"):
        cache.truncate(14)
    assert cache.lengths.tolist() == [17]
    assert (cache.rows[0].kept_before(14), cache.rows[0].kept_before(11)) == (12, 0)
    for _ in range(2):  # what is kept can be gone back to again
        cache.truncate(12)
        (found,) = model.logits([ids[12:]], cache)
        expected = model.new_cache(1, 64)
        model.logits([ids[:12]], expected)
        assert_same(name, found, model.logits([ids[12:]], expected)[0])
    cache.rows[0].forget(12)
    assert cache.rows[0].kept_before(15) == 0
    cache.truncate(0)
    assert_same(name, *model.logits([ids], cache), *model.logits([ids], model.new_cache(1, 64)))


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_that_share_a_past(name: str) -> None:
    model, ids = model_on(name), ids_of(10)
    cache = model.new_cache(1, 16)
    model.logits([ids], cache)
    cache.select([0, 0, 0])
    states = cache.pool.states
    assert states is not None
    assert len({row.state for row in cache.rows}) == 1
    found = model.logits([[1], [2], [1]], cache)
    for token, logits in zip((1, 2, 1), found, strict=True):
        assert_close(logits, plain_logits(TENSORS, [*ids, token])[-1:])
    cache.truncate(0)
    assert states.available == states.count


@pytest.mark.parametrize("name", BACKENDS)
def test_a_beginning_is_found_with_its_state(name: str) -> None:
    """Two full pages are known, but a state only of the first."""
    model, ids = model_on(name), ids_of(150)
    pool = model.new_pool(8, 6)
    first, second = BlockTable(pool), BlockTable(pool)
    cache = Cache(pool, [first], 200)
    model.logits([ids[:64]], cache)
    first.snapshot()
    (expected,) = model.logits([ids[64:]], cache)
    keys = prefix_keys(ids)
    first.publish(keys)
    first.release()
    assert second.match(keys) == 64
    (found,) = model.logits([ids[64:]], Cache(pool, [second], 200))
    assert_same(name, found, expected)
    third = BlockTable(pool)
    assert third.match(prefix_keys(ids_of(150, 9))) == 0
    assert pool.states is not None
    while pool.states.available:
        BlockTable(pool).reserve(1)
    with pytest.raises(OutOfPagesError, match="all 6 pages of the cache are in use"):
        BlockTable(pool).reserve(1)


def test_a_pass_that_fails_leaves_the_state_as_it_was() -> None:
    model, ids = model_on("native"), ids_of(9)
    cache = model.new_cache(1, 16)
    model.logits([ids[:8]], cache)
    cache.reserve([1])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model.runner.forward(Batch.of([[VOCABULARY]], cache.lengths), cache)
    (found,) = model.logits([ids[8:]], cache)
    assert_close(found, plain_logits(TENSORS, ids)[-1:])


def test_what_does_not_fit_is_refused() -> None:
    model = model_on("native")
    other = model.backend.new_cache(1, 1, 1, 16, 8)
    other.reserve([1])
    with pytest.raises(TypeError, match="a recurrent model's cache has a pool of states"):
        model.runner.forward(Batch.of([[1]], [0]), other)
