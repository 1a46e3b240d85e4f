"""The scheduler: whatever is computed together, in whatever order, every text is answered as if it were alone."""

from __future__ import annotations

import numpy as np
import pytest
from decoder_cases import TINY, DictSource, quantized, tame_tensors
from native_cases import VOCABULARY, native, source_of
from numpy.typing import NDArray

from kbit.engine.scheduler import Scheduler
from kbit.engine.sequence import Sequence
from kbit.graph.pages import pages_for
from kbit.host.errors import UsageError
from kbit.models.decoder import Decoder

LENGTHS = [1, 150, 64, 65, 30, 200, 3, 127]
NEW = 70


def texts(seed: int = 0) -> list[list[int]]:
    """Prompts of LENGTHS, the third and the fourth with a beginning in common."""
    generator = np.random.default_rng(seed)
    prompts = [generator.integers(0, VOCABULARY, length).tolist() for length in LENGTHS]
    prompts[3][:64] = prompts[2]
    return prompts


def alone(decoder: Decoder, prompt: list[int]) -> list[NDArray[np.float32]]:
    """Logits (V,) after the prompt and after each of NEW - 1 greedy tokens."""
    cache = decoder.new_cache(1, len(prompt) + NEW)
    logits = [decoder.extend(prompt, cache)[-1]]
    while len(logits) < NEW:
        logits.append(decoder.extend([int(logits[-1].argmax())], cache)[-1])
    return logits


def together(
    decoder: Decoder,
    prompts: list[list[int]],
    order: list[int],
    pages: int,
    batch_tokens: int,
    every: int = 1,
    sequences: int = 1,
) -> tuple[list[list[NDArray[np.float32]]], Scheduler]:
    """The same from a scheduler, a prompt added every so many passes."""
    pool = decoder.new_pool(pages, sequences)
    scheduler = Scheduler(pool, batch_tokens)
    answers: list[list[NDArray[np.float32]]] = [[] for _ in prompts]
    owner: dict[Sequence, int] = {}
    coming, passes = list(order), 0
    while coming or len(scheduler):
        if coming and passes % every == 0:
            index = coming.pop(0)
            sequence = Sequence(pool, prompts[index])
            owner[sequence] = index
            scheduler.add(sequence)
        passes += 1
        work = scheduler.next_pass()
        if work is None:
            continue
        assert len(work.batch) <= batch_tokens
        logits = np.asarray(decoder.run(work.batch, work.cache))
        for sequence, rows in scheduler.complete(work):
            (row,) = logits[rows]
            answers[owner[sequence]].append(row)
            if len(answers[owner[sequence]]) == NEW:
                scheduler.remove(sequence)
            else:
                sequence.append(int(row.argmax()))
    assert pool.available == pool.count
    assert pool.states is None or pool.states.available == pool.states.count
    return answers, scheduler


@pytest.mark.parametrize("kv", ["fp32", "fp16", "4", "3"])
def test_answers_do_not_depend_on_the_batch(kv: str) -> None:
    config = {**TINY, "head_dim": 16, "model_type": "mistral", "sliding_window": 70}
    decoder, prompts = native(DictSource(config, quantized(tame_tensors(config), "nf4-b32")), kv=kv), texts()
    expected = [alone(decoder, prompt) for prompt in prompts]
    for seed, (pages, batch_tokens, every) in enumerate([(100, 512, 1), (100, 33, 4), (8, 64, 1), (5, 100, 1)]):
        order = np.random.default_rng(seed).permutation(len(prompts)).tolist()
        found, scheduler = together(decoder, prompts, order, pages, batch_tokens, every)
        assert (scheduler.preemptions > 0) == (pages < 10), pages
        for one, other in zip(expected, found, strict=True):
            assert np.array_equal(np.stack(one), np.stack(other))


