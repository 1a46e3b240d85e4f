"""What models compute of hidden states besides the logits of a next token: heads, as data.

A head is y = out(norm(act(dense(x)))), of which any part may be missing, on every token or on one vector for the text.
`kbit.engine.heads` computes it; its tensors are a model's own (`kbit.models.params`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TaskKind = Literal["hidden", "mask", "sequence", "tokens", "span"]


@dataclass(frozen=True)
class TaskHead:
    """A head. Names lack .weight and .bias.

    Attributes:
        kind: "hidden": none, hidden states are the result; "mask": logits of masked tokens; "sequence": of a text's
            labels; "tokens": of every token's labels; "span": of being a span's first and last token.
        dense: a square linear.
        dense_bias: whether it has a bias.
        activation: after it: one of kernels.activations.ACTIVATIONS, or "tanh".
        norm: of its kind in the model, after that.
        norm_bias: whether it has a bias.
        out: the last linear; None: there is none ("hidden"), or it is the embedding (`ModelSpec.tied_embeddings`).
        out_bias: the name of its bias; None: it has none.
        labels: rows of `out`; 0 for the vocabulary.
        pooling: "sequence": of which token, or of what mean, the vector for the text is.
        problem: "sequence": what labels are: one of several ("single"), any of several ("multi"), or a number
            ("regression").
    """

    kind: TaskKind
    dense: str | None = None
    dense_bias: bool = True
    activation: str | None = None
    norm: str | None = None
    norm_bias: bool = True
    out: str | None = None
    out_bias: str | None = None
    labels: int = 0
    pooling: Literal["cls", "mean"] = "cls"
    problem: Literal["single", "multi", "regression"] = "single"


HIDDEN = TaskHead("hidden")
