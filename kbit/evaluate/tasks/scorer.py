"""Log-likelihoods of continuations, batched, with what requests have in common computed once.

What is scored equals lm-eval's Hugging Face model (`lm_eval/models/huggingface.py`, 0.4.13): context and continuation
are tokenised together and cut where the context's own tokens end; what exceeds the model's context is cut off at the
left; a continuation is greedy where each of its tokens is the likeliest. Where lm-eval takes log-softmax in the logits'
float32, here it is in float64, and the head runs on the scored positions alone.

The choices of a question share its context, and examples in front would be shared by all questions. Requests are sorted
by their tokens, so that those with a long common beginning are neighbours; neighbours form a group, whose beginning
goes through the model once and whose cache is then copied for every member. A batch takes groups of similar length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from kbit.evaluate.logits import row_step
from kbit.evaluate.perplexity import token_nll
from kbit.host.errors import KbitError, UsageError
from kbit.models.decoder import Decoder
from kbit.models.spec import ModelSpec
from kbit.text.tokenizer import Tokenizer

# Tokens of a batch: four passes of the native kernels (512 rows), so that a last, incomplete pass costs little.
BATCH_TOKENS = 2048
# Memory for the caches of a batch, unless one group alone needs more.
CACHE_BYTES = 256 << 20
# A common beginning shorter than this is computed again: a pass of its own costs more.
_MIN_SHARED = 8
# Members of a group. More of them save less and less, and all their caches are in memory at once.
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


def choose_length(spec: ModelSpec, asked: int | None) -> int:
    """Tokens of context and continuation that a request may have: those asked for, or all the model is meant for.

    Raises:
        UsageError: fewer than 2, or more than the model takes.
    """
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
        self._cache_bytes_per_token: float | None = None

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

    def fit(self, context: Sequence[int], continuation: Sequence[int]) -> Encoded:
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

    def score(self, requests: Sequence[tuple[str, str]]) -> list[Score]:
        """Scores of (context, continuation) pairs, in their order.

        Raises:
            UsageError, KbitError: see `encode` and `stream`.
        """
        scores = dict(self.stream([self.encode(*request) for request in requests]))
        return [scores[index] for index in range(len(requests))]

    def stream(self, requests: Sequence[Encoded]) -> Iterator[tuple[int, Score]]:
        """(index, score) of every request, batch by batch, the longest requests first.

        Raises:
            UsageError: a token the model does not know.
            KbitError: the model's logits are NaN or infinite.
        """
        for batch in self._batches(requests):
            yield from self._run(requests, batch)

    def _batches(self, requests: Sequence[Encoded]) -> Iterator[list[_Group]]:
        """Groups of similar length, as many at a time as BATCH_TOKENS and CACHE_BYTES allow."""
        groups = group_requests(requests)
        longest = {id(group): max(len(requests[member].ids) for member in group.members) for group in groups}
        groups.sort(key=lambda group: -longest[id(group)])
        batch: list[_Group] = []
        tokens = rows = capacity = 0
        for group in groups:
            new = group.shared + sum(len(requests[member].fed) - group.shared for member in group.members)
            # All rows have the capacity of the longest, which is the first.
            capacity = capacity or longest[id(group)]
            cached = (rows + len(group.members)) * capacity * self._token_bytes()
            if batch and (tokens + new > BATCH_TOKENS or cached > CACHE_BYTES):
                yield batch
                batch, tokens, rows, capacity = [], 0, 0, longest[id(group)]
            batch.append(group)
            tokens += new
            rows += len(group.members)
        if batch:
            yield batch

    def _token_bytes(self) -> float:
        """Bytes that a token takes in the cache."""
        if self._cache_bytes_per_token is None:
            cache = self._decoder.new_cache(1, 64)
            self._cache_bytes_per_token = cache.nbytes / 64
        return self._cache_bytes_per_token

    def _run(self, requests: Sequence[Encoded], batch: Sequence[_Group]) -> Iterator[tuple[int, Score]]:
        members = [member for group in batch for member in group.members]
        shared = [group.shared for group in batch for _ in group.members]
        capacity = max(len(requests[member].fed) for member in members)
        device = self._decoder.backend.device
        with torch.inference_mode():
            if any(shared):
                cache = self._decoder.new_cache(len(batch), capacity)
                beginnings = [requests[group.members[0]].fed[: group.shared] for group in batch]
                ids, lengths = _padded(beginnings, device)
                self._decoder.hidden_states(ids, cache, lengths)
                copies = [row for row, group in enumerate(batch) for _ in group.members]
                cache.select(torch.tensor(copies, device=device))
            else:
                cache = self._decoder.new_cache(len(members), capacity)
            rest = [requests[member].fed[at:] for member, at in zip(members, shared, strict=True)]
            ids, lengths = _padded(rest, device)
            hidden = self._decoder.hidden_states(ids, cache, lengths)  # (rows, T, hidden)
            rows: list[int] = []
            columns: list[int] = []
            targets: list[int] = []
            for row, (member, at) in enumerate(zip(members, shared, strict=True)):
                request = requests[member]
                rows += [row] * request.scored
                columns += range(request.first - at, len(request.fed) - at)
                targets += request.ids[request.first + 1 :]
            scored = hidden[torch.tensor(rows, device=hidden.device), torch.tensor(columns, device=hidden.device)]
            nll, top = self._losses(scored, torch.tensor(targets))
        start = 0
        for member in members:
            request = requests[member]
            stop = start + request.scored
            total = float(nll[start:stop].sum())
            if not math.isfinite(total):
                raise KbitError(
                    f"the log-likelihood of a continuation is {-total}: the weights or the arithmetic are broken"
                )
            yield member, Score(-total, bool(top[start:stop].all()), request.scored, request.truncated)
            start = stop

    def _losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses in nats, float64 (R,), and whether the target is the likeliest token, bool (R,), of hidden states."""
        step = row_step(self._decoder.spec.vocab_size)
        losses, tops = [], []
        for start in range(0, len(targets), step):
            logits = self._decoder.logits(hidden[start : start + step])
            wanted = targets[start : start + step].to(logits.device)
            losses.append(token_nll(logits, wanted).cpu())
            tops.append((logits.argmax(dim=-1) == wanted).cpu())
        return torch.cat(losses), torch.cat(tops)


def group_requests(requests: Sequence[Encoded]) -> list[_Group]:
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


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    for index, (ours, theirs) in enumerate(zip(one, other, strict=False)):
        if ours != theirs:
            return index
    return min(len(one), len(other))


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as a right-padded batch, int64 (B, T), and their lengths, int64 (B,)."""
    width = max(map(len, rows))
    ids = torch.zeros((len(rows), width), dtype=torch.int64)
    for row, values in enumerate(rows):
        ids[row, : len(values)] = torch.tensor(values, dtype=torch.int64)
    return ids.to(device), torch.tensor([len(values) for values in rows]).to(device)


def _prefix_id(tokenizer: Tokenizer) -> int | None:
    """What lm-eval puts where there is no context: the beginning of a sequence, or its end."""
    if tokenizer.bos_id is not None:
        return tokenizer.bos_id
    ids = tokenizer.encode(tokenizer.special_tokens.get("eos_token", ""), add_special_tokens=False)
    return ids[0] if len(ids) == 1 else min(tokenizer.eos_ids, default=None)
