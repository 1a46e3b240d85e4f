"""Write a Llama-style checkpoint of any size with random weights: to test the conversion of models that do not fit
memory, and to measure models of a size that is nowhere at hand.

    python tools/make_synthetic_checkpoint.py /tmp/big --gigabytes 6           # bf16, of that size
    python tools/make_synthetic_checkpoint.py /tmp/8b --quantized 4            # 8 billion weights at 4 bits: 4.8 GB

Weights are normal. In bf16 each matrix has one outlier, sharded files and a valid index, and memory stays below 200 MB
whatever the size. Quantized, there is no outlier, and the 16 GB of bf16 are never written: matrices are made and
quantized as the conversion asks for them. The tokenizer is a 256-byte alphabet; the model generates noise.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np

if TYPE_CHECKING:
    import torch

    from kbit.checkpoint.source import CheckpointSource
    from kbit.formats.codec import Codec
    from kbit.formats.quant_tensor import QuantTensor

SHARD_BYTES = 1_000_000_000
TILE_ROWS = 256  # one random tile per matrix, repeated: generating every value would take minutes per gigabyte
SPREAD = 0.02  # standard deviation of the weights


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; the names are config.json's."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = True

    def config(self, layers: int) -> dict[str, Any]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": "bfloat16",
        }

    def layer(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of one decoder layer's tensors."""
        prefix, hidden, middle = f"model.layers.{layer}.", self.hidden_size, self.intermediate_size
        kv = hidden * self.num_key_value_heads // self.num_attention_heads
        return {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}self_attn.k_proj.weight": (kv, hidden),
            f"{prefix}self_attn.v_proj.weight": (kv, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}mlp.gate_proj.weight": (middle, hidden),
            f"{prefix}mlp.up_proj.weight": (middle, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, middle),
        }

    def tensors(self, layers: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for layer in range(layers):
            shapes.update(self.layer(layer))
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes


SMALL = Shape(2048, 5632, 32, 8, 32000)  # as many layers as the size asked for takes
EIGHT_BILLION, EIGHT_BILLION_LAYERS = Shape(4096, 14336, 32, 8, 128_256, tie_word_embeddings=False), 32  # 8.03e9


def nbytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of some tensors in bf16."""
    return sum(2 * int(np.prod(shape)) for shape in shapes.values())


def bfloat16_bytes(values: np.ndarray) -> bytes:
    """float32 values as bf16, truncated."""
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def random_tile(columns: int, generator: np.random.Generator) -> np.ndarray:
    """(TILE_ROWS, columns), float32."""
    return (generator.standard_normal((TILE_ROWS, columns)) * SPREAD).astype(np.float32)


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], generator: np.random.Generator) -> None:
    header, position = {}, 0
    for name, shape in shapes.items():
        size = nbytes({name: shape})
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            if len(shape) == 1:
                file.write(bfloat16_bytes(np.ones(shape, np.float32)))
                continue
            tile = random_tile(shape[1], generator)
            tile[generator.integers(TILE_ROWS), generator.integers(shape[1])] *= 40
            for start in range(0, shape[0], TILE_ROWS):
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
    """Write a checkpoint in bf16; returns its size in bytes."""
    without_layers = nbytes(SMALL.tensors(0))
    layers = max(1, round((gigabytes * 1e9 - without_layers) / nbytes(SMALL.layer(0))))
    tensors = SMALL.tensors(layers)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in tensors.items():
        if shards[-1] and nbytes(shards[-1]) + nbytes({name: shape}) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / file_name, shard, generator)
        weight_map.update(dict.fromkeys(shard, file_name))
    total = nbytes(tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(SMALL.config(layers), indent=1))
    write_tokenizer(folder)
    return total


def synthetic_source(shape: Shape, layers: int, seed: int = 0) -> CheckpointSource:
    """A checkpoint that is nowhere: each tensor is made when it is read. Norms are ones."""
    import torch

    from kbit.checkpoint.source import CheckpointSource, TensorInfo

    class Synthetic(CheckpointSource):
        def __init__(self) -> None:
            self.path, self.config = Path("synthetic"), shape.config(layers)
            shapes = shape.tensors(layers)
            self._infos = {n: TensorInfo(n, s, "BF16", nbytes({n: s}), self.path) for n, s in shapes.items()}

        @property
        def tensors(self) -> Mapping[str, TensorInfo]:
            return self._infos

        def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
            of = self._infos[name].shape
            if len(of) == 1:
                return torch.ones(stop - start)
            tile = random_tile(of[1], np.random.default_rng((seed, crc32(name.encode()))))
            return torch.from_numpy(tile[np.arange(start, stop) % TILE_ROWS])

        def sidecar_files(self) -> Mapping[str, bytes]:
            with tempfile.TemporaryDirectory() as folder:
                write_tokenizer(Path(folder))
                return {"tokenizer.json": (Path(folder) / "tokenizer.json").read_bytes()}

        def fingerprint(self) -> str:
            return f"synthetic {shape} {layers} {seed}"

    return Synthetic()


def quantize_tile(source: CheckpointSource, name: str, format: Codec) -> QuantTensor:
    """A matrix of `synthetic_source`, its tile quantized once and repeated, as the rows it is made of repeat."""
    from kbit.formats.quant_tensor import QuantTensor

    rows, columns = source.tensors[name].shape
    tile = format.encode(lambda start, stop: source.read_rows(name, start, stop), (TILE_ROWS, columns), name=name)
    repeats = -(-rows // TILE_ROWS)
    # Every part has a first dimension of rows: data types with a codebook of the tensor's own are not for this.
    stored = {part: array.repeat(repeats, 1)[:rows] for part, array in tile.stored.items()}
    return QuantTensor(format, (rows, columns), stored, tile.codebook)


def make_quantized(
    folder: Path,
    bits: int,
    *,
    head_bits: int = 8,
    shape: Shape = EIGHT_BILLION,
    layers: int = EIGHT_BILLION_LAYERS,
    seed: int = 0,
) -> int:
    """Write 8 billion weights (or another model) at some bits; returns the size of the files in bytes."""
    from kbit.formats.quant_format import QuantFormat, default_dtype
    from kbit.quantizers.convert import convert
    from kbit.quantizers.plan import make_plan

    source = synthetic_source(shape, layers, seed)
    plan = make_plan(source, QuantFormat(default_dtype(bits), bits, 64), embedding_bits=head_bits)
    return convert(source, plan, folder, encode=quantize_tile).nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of a bf16 checkpoint")
    parser.add_argument("--quantized", type=int, metavar="BITS", help="instead: 8 billion weights, embedding at 8 bits")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.quantized is not None:
        total = make_quantized(arguments.folder, arguments.quantized, seed=arguments.seed)
    else:
        total = make(arguments.folder, arguments.gigabytes, arguments.seed)
    print(f"{arguments.folder}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
