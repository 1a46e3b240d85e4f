"""Names of tensors: in files, and in the models of transformers, which renames some as it loads and saves them."""

from __future__ import annotations

from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, rename_source_key

from kbit.host.errors import UnsupportedError


class Names:
    """Of one model.

    Args:
        model: of transformers, before any of its modules was replaced.
        instead: what to do where a k-bit tensor cannot be put into it.
    """

    def __init__(self, model: Any, instead: str) -> None:
        self._instead = instead
        mapping = get_model_conversion_mapping(model)
        self._renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        self._converters = [each for each in mapping if isinstance(each, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._known = dict(model.state_dict())

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def in_model(self, stored: str) -> str:
        """What the model calls a tensor of a file; a name that it does not have, where it has none for it.

        Raises:
            UnsupportedError: the model has it as a part of another tensor, or in several.
        """
        name, converter = rename_source_key(stored, self._renamings, self._converters, self._prefix, self._known)
        if converter is not None:
            raise UnsupportedError(
                f"{stored}: this version of transformers keeps it in another form ({name}), which kbit.transformers "
                f"does not make of a k-bit tensor: {self._instead}"
            )
        return str(name)


def in_files(model: Any, name: str) -> str:
    """What `save_pretrained` calls a tensor of a model.

    Raises:
        UnsupportedError: it would write another form of it.
    """
    mapping = getattr(model, "_weight_conversions", None)
    if mapping is None:
        mapping = [each for each in get_model_conversion_mapping(model, add_legacy=False) if not _prefixes(each)]
    reverse = [each.reverse_transform() for each in mapping[::-1]]
    renamings = [each for each in reverse if isinstance(each, WeightRenaming)]
    converters = [each for each in reverse if isinstance(each, WeightConverter)]
    stored, converter = rename_source_key(name, renamings, converters, reverse=True)
    if converter is not None:
        raise UnsupportedError(f"{name}: transformers saves it in another form, which it cannot make of a k-bit tensor")
    return str(stored)


def _prefixes(transform: Any) -> bool:
    return isinstance(transform, PrefixChange)
