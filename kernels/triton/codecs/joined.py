"""Tensors of several matrices as one, without a copy where they lie so already."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors (T, ...) one below the other: where they lie in memory like that, a view of them, else a copy."""
    first, at = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and part.is_contiguous()
        if not same or part.storage_offset() != at:
            return torch.cat(list(parts))
        at += part.numel()
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())
