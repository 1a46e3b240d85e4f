"""Log-likelihoods of continuations, batched, with what requests have in common computed once.

What is scored equals lm-eval's Hugging Face model (`lm_eval/models/huggingface.py`, 0.4.13): context and continuation
are tokenised together and cut where the context's own tokens end; what exceeds the model's context is cut off at the
left; a continuation is greedy where each of its tokens is the likeliest. Where lm-eval takes log-softmax in the logits'
float32, here it is in float64, and the head runs on the scored positions alone.

The choices of a question share its context, and examples in front would be shared by all questions. Requests are sorted
by their tokens, so that those with a long common beginning are neighbours; neighbours form a group, whose beginning
goes through the model once, on pages that every member then shares. The scheduler (kbit.engine.scheduler) fills passes
with what is ready, beginnings and continuations alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

import numpy as np
import torch

from kbit.engine.scheduler import Scheduler
from kbit.engine.sequence import Sequence
from kbit.evaluate.logits import row_step
from kbit.evaluate.perplexity import token_nll
from kbit.graph.backend import Array
from kbit.graph.block_table import BlockTable
from kbit.graph.pages import pages_for
from kbit.host.errors import KbitError, UsageError
from kbit.models.check import check_continues
from kbit.models.decoder import Decoder
from kbit.models.spec import ModelSpec
from kbit.text.tokenizer import Tokenizer

# Tokens of a pass: four of the native kernels (512 rows), so that a last, incomplete one costs little.
BATCH_TOKENS = 2048
# Memory for the pages of all sequences, unless one alone needs more.
CACHE_BYTES = 256 << 20
# Sequences whose states of fixed size there is room for at once, at most.
_MOST_STATES = 64
# A common beginning shorter than this is computed again: a pass of its own costs more.
_MIN_SHARED = 8
# Members of a group. More of them save less and less, and all their pages are in memory at once.
_MAX_GROUP = 64


class TooLongError(KbitError):
    """A continuation alone is longer than the model's context."""


@dataclass(frozen=True)
class Score:
    """How likely a model finds a continuation.

    Attributes:
        loglikelihood: of all its tokens, in nats.
        greedy: whether each of its tokens is the likeliest where it stands.
        tokens: how many.
        truncated: tokens of the context that were cut off, as the model's context is too short.
    """

    loglikelihood: float
    greedy: bool
    tokens: int
    truncated: int


@dataclass(frozen=True)
class Encoded:
    """A request as tokens.

    Attributes:
        ids: context and continuation.
        scored: how many at the end are the continuation's, at least 1.
        truncated: tokens that were cut off in front.
    """

    ids: tuple[int, ...]
    scored: int
    truncated: int = 0

    @property
    def fed(self) -> tuple[int, ...]:
        """What goes through the model: all but the last token, which is only predicted."""
        return self.ids[:-1]

    @property
    def first(self) -> int:
        """The first position whose logits count."""
        return len(self.ids) - 1 - self.scored


@dataclass(frozen=True)
class _Group:
    """Requests, by index, whose first `shared` tokens are the same."""

    members: tuple[int, ...]
    shared: int


@dataclass
class _Running:
    """A request whose tokens go through the model, and what is known of its continuation so far."""

    index: int
    request: Encoded
    losses: list[torch.Tensor] = field(default_factory=list)  # float64 nats
    tops: list[torch.Tensor] = field(default_factory=list)  # whether the target is the likeliest
    taken: int = 0  # targets

    def next_targets(self, count: int) -> tuple[int, ...]:
        """The tokens that the next `count` scored positions should predict."""
        first = self.request.first + 1 + self.taken
        self.taken += count
        return self.request.ids[first : first + count]

    def score(self) -> tuple[int, Score]:
        """Index and score, once all is known.

        Raises:
            KbitError: the model's logits are NaN or infinite.
        """
        total = float(torch.cat(self.losses).sum())
        if not math.isfinite(total):
            raise KbitError(
                f"the log-likelihood of a continuation is {-total}: the weights or the arithmetic are broken"
            )
        greedy = bool(torch.cat(self.tops).all())
        return self.index, Score(-total, greedy, self.request.scored, self.request.truncated)


def choose_length(spec: ModelSpec, asked: int | None) -> int:
    """Tokens of context and continuation that a request may have: those asked for, or all the model is meant for.

    Raises:
        UsageError: fewer than 2, or more than the model takes.
    """
    check_continues(spec, f"config of a {spec.family} model")
    # Beyond max_positions such a RoPE rotates a shared beginning otherwise than the longer whole.
    longest = spec.longest_in_pieces
    if asked is not None and not 2 <= asked <= longest:
        raise UsageError(f"--context {asked}: expected at least 2 and at most the model's {longest} tokens")
    return longest if asked is None else asked


