"""What llama.cpp makes of texts beside next tokens: python llama_states.py FILE '[[ids], ...]' ['[[ids], ...]'].

Prints a JSON list. Of an encoder: hidden states, every token's, of each text; of an encoder-decoder: the logits after
each of the second texts, which the decoder has written of the first. Calls the C functions in the library that
xllamacpp brings (llama.h of that version); runs in an environment with it, and needs nothing else.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

_NO_POOLING, _FLASH_OFF, _F32 = 0, 0, 0


class ModelParams(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("devices", "overrides")),
        *((name, c_int32) for name in ("gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *((name, c_void_p) for name in ("split", "progress", "progress_data", "kv_overrides")),
        *((name, c_bool) for name in ("vocab_only", "check", "extra", "no_host", "no_alloc", "mtp")),
    ]


class ContextParams(Structure):
    _fields_ = [
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "outs", "outs_seq")),
        *((name, c_int32) for name in ("threads", "threads_batch", "kind", "rope", "pooling", "attention", "flash")),
        *((name, c_float) for name in ("base", "scale", "ext", "attn", "fast", "slow")),
        ("original", c_uint32),
        ("defrag", c_float),
        *((name, c_void_p) for name in ("eval", "eval_data")),
        *((name, c_int32) for name in ("type_k", "type_v")),
        *((name, c_void_p) for name in ("abort", "abort_data")),
        *((name, c_bool) for name in ("embeddings", "offload", "no_perf", "op_offload", "swa_full", "unified")),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("other", c_void_p),
    ]


class Batch(Structure):
    _fields_ = [
        ("count", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


def library() -> Any:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise SystemExit("xllamacpp is not installed")
    found = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    for name, result in (("llama_model_default_params", ModelParams), ("llama_context_default_params", ContextParams)):
        getattr(found, name).restype, getattr(found, name).argtypes = result, []
    for name, result, arguments in (
        ("llama_model_load_from_file", c_void_p, [c_char_p, ModelParams]),
        ("llama_init_from_model", c_void_p, [c_void_p, ContextParams]),
        ("llama_model_has_encoder", c_bool, [c_void_p]),
        ("llama_model_n_embd", c_int32, [c_void_p]),
        ("llama_model_get_vocab", c_void_p, [c_void_p]),
        ("llama_vocab_n_tokens", c_int32, [c_void_p]),
        ("llama_batch_init", Batch, [c_int32, c_int32, c_int32]),
        ("llama_encode", c_int32, [c_void_p, Batch]),
        ("llama_decode", c_int32, [c_void_p, Batch]),
        ("llama_get_embeddings_ith", POINTER(c_float), [c_void_p, c_int32]),
        ("llama_get_logits_ith", POINTER(c_float), [c_void_p, c_int32]),
        ("llama_set_embeddings", None, [c_void_p, c_bool]),
        ("llama_free", None, [c_void_p]),
    ):
        getattr(found, name).restype, getattr(found, name).argtypes = result, arguments
    return found


def batch_of(llama: Any, ids: list[int]) -> Batch:
    batch: Batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.count = len(ids)
    for at, token in enumerate(ids):
        batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = token, at, 1, 0, 1
    return batch


def main() -> None:
    path, texts = sys.argv[1], json.loads(sys.argv[2])
    written = json.loads(sys.argv[3]) if len(sys.argv) > 3 else [[]] * len(texts)
    llama = library()
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit("llama.cpp does not open the file")
    width, vocabulary = llama.llama_model_n_embd(model), llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    answers = []
    for ids, after in zip(texts, written, strict=True):
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 512
        params.threads = params.threads_batch = 1
        params.type_k = params.type_v = _F32
        params.flash = _FLASH_OFF
        params.pooling = _NO_POOLING
        context = llama.llama_init_from_model(model, params)
        if context:
            llama.llama_set_embeddings(context, not after)
        if not context or llama.llama_encode(context, batch_of(llama, ids)):
            raise SystemExit("llama.cpp does not run the model")
        if after:
            if llama.llama_decode(context, batch_of(llama, after)):
                raise SystemExit("llama.cpp does not run the decoder")
            answers.append(llama.llama_get_logits_ith(context, len(after) - 1)[:vocabulary])
        else:
            answers.append([llama.llama_get_embeddings_ith(context, at)[:width] for at in range(len(ids))])
        llama.llama_free(context)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
