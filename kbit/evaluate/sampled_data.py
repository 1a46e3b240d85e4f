"""`--data sampled`: evaluation text that the original itself wrote, for machines without data or network.

A divergence from the original is a mean over contexts, and contexts the original produces are what it is used for; so
such text serves to compare quantized models with each other. Perplexities on it are about the original's entropy, and
do not compare with those on human text. It is sampled with a seed of its own: calibration never sees it
(kbit.models.sampled_text).

What was sampled is kept in the cache folder, in tokens; asked for more, sampling goes on where it ended. It is handed
out as text, so that it is cut into windows like any other.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kbit.host.cache_folder import cache_dir
from kbit.host.errors import KbitError
from kbit.host.files import write_durably
from kbit.models.check import check_continues
from kbit.models.families import spec_from_config
from kbit.models.opening import open_model
from kbit.models.sampled_text import EVALUATION_SEED, VERSION, sample_sequences, start_tokens
from kbit.text.datasets import TextData, resolve_data
from kbit.text.tokenizer import Tokenizer

SAMPLED = "sampled"
DEFAULT_TOKENS = 8192
# Tokens of a sampled sequence, or what the model can take.
_LENGTH = 512
# Read again, a text has fewer tokens than it was sampled in: the model spells some words in more of them than the
# tokenizer does, and special tokens are left out.
_MARGIN = 1.15

Status = Callable[[str], None]


def is_sampled(data: str) -> bool:
    """Whether `--data` asks for sampled text. As with named texts, a file of that name wins."""
    return data == SAMPLED and not Path(data).is_file()


def evaluation_text(data: str, original: str, tokens: int | None = None, status: Status = lambda _: None) -> TextData:
    """What `--data` asks for: a text file, a named text, or "sampled".

    Args:
        original: the model that a sampled text is to be from.
        tokens: how much of a text will be used; None: DEFAULT_TOKENS of a sampled one.
        status: told how far sampling is.

    Raises:
        UsageError, KbitError: see `resolve_data`; or a model that writes no text.
    """
    if not is_sampled(data):
        return resolve_data(data)
    return _sampled(original, DEFAULT_TOKENS if tokens is None else tokens, status)


def _sampled(model: str, tokens: int, status: Status) -> TextData:
    """A text of at least about so many tokens that a model wrote."""
    with open_model(model) as source:
        tokenizer = Tokenizer.from_source(source)
        spec = spec_from_config(source.config, where=f"config of {source.path}")
        check_continues(spec, str(source.path))
        length = min(_LENGTH, spec.longest_in_pieces)
        count = -(-int(_MARGIN * tokens) // length) + 1
        name = f"{source.fingerprint()[:32]}-v{VERSION}-seed{EVALUATION_SEED}-{length}.npy"
        file = cache_dir() / SAMPLED / name
    ids = _read(file, length)
    if len(ids) < count:
        ids = np.concatenate([ids, _sample(model, len(ids), count - len(ids), length, status)])
        _keep(file, ids)
    # Pieces of texts are joined like texts: what stands between them is the same for all models that are compared.
    text = "\n\n".join(tokenizer.decode(row.tolist()).strip() for row in ids[:count])
    return TextData(
        SAMPLED,
        text,
        "plain",
        hashlib.sha256(text.encode("utf-8")).hexdigest(),
        str(file),
        f"written by {model}, seed {EVALUATION_SEED}",
    )


def _sample(model: str, first: int, count: int, length: int, status: Status) -> NDArray[np.int64]:
    from kbit.engine.loader import load_model

    status(f"loading {model} to sample text from it")
    # Exactly: it is no slower for so many sequences at once, and the text is the model's own, not its rounding's.
    loaded = load_model(model, "cpu", compute="fp32")

    def on_progress(done: int, total: int) -> None:
        status(f"sampling text from {model}: {done:,} of {total:,} tokens")

    return sample_sequences(
        loaded.decoder,
        start_tokens(loaded.tokenizer),
        count=count,
        length=length,
        seed=EVALUATION_SEED,
        first=first,
        on_progress=on_progress,
    )


def _read(file: Path, length: int) -> NDArray[np.int64]:
    """Sequences that were sampled before, none where there is no file, or none that can be read."""
    try:
        ids = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return np.empty((0, length), dtype=np.int64)
    good = isinstance(ids, np.ndarray) and ids.ndim == 2 and ids.shape[1] == length and ids.dtype.kind == "i"
    return ids.astype(np.int64) if good else np.empty((0, length), dtype=np.int64)


def _keep(file: Path, ids: NDArray[np.int64]) -> None:
    data = io.BytesIO()
    np.save(data, ids.astype(np.int32))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_durably(file, data.getvalue())
    except OSError as error:
        raise KbitError(f"cannot write {file}: {error.strerror or error}") from error
