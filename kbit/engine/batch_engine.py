"""Many requests to one model at once: each step is one pass over tokens of any of them.

A request is a sequence of tokens, some of them computed; there are no phases. Each step takes the next token of every
answer in the making, and pieces of prompts as far as they fit into the time that a step may take, so that a long prompt
does not hold the others up and a cancelled request is gone within a step.

What a request is answered depends on nothing but the request, where results of the kernels do not depend on the batch
(the native ones): its random numbers are keyed by its seed, the choice and the token's place (`KeyedUniform`), and
pages of the cache hold the same bits whoever computed them, and however often.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kbit.engine.answers import Choice, Done, Event, Failed, Piece, Progress, PromptScored, Request, TokenInfo
from kbit.engine.batch_decoder import BatchDecoder, longest_text
from kbit.engine.batch_speculation import MOST_WRITING, Asked, BatchDrafter
from kbit.engine.live import Counters as Counters
from kbit.engine.live import Live as Live
from kbit.engine.live import TooLongError as TooLongError
from kbit.engine.logprobs import token_infos
from kbit.engine.pace import STEP_SECONDS, Pace
from kbit.engine.prompt_cache import check_prompt
from kbit.engine.scheduler import BATCH_TOKENS, Pass, Scheduler
from kbit.engine.sequence import Sequence
from kbit.engine.slots import Slots
from kbit.engine.step_choice import choose_tokens
from kbit.graph.pages import PagePool
from kbit.host.errors import KbitError, UsageError

if TYPE_CHECKING:
    from kbit.text.tokenizer import Tokenizer


@dataclass(eq=False)
class _Check:
    """An answer that gets a token; where it has guesses, the first of these is compared with it.

    Attributes:
        row: of the logits that the token is chosen from.
        held: guesses that were right.
    """

    live: Live
    choice: Choice
    sequence: Sequence
    row: int
    held: int = 0


class BatchEngine:
    """The requests to one model.

    Not for several threads at once: see `kbit.engine.engine_thread`.

    Args:
        decoder: the model.
        tokenizer: its tokenizer.
        pool: pages for its keys and values. The prefix cache lives in those that are free.
        context: tokens that a prompt and its answer may have together; None: as many as the model and the pool allow.
        seats: most sequences that are computed at once.
        step_seconds: how long a step may take while answers are being written.
        batch_tokens: most tokens of a pass.
        drafter: who guesses tokens, where few answers are being written; None: nobody does.

    Attributes:
        tokenizer, pool, context, counters: as given, and what was done.
        slots: what requests with a slot left there.

    Raises:
        UsageError: a context that the model or the pool does not have.
    """

    def __init__(
        self,
        decoder: BatchDecoder,
        tokenizer: Tokenizer,
        pool: PagePool,
        *,
        context: int | None = None,
        seats: int = 64,
        step_seconds: float = STEP_SECONDS,
        batch_tokens: int = BATCH_TOKENS,
        drafter: BatchDrafter | None = None,
    ) -> None:
        self._decoder = decoder
        self.tokenizer = tokenizer
        self.pool = pool
        self.context = longest_text(decoder.spec, pool, context)
        self.counters = Counters()
        self.slots = Slots(pool)
        self._scheduler = Scheduler(pool, batch_tokens, seats)
        self._pace = Pace(step_seconds)
        self._drafter = drafter
        self._owners: dict[Sequence, tuple[Live, Choice]] = {}
        self._live: dict[Live, None] = {}

    def __len__(self) -> int:
        """Requests that are not finished."""
        return len(self._live)

    def has(self, live: Live) -> bool:
        """Whether a request is not finished."""
        return live in self._live

    @property
    def running(self) -> int:
        """Sequences that have pages."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Sequences that wait for pages or a seat."""
        return self._scheduler.waiting

    @property
    def preemptions(self) -> int:
        """How often a sequence lost its pages to another."""
        return self._scheduler.preemptions

    def check(self, request: Request) -> None:
        """
        Raises:
            UsageError: the request has no tokens, or such as the model does not know, or an adapter that it has not.
            TooLongError: it leaves no room for an answer.
        """
        if len(request.prompt) + min(1, request.max_tokens) > self.context:
            raise TooLongError(len(request.prompt), self.context)
        check_prompt(request.prompt, self._decoder.spec)
        if request.adapter is not None and request.adapter not in self._decoder.adapters:
            known = ", ".join(self._decoder.adapters) or "none"
            raise UsageError(f"there is no adapter {request.adapter!r}: this model was loaded with {known}")

    def add(self, live: Live) -> None:
        """Takes a request in.

        Raises:
            UsageError: see `check`.
        """
        self.check(live.request)
        request, choice = live.request, live.choices[0]
        first = len(request.prompt) - 1 if request.prompt_logprobs is None else 0
        adapter = self.adapter_index(request.adapter)
        slot = b"" if request.slot is None else self.slots.kind((adapter, request.slot))
        choice.sequence = Sequence(self.pool, request.prompt, wanted_from=first, adapter=adapter, slot=slot)
        self._scheduler.add(choice.sequence)
        self._owners[choice.sequence] = live, choice
        self._live[live] = None

    def cancel(self, live: Live) -> None:
        """Lets go of a request and what it holds; nothing happens where it is finished."""
        if live not in self._live:
            return
        for choice in live.choices:
            if choice.finish is None:
                choice.finish = "cancelled"
                self._release(choice)
        del self._live[live]

    def cancel_all(self) -> list[Live]:
        """Lets go of all requests, and returns them."""
        live = list(self._live)
        for each in live:
            self.cancel(each)
        return live

    def step(self) -> list[tuple[Live, list[Event]]]:
        """One pass, and what came of it, by request. Nothing where there is nothing to do.

        A request whose logits are no numbers fails alone; where the pass fails, all that were in it do.
        """
        events: dict[Live, list[Event]] = {}
        if self._drafter is not None:
            self._draft(self._drafter)
        work = self._scheduler.next_pass(self._rows())
        if work is None:
            return []
        self._begin(work, events)
        start = perf_counter()
        try:
            logits = np.asarray(self._decoder.run(work.batch, work.cache))
        except Exception as error:
            for sequence in work.sequences:
                live, _ = self._owners.get(sequence, (None, None))
                if live is not None:
                    self._fail(live, error, events)
            return list(events.items())
        seconds = perf_counter() - start
        self._pace.measure(len(work.batch), seconds)
        self.counters.steps += 1
        self.counters.computed_tokens += len(work.batch)
        self.counters.step_seconds += seconds
        self._answer(work, np.ascontiguousarray(logits, np.float32), events)
        return list(events.items())

    def _answer(self, work: Pass, logits: NDArray[np.float32], events: dict[Live, list[Event]]) -> None:
        """What a pass's results (L, V) mean for the requests that were in it."""
        due = self._due(work, logits, events)
        drawn = [(c, each.row) for each, choices in due for c in choices if c.request.max_tokens]
        found = choose_tokens([choice for choice, _ in drawn], logits, [row for _, row in drawn])
        tokens = {choice: token for (choice, _), token in zip(drawn, found, strict=True)}
        checks: list[_Check] = []
        for check, choices in due:
            live, sequence = check.live, check.sequence
            if live not in self._live:  # another of its choices failed in this very step
                continue
            failed = next((each for c in choices if isinstance(each := tokens.get(c), KbitError)), None)
            if failed is not None:
                self._fail(live, failed, events)
                continue
            mine = events.setdefault(live, [])
            mine += [self._take(live, each, tokens.get(each)) for each in choices]
            for other in choices[1:]:
                self._branch(live, other, sequence)
            if sequence.draft and check.choice.finish is None:
                checks.append(check)
                continue
            if sequence.draft:
                self._holds(check)
                self._settle(check, logits)
            else:
                self._go_on(check.choice)
            self._finish(live, mine)
        self._check_drafts(checks, logits, events)

    def _due(
        self, work: Pass, logits: NDArray[np.float32], events: dict[Live, list[Event]]
    ) -> list[tuple[_Check, list[Choice]]]:
        """The answers that get a token from a pass, each with the choices that do; prompts are scored on the way."""
        found = []
        complete = list(self._scheduler.complete(work))
        for sequence in work.sequences:
            self._tell_progress(*self._owners[sequence], events)
        for sequence, part in complete:
            live, choice = self._owners[sequence]
            try:
                self._score_prompt(live, choice, logits, part, events)
            except KbitError as error:
                self._fail(live, error, events)
                continue
            if sequence.pending <= 0:  # fewer, with guesses
                # When the prompt has been read, the other choices go on from its pages.
                first = not choice.ids and not choice.index
                row = part.stop - 1 - len(sequence.draft)
                found.append((_Check(live, choice, sequence, row), live.choices if first else [choice]))
        return found

    def _branch(self, live: Live, choice: Choice, sequence: Sequence) -> None:
        """A choice goes on from the pages of its request's first one, unless it has ended."""
        if choice.finish is None:
            ids = [*live.request.prompt, *choice.ids]
            table, adapter = sequence.table.fork(), sequence.adapter
            choice.sequence = Sequence(self.pool, ids, table=table, adapter=adapter, slot=sequence.slot)
            self._scheduler.add(choice.sequence)
            self._owners[choice.sequence] = live, choice

    def _finish(self, live: Live, events: list[Event]) -> None:
        """Ends a request whose choices have all ended."""
        if all(each.finish is not None for each in live.choices):
            del self._live[live]
            events.append(Done(live.usage))

    def _draft(self, drafter: BatchDrafter) -> None:
        """Has the next tokens guessed of answers that are being written, where these are few and nothing else waits."""
        writing = [sequence for sequence in self._scheduler.running if sequence.pending == 1]
        quiet = not self._scheduler.waiting and len(writing) == len(self._scheduler.running)
        asked = []
        for sequence in writing if quiet and len(writing) <= MOST_WRITING else ():
            live, choice = self._owners[sequence]
            room = min(live.request.max_tokens - len(choice.ids), self.context - len(sequence.ids)) - 1
            if choice.ids and room > 0:
                asked.append(Asked(sequence, choice.sampler, choice.drafts, room))
        for each, draft in zip(asked, drafter.draft(asked, self.pool) if asked else (), strict=True):
            each.sequence.draft = draft

    def _check_drafts(self, checks: list[_Check], logits: NDArray[np.float32], events: dict[Live, list[Event]]) -> None:
        """Chooses the tokens after each that was guessed right, those of all answers in one go."""
        while checks:
            going: list[_Check] = []
            over: list[_Check] = []
            for check in checks:
                if check.live in self._live:
                    (going if self._holds(check) else over).append(check)
            for check in over:
                self._settle(check, logits)
            for check in over:  # (of one request, several may end in one step)
                if check.live in self._live:
                    self._finish(check.live, events[check.live])
            found = choose_tokens([each.choice for each in going], logits, [each.row + each.held for each in going])
            for check, chosen in zip(going, found, strict=True):
                if isinstance(chosen, KbitError):
                    self._fail(check.live, chosen, events)
                elif check.live in self._live:
                    events[check.live].append(self._take(check.live, check.choice, chosen))
            checks = going

    def _holds(self, check: _Check) -> bool:
        """Counts an answer's last token to its text; whether it is the guess, so that the logits after it hold."""
        token, draft = check.choice.ids[-1], check.sequence.draft
        check.sequence.append(token)
        right = check.held < len(draft) and draft[check.held] == token
        check.held += right
        return right and check.choice.finish is None

    def _settle(self, check: _Check, logits: NDArray[np.float32]) -> None:
        """Forgets the guesses that did not hold, or the whole sequence, if its answer has ended."""
        assert self._drafter is not None
        draft = check.sequence.draft
        self._drafter.learn(check.choice.drafts, len(draft), check.held, logits[check.row : check.row + check.held + 1])
        self.counters.drafts += 1
        self.counters.drafted_tokens += len(draft)
        self.counters.accepted_tokens += check.held
        check.sequence.settle(check.held)
        if check.choice.finish is not None:
            self._release(check.choice)

    def _fail(self, live: Live, error: Exception, events: dict[Live, list[Event]]) -> None:
        events[live] = [Failed(error)]
        self.cancel(live)

    def _score_prompt(
        self, live: Live, choice: Choice, logits: NDArray[np.float32], rows: slice, events: dict[Live, list[Event]]
    ) -> None:
        """Log-probabilities of a prompt's tokens, where they were asked for, from some rows of logits (L, V)."""
        request = live.request
        if request.prompt_logprobs is None or choice.ids or choice.index:
            return
        done = len(live.scored)
        targets = request.prompt[done : done + rows.stop - rows.start]
        if targets:
            places = range(rows.start, rows.start + len(targets))
            live.scored += token_infos(logits, places, targets, request.prompt_logprobs)
        if len(live.scored) == len(request.prompt) and (targets or len(request.prompt) == 1):
            events.setdefault(live, []).append(PromptScored(tuple(live.scored)))

    def _go_on(self, choice: Choice) -> None:
        """After a token of a choice that has a sequence: computes it next, or lets go of the sequence."""
        if choice.finish is None:
            assert choice.sequence is not None
            choice.sequence.append(choice.ids[-1])
        else:
            self._release(choice)

    def _take(self, live: Live, choice: Choice, token: TokenInfo | KbitError | None) -> Piece:
        """Adds a token to a choice; None: it shall have none."""
        if not isinstance(token, TokenInfo):
            return choice.cut("length")
        if live.first_token is None:
            live.first_token = perf_counter()
        self.counters.generated_tokens += 1
        return choice.take(token.id, token, self.context - len(live.request.prompt) - len(choice.ids) - 1)

    def _begin(self, work: Pass, events: dict[Live, list[Event]]) -> None:
        """Notes which requests begin with a pass, and what of their prompts was in the cache."""
        self.counters.sequences += len(work.sequences)
        for sequence, start in zip(work.sequences, work.batch.starts.tolist(), strict=True):
            live, _ = self._owners[sequence]
            if live.begun is None:
                live.begun, live.cached = perf_counter(), start
                self.counters.prompt_tokens += len(live.request.prompt)
                self.counters.cached_tokens += start
                if live.request.progress:
                    first = Progress(start, start, len(live.request.prompt), 0.0)
                    events.setdefault(live, []).append(first)
                    live.told = start

    def _tell_progress(self, live: Live, choice: Choice, events: dict[Live, list[Event]]) -> None:
        """Where a request asks for it, and more of its prompt has been read than it was told."""
        if not live.request.progress or choice.sequence is None or live.begun is None:
            return
        total = len(live.request.prompt)
        processed = min(choice.sequence.table.length, total)
        if processed > live.told:  # a sequence that lost its pages starts again
            live.told = processed
            told = Progress(processed, live.cached, total, perf_counter() - live.begun)
            events.setdefault(live, []).append(told)

    def _release(self, choice: Choice) -> None:
        if choice.sequence is not None:
            sequence, number = choice.sequence, choice.request.slot
            if number is not None and not sequence.draft:
                self.slots.note((sequence.adapter, number), sequence.slot, sequence.ids[: sequence.table.length])
            self._scheduler.remove(choice.sequence)
            del self._owners[choice.sequence]
            choice.sequence = None

    def adapter_index(self, name: str | None) -> int:
        """Which of the model's adapters has a name; -1: None."""
        return -1 if name is None else self._decoder.adapters.index(name)

    def _rows(self) -> int:
        """Tokens of the next pass."""
        return self._pace.rows(sum(sequence.pending == 1 for sequence in self._scheduler.running))
