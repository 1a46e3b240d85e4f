"""An encoder-decoder with its tokenizer: texts in, texts out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Literal

from kbit.checkpoint.source import CheckpointSource
from kbit.engine.beam_search import write
from kbit.engine.generation_settings import GenerationSettings, read_settings
from kbit.graph.backend import Backend
from kbit.host.errors import UsageError
from kbit.models.encoder_decoder import load_encoder_decoder
from kbit.text.added_tokens import read_json
from kbit.text.languages import Prompted, prompted_for_languages, prompted_for_task
from kbit.text.tokenizer import Tokenizer

Long = Literal["refuse", "truncate"]


@dataclass(frozen=True)
class Answer:
    """What was made of a text.

    Attributes:
        text: without special tokens.
        ids: its tokens, the first one and that which ended it included.
        source_tokens: tokens that the encoder read.
        cut: how many of the source were left out, as it was too long.
        score: of the beam; None without beams.
        finished: it ended by itself; else it was cut off.
    """

    text: str
    ids: tuple[int, ...]
    source_tokens: int
    cut: int
    score: float | None
    finished: bool


class TextToText:
    """A model in memory.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        prompted: what stands around texts.
        settings: how texts are generated.
        load_seconds: from opening the checkpoint's tokenizer to the last prepared weight.

    Args:
        source: the checkpoint, as `kbit.models.opening.open_model` opens it.
        backend: who computes.
        task: of task_specific_params in config.json, where it is there ("summarization"), or "translation".
        languages: of a translation, from which to which; None: what the files say.

    Raises:
        CheckpointError, UnsupportedError: the model cannot be read or run.
        UsageError: it has no such languages, or is no encoder-decoder.
    """

    def __init__(
        self,
        source: CheckpointSource,
        backend: Backend,
        *,
        task: str | None = None,
        languages: tuple[str | None, str | None] = (None, None),
    ) -> None:
        start, where = perf_counter(), str(source.path)
        self.tokenizer = Tokenizer.from_source(source)
        self.prompted = self._prompted(source, task, languages, where)
        self.model = load_encoder_decoder(source, backend)
        if self.model.encoder_spec.sound is not None:
            raise UsageError(f"{where}: a {self.model.spec.family} model reads sound, and no text: use kbit transcribe")
        self.settings: GenerationSettings = read_settings(source, self.model.spec.vocab_size, self.prompted.generation)
        self.load_seconds = perf_counter() - start

    def _prompted(
        self, source: CheckpointSource, task: str | None, languages: tuple[str | None, str | None], where: str
    ) -> Prompted:
        if task is None:
            return Prompted()
        config: Mapping[str, Any] = source.config
        if task != "translation":
            return prompted_for_task(config, task, where)
        settings = read_json(source.sidecar_files(), "tokenizer_config.json", where)
        family = str(config.get("model_type"))
        return prompted_for_languages(family, self.tokenizer, config, settings, *languages, where)

    def with_settings(
        self, beams: int | None = None, max_tokens: int | None = None, length_penalty: float | None = None
    ) -> GenerationSettings:
        """The settings with what the user says.

        Args:
            beams, length_penalty: see GenerationSettings; None: as the model says.
            max_tokens: most new tokens; None: as the model says, or as it has positions for.

        Raises:
            UsageError: a value out of range.
        """
        settings, room = self.settings, self.model.spec.context_length
        if max_tokens is None:
            settings = replace(settings, longest=min(settings.longest, room))
        else:
            settings = replace(settings, longest=1 + max_tokens)
        if beams is not None:
            settings = replace(settings, beams=beams)
        return settings if length_penalty is None else replace(settings, length_penalty=length_penalty)

    def encode(self, text: str) -> list[int]:
        """What the encoder reads of a text."""
        text = f"{self.prompted.words}{text}"
        if self.prompted.before is None or self.prompted.after is None:
            return self.tokenizer.encode(text)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return [*self.prompted.before, *ids, *self.prompted.after]

    def answer(
        self, texts: Sequence[str], settings: GenerationSettings, long: Long = "refuse", first: int = 1
    ) -> list[Answer]:
        """Reads texts and writes one for each.

        Args:
            texts: texts.
            settings: how to write.
            long: what becomes of a text with more tokens than the model has positions: the call fails, or the text's
                end is left out.
            first: the number of the first text, for errors.

        Raises:
            UsageError: a text that cannot be read; see `kbit.engine.beam_search.write`.
        """
        sources, cut = [], []
        for number, text in enumerate(texts, first):
            whole = self.encode(text)
            kept = self._shortened(whole, number, long)
            sources.append(kept)
            cut.append(len(whole) - len(kept))
        return [
            Answer(
                self.tokenizer.decode(written.ids),
                written.ids,
                len(source),
                left_out,
                written.score,
                written.finished,
            )
            for written, source, left_out in zip(write(self.model, sources, settings), sources, cut, strict=True)
        ]

    def _shortened(self, ids: list[int], number: int, long: Long) -> list[int]:
        room = self.model.encoder_spec.context_length
        if len(ids) <= room:
            return ids
        if long == "refuse":
            raise UsageError(
                f"text {number} has {len(ids)} tokens, and this {self.model.spec.family} model reads at most {room}: "
                "split it, or leave its end out with --long truncate"
            )
        # What the tokenizer puts at the end stays there.
        around = self.encode("")
        after = len(self.prompted.after) if self.prompted.after is not None else int(ids[-1:] == around[-1:])
        return [*ids[: room - after], *ids[len(ids) - after :]]
