"""Writes Karpathy's stories260K (llama2.c's .bin files) as the GGUF file that llama.cpp's server tests are about.

python tools/judges/stories_gguf.py $KBIT_DATA/models/stories260K stories260K.gguf [--infill] [--split]

--infill: the last three tokens are called what code models call the marks around a gap. The model was not trained for
them, so what it answers says nothing; that it is asked as it should be can be tested.
--split: in files of 20 tensors.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import gguf
import numpy as np

# The tests ask for contexts of up to 8192 tokens; the model was trained on 512.
CONTEXT = 8192


def main() -> None:
    """Writes it."""
    folder, out = Path(sys.argv[1]), sys.argv[2]
    split = 20 if "--split" in sys.argv else 0
    raw = (folder / "stories260K.bin").read_bytes()
    dim, inner, layers, heads, kv_heads, vocabulary, _ = struct.unpack_from("<7i", raw)
    numbers, at = np.frombuffer(raw, "<f4", offset=28), 0

    def take(*shape: int) -> np.ndarray:
        nonlocal at
        size = int(np.prod(shape))
        at += size
        return numbers[at - size : at].reshape(shape)

    writer = gguf.GGUFWriter(out, "llama", split_max_tensors=split)
    writer.add_name("stories260K")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(dim)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(dim // heads)
    writer.add_vocab_size(vocabulary)
    kv = dim // heads * kv_heads
    parts = {
        "token_embd": take(vocabulary, dim),
        "attn_norm": take(layers, dim),
        "attn_q": take(layers, dim, dim),
        "attn_k": take(layers, kv, dim),
        "attn_v": take(layers, kv, dim),
        "attn_output": take(layers, dim, dim),
        "ffn_norm": take(layers, dim),
        "ffn_gate": take(layers, inner, dim),
        "ffn_down": take(layers, dim, inner),
        "ffn_up": take(layers, inner, dim),
    }
    writer.add_tensor("output_norm.weight", take(dim))
    writer.add_tensor("token_embd.weight", parts.pop("token_embd"))
    for name, stacked in parts.items():
        for layer, tensor in enumerate(stacked):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ascontiguousarray(tensor))
    _vocabulary(writer, (folder / "tok512.bin").read_bytes(), infill="--infill" in sys.argv)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _vocabulary(writer: gguf.GGUFWriter, raw: bytes, *, infill: bool) -> None:
    at, tokens, scores = 4, [], []
    while at < len(raw):
        score, size = struct.unpack_from("<fi", raw, at)
        tokens.append(raw[at + 8 : at + 8 + size].decode("utf-8").replace(" ", "▁"))
        scores.append(score)
        at += 8 + size
    tokens[1], tokens[2] = "<s>", "</s>"  # llama2.c writes line breaks around them
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]  # unknown, control, bytes, normal
    if infill:
        tokens[-3:], types[-3:] = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"], [3, 3, 3]
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)


if __name__ == "__main__":
    main()