def test_every_position_is_answered_once() -> None:
    """As an evaluation wants it: results of a text's second half, from batches of many texts."""
    decoder, prompts = native(source_of("qwen2", "int4-b16")), texts()
    pool = decoder.new_pool(12)
    scheduler = Scheduler(pool, 100)
    sequences = [Sequence(pool, prompt, wanted_from=len(prompt) // 2) for prompt in prompts]
    for sequence in sequences:
        scheduler.add(sequence)
    answers: dict[Sequence, list[NDArray[np.float32]]] = {sequence: [] for sequence in sequences}
    while (work := scheduler.next_pass()) is not None:
        hidden = decoder.run_hidden(work.batch, work.cache)
        for sequence, rows in scheduler.complete(work):
            answers[sequence].append(np.asarray(decoder.run_head(hidden[rows])))
            if not sequence.pending:
                scheduler.remove(sequence)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        whole = decoder.extend(prompt, decoder.new_cache(1, len(prompt)), last_only=False)
        assert np.array_equal(np.concatenate(answers[sequence]), whole[len(prompt) // 2 :])


def test_a_beginning_that_was_computed_is_not_computed_again() -> None:
    decoder = native(source_of("llama", "int4-b16"))
    pool = decoder.new_pool(20)
    scheduler = Scheduler(pool)
    prompt = texts()[5]
    counts = []
    for ending in ([], [1, 2], [1, 3]):
        sequence = Sequence(pool, prompt + ending)
        scheduler.add(sequence)
        work = scheduler.next_pass()
        assert work is not None
        counts.append(len(work.batch))
        decoder.run(work.batch, work.cache)
        assert [found for found, _ in scheduler.complete(work)] == [sequence]
        scheduler.remove(sequence)
    assert counts == [200, 2, 1]


def test_decodes_go_first_and_prompts_fill_up() -> None:
    decoder = native(source_of("llama", "int4-b16"))
    pool = decoder.new_pool(20)
    scheduler = Scheduler(pool, 100)
    short, long = Sequence(pool, [1, 2, 3]), Sequence(pool, texts()[5])
    scheduler.add(short)
    scheduler.add(long)
    seen = []
    for _ in range(3):
        work = scheduler.next_pass()
        assert work is not None
        seen.append(work.batch.counts.tolist())
        decoder.run(work.batch, work.cache)
        for sequence, _ in scheduler.complete(work):
            if sequence is short:
                sequence.append(5)
    assert seen == [[3, 97], [1, 99], [1, 4]]


def test_a_short_prompt_does_not_wait_for_long_ones() -> None:
    """Though these came before; and the first of them goes on all the while."""
    decoder = native(source_of("llama"))
    pool = decoder.new_pool(60)
    scheduler = Scheduler(pool, 40)
    long = [Sequence(pool, list(range(number, number + 500))) for number in range(2)]
    for each in long:
        scheduler.add(each)
    first = scheduler.next_pass()
    assert first is not None
    decoder.run(first.batch, first.cache)
    list(scheduler.complete(first))
    short = [Sequence(pool, [number] * 20) for number in range(3)]
    for each in short:
        scheduler.add(each)
    passes = []
    for _ in range(2):
        work = scheduler.next_pass()
        assert work is not None
        passes.append(dict(zip(work.sequences, work.batch.counts.tolist(), strict=True)))
        decoder.run(work.batch, work.cache)
        for each, _ in scheduler.complete(work):
            scheduler.remove(each)
    assert passes == [{long[0]: 10, short[0]: 20, short[1]: 10}, {long[0]: 10, short[1]: 10, short[2]: 20}]


def test_what_does_not_fit_is_refused() -> None:
    pool = native(source_of("llama")).new_pool(2)
    scheduler = Scheduler(pool)
    with pytest.raises(UsageError, match=f"129 tokens needs {pages_for(129)} pages of the KV cache, which has 2"):
        scheduler.add(Sequence(pool, [1] * 129))
    growing = Sequence(pool, [1] * 128)
    scheduler.add(growing)
    work = scheduler.next_pass()
    assert work is not None
    growing.table.advance(128)
    list(scheduler.complete(work))
    growing.append(1)
    with pytest.raises(UsageError, match="make the cache larger or the text shorter"):
        scheduler.next_pass()
    with pytest.raises(ValueError, match="still to be computed"):
        Sequence(pool, [])
    with pytest.raises(ValueError, match="still to be computed"):
        Sequence(pool, [1, 2], table=growing.table)


def test_a_text_that_must_be_whole_is() -> None:
    pool = native(source_of("llama")).new_pool(9)
    scheduler = Scheduler(pool, 100)
    first, whole = Sequence(pool, [1] * 50), Sequence(pool, [1] * 150, whole=True)
    scheduler.add(first)
    scheduler.add(whole)
    counts = []
    for _ in range(2):
        work = scheduler.next_pass()
        assert work is not None
        counts.append(work.batch.counts.tolist())
        work.cache.advance(work.batch.counts)
        for sequence, _ in scheduler.complete(work):
            scheduler.remove(sequence)
    assert counts == [[50], [150]]


@pytest.mark.parametrize(("pages", "sequences"), [(40, 8), (40, 3), (12, 8), (5, 1)])
def test_texts_of_a_recurrent_model_wait_for_states(pages: int, sequences: int) -> None:
    """However many have room at once, of pages and of states; and those who go on from another's states."""
    decoder = native(source_of("qwen3_5"), threads=1)
    prompts = [prompt[:90] for prompt in texts()[:5]]
    expected = [alone(decoder, prompt) for prompt in prompts]
    answers, scheduler = together(decoder, prompts, [3, 0, 4, 1, 2], pages, 64, sequences=sequences)
    for found, wanted in zip(answers, expected, strict=True):
        assert np.array_equal(np.array(found), np.array(wanted))
    pool = scheduler.pool
    assert pool.states is not None
    assert pool.states.count <= max(2 * sequences, 3)
    first = Sequence(pool, prompts[1])
    scheduler = Scheduler(pool, 512)
    scheduler.add(first)
    work = scheduler.next_pass()
    assert work is not None
    decoder.run(work.batch, work.cache)
    list(scheduler.complete(work))
    forks = [Sequence(pool, [*prompts[1], token], table=first.table.fork()) for token in (1, 2, 3)]
    scheduler.remove(first)
    for fork in forks:
        scheduler.add(fork)
    found = {}
    while len(found) < 3:
        found |= _pass(decoder, scheduler)
    for token, fork in zip((1, 2, 3), forks, strict=True):
        cache = decoder.new_cache(1, 100)
        assert np.array_equal(found[fork], decoder.extend([*prompts[1], token], cache)[-1])


def _pass(decoder: Decoder, scheduler: Scheduler) -> dict[Sequence, NDArray[np.float32]]:
    work = scheduler.next_pass()
    assert work is not None
    logits = np.asarray(decoder.run(work.batch, work.cache))
    found = {sequence: logits[rows][-1] for sequence, rows in scheduler.complete(work)}
    for sequence in found:
        scheduler.remove(sequence)
    return found
