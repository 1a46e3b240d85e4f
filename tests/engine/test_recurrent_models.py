"""Generation with a recurrent model, which goes back only to where its states were kept: the text is always the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from speculative_cases import FixedDrafter, both

from kbit.engine.generate import generate
from kbit.engine.loader import LoadedModel, load_model
from kbit.engine.ngram import NgramDrafter
from kbit.engine.prompt_cache import PromptCache
from kbit.engine.sampler import SamplingParams
from kbit.engine.speculative import DraftModel, Speculation

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = [65, 66, 69, 67, 67, 69, 66, 65, 66]  # whose greedy answer goes on


@pytest.fixture(scope="module", params=["qwen3_5", "lfm2", "bamba", "falcon-h1"])
def model(request: pytest.FixtureRequest, published: Callable[[str], Path]) -> LoadedModel:
    return load_model(str(published(request.param)), threads=1, compute="fp32")


class Counting:
    """A decoder that counts the tokens that go through it."""

    def __init__(self, decoder: Any) -> None:
        self.decoder, self.spec, self.new_cache, self.tokens = decoder, decoder.spec, decoder.new_cache, 0

    def extend(self, ids: Any, cache: Any, last_only: bool = True) -> Any:
        self.tokens += len(ids)
        return self.decoder.extend(ids, cache, last_only)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "seed": 5}], ids=["greedy", "sampled"])
def test_drafts_leave_no_trace(model: LoadedModel, settings: dict[str, Any]) -> None:
    """Drafts that hold, that hold in part, and that never do; by a model that goes back, too."""
    params = SamplingParams(**settings)
    plain = generate(model.decoder, model.tokenizer, PROMPT, params, max_tokens=40).run()
    assert len(plain.ids) > 20
    text = [*PROMPT, *plain.ids]

    def partly(known: list[int]) -> list[int]:
        ahead = text[len(known) : len(known) + 6]
        return [*ahead[: len(known) % 5], (ahead[0] + 1) % 250 if ahead else 0, 7]

    drafters = [FixedDrafter(partly), FixedDrafter(lambda known: [1, 2, 3]), NgramDrafter()]
    drafters += [] if settings else [DraftModel("itself", model.decoder)]
    for drafter in drafters:
        _, sped = both(
            lambda: model.decoder,
            model.tokenizer,
            PROMPT,
            Speculation(drafter, 5),  # type: ignore[arg-type]
            params,
            plain=plain,
            max_tokens=40,
        )
        assert sped.speculation is not None
    assert sped.speculation is not None
    assert settings or sped.speculation.acceptance_rate == 1.0


def test_drafts_that_fail_cost_their_own_tokens_and_few_more(model: LoadedModel) -> None:
    """What was accepted goes through the model once more with the next draft, and the rest of the text does not."""
    decoder = Counting(model.decoder)
    wrong = FixedDrafter(lambda known: [1, 2, 3])
    result = generate(decoder, model.tokenizer, PROMPT, max_tokens=40, speculation=Speculation(wrong, 3)).run()
    assert result.speculation is not None
    # A pass at most: 3 tokens of a draft, the one before it, and up to 8 again; and up to 9 of these by themselves.
    assert decoder.tokens <= len(PROMPT) + 40 * (4 + 8) + 9 * 40 // 8


def test_prompts_with_a_common_beginning(model: LoadedModel) -> None:
    """A conversation goes on where it is; what begins otherwise goes back as far as it must, and not to the start."""
    decoder = Counting(model.decoder)
    cache = PromptCache(decoder)

    def run(prompt: list[int]) -> Any:
        result = generate(decoder, model.tokenizer, prompt, max_tokens=6, prompt_cache=cache).run()
        assert result.ids == generate(model.decoder, model.tokenizer, prompt, max_tokens=6).run().ids
        return result

    first = run(PROMPT)
    longer = [*PROMPT, *first.ids, 70, 71]
    assert run(longer).cached_tokens == len(PROMPT) + len(first.ids) - 1
    # Another answer to the first prompt: back to its end.
    assert run([*PROMPT, 80, 81, 82]).cached_tokens == len(PROMPT)
    # Inside of the first prompt nothing was kept; and the same prompt again is of that kind.
    assert run(PROMPT[:4] + [90, 91]).cached_tokens == 0
    states = cache._cache.pool.states if cache._cache else None
    assert states is not None
    for last in range(20):  # states of old beginnings are given back
        run([*PROMPT, 100 + last])
    assert states.count - states.available <= 6
