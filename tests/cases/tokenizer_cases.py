"""Tokenizers of the kinds that real checkpoints have."""

from __future__ import annotations

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, processors


def sentencepiece() -> Backend:
    """Like Llama 2: visible spaces, byte fallback, a space before the text that decoding strips."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581"]
    pieces += list("abcdehilnorstw.,!") + ["\u2581h", "el", "lo", "\u2581hel", "\u2581hello", "\u2581w", "\ufffd"]
    merges = [("\u2581", "h"), ("e", "l"), ("l", "o"), ("\u2581h", "el"), ("\u2581hel", "lo"), ("\u2581", "w")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", 1)])
    return backend
