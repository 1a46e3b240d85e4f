"""What a sweep measures on: a model and the windows of text it reads. Found without torch.

A subject says who it is by content: the digest of its weight files and configuration, of its tokenizer, and of the very
token ids that are scored. Two copies of a model in two folders are one subject, whatever their dates.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kbit.checkpoint.source import CheckpointSource
from kbit.formats.quant_format import QuantFormat
from kbit.host.cache_folder import cache_dir
from kbit.host.errors import CheckpointError, KbitError, UsageError
from kbit.host.files import read_json_object, sha256_of, write_durably
from kbit.models.check import check_continues, check_tensors
from kbit.models.families import spec_from_config
from kbit.models.opening import open_model
from kbit.models.spec import ModelSpec
from kbit.quantizers.plan import make_plan
from kbit.text.datasets import NAMED_TEXTS, TextData
from kbit.text.tokenizer import Tokenizer
from kbit.text.windows import Convention, Windows, choose_context, make_windows

# What decides how a text becomes tokens.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_COMMANDS = {"sequence": "classify", "tokens": "classify", "span": "answer"}


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and its windows.

    Attributes:
        location: what opens it: an absolute path, a hub id or a name of the catalogue.
        name: how tables call it.
        content: hex digest of its weights and configuration.
        tokenizer: hex digest of its tokenizer.json.
        windows: the windows it is measured on.
        text_bytes: bytes of UTF-8 that the scored tokens make.
        vocab_size: columns of its logits.
        linear_parameters: weights of the linear layers.
        parameters: all weights, a tied head once.
        linear_bits, total_bits: what these take as they are stored.
        training_tokens: tokens it was trained on, where its folder says (training.json).
    """

    location: str
    name: str
    content: str
    tokenizer: str
    windows: Windows
    text_bytes: int
    vocab_size: int
    linear_parameters: int
    parameters: int
    linear_bits: int
    total_bits: int
    training_tokens: int | None

    @property
    def tokens_digest(self) -> str:
        """Hex digest of the token ids and of which of them are scored."""
        head = f"{self.windows.convention} {self.windows.ids.shape} {self.windows.first_scored} "
        return hashlib.sha256(head.encode() + self.windows.ids.tobytes()).hexdigest()


def find_subjects(
    models: Sequence[str],
    text: TextData,
    convention: Convention,
    context: int | None,
    max_tokens: int | None,
    *,
    remember: bool = True,
    status: Callable[[str], None] = lambda _: None,
) -> list[Subject]:
    """Open models, check that kbit can run and quantize them, and cut the text for each.

    All get windows of the same length: by default the convention's, or what the shortest model can take.

    Args:
        remember: keep digests of weight files in the cache folder, by the files' names, sizes and dates.
        status: told what is being done.

    Raises:
        UsageError: no model, one given twice, one that is quantized by kbit already, or too short a text.
        KbitError and its kinds: a model that cannot be read or run.
    """
    if not models:
        raise UsageError("there is no model: name at least one folder, .gguf file, hub id or name kbit pull lists")
    names = _names(models)
    sources: list[CheckpointSource] = []
    try:
        for model in models:
            status(f"opening {model}")
            sources.append(open_model(model))
        specs = [spec_from_config(source.config, where=f"config of {source.path}") for source in sources]
        for spec, source in zip(specs, sources, strict=True):
            check_continues(spec, str(source.path), _instead(spec, str(source.path)))
        length = choose_context(convention, context, min(spec.longest_in_pieces for spec in specs))
        subjects: list[Subject] = []
        seen: dict[tuple[bytes, ...], tuple[Windows, int]] = {}
        for model, name, source in zip(models, names, sources, strict=True):
            files = source.sidecar_files()
            parts = tuple(files.get(file, b"") for file in _TOKENIZER_FILES)
            if parts not in seen:
                status(f"tokenising for {name}")
                tokenizer = Tokenizer.from_source(source, files)
                windows = make_windows(text, tokenizer, convention, length, max_tokens)
                seen[parts] = windows, _scored_bytes(windows, tokenizer)
            status(f"looking at {name}")
            subject = _subject(model, name, source, *seen[parts], hashlib.sha256(parts[0]).hexdigest(), remember)
            twin = next((other for other in subjects if other.content == subject.content), None)
            if twin is not None:
                raise UsageError(f"{model} holds the same model as {twin.location}: name it once")
            subjects.append(subject)
        return subjects
    finally:
        for source in sources:
            source.close()


