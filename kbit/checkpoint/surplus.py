"""Tensors that checkpoints carry and that no result depends on.

What trainers, exporters and quantizers leave in a file beside the weights. Each rule says why leaving its tensors out
changes nothing; whatever no rule names stays an error, since a tensor that is not used may be one that should be. A
rule never stands against a family: a tensor that the model declares is the model's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from kbit.checkpoint.source import TensorInfo

_MASK_TYPES = ("BOOL", "U8")


@dataclass(frozen=True)
class Rule:
    """A kind of tensor that is left out.

    Attributes:
        pattern: of its last names.
        why: why it is harmless, for `kbit info`.
        holds: what must be true of it besides.
    """

    pattern: str
    why: str
    holds: Callable[[TensorInfo], bool] = lambda info: True

    def names(self, info: TensorInfo) -> bool:
        """Whether the rule is about this tensor."""
        return re.search(rf"(^|\.)({self.pattern})$", info.name) is not None and self.holds(info)


def _is_scalar(info: TensorInfo) -> bool:
    return info.numel == 1


def _is_mask(info: TensorInfo) -> bool:
    square = len(info.shape) == 4 and info.shape[:2] == (1, 1) and info.shape[2] == info.shape[3]
    return info.stored_as in _MASK_TYPES or square


RULES = (
    Rule(r".*", "it has no elements", lambda info: info.numel == 0),
    Rule(
        r"(rotary_emb|rotary_pos_emb|rope)\.(inv_freq|original_inv_freq|cos_cached|sin_cached|cos|sin)",
        "angles of the rotary embedding, which follow from config.json",
    ),
    Rule(r"position_ids", "the numbers of the positions: 0, 1, 2, ..."),
    Rule(r"(attn|attention|self_attn)\.bias", "the causal mask, which is computed", _is_mask),
    Rule(r"masked_bias", "what the causal mask puts in place of a score", _is_scalar),
    Rule(r"num_batches_tracked", "a counter of training"),
    # Of one number only: a scale per channel would have its counterpart in the weights.
    Rule(
        r"(input|in|output|out|activation|act|prob)(_global)?_scale(_inv)?",
        "a scale for 8-bit activations, which are not rounded to it here",
        _is_scalar,
    ),
    Rule(r"[qkv]_scale", "a scale for 8-bit keys, values or queries, which are not rounded to it here"),
    Rule(
        r"bias",
        "a bias of zeros: quantizers write one for every layer that they pack",
        lambda info: info.packed_as == "zeros",
    ),
    Rule(r"mtp(\.\w+)+", "layers that predict tokens further on, for speculation; the model's own do without"),
    Rule(r"v_head(\.\w+)*\.(weight|bias)", "the value head of a reward model or of training with one"),
)


def harmless(info: TensorInfo) -> str | None:
    """Why a tensor that a model does not declare can be left out; None where it cannot."""
    return next((rule.why for rule in RULES if rule.names(info)), None)
