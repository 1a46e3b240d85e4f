"""Speculation with real models: prompt lookup and draft models on small trained ones, RoPE that forbids it, commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_cases import in_process
from speculative_cases import FixedDrafter, TokenByToken, both

from kbit.backends.select import select_backend
from kbit.engine.generate import generate
from kbit.engine.loader import LoadedModel, load_model
from kbit.engine.ngram import NgramDrafter
from kbit.engine.prompt_cache import PromptCache
from kbit.engine.sampler import SamplingParams
from kbit.engine.speculative import Drafter, DraftModel, Speculation, load_drafter
from kbit.host.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = (
    "The old man looked at her and",
    "It was a dark night. It was a dark night. It was",
    "one two three four five six seven one two three four",
)
SAMPLED = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 2}


@dataclass(frozen=True)
class Pair:
    """A model and a smaller one with the same vocabulary, on one backend."""

    large: LoadedModel
    small: LoadedModel

    @property
    def decoder(self) -> Any:
        """The large model with the same logits however a text is cut into passes: the native backend's nature."""
        return self.large.decoder if self.large.backend_name == "native" else TokenByToken(self.large.decoder)

    def drafter(self, kind: str) -> Drafter:
        return NgramDrafter() if kind == "ngram" else DraftModel("small", self.small.decoder)

    def encode(self, text: str) -> list[int]:
        return self.large.tokenizer.encode(text)


@pytest.fixture(scope="module", params=["native", "reference"])
def pair(request: pytest.FixtureRequest, data_dir: Path) -> Pair:
    backend = select_backend("cpu", backend=request.param, threads=1 if request.param == "native" else None)
    large, small = (
        load_model(str(data_dir / "models" / name), backend=backend) for name in ("novels-2m", "novels-0.7m")
    )
    return Pair(large, small)


class TestRealModels:
    @pytest.mark.parametrize("prompt", PROMPTS)
    def test_greedy_text_is_the_same(self, pair: Pair, prompt: str) -> None:
        """Every drafter and length of drafts on the native backend. On the reference, which takes the same decisions and
        is ten times slower, each drafter and each length with each prompt.
        """
        settings = [(drafter, most) for drafter in ("ngram", "model") for most in (1, 3, 16)]
        if pair.large.backend_name == "reference":
            first = PROMPTS.index(prompt)
            settings = [(drafter, (1, 3, 16)[(first + i) % 3]) for i, drafter in enumerate(("ngram", "model", "ngram"))]
        plain = None
        for drafter, draft_tokens in settings:
            plain, sped = both(
                lambda: pair.decoder,
                pair.large.tokenizer,
                pair.encode(prompt),
                Speculation(pair.drafter(drafter), draft_tokens),
                plain=plain,
                max_tokens=48,
            )
            report = sped.speculation
            assert report is not None
            assert report.accepted > 0
            assert sped.completion_tokens == 48

    @pytest.mark.parametrize("drafter", ["ngram", "model"])
    def test_in_one_pass_too(self, pair: Pair, drafter: str) -> None:
        """The decoder as it is, T + 1 tokens at once. The reference's sums round differently then; where the best two
        tokens are further apart than that, the text must be the same."""
        ids = pair.encode(PROMPTS[0])
        margins: list[float] = []

        class Watched(PromptCache):
            def extend(self, ids: Any) -> Any:
                logits = super().extend(ids)
                best = np.sort(logits)[:-3:-1]
                # Thousands of float32 roundings of 6e-8 each, at random: 1e-4 of the largest logit is far above them.
                margins.append(float(best[0] - best[1]) - 1e-4 * float(np.abs(logits).max()))
                return logits

        decoder, tokenizer = pair.large.decoder, pair.large.tokenizer
        plain = generate(decoder, tokenizer, ids, max_tokens=60, prompt_cache=Watched(decoder)).run()
        speculation = Speculation(pair.drafter(drafter))
        sped = generate(decoder, tokenizer, ids, max_tokens=60, speculation=speculation).run()
        clear = next((i for i, margin in enumerate(margins) if margin <= 0), 60)
        assert clear > 10  # the text has something to say
        assert sped.ids[:clear] == plain.ids[:clear]
        assert sped.speculation is not None
        assert sped.speculation.accepted > 0

    def test_sampling_with_prompt_lookup_draws_the_same_tokens(self, pair: Pair) -> None:
        for prompt in PROMPTS:
            both(
                lambda: pair.decoder,
                pair.large.tokenizer,
                pair.encode(prompt),
                Speculation(NgramDrafter()),
                SamplingParams(**SAMPLED),
                max_tokens=60,
            )

    @pytest.mark.parametrize("settings", [{}, SAMPLED])
    def test_a_model_that_drafts_for_itself(self, pair: Pair, settings: dict[str, Any]) -> None:
        result = generate(
            pair.decoder,
            pair.large.tokenizer,
            pair.encode(PROMPTS[0]),
            SamplingParams(**settings),
            max_tokens=50,
            speculation=Speculation(DraftModel("itself", pair.decoder)),
        ).run()
        assert result.speculation is not None
        assert result.speculation.acceptance_rate == 1.0
        assert result.completion_tokens == 50

    def test_sampling_with_a_draft_model_repeats(self, pair: Pair) -> None:
        texts = [
            generate(
                pair.large.decoder,
                pair.large.tokenizer,
                pair.encode(PROMPTS[0]),
                SamplingParams(**{**SAMPLED, "seed": seed}),
                max_tokens=40,
                speculation=Speculation(pair.drafter("model")),
            )
            .run()
            .text
            for seed in (2, 2, 3)
        ]
        assert texts[0] == texts[1] != texts[2]

    @pytest.mark.parametrize("drafter", ["ngram", "model"])
    def test_to_the_end_of_the_context(self, pair: Pair, drafter: str) -> None:
        ids = pair.encode("word and word and " * 60)[:240]
        speculation = Speculation(pair.drafter(drafter))
        _, sped = both(lambda: pair.decoder, pair.large.tokenizer, ids, speculation, max_tokens=100)
        assert (sped.finish_reason, sped.completion_tokens) == ("context", 16)

    @pytest.mark.parametrize("kv_bits", [8, 4, 3, 2])
    def test_with_a_quantized_cache(self, novels_folder: str, kv_bits: int) -> None:
        """Rejected tokens leave codes behind, which must not be seen again."""
        loaded = load_model(novels_folder, backend="native", threads=1, kv_bits=kv_bits)
        ids = loaded.tokenizer.encode(PROMPTS[1])
        # Guesses that hold, guesses that do not, and both in one draft.
        wrong = FixedDrafter(lambda text: [5, 6, 7, 8] if len(text) % 2 else [])
        for drafter in (NgramDrafter(), wrong):
            both(lambda: loaded.decoder, loaded.tokenizer, ids, Speculation(drafter), max_tokens=40)


