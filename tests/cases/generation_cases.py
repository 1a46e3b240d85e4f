"""A tokenizer of bytes and a decoder whose every answer is known, which the tests of generation share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from kbit.backends.reference.kv_cache import ReferencePages, reference_pages
from kbit.engine.generate import Generation, generate
from kbit.graph.block_table import BlockTable
from kbit.graph.cache import Cache
from kbit.graph.pages import PAGE, PagePool, pages_for
from kbit.text.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def byte_tokenizer(chat_template: str | None = None) -> Tokenizer:
    """Token i is byte i, roughly: every byte is one token; </s> (256) ends a generation."""
    backend = Backend(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    templates = {} if chat_template is None else {"default": chat_template}
    return Tokenizer(backend, eos_ids=frozenset({256}), chat_templates=templates)


def rows_of(logits: torch.Tensor) -> NDArray[np.float32]:
    """Logits (1, T, V) as `extend` returns them: (T, V)."""
    rows: NDArray[np.float32] = logits[0].detach().float().numpy()
    return rows


class GrowingCache(Cache):
    """A cache that tells a fake decoder how large it was made."""

    def __init__(self, capacities: list[int], batch: int, capacity: int) -> None:
        pool = PagePool(ReferencePages(1, 1, 1, batch * pages_for(capacity)))
        super().__init__(pool, [BlockTable(pool) for _ in range(batch)], capacity, private=True)
        self._capacities = capacities
        capacities.append(capacity)

    def grow(self, capacity: int) -> None:
        super().grow(capacity)
        self._capacities.append(capacity)


class FakeDecoder:
    """A decoder whose next token is a function of all tokens so far, read from the cache.

    The ids are stored as "keys", so a cache that is truncated, filled or counted wrongly changes the answer.
    """

    def __init__(self, rule: Callable[[list[int]], int | torch.Tensor], context: int = 1000) -> None:
        self.rule = rule
        self.spec = SimpleNamespace(
            max_positions=context, longest_in_pieces=context, begins_anew_beyond=None, vocab_size=257
        )
        self.steps: list[int] = []  # tokens of each forward pass
        self.capacities: list[int] = []

    def new_cache(self, batch: int, capacity: int) -> Cache:
        return GrowingCache(self.capacities, batch, capacity)

    def extend(self, ids: Sequence[int], cache: Cache, last_only: bool = True) -> NDArray[np.float32]:
        return rows_of(self.forward(torch.tensor([ids], dtype=torch.int64), cache, last_only=last_only))

    def forward(
        self, ids: torch.Tensor, cache: Cache, lengths: torch.Tensor | None = None, last_only: bool = False
    ) -> torch.Tensor:
        assert ids.shape[0] == 1
        assert lengths is None
        new = torch.tensor([ids.shape[1]])
        cache.reserve(new)
        start = int(cache.lengths[0])
        pages, table = reference_pages(cache), cache.rows[0].pages
        slots = torch.tensor([table[at // PAGE] * PAGE + at % PAGE for at in range(start, start + ids.shape[1])])
        stored = ids[0].float()[:, None, None]
        pages.append(0, slots, stored, stored)
        cache.advance(new)
        self.steps.append(ids.shape[1])
        history = pages.read(0, table, int(cache.lengths[0]))[0][0, :, 0].long().tolist()
        first = len(history) if last_only else start + 1
        answers = [self.rule(history[:end]) for end in range(first, len(history) + 1)]
        vectors = [
            answer
            if isinstance(answer, torch.Tensor)
            else torch.nn.functional.one_hot(torch.tensor(answer), self.spec.vocab_size).float()
            for answer in answers
        ]
        return torch.stack(vectors)[None]  # (1, T or 1, V)


def reciting(tokenizer: Tokenizer, prompt: str, answer: str, end: bool = True, **options: Any) -> FakeDecoder:
    """A decoder that follows exactly this prompt with exactly this answer."""
    ids = tokenizer.encode(prompt)
    script = ids + tokenizer.encode(answer) + [256] * end

    def rule(history: list[int]) -> int:
        assert history == script[: len(history)]
        return script[len(history)]

    return FakeDecoder(rule, **options)


def start(answer: str, prompt: str = "prompt", *, end: bool = True, context: int = 1000, **options: Any) -> Generation:
    tokenizer = byte_tokenizer()
    decoder = reciting(tokenizer, prompt, answer, end, context=context)
    return generate(decoder, tokenizer, tokenizer.encode(prompt), **options)
