"""Write a Llama-style checkpoint of any size with random weights: to test conversion of models that do not fit memory.

    python tools/make_synthetic_checkpoint.py /tmp/big --gigabytes 6

Weights are normal with a few outliers, in bf16, sharded, with a valid index; the tokenizer is a 256-byte alphabet. The
model generates noise. Memory stays below 200 MB whatever the size.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 32, 8, 32000
SHARD_BYTES = 1_000_000_000


def layer_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one decoder layer's tensors."""
    prefix, kv = f"model.layers.{layer}.", HIDDEN * KV_HEADS // HEADS
    return {
        f"{prefix}input_layernorm.weight": (HIDDEN,),
        f"{prefix}self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        f"{prefix}self_attn.k_proj.weight": (kv, HIDDEN),
        f"{prefix}self_attn.v_proj.weight": (kv, HIDDEN),
        f"{prefix}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{prefix}post_attention_layernorm.weight": (HIDDEN,),
        f"{prefix}mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        f"{prefix}mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        f"{prefix}mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
    }


def bfloat16_bytes(values: np.ndarray) -> bytes:
    """float32 values as bf16, truncated."""
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], generator: np.random.Generator) -> None:
    header, position = {}, 0
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            if len(shape) == 1:
                file.write(bfloat16_bytes(np.ones(shape, np.float32)))
                continue
            # One random tile per matrix, repeated: generating every value would take minutes per gigabyte.
            tile = (generator.standard_normal((256, shape[1])) * 0.02).astype(np.float32)
            tile[generator.integers(256), generator.integers(shape[1])] *= 40
            for start in range(0, shape[0], 256):
                file.write(bfloat16_bytes(np.ascontiguousarray(tile[: shape[0] - start])))


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def make(folder: Path, gigabytes: float, seed: int = 0) -> int:
    """Write the checkpoint; returns its size in bytes."""
    layer_bytes = sum(2 * int(np.prod(shape)) for shape in layer_shapes(0).values())
    embedding_bytes = 2 * VOCABULARY * HIDDEN
    layers = max(1, round((gigabytes * 1e9 - embedding_bytes) / layer_bytes))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        shapes.update(layer_shapes(layer))
    shapes["model.norm.weight"] = (HIDDEN,)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / file_name, shard, generator)
        weight_map.update(dict.fromkeys(shard, file_name))
    total = layers * layer_bytes + embedding_bytes + 2 * HIDDEN
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(folder)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    total = make(arguments.folder, arguments.gigabytes, arguments.seed)
    print(f"{arguments.folder}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
