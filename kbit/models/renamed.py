"""Published names of tensors as the family's: with or without the name of the model they are part of, old spellings.

`BertModel` saves `embeddings.word_embeddings.weight`, `BertForMaskedLM` the same as `bert.embeddings...`; files from
before 2019 say `gamma` and `beta`. Which it is can be seen from the names, so it is recorded nowhere.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kbit.checkpoint.source import StoredSource, TensorInfo
from kbit.models.layout import Layout

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kbit.formats.stored import AnyStored


def renamed(source: StoredSource, layout: Layout, expected: Collection[str]) -> StoredSource:
    """A checkpoint with the names that its family declares: itself, where it has these, and nothing else.

    Args:
        source: the checkpoint.
        layout: its family's.
        expected: names of the tensors that the model needs, those of fused ones among them.
    """
    unused = [re.compile(pattern) for pattern in layout.unused]
    names: dict[str, str] = {name: name for name in source.tensors if name in expected}
    for name in source.tensors:
        if name in expected:
            continue
        found = next((new for new in _candidates(name, layout) if new in expected and new not in names), None)
        bare = name.removeprefix(layout.prefix)
        if found is None and any(pattern.fullmatch(bare) for pattern in unused):
            continue
        names[found or name] = name
    if all(new == old for new, old in names.items()) and len(names) == len(source.tensors):
        return source
    return RenamedSource(source, names)


def _candidates(name: str, layout: Layout) -> Iterator[str]:
    """What a published name may stand for."""
    for new in dict.fromkeys((name, name.removeprefix(layout.prefix), layout.prefix + name)):
        yield new
        for part, ours in layout.renamed:
            if part in new:
                yield new.replace(part, ours)


class RenamedSource(StoredSource):
    """A checkpoint under other names. Closes what it reads from.

    Args:
        source: the checkpoint.
        names: its names, by the new ones; tensors that have none are left out.
        config: in place of the checkpoint's own.
    """

    def __init__(self, source: StoredSource, names: Mapping[str, str], config: dict[str, Any] | None = None) -> None:
        self.path, self.config = source.path, source.config if config is None else config
        self._source, self._names = source, names
        kept = {old: new for new, old in names.items()}
        self._infos = {
            kept[name]: replace(info, name=kept[name]) for name, info in source.tensors.items() if name in kept
        }

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def origin(self, name: str) -> str:
        """The checkpoint's own name of one."""
        return self._names.get(name, name)

    def read_array_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        return self._source.read_array_rows(self._names[name], start, stop)

    def read_stored(self, name: str) -> AnyStored:
        return self._source.read_stored(self._names[name])

    def sidecar_files(self) -> Mapping[str, bytes]:
        return self._source.sidecar_files()

    def token_table(self) -> memoryview | None:
        return self._source.token_table()

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self._source.fingerprint()} {sorted(self._names.items())}".encode()).hexdigest()

    def close(self) -> None:
        self._source.close()