class Scorer:
    """Scores continuations with one model.

    Args:
        decoder: the model.
        tokenizer: its tokenizer.
        max_length: tokens of context and continuation; None: what the model is meant for (`choose_length`).
        prefix_id: stands for an empty context; None: the tokenizer's beginning of sequence, else its end of sequence.

    Raises:
        UsageError: a max_length below 2 or above what the model takes.
    """

    def __init__(
        self, decoder: Decoder, tokenizer: Tokenizer, max_length: int | None = None, prefix_id: int | None = None
    ) -> None:
        self.max_length = choose_length(decoder.spec, max_length)
        self._decoder = decoder
        self._tokenizer = tokenizer
        self.prefix_id = _prefix_id(tokenizer) if prefix_id is None else prefix_id
        self._prefix = "" if self.prefix_id is None else tokenizer.decode([self.prefix_id], skip_special_tokens=False)

    def tokens(self, text: str) -> list[int]:
        """A text's token ids, with what the tokenizer adds around a text unless that stands there already."""
        written = bool(self._prefix) and text.startswith(self._prefix)
        return self._tokenizer.encode(text, add_special_tokens=not written)

    def encode(self, context: str, continuation: str) -> Encoded:
        """A request as tokens.

        Raises:
            UsageError: an empty context, for which this tokenizer has no token.
            TooLongError: the continuation alone does not fit.
            KbitError: the continuation has no tokens of its own.
        """
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        if not stripped:
            rest = self._tokenizer.encode(continuation, add_special_tokens=False)
            if self.prefix_id is None:
                raise UsageError(
                    "a request has no context, and this tokenizer has no token for the beginning or end of a text that "
                    "could stand for it"
                )
            return self.fit([] if rest[:1] == [self.prefix_id] else [self.prefix_id], rest)
        whole, start = self.tokens(stripped + continuation), len(self.tokens(stripped))
        return self.fit(whole[:start], whole[start:])

    def fit(self, context: Tokens[int], continuation: Tokens[int]) -> Encoded:
        """A request of tokens, cut at the left so that the model can take it.

        Raises:
            TooLongError: the continuation alone does not fit.
            KbitError: no token of context or of continuation.
        """
        if not context:  # the continuation's first token takes its place
            context, continuation = continuation[:1], continuation[1:]
        if not context or not continuation:
            raise KbitError("a request cannot be scored whose continuation has no tokens of its own")
        if len(continuation) > self.max_length:
            raise TooLongError(
                f"a continuation of {len(continuation)} tokens does not fit the {self.max_length} the model takes: "
                f"{self._tokenizer.decode(continuation)!r:.80}"
            )
        ids = (*context, *continuation)
        cut = max(0, len(ids) - self.max_length - 1)
        return Encoded(ids[cut:], len(continuation), cut)

    def score(self, requests: Tokens[tuple[str, str]]) -> list[Score]:
        """Scores of (context, continuation) pairs, in their order.

        Raises:
            UsageError, KbitError: see `encode` and `stream`.
        """
        scores = dict(self.stream([self.encode(*request) for request in requests]))
        return [scores[index] for index in range(len(requests))]

    def stream(self, requests: Tokens[Encoded]) -> Iterator[tuple[int, Score]]:
        """(index, score) of every request, pass by pass, the longest requests first.

        Raises:
            UsageError: a token the model does not know.
            KbitError: the model's logits are NaN or infinite.
        """
        if not requests:
            return
        groups = group_requests(requests)
        longest = {id(group): max(len(requests[member].fed) for member in group.members) for group in groups}
        groups.sort(key=lambda group: longest[id(group)])  # the next one is the last
        needed = pages_for(longest[id(groups[-1])])
        states = self._decoder.spec.state_bytes
        pool = self._decoder.new_pool(needed, max(2, min(_MOST_STATES, CACHE_BYTES // (2 * max(1, states)))))
        pool.ensure(CACHE_BYTES // pool.store.page_bytes)
        scheduler = Scheduler(pool, BATCH_TOKENS)
        beginnings: dict[Sequence, _Group] = {}
        running: dict[Sequence, _Running] = {}
        with torch.inference_mode():
            while groups or len(scheduler):
                while groups and scheduler.pending < BATCH_TOKENS:
                    group = groups.pop()
                    if group.shared:
                        beginning = Sequence(pool, requests[group.members[0]].fed[: group.shared])
                        beginnings[beginning] = group
                        scheduler.add(beginning)
                    else:
                        self._add(scheduler, running, requests, group, None)
                work = scheduler.next_pass()
                assert work is not None, "what was added is computed or removed"
                hidden = self._decoder.run_hidden(work.batch, work.cache)
                answered = list(scheduler.complete(work))
                for sequence, _ in answered:
                    if sequence in beginnings:
                        self._add(scheduler, running, requests, beginnings.pop(sequence), sequence.table)
                        scheduler.remove(sequence)
                self._take(hidden, [(running[each], rows) for each, rows in answered if each in running])
                for sequence, _ in answered:
                    if sequence in running and not sequence.pending:
                        scheduler.remove(sequence)
                        yield running.pop(sequence).score()

    def _add(
        self,
        scheduler: Scheduler,
        running: dict[Sequence, _Running],
        requests: Tokens[Encoded],
        group: _Group,
        beginning: BlockTable | None,
    ) -> None:
        """Queues the members of a group, which go on from its beginning where that has been computed."""
        for member in group.members:
            request = requests[member]
            table = None if beginning is None else beginning.fork()
            sequence = Sequence(scheduler.pool, request.fed, wanted_from=request.first, table=table)
            running[sequence] = _Running(member, request)
            scheduler.add(sequence)

    def _take(self, hidden: Array, answered: Tokens[tuple[_Running, slice]]) -> None:
        """Scores of the positions whose hidden states (L, hidden) a pass gave: those at a slice for each request."""
        if not answered:
            return
        rows = np.concatenate([np.arange(rows.start, rows.stop) for _, rows in answered])
        targets = [token for each, rows in answered for token in each.next_targets(rows.stop - rows.start)]
        nll, top = self._losses(hidden[rows], torch.tensor(targets))
        counts = [rows.stop - rows.start for _, rows in answered]
        parts = zip(torch.split(nll, counts), torch.split(top, counts), strict=True)
        for (each, _), (losses, tops) in zip(answered, parts, strict=True):
            each.losses.append(losses)
            each.tops.append(tops)

    def _losses(self, hidden: Array, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses in nats, float64 (R,), and whether the target is the likeliest token, bool (R,), of hidden states."""
        step = row_step(self._decoder.spec.vocab_size)
        losses, tops = [], []
        for start in range(0, len(targets), step):
            logits = torch.as_tensor(self._decoder.run_head(hidden[start : start + step]))
            wanted = targets[start : start + step].to(logits.device)
            losses.append(token_nll(logits, wanted).cpu())
            tops.append((logits.argmax(dim=-1) == wanted).cpu())
        return torch.cat(losses), torch.cat(tops)


def group_requests(requests: Tokens[Encoded]) -> list[_Group]:
    """Requests with long common beginnings together.

    In the order of their tokens, a request joins the group before it as long as the tokens saved by the group,
    (members - 1) * shared, do not become fewer by it. The last token before a continuation is never shared: its logits
    belong to each member.
    """
    order = sorted(range(len(requests)), key=lambda index: requests[index].ids)
    groups: list[_Group] = []
    members: list[int] = []
    shared = 0
    for index in order:
        request = requests[index]
        if members:
            common = min(shared, request.first, _common(requests[members[-1]].ids, request.ids))
            good = common >= _MIN_SHARED and len(members) * common >= (len(members) - 1) * shared
            if good and len(members) < _MAX_GROUP:
                members.append(index)
                shared = common
                continue
            groups.append(_group(members, shared))
        members, shared = [index], request.first
    if members:
        groups.append(_group(members, shared))
    return groups


def _group(members: list[int], shared: int) -> _Group:
    return _Group(tuple(members), shared if len(members) > 1 else 0)


def _common(one: Tokens[int], other: Tokens[int]) -> int:
    """Length of the common beginning."""
    for index, (ours, theirs) in enumerate(zip(one, other, strict=False)):
        if ours != theirs:
            return index
    return min(len(one), len(other))


def _prefix_id(tokenizer: Tokenizer) -> int | None:
    """What lm-eval puts where there is no context: the beginning of a sequence, or its end."""
    if tokenizer.bos_id is not None:
        return tokenizer.bos_id
    ids = tokenizer.encode(tokenizer.special_tokens.get("eos_token", ""), add_special_tokens=False)
    return ids[0] if len(ids) == 1 else min(tokenizer.eos_ids, default=None)