class TestRopeThatDependsOnTheLength:
    """Dynamic RoPE rotates a pass for the length after it: several tokens at once would turn further than one by one.
    Beyond max_position_embeddings nothing is drafted, and the report says so."""

    @pytest.fixture
    def model(self, tmp_path: Path, write_model: Callable[..., Path]) -> LoadedModel:
        folder = write_model(
            tmp_path / "m",
            dtype=torch.float32,
            max_position_embeddings=24,
            rope_theta=100.0,
            rope_scaling={"rope_type": "dynamic", "factor": 4.0},
        )
        return load_model(str(folder), "cpu")

    @pytest.mark.parametrize("length", [4, 19, 22, 23, 24, 40])
    def test_drafts_end_where_it_begins_to_depend(self, model: LoadedModel, length: int) -> None:
        passes: list[tuple[int, int]] = []

        class Watched(TokenByToken):
            """Passes below max_position_embeddings token by token, which is the same there; what is beyond as it
            comes."""

            def forward(self, ids: torch.Tensor, cache: Any, *rest: Any, **options: Any) -> torch.Tensor:
                start, width = int(cache.lengths[0]), ids.shape[1]
                passes.append((start, width))
                if start and start + width <= 24:
                    return super().forward(ids, cache, *rest, **options)
                return model.decoder.forward(ids, cache, *rest, **options)

        ids = [(7 * index) % 251 for index in range(length)]
        by = DraftModel("itself", TokenByToken(model.decoder))
        _, sped = both(lambda: Watched(model.decoder), model.tokenizer, ids, Speculation(by), max_tokens=30)
        assert all(width == 1 or start + width <= 24 for start, width in passes if start)
        report = sped.speculation
        assert report is not None
        assert report.note == "no drafts beyond 24 tokens: the model's RoPE depends on the length of the text"
        assert (report.drafted > 0) == (length < 23)  # a draft of one needs the text, itself and what it gives