def text_name(text: TextData) -> str:
    """How tables call a text: its name, or its file's."""
    return text.name if text.name in NAMED_TEXTS else Path(text.name).name


def content_digest(source: CheckpointSource, remember: bool = True) -> str:
    """Hex digest of a model's configuration and of its weight files, byte for byte.

    Args:
        remember: keep the result in the cache folder for as long as the source's fingerprint is the same.

    Raises:
        CheckpointError: a file cannot be read.
    """
    memo = _memo(source) if remember else None
    if memo is not None and memo.is_file():
        text = memo.read_text(encoding="ascii", errors="replace").strip()
        if len(text) == 64:
            return text
    digest = hashlib.sha256(json.dumps(source.config, sort_keys=True, default=str).encode())
    for file in sorted({tensor.file for tensor in source.tensors.values()}):
        try:
            digest.update(sha256_of(file).encode())
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    if memo is not None:
        try:
            memo.parent.mkdir(parents=True, exist_ok=True)
            write_durably(memo, digest.hexdigest().encode())
        except OSError:
            pass  # it is read again the next time
    return digest.hexdigest()


def _memo(source: CheckpointSource) -> Path | None:
    try:
        return cache_dir() / "points" / "digests" / source.fingerprint()
    except (KbitError, OSError):
        return None


def _subject(
    model: str, name: str, source: CheckpointSource, windows: Windows, text_bytes: int, tokenizer: str, remember: bool
) -> Subject:
    spec = spec_from_config(source.config, where=f"config of {source.path}")
    check_tensors(source, spec)
    plan = make_plan(source, QuantFormat())  # for its tensors: a tied head once, and what is linear
    linear = [tensor.source for tensor in plan.tensors if tensor.role == "linear"]
    return Subject(
        location=os.path.abspath(os.path.expanduser(model)) if os.path.exists(os.path.expanduser(model)) else model,
        name=name,
        content=content_digest(source, remember),
        tokenizer=tokenizer,
        windows=windows,
        text_bytes=text_bytes,
        vocab_size=spec.vocab_size,
        linear_parameters=sum(tensor.numel for tensor in linear),
        parameters=sum(tensor.source.numel for tensor in plan.tensors),
        linear_bits=8 * sum(tensor.nbytes for tensor in linear),
        total_bits=8 * sum(tensor.source.nbytes for tensor in plan.tensors),
        training_tokens=_training_tokens(source.path),
    )


def _names(models: Sequence[str]) -> list[str]:
    """Short names: the last part of a path, without .gguf; longer ones where these would be the same."""
    short = []
    for model in models:
        path = Path(os.path.expanduser(model))
        known = path.exists()
        short.append((path.resolve().name if path.name in ("", ".", "..") else path.name) if known else model)
    names = [name.removesuffix(".gguf") for name in short]
    return [model if names.count(name) > 1 else name for model, name in zip(models, names, strict=True)]


def _instead(spec: ModelSpec, model: str) -> str:
    """What to do with a model that predicts no next token: convert it to each width, and measure what it is for."""
    kind = None if spec.task is None else spec.task.kind
    measured = f"kbit eval OUT --tasks stsb --reference {model}"
    if spec.encoder is not None:
        measured = "kbit eval OUT --data PAIRS.tsv"
    elif kind in _COMMANDS:
        measured = f"compare what kbit {_COMMANDS[kind]} says with OUT and with {model}"
    return (
        "kbit scale measures by predictions of the next token: for each width run kbit quantize "
        f"{model} --method rtn --bits N -o OUT, and {measured}"
    )


def _scored_bytes(windows: Windows, tokenizer: Tokenizer) -> int:
    scored = windows.ids[:, windows.first_scored + 1 :]
    return sum(len(tokenizer.decode(row.tolist()).encode("utf-8", "replace")) for row in scored)


def _training_tokens(path: Path) -> int | None:
    """`training_tokens` of a training.json beside the weights, which tools/train_family.py writes."""
    file = path / "training.json"
    if not file.is_file():
        return None
    tokens = read_json_object(file).get("training_tokens")
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1):
        raise CheckpointError(f"{file}: training_tokens is {tokens!r:.40}, a number of tokens was expected")
    return tokens
