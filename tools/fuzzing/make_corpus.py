"""Writes the inputs that fuzzing starts from, made of what the tests have: tiny models of every kind.

    python tools/fuzzing/make_corpus.py        # needs the packages of the [test] extra

What is in tools/fuzzing/corpus under other names (found-*) is kept: inputs that were findings once.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_ROOT / "tools"), *(str(_ROOT / "tests" / part) for part in ("cases", "checkpoint", "text", "."))]

import gguf  # noqa: E402
import test_chat_template  # noqa: E402
import test_packed_bitsandbytes as bitsandbytes  # noqa: E402
import test_packed_compressed_tensors as compressed  # noqa: E402
import test_packed_hqq as hqq  # noqa: E402
import test_packed_integers as integers  # noqa: E402
import test_packed_mlx as mlx  # noqa: E402
import test_packed_nvidia as nvidia  # noqa: E402
import test_packed_quanto as quanto  # noqa: E402
import test_packed_torchao as torchao  # noqa: E402
import torch  # noqa: E402
from conftest import _write_model, _write_tokenizer  # noqa: E402
from conversion_cases import quantize  # noqa: E402
from decoder_cases import CASES, tiny_config  # noqa: E402
from gguf_model_cases import Model  # noqa: E402
from gguf_tokenizer_cases import byte_level  # noqa: E402
from packed_cases import awq, gptq, write_layer  # noqa: E402
from piece_cases import model_file, pieces_of  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from serve_cases import TEMPLATE  # noqa: E402
from token_table_cases import trained, with_everything  # noqa: E402
from tokenizer_cases import sentencepiece  # noqa: E402

from fuzzing.file_targets import Safetensors  # noqa: E402
from fuzzing.http_target import MODEL  # noqa: E402
from fuzzing.target import CORPUS, join_head  # noqa: E402
from kbit.checkpoint.gguf.types import GGML_TYPES  # noqa: E402

_SHAPE = (96, 128)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for make in (_safetensors, _gguf, _configs, _texts, _manifests, _packed, _requests, _native):
            make(Path(folder) / make.__name__)


def put(target: str, name: str, data: bytes) -> None:
    """An input of a target."""
    path = CORPUS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def put_lines(target: str, values: list[Any]) -> None:
    """Inputs of a target that are JSON, in one file."""
    put(target, "seeds.jsonl", "".join(json.dumps(value, separators=(",", ":")) + "\n" for value in values).encode())


def _safetensors(work: Path) -> None:
    work.mkdir()
    kinds = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)
    tensors = {f"t{i}": torch.zeros((2, i), dtype=kind) for i, kind in enumerate(kinds)}
    for name, some, metadata in (("one", {"t1": tensors["t1"]}, None), ("many", tensors, {"format": "pt"})):
        save_file(some, work / name, metadata)
        put("safetensors", name, (work / name).read_bytes())
    assert Safetensors.longest > len((work / "many").read_bytes())


def _described(path: Path) -> dict[str, Any]:
    """A GGUF file as GGUFModel describes it."""
    reader = gguf.GGUFReader(path)
    keys: list[Any] = []
    for field in reader.fields.values():
        if field.name.startswith("GGUF."):
            continue
        kinds = [int(kind) for kind in field.types]
        keys.append([field.name, kinds[0] if kinds[0] != 9 else kinds[1:2] or [4], field.contents()])
    tensors = [[t.name, int(t.tensor_type), [int(dim) for dim in t.shape]] for t in reader.tensors]
    return {"keys": keys, "tensors": tensors}


def _gguf(work: Path) -> None:
    work.mkdir()
    found = []
    for arch in ("llama", "qwen2", "gemma"):
        model = Model(arch)
        model.write(work / f"{arch}.gguf")
        found.append(_described(work / f"{arch}.gguf"))
    header = (work / "llama.gguf").read_bytes()
    put("gguf-header", "llama", header[: 3 << 10])
    byte_level().write(work / "bytes.gguf")
    words = _described(work / "bytes.gguf")
    put("gguf-header", "tokens", (work / "bytes.gguf").read_bytes()[: 3 << 10])
    tokenizer = [key for key in words["keys"] if key[0].startswith("tokenizer.")]
    size = len(next(value for name, _, value in tokenizer if name.endswith(".tokens")))
    whole = json.loads(json.dumps(found[0]))
    whole["keys"] = [[n, k, size if n.endswith("vocab_size") else v] for n, k, v in whole["keys"]] + tokenizer
    for tensor in whole["tensors"]:
        tensor[2] = [size if dim == 24 else dim for dim in tensor[2]]
    found.append(whole)
    packed = json.loads(json.dumps(found[0]))
    for tensor, kind in zip(
        (t for t in packed["tensors"] if len(t[2]) == 2), (2, 3, 6, 7, 8, 20, 39) * 2, strict=False
    ):
        tensor[1] = kind if kind in GGML_TYPES else 2
    found.append(packed)
    put_lines("gguf-model", found)
    from kbit.checkpoint.gguf.blocks import BLOCK_TYPES

    for index, name in enumerate(sorted(BLOCK_TYPES)):
        kind = next(each for each in GGML_TYPES.values() if each.name == name)
        put(
            "gguf-blocks",
            name,
            bytes([index]) + bytes(range(256)) * 2
            if kind.block_bytes > 255
            else bytes([index]) + bytes(range(kind.block_bytes)),
        )


def _configs(work: Path) -> None:
    put_lines("config", [tiny_config(name) for name in sorted(CASES)])
    config = {"vocab_size": 260, "eos_token_id": 2, "bos_token_id": 1, "decoder_start_token_id": 2, "max_length": 20}
    generations = [
        {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1},
        {"num_beams": 4, "length_penalty": 0.6, "early_stopping": True, "bad_words_ids": [[5, 6]], "max_length": 128},
        {"forced_bos_token_id": 3, "forced_eos_token_id": 2, "no_repeat_ngram_size": 3, "suppress_tokens": [1, 2]},
        {
            "lang_to_id": {"<|en|>": 5, "<|de|>": 6},
            "task_to_id": {"translate": 7},
            "no_timestamps_token_id": 9,
            "forced_decoder_ids": [[1, 5], [2, 7]],
            "max_initial_timestamp_index": 50,
            "return_timestamps": True,
        },
    ]
    put_lines("generation", [{"config": config, "generation": generation} for generation in generations])


def _texts(work: Path) -> None:
    named = {"eos_token": "<s>", "unk_token": {"content": "<unk>"}, "chat_template": "{{ messages[0].content }}"}
    added = {
        "added_tokens_decoder": {"400": {"content": "<extra>", "special": True}},
        "clean_up_tokenization_spaces": False,
    }
    found = []
    for make in (lambda: trained(20), sentencepiece, with_everything):
        tokenizer = json.loads(make().to_str())
        found.append({"tokenizer.json": tokenizer, "tokenizer_config.json": named})
    found[0] |= {"added_tokens.json": {"<more>": 400}, "special_tokens_map.json": {"bos_token": "<s>"}}
    found[1]["tokenizer_config.json"] = {**named, **added}
    put_lines("tokenizer", found)
    for kind in (1, 2):
        put("sentencepiece", f"kind{kind}", model_file(pieces_of(), kind=kind, normalizer={3: 1}))
    for name, text in test_chat_template.TEMPLATES.items():
        put("template", name, text.encode())


def _folder(path: Path, *beside: str, **more: Any) -> bytes:
    """A model folder as an input."""
    files = {name: json.loads((path / name).read_text()) for name in ("config.json", *beside)}
    return join_head({**files, **more}, (path / "model.safetensors").read_bytes())


def _manifests(work: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = _write_model(work / "model", num_hidden_layers=1, vocab_size=260, **sizes)
    for format in ("nf4-b64", "int3-b32-asym-dq", "lloyd2-row", "float8-b16", "int4-b32-bf16"):
        quantize(model, work / format, format)
        for repair in (False, True):
            put(
                "manifest",
                f"{format}{'-repaired' * repair}",
                _folder(work / format, "kbit-manifest.json", repair=repair),
            )
    shutil.rmtree(MODEL, ignore_errors=True)
    _write_model(MODEL, num_hidden_layers=1, vocab_size=260, eos_token_id=255, **sizes)
    _write_tokenizer(MODEL)
    (MODEL / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))


def _packed(work: Path) -> None:
    work.mkdir()

    def layer(
        name: str, section: dict[str, Any], pack: Any, key: str = "quantization_config", shape: Any = (32, 64)
    ) -> None:
        write_layer(work / name, section, pack, shape, key=key)
        put("packed", name, _folder(work / name))

    for bits in (3, 4, 8):
        settings: dict[str, Any] = {"bits": bits, "group": 32, "symmetric": False, "layout": 1}
        layer(f"gptq{bits}", integers.gptq_section(**settings), gptq(**settings))
    ordered: dict[str, Any] = {"bits": 4, "group": 32, "symmetric": True, "layout": 2, "ordered": True}
    layer("gptq-ordered", integers.gptq_section(**ordered), gptq(**ordered))
    layer("awq", {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, awq(32))
    vars(bitsandbytes)["functional"] = import_module("bitsandbytes.functional")
    layer("bnb-nf4", bitsandbytes.SECTION, bitsandbytes.four_bits(kind="nf4", block=64, nested=True))
    layer("hqq3", hqq.SECTION, hqq.hqq(3, 32, torch.float16))
    layer("mlx4", {"bits": 4, "group_size": 32}, mlx.affine(4, 32, torch.float16), key="quantization")
    layer("nvfp4", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvidia.nvfp4)
    for case in ("fp16", "3 bits, old", "nvfp4", "int8 by tensor", "act-order"):
        weights, pack, _, _ = compressed.CASES[case]
        layer(f"ct-{case.replace(' ', '-')}", compressed.section(**weights), pack)
    quanto.write_group(work / "quanto", "q_proj", 4, (32, 160), 32, dtype=torch.float16)
    put("packed", "quanto", _folder(work / "quanto"))
    torchao.write(work / "torchao", torchao.floats((1, 1)))
    put("packed", "torchao", _folder(work / "torchao"))


def _requests(work: Path) -> None:
    said = [{"role": "user", "content": "Hi"}]
    some: dict[str, Any] = {"model": "tiny", "max_tokens": 3}
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": parameters}}
    talk: dict[str, Any] = {**some, "messages": said}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    scored = {"logprobs": True, "top_logprobs": 2}
    bodies: list[tuple[str, Any]] = [
        ("/v1/completions", {**some, "prompt": "ab", "logprobs": 2, "echo": True, "stop": ["x"], "n": 2, "seed": 1}),
        ("/v1/completions", {**some, "prompt": [97, 98], "stream": True, "temperature": 0, "logit_bias": {"97": -5}}),
        ("/v1/chat/completions", {**talk, **scored, "tools": [tool], "tool_choice": "auto"}),
        ("/v1/chat/completions", {**talk, "response_format": form}),
        ("/v1/chat/completions", {**talk, **streamed, "regex": "[ab]{1,3}"}),
        ("/v1/responses", {"model": "tiny", "input": "Hi", "max_output_tokens": 3, "instructions": "a"}),
        ("/v1/responses/input_tokens", {"model": "tiny", "input": said}),
        ("/v1/messages", {**talk, "system": "a", "stop_sequences": ["b"], "top_k": 3}),
        ("/v1/messages/count_tokens", {"model": "tiny", "messages": said}),
        ("/tokenize", {"content": "ab", "add_special": True, "with_pieces": True}),
        ("/detokenize", {"tokens": [97, 98]}),
        ("/apply-template", {"messages": said}),
        ("/completion", {"prompt": "ab", "n_predict": 3, "n_probs": 2, "cache_prompt": True, "id_slot": 0}),
        ("/v1/embeddings", {"model": "tiny", "input": ["a"]}),
        ("/v1/rerank", {"model": "tiny", "query": "a", "documents": ["b"]}),
    ]
    found: list[dict[str, Any]] = [{"path": path, "body": body} for path, body in bodies]
    found += [
        {"method": "GET", "path": path} for path in ("/health", "/metrics", "/v1/models/tiny", "/props", "/slots")
    ]
    put_lines("http", [*found, {"path": "/v1/completions", "body": '{"model": "tiny", "prompt": '}])


def _native(work: Path) -> None:
    from fuzzing.native_target import CALLS

    generator = torch.Generator().manual_seed(0)
    for index, name in enumerate(sorted(CALLS)):
        drawn = torch.randint(0, 240, (200,), generator=generator, dtype=torch.uint8).numpy().tobytes()
        put("native", name.replace(" ", "-"), bytes([index]) + drawn)


if __name__ == "__main__":
    main()
