"""What calibration takes: tokens, memory, disk. Imports neither torch nor numpy, so that plans can say it."""

from __future__ import annotations

from kbit.calibration.request import SEQUENCE
from kbit.host.errors import UnsupportedError
from kbit.models.parameter import Parameter
from kbit.models.params import parameters
from kbit.models.spec import ModelSpec

# Tokens whose activations are held at once.
CHUNK_TOKENS = 2048
# Logits and their gradients are formed for so many bytes at a time.
LOGITS_BYTES = 32 << 20
# Of calibration's sequences, one of so many is measured again, on other text, to judge errors by.
HELD_OUT_SHARE = 8
# Models below this many weights are calibrated on more tokens: they are cheap there.
_SMALL_MODEL, _MANY_TOKENS, _TOKENS = 20_000_000, 65536, 16384


def default_tokens(spec: ModelSpec) -> int:
    """Tokens to calibrate on (docs/methods.md: what they buy)."""
    weights = sum(p.shape[0] * p.shape[1] for p in parameters(spec) if p.role == "linear")
    return _MANY_TOKENS if weights < _SMALL_MODEL else _TOKENS


def text_shape(spec: ModelSpec, tokens: int | None) -> tuple[int, int]:
    """Sequences, and tokens of each."""
    length = min(SEQUENCE, spec.longest_in_pieces if spec.continues_text else spec.context_length)
    return (tokens or default_tokens(spec)) // length, length


def refuse_encoder(spec: ModelSpec, texts: bool, gradients: bool) -> None:
    """Raise where an encoder is to be calibrated on what it does not have: text of its own, or a next token.

    Args:
        spec: the model.
        texts: whether there is text to calibrate on.
        gradients: whether gradients are to be measured.

    Raises:
        UnsupportedError: it is.
    """
    if spec.encoder is not None and spec.encoder.sound is not None:
        raise UnsupportedError(
            f"a {spec.family} model reads sound, so it is not calibrated on text: use --method rtn or hqq"
        )
    if spec.encoder is not None and (gradients or not texts):
        raise UnsupportedError(
            f"a {spec.family} encoder-decoder is calibrated on what goes in to its matrices when it reads a text: use "
            "--method gptq or search with --inputs-only and --calibration TEXT, or --method rtn or hqq"
        )
    if not spec.continues_text and (gradients or not texts):
        raise UnsupportedError(
            f"a {spec.family} encoder predicts no next token: it writes no text to calibrate on, and has no gradients "
            "to weigh errors by; use --method rtn or hqq, or --method gptq or search with --inputs-only and "
            "--calibration TEXT"
        )


def factor_bytes(spec: ModelSpec, layers: int, gradients: bool) -> int:
    """About what the factors of so many layers take on disk: half of each symmetric matrix in 16 bits."""
    return layers * sum(columns**2 + (rows**2 if gradients else 0) for rows, columns in _shapes(spec))


def calibration_memory(spec: ModelSpec, tokens: int | None, gradients: bool) -> int:
    """About what calibrating takes at its peak: the inputs of all layers, the factors of one, a chunk of tokens."""
    count, length = text_shape(spec, tokens)
    hidden = count * length * spec.hidden_size
    kept = hidden * (2 * (spec.layers + 1) + 8 if gradients else 4)
    kept += 2 * count * length * spec.layers * spec.layer_features
    shapes = enumerate(spec.shapes)
    of_keys = {s.source: 2 * s.kv_heads * s.head_dim for layer, s in shapes if s.source != layer}
    kept += (2 + 4 * gradients) * count * length * sum(of_keys.values())  # which several layers attend to
    linear = _shapes(spec)
    weights = 4 * sum(rows * columns for rows, columns in linear)
    factors = 3 * factor_bytes(spec, 1, gradients) * 2
    through = sum(p.active * (p.shape[0] + p.shape[1]) for p in _linears(spec))
    activations = round(4 * 3 * min(CHUNK_TOKENS, count * length) * through)
    head = 6 * spec.vocab_size * spec.hidden_size + (16 * LOGITS_BYTES if gradients else 0)
    return kept + max(weights + factors + activations, head)


def _shapes(spec: ModelSpec) -> list[tuple[int, int]]:
    """Of the matrices of a layer."""
    return [(p.shape[0], p.shape[1]) for p in _linears(spec)]


def _linears(spec: ModelSpec) -> list[Parameter]:
    """The matrices of a layer, one with experts where there are any; the largest, where layers differ."""
    layer = spec.experts.layers.index(True) if spec.experts is not None else 0
    if spec.shapes:
        layer = max(range(spec.layers), key=lambda at: (spec.shape(at).width, spec.shape(at).head_dim))
    found = [p for p in parameters(spec) if p.role == "linear"]
    kinds = (
        {spec.recurs(at): at for at in reversed(range(layer, spec.layers))} if spec.delta is not None else {0: layer}
    )
    layers = [[p for p in found if p.layer == at] for at in kinds.values()]
    return max(layers, key=lambda matrices: sum(p.shape[0] * p.shape[1] for p in matrices))
