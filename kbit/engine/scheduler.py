"""Continuous batching: which tokens of which sequences go through the model in the next pass.

Every pass takes the next token of each text that is being written and fills up with pieces of prompts, the shortest
first, so that texts neither wait for each other's ends nor for long prompts. A sequence comes in when its pages are
free; when a running one needs a page and there is none, the latest that came in gives its own back and starts again
later.

What a sequence is answered does not depend on any of this where the kernels' results do not depend on the batch, as the
native ones' do not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, replace

import numpy as np

from kbit.engine.sequence import Sequence
from kbit.graph.batch import Batch
from kbit.graph.cache import Cache
from kbit.graph.pages import PagePool, pages_for
from kbit.host.errors import UsageError

# Tokens of a pass: as many as the native backend computes at once (kbit.backends.cpu.runner).
BATCH_TOKENS = 512
_OLDEST_SHARE = 4


@dataclass(frozen=True, eq=False)
class Pass:
    """What goes through the model together. Room for it is made.

    Attributes:
        batch: the tokens, those whose results are wanted among them.
        cache: the block tables of the sequences, in the batch's order.
        sequences: whose tokens they are.
    """

    batch: Batch
    cache: Cache
    sequences: tuple[Sequence, ...]


class Scheduler:
    """Sequences that share a pool of pages, and when each is computed.

    Args:
        pool: the pages.
        batch_tokens: most tokens of a pass, but for a sequence that must be computed whole.
        most_running: most sequences that have pages at once.

    Attributes:
        pool: as given.
        preemptions: how often a running sequence lost its pages.
    """

    def __init__(self, pool: PagePool, batch_tokens: int = BATCH_TOKENS, most_running: int = BATCH_TOKENS) -> None:
        self.pool = pool
        self._batch_tokens = batch_tokens
        self._most_running = most_running
        self._running: list[Sequence] = []  # in the order they came in
        self._waiting: deque[Sequence] = deque()
        self._budget = batch_tokens  # of the pass that is being made
        self.preemptions = 0

    def __len__(self) -> int:
        """Sequences that have not been removed."""
        return len(self._running) + len(self._waiting)

    @property
    def running(self) -> Sequence_[Sequence]:
        """Those that came in, the first first."""
        return self._running

    @property
    def waiting(self) -> int:
        """How many wait to come in, or to come in again."""
        return len(self._waiting)

    @property
    def pending(self) -> int:
        """Tokens of all sequences that are still to go through the model."""
        return sum(sequence.pending for sequence in (*self._running, *self._waiting))

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence.

        Raises:
            UsageError: it would not fit if it were alone.
        """
        self._check_size(sequence)
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Lets go of a sequence and its pages, which others find."""
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.publish_end()
        sequence.table.release()

    def next_pass(self, most: int | None = None) -> Pass | None:
        """The tokens to compute next, or None where every sequence waits for its next token to be appended.

        Args:
            most: tokens of this pass, in place of `batch_tokens` if that is more. Each text that is being written gets
                its token all the same.

        Raises:
            UsageError: a sequence has grown beyond what the pool holds.
        """
        chosen: list[tuple[Sequence, int]] = []
        budget = self._budget = self._batch_tokens if most is None else min(most, self._batch_tokens)
        for sequence in [each for each in self._running if each.pending == 1]:
            if sequence in self._running:  # it may have been stopped for one before it
                count = self._admit(sequence, max(budget, 1), {id(each) for each, _ in chosen})
                if count:
                    count += self._admit_draft(sequence, budget - count)
                    chosen.append((sequence, count))
                    budget -= count
        parts = self._parts(budget)
        for sequence in [each for each in self._running if each.pending > 1]:
            part = budget if sequence.whole else min(parts.get(sequence, 0), budget)
            if part > 0 and sequence in self._running:
                count = self._admit(sequence, part, {id(each) for each, _ in chosen})
                if count:
                    chosen.append((sequence, count))
                    budget -= count
        for sequence in list(self._waiting):
            if budget <= 0 or len(self._running) >= self._most_running:
                break
            part = budget if sequence.whole else min(parts.get(sequence, 0), budget)
            if part <= 0:
                continue
            has_room = self._has_room(sequence)  # and maybe the beginning of it, so less is pending
            count = self._fitting(sequence, part)
            if not has_room or not count:
                break
            self._reserve(sequence, count)
            self._waiting.remove(sequence)
            self._running.append(sequence)
            chosen.append((sequence, count))
            budget -= count
        return self._pass(chosen) if chosen else None

    def _parts(self, budget: int) -> dict[Sequence, int]:
        """What each prompt gets of so many tokens: the shortest first, so that a long one keeps nobody waiting for its
        end; but the oldest gets a quarter, so that none waits for ever."""
        reading = [each for each in self._running if each.pending > 1]
        reading += list(self._waiting)[: max(0, self._most_running - len(self._running))]
        parts: dict[Sequence, int] = {}
        if reading:
            parts[reading[0]] = min(reading[0].pending, budget // _OLDEST_SHARE)
            budget -= parts[reading[0]]
        for sequence in sorted(reading, key=lambda each: each.pending):
            more = min(sequence.pending - parts.get(sequence, 0), budget)
            parts[sequence] = parts.get(sequence, 0) + more
            budget -= more
        return parts

    def complete(self, done: Pass) -> Iterator[tuple[Sequence, slice]]:
        """After a pass: the sequences that are answered, and which of the pass's results are theirs."""
        begin = 0
        for sequence, count in zip(done.sequences, done.batch.counts.tolist(), strict=True):
            answered = sequence.computed(count)
            if answered:
                yield sequence, slice(begin, begin + answered)
            begin += answered

    def _admit(self, sequence: Sequence, budget: int, chosen: Iterable[int]) -> int:
        """Makes room for the next tokens of a running sequence; how many of them, 0 for none."""
        self._check_size(sequence)
        count = self._fitting(sequence, budget)
        while count and sequence.table.missing(count) > self.pool.available:
            if not self._take_a_page(sequence, chosen):
                return 0
        self._reserve(sequence, count)
        return count

    def _admit_draft(self, sequence: Sequence, budget: int) -> int:
        """Makes room for the guesses of a sequence that has room for its next token: how many, 0 where that would take
        pages of others."""
        draft = sequence.draft = sequence.draft[: max(0, budget)]
        if draft and sequence.table.missing(1 + len(draft)) > self.pool.available:
            draft = sequence.draft = []
        if draft:
            self._reserve(sequence, 1 + len(draft))
        return len(draft)

    def _fitting(self, sequence: Sequence, budget: int) -> int:
        """Tokens of a sequence that a pass with so much room left takes."""
        if sequence.whole:
            return sequence.pending if sequence.pending <= budget or budget == self._budget else 0
        return max(0, min(sequence.pending, budget))

    def _take_a_page(self, sequence: Sequence, chosen: Iterable[int]) -> bool:
        """Frees pages for a running sequence: of those that wait, the last first; else of the latest to come in."""
        if self._release_waiting(sequence):
            return True
        for victim in reversed(self._running):
            if id(victim) in chosen:
                continue
            self._running.remove(victim)
            victim.table.release()
            victim.draft = []
            self._waiting.appendleft(victim)
            self.preemptions += 1
            return victim is not sequence
        return False

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether the next in the queue can come in: with all its tokens, and a page more for each that runs.

        Less, and it would soon be stopped again, or stop others. Where nothing runs, it takes the pages of those that
        wait behind it. Likewise of states of fixed size, if the model has them.
        """
        if self._running and self._states_needed() > self._states_free():
            return False
        sequence.find_beginning()
        while sequence.table.missing(sequence.pending) + len(self._running) > self.pool.available:
            if self._running or not self._release_waiting(sequence):
                return False
        return True

    def _reserve(self, sequence: Sequence, count: int) -> None:
        """Room for a sequence's next tokens, and for its states after them."""
        if self.pool.states is not None:
            self.pool.states.spare(1)  # there is one, but for sequences that go on from states they share
        sequence.table.reserve(count)

    def _states_free(self) -> int:
        return 0 if self.pool.states is None else self.pool.states.available

    def _states_needed(self) -> int:
        """Slots that another sequence needs, now and after its first pass, and those that running ones will need: where
        they have none for their next states, or will not give their present one back."""
        states = self.pool.states
        if states is None:
            return 0
        tables = [sequence.table for sequence in self._running]
        return 2 + sum(table.next_state < 0 or table.state < 0 or states.uses(table.state) > 1 for table in tables)

    def _release_waiting(self, sequence: Sequence) -> bool:
        """Takes the pages of the last sequence in the queue that has any; whether there was one."""
        for other in reversed(self._waiting):
            if other is not sequence and other.table.pages:
                other.table.release()
                return True
        return False

    def _check_size(self, sequence: Sequence) -> None:
        needed = pages_for(len(sequence.ids))
        if needed > self.pool.count:
            raise UsageError(
                f"a text of {len(sequence.ids)} tokens needs {needed} pages of the KV cache, which has "
                f"{self.pool.count}: make the cache larger or the text shorter"
            )

    def _pass(self, chosen: list[tuple[Sequence, int]]) -> Pass:
        tokens: list[list[int]] = []
        starts: list[int] = []
        wanted: list[int] = []
        begin = 0
        chosen = sorted(chosen, key=lambda each: each[0].adapter)  # rows of one adapter are multiplied together
        for sequence, count in chosen:
            start = sequence.table.length
            tokens.append([*sequence.ids, *sequence.draft][start : start + count])
            starts.append(start)
            first = max(sequence.wanted_from, start)
            wanted += range(begin + first - start, begin + count)
            begin += count
        batch = Batch.of(tokens, starts, np.array(wanted, dtype=np.int64))
        sequences = tuple(sequence for sequence, _ in chosen)
        if any(sequence.adapter >= 0 for sequence in sequences):
            batch = replace(batch, adapters=np.array([sequence.adapter for sequence in sequences], dtype=np.int64))
        capacity = max(len(sequence.ids) + len(sequence.draft) for sequence in sequences)
        return Pass(batch, Cache(self.pool, [each.table for each in sequences], capacity), sequences)