class TestLoading:
    def test_vocabularies_must_be_equal(self, pair: Pair, tiny_model: Path) -> None:
        with pytest.raises(UsageError) as caught:
            load_drafter(str(tiny_model), "novels", pair.large.tokenizer, load_model)
        assert str(caught.value) == (
            f"--speculate {tiny_model}: its vocabulary is not that of novels, so it cannot draft for it: name a smaller "
            "model of the same family, or use --speculate ngram"
        )

    def test_other_names_for_the_same_tokens_are_another_vocabulary(self, tmp_path: Path, tiny_model: Path) -> None:
        other = tmp_path / "other"
        shutil.copytree(tiny_model, other)
        loaded = load_model(str(tiny_model), "cpu")
        assert isinstance(load_drafter(str(other), "tiny", loaded.tokenizer, load_model), DraftModel)
        file = json.loads((other / "tokenizer.json").read_text())
        vocabulary = file["model"]["vocab"]
        first, second = list(vocabulary)[:2]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        (other / "tokenizer.json").write_text(json.dumps(file))
        with pytest.raises(UsageError, match="its vocabulary is not that of tiny"):
            load_drafter(str(other), "tiny", loaded.tokenizer, load_model)


class TestCommands:
    def report(self, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
        code, stdout, stderr = in_process(["run", *arguments, "--json"], monkeypatch)
        assert (code, stderr) == (0, "")
        report: dict[str, Any] = json.loads(stdout)
        return report

    def test_run(self, novels_folder: str, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        flags = (PROMPTS[1], "-m", novels_folder, "--max-tokens", "24")
        plain = self.report(monkeypatch, *flags)
        assert plain["speculation"] is None
        for drafter, most in (("ngram", "3"), (str(data_dir / "models" / "novels-0.7m"), "6")):
            sped = self.report(monkeypatch, *flags, "--speculate", drafter, "--draft-tokens", most)
            found = sped["speculation"]
            assert found["drafter"] == drafter
            assert 0 < found["accepted"] <= found["drafted"] <= int(most) * found["passes"]
            assert found["acceptance_rate"] == found["accepted"] / found["drafted"]
            assert found["note"] is None
            assert sped["completion_tokens"] == 24

    def test_figures_for_people(self, novels_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
        code, _, stderr = in_process(
            ["run", PROMPTS[1], "-m", novels_folder, "--max-tokens", "24", "--speculate", "ngram"], monkeypatch
        )
        assert code == 0
        assert " drafted tokens accepted (" in stderr

    def test_chat(self, novels_folder: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from generation_cases import CHATML

        folder = tmp_path / "chatty"
        shutil.copytree(novels_folder, folder)
        (folder / "chat_template.jinja").write_text(CHATML)
        flags = ["chat", "-m", str(folder), "--temperature", "0", "--max-tokens", "8"]
        lines = b"Hello there\nHello there again\n"
        code, plain, _ = in_process(flags, monkeypatch, lines)
        assert code == 0
        for drafter in ("ngram", str(data_dir / "models" / "novels-0.7m")):
            code, sped, _ = in_process([*flags, "--speculate", drafter], monkeypatch, lines)
            assert (code, sped) == (0, plain)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--draft-tokens", "4"), "--draft-tokens needs --speculate"),
            (("--draft-tokens", "0", "--speculate", "ngram"), "--draft-tokens 0: expected 1 to 64"),
            (("--draft-tokens", "65", "--speculate", "ngram"), "--draft-tokens 65: expected 1 to 64"),
            (("--speculate", "no-such-model"), "no-such-model"),
        ],
    )
    @pytest.mark.parametrize("command", ["run", "chat"])
    def test_usage_errors(
        self,
        command: str,
        arguments: tuple[str, ...],
        message: str,
        tiny_model: Path,
        monkeypatch: pytest.MonkeyPatch,
        no_network: None,
        tmp_path: Path,
    ) -> None:
        folder = tmp_path / "chatty"
        shutil.copytree(tiny_model, folder)
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        prompt = ["x"] if command == "run" else []
        code, stdout, stderr = in_process([command, *prompt, "-m", str(folder), *arguments], monkeypatch, b"x\n")
        assert (code, stdout) == (2, "")
        assert message in stderr
        assert stderr.count("\n") == 1
