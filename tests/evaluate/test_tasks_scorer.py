"""Log-likelihoods of continuations: against a plain forward pass of each request alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kbit.engine.loader import LoadedModel, load_model
from kbit.evaluate.tasks import scorer as module
from kbit.evaluate.tasks.documents import TASKS
from kbit.evaluate.tasks.scorer import Encoded, Scorer, TooLongError, choose_length, group_requests
from kbit.evaluate.tasks.sources import load_items
from kbit.graph.backend import Array
from kbit.graph.batch import Batch
from kbit.graph.cache import Cache
from kbit.host.errors import KbitError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

# Logits of size 20 after float32 sums in another order are off by some 1e-5; a continuation adds up to 60 of them.
ABSOLUTE = 1e-3


@pytest.fixture(scope="module")
def novels(novels_folder: str) -> LoadedModel:
    return load_model(novels_folder, threads=1, compute="fp32")


@pytest.fixture(scope="module")
def requests(data_dir: Path) -> list[tuple[str, str]]:
    """A few items of every task: one choice, two beginnings of one end, two and four ends of one beginning."""
    found = [load_items(task, str(data_dir), 2).items for task in TASKS.values()]
    return [request for items in found for item in items for request in item.requests]


def alone(scorer: Scorer, model: LoadedModel, request: Encoded) -> tuple[float, bool]:
    """What one request is worth by a forward pass over all of it, in float64."""
    ids = torch.tensor([request.ids])
    logits = model.decoder.forward(ids[:, :-1], model.decoder.new_cache(1, ids.shape[1]))[0].double()
    targets = ids[0, -request.scored :]
    scored = logits[-request.scored :].log_softmax(-1)
    greedy = bool((scored.argmax(-1) == targets).all())
    return float(scored.gather(1, targets[:, None]).sum()), greedy


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_batches_with_shared_beginnings_give_what_each_request_gives_alone(
    novels_folder: str, requests: list[tuple[str, str]], backend: str
) -> None:
    compute = "fp32" if backend == "native" else None
    model = load_model(novels_folder, threads=1, backend=backend, compute=compute)
    scorer = Scorer(model.decoder, model.tokenizer)
    scores = scorer.score(requests)
    for request, score in zip(requests, scores, strict=True):
        encoded = scorer.encode(*request)
        loglikelihood, greedy = alone(scorer, model, encoded)
        assert score.loglikelihood == pytest.approx(loglikelihood, abs=ABSOLUTE)
        assert (score.greedy, score.tokens) == (greedy, encoded.scored)


def test_greedy_is_what_the_model_goes_on_with(novels: LoadedModel) -> None:
    scorer = Scorer(novels.decoder, novels.tokenizer)
    context = "It was a dark and"
    ids = torch.tensor([scorer.tokens(context)])
    best = int(novels.decoder.forward(ids, novels.decoder.new_cache(1, 64))[0, -1].argmax())
    request = scorer.fit(ids[0].tolist(), [best])
    other = scorer.fit(ids[0].tolist(), [(best + 1) % 2048])
    scores = dict(scorer.stream([request, other]))
    assert scores[0].greedy
    assert not scores[1].greedy
    assert scores[0].loglikelihood > scores[1].loglikelihood


def test_the_order_and_the_size_of_batches_change_nothing(
    novels: LoadedModel, requests: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer(novels.decoder, novels.tokenizer)
    expected = [score.loglikelihood for score in scorer.score(requests)]
    monkeypatch.setattr(module, "BATCH_TOKENS", 1)
    assert [score.loglikelihood for score in scorer.score(requests)] == pytest.approx(expected, abs=ABSOLUTE)
    monkeypatch.setattr(module, "BATCH_TOKENS", 1 << 30)
    monkeypatch.setattr(module, "CACHE_BYTES", 1)
    backwards = scorer.score(requests[::-1])[::-1]
    assert [score.loglikelihood for score in backwards] == pytest.approx(expected, abs=ABSOLUTE)


def test_shared_beginnings_are_computed_once(novels: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(novels.decoder, novels.tokenizer)
    context = "The lighthouse keeper climbed the stairs and, since nobody was there, he "
    requests = [(context, text) for text in ("slept", "wrote a letter", "sang", "looked at the sea")]
    fed: list[int] = []
    run = novels.decoder.run_hidden

    def count(batch: Batch, cache: Cache) -> Array:
        fed.append(len(batch))
        return run(batch, cache)

    monkeypatch.setattr(novels.decoder, "run_hidden", count)
    scorer.score(requests)
    encoded = [scorer.encode(*request) for request in requests]
    shared = encoded[0].first
    assert fed == [shared, sum(len(each.fed) - shared for each in encoded)]


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(novels: LoadedModel) -> None:
    scorer = Scorer(novels.decoder, novels.tokenizer)
    assert scorer.encode("He said ", "yes") == scorer.encode("He said", " yes")


def test_long_contexts_lose_their_beginning(novels: LoadedModel) -> None:
    whole = Scorer(novels.decoder, novels.tokenizer)
    short = Scorer(novels.decoder, novels.tokenizer, max_length=16)
    context = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of"
    encoded = short.encode(context, " foolishness")
    ids = whole.encode(context, " foolishness").ids
    assert encoded.ids == ids[-17:]
    assert encoded.truncated == len(ids) - 17
    (score,) = short.score([(context, " foolishness")])
    assert score.truncated == encoded.truncated
    assert score.loglikelihood == pytest.approx(alone(short, novels, encoded)[0], abs=ABSOLUTE)


def test_an_empty_context_is_the_beginning_of_a_text(novels: LoadedModel) -> None:
    scorer = Scorer(novels.decoder, novels.tokenizer)
    text = novels.tokenizer.encode(" once", add_special_tokens=False)
    assert scorer.prefix_id == novels.tokenizer.bos_id == 0
    assert scorer.encode("", " once") == Encoded((0, *text), len(text))
    # A text that begins with the token itself takes it as its context.
    assert scorer.encode("", "<|endoftext|> once").ids == (0, *text)
    assert scorer.encode(" ", "once") == scorer.encode("", " once")


def test_without_such_a_token_an_empty_context_is_refused(tiny_model: Path) -> None:
    model = load_model(str(tiny_model), threads=1)
    scorer = Scorer(model.decoder, model.tokenizer)
    assert scorer.prefix_id is None
    with pytest.raises(UsageError, match="no context"):
        scorer.encode("", "word")
    assert Scorer(model.decoder, model.tokenizer, prefix_id=5).encode("", "a").ids[0] == 5


def test_continuations_that_do_not_fit_are_refused(novels: LoadedModel) -> None:
    scorer = Scorer(novels.decoder, novels.tokenizer, max_length=4)
    assert scorer.encode("a b c", " d").scored == 1
    with pytest.raises(TooLongError, match="the 4 the model takes"):
        scorer.encode("a", " one two three four five six")
    with pytest.raises(KbitError, match="no tokens of its own"):
        scorer.encode("a", "")


def test_lengths_a_model_cannot_take_are_refused(novels: LoadedModel) -> None:
    assert choose_length(novels.decoder.spec, None) == 256
    for bad in (1, 257, -3):
        with pytest.raises(UsageError, match=f"--context {bad}"):
            choose_length(novels.decoder.spec, bad)


def test_broken_arithmetic_is_told(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(str(tiny_model), threads=1)
    monkeypatch.setattr(model.decoder, "run_head", lambda x: torch.full((len(x), 260), float("nan")))
    with pytest.raises(KbitError, match="broken"):
        Scorer(model.decoder, model.tokenizer).score([("abc", "def")])


def encoded(values: Sequence[tuple[list[int], int]]) -> list[Encoded]:
    return [Encoded(tuple(ids), min(scored, len(ids) - 1)) for ids, scored in values]


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=2, max_size=24), st.integers(1, 5)), max_size=70),
    st.lists(st.integers(0, 1), max_size=30),
)
def test_groups_hold_every_request_once_and_share_what_is_common(
    values: list[tuple[list[int], int]], beginning: list[int]
) -> None:
    requests = encoded([(beginning + ids, scored) for ids, scored in values])
    groups = group_requests(requests)
    members = sorted(member for group in groups for member in group.members)
    assert members == list(range(len(requests)))
    for group in groups:
        first = requests[group.members[0]]
        assert len(group.members) <= 64
        for member in group.members:
            assert requests[member].ids[: group.shared] == first.ids[: group.shared]
            assert group.shared <= requests[member].first
        if len(group.members) > 1:
            assert group.shared >= 8


def test_choices_of_an_item_form_a_group() -> None:
    generator = np.random.default_rng(0)
    requests = []
    for item in range(20):
        context = [item, *generator.integers(0, 50, 30).tolist()]
        requests += [Encoded((*context, *generator.integers(50, 99, 6).tolist()), 6) for _ in range(4)]
    groups = group_requests(requests)
    assert sorted(tuple(sorted(group.members)) for group in groups) == [
        tuple(range(first, first + 4)) for first in range(0, 80, 4)
    ]
    assert {group.shared for group in groups} == {30}
