"""Models that two processes run together, and the program that each of them is.

python tensor_parallel_cases.py FOLDER reference|triton runs every case of a backend as one of the processes that RANK
and WORLD_SIZE name, and writes its logits to FOLDER/BACKEND-RANK.pt.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import toy_family
from decoder_cases import DictSource, quantized, tame_tensors, tiny_config
from torch import distributed

from kbit.checkpoint.source import TensorInfo
from kbit.formats.quant_tensor import QuantTensor
from kbit.graph.batch import Batch
from kbit.host.errors import KbitError, UsageError
from kbit.models.decoder import Decoder
from kbit.models.encoder_decoder import EncoderDecoder, load_encoder_decoder
from kbit.models.families import spec_from_config
from kbit.models.load import load_decoder
from kbit.models.opening import open_model
from kbit.models.shard import shard

WORLD = 2

# (family and switches, format): each family that has a path of its own, and each way in which scales are stored. The MLP
# has 77 features: blocks of 16 give the processes 32 and 45 of them.
CASES: list[tuple[str, str | None]] = [
    ("llama", None),
    ("llama-biases", "int4-b16-asym"),
    ("llama-biases", None),
    ("llama-multi-query", "nf4-b16-dq"),
    ("llama-dynamic", "int3-row"),
    ("llama-tied", "int5-b16-asym-dq"),
    ("mistral-window", "lloyd3-row-bf16"),
    ("qwen2", "quantile4-b16-fp32"),
    ("qwen3-biases-windows", None),
    ("gemma2", "nf4-b16"),
    ("gemma3", None),
    ("granite", "int8-b16"),
    ("glm4", "nf5-b16"),
    ("hunyuan", None),
    ("ministral3", "nf6-b16"),
    ("gpt2", "nf4-b16"),
    ("gpt_neox", None),
    ("cohere", "int8-b16"),
    ("gemma4-dense", "nf4-b16"),
    ("gemma4-e", None),
    ("gpt-oss", None),
    ("qwen2-moe", None),
    ("deepseek-v3", None),
    ("gemma4-moe", "nf4-b16"),
    ("qwen3-next", None),
    ("qwen3_5", "int4-b16-asym-dq"),
    ("bamba", "nf4-b16"),
    ("granite-hybrid", None),
    ("olmo2", None),
    ("opt-350m", "nf4-b16"),
    ("lfm2-biases", None),
    ("lfm2-moe", "int3-row"),
    ("apertus", None),
    ("bitnet", "nf4-b16"),
    ("llama4-plain", "int4-b16-asym"),
]
# Whole blocks of 16 for each.
CHANGES: dict[tuple[str, str | None], dict[str, Any]] = {
    ("gemma4-moe", "nf4-b16"): {"num_global_key_value_heads": 2},
    ("qwen3_5", "int4-b16-asym-dq"): {"linear_value_head_dim": 32},
}
# One layer has both sums; Triton's interpreter takes seconds for it. The second has a delta net and experts.
TRITON_CASES: list[tuple[str, str | None]] = [("llama-biases", "nf4-b16"), ("qwen3-next", "nf4-b16")]
TRITON_CHANGES: dict[str, Any] = {"num_hidden_layers": 1, "decoder_sparse_step": 1, "linear_value_head_dim": 32}


class PackedSource(DictSource):
    """A checkpoint in memory that says, as files do, which weights are packed, and how."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        infos = {}
        for name, info in super().tensors.items():
            x = self.data[name]
            infos[name] = replace(info, stored_as=str(x.format)) if isinstance(x, QuantTensor) else info
        return infos


def source_of(name: str, format: str | None, **changes: Any) -> PackedSource:
    """A tiny model with heads of 16 features: a head of 8 would be half a block."""
    config = {**tiny_config(name), "head_dim": 16, **changes}
    tensors = tame_tensors(config)
    return PackedSource(config, tensors if format is None else quantized(tensors, format))


def source_for(case: tuple[str, str | None]) -> PackedSource:
    """That of one of CASES."""
    return source_of(*case, **CHANGES.get(case, {}))


def triton_source(case: tuple[str, str | None]) -> PackedSource:
    """That of one of TRITON_CASES."""
    changes = dict(TRITON_CHANGES)
    if case[0] == "qwen3-next":
        changes["layer_types"] = ["linear_attention"]
    return source_of(*case, **changes)


def ragged_ids() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of 9 and 6 tokens: (2, 9), (2,)."""
    return torch.randint(0, 131, (2, 9), generator=torch.Generator().manual_seed(5)), torch.tensor([9, 6])


def logits(model: Decoder) -> dict[str, torch.Tensor]:
    """What a model says to a ragged batch, to one token more per row, and to one sequence bit by bit."""
    ids, lengths = ragged_ids()
    cache = model.new_cache(2, 12)
    batch = model.forward(ids, cache, lengths)
    batch = torch.cat([batch[0], batch[1, :6]])  # what padding gives means nothing
    more = model.forward(ids[:, :1], cache)
    cache = model.new_cache(1, 12)
    pieces = [torch.tensor(model.extend(part, cache)) for part in (ids[0].tolist(), [3], [4, 5])]
    return {"batch": batch, "more": more.flatten(0, 1), "pieces": torch.cat(pieces)}


def toy_source() -> DictSource:
    """A model with a norm of what its attention adds, and with no cut between heads and no whole block to mind."""
    config = toy_family.toy_config(head_dim=16)
    return DictSource(config, tame_tensors(config))


def whole_logits(model: Decoder) -> dict[str, torch.Tensor]:
    """What a model whose tokens see the whole text says to a ragged batch, and to one sequence."""
    ids, lengths = ragged_ids()
    batch = model.forward(ids, model.new_cache(2, 12), lengths)
    one = model.extend(ids[0].tolist(), model.new_cache(1, 12), last_only=False)
    return {"batch": torch.cat([batch[0], batch[1, :6]]), "one": torch.tensor(one)}


# Sizes with which the cache keeps latent vectors.
LATENT = {"kv_lora_rank": 48, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}


def latent_source() -> DictSource:
    """Of DeepSeek-V2's kind."""
    config = {**tiny_config("deepseek-v2"), **LATENT}
    return DictSource(config, tame_tensors(config))


# Encoder-decoders, as transformers writes them; see `written_logits`.
WRITERS = ("bart", "t5")


def written_logits(model: EncoderDecoder) -> dict[str, torch.Tensor]:
    """What an encoder-decoder says to a prompt and a token more, of two texts of other lengths."""
    cache = model.encode([list(range(5, 25)), [7, 11, 13]], 8)
    prompts = Batch.of([[2, 9, 8], [2, 30, 31]], [0, 0], "all")
    first = model.run(prompts, cache)
    second = model.run(Batch.of([[40], [41]], [3, 3], "all"), cache)
    return {"prompt": torch.from_numpy(first), "token": torch.from_numpy(second)}


def few_logits(model: Decoder) -> dict[str, torch.Tensor]:
    """A prompt and a token."""
    cache = model.new_cache(1, 8)
    ids = ragged_ids()[0][0].tolist()
    return {"prompt": torch.tensor(model.extend(ids[:6], cache)), "token": torch.tensor(model.extend(ids[6:7], cache))}


def environment(rank: int, port: int) -> dict[str, str]:
    """What torchrun would tell a process."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    told["TORCHELASTIC_USE_AGENT_STORE"] = True  # the store at that address is the launcher's, as torchrun's is
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **{k: str(v) for k, v in told.items()}}


def run_all(*arguments: str, stdin: str = "") -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of the processes of one command (a Python's arguments); stdin is the first's."""
    # A port that is looked for, let go and taken again by the first process could be another program's meanwhile.
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([sys.executable, *arguments], env=environment(rank, store.port), **pipes)  # type: ignore[call-overload]
        for rank in range(WORLD)
    ]
    try:
        done = [process.communicate(stdin if rank == 0 else "", timeout=300) for rank, process in enumerate(processes)]
    finally:
        for process in processes:
            process.kill()
        del store
    return [(process.returncode, out, err) for process, (out, err) in zip(processes, done, strict=True)]


def failures(group: Any) -> list[str]:
    """What a process is told when some process fails; and what one alone decides."""
    heard = []
    for failing in range(WORLD):
        try:
            with group.together():
                if group.rank == failing:
                    raise UsageError(f"no \0 good at {failing}")
        except KbitError as error:
            heard.append(f"{type(error).__name__}: {error}")
    try:
        group.decided_by_first(lambda: (_ for _ in ()).throw(UsageError("undecided")))
    except KbitError as error:
        heard.append(f"{type(error).__name__}: {error}")
    return [*heard, group.decided_by_first(lambda: f"decided by {group.rank} é")]


def main(folder: Path, backend: str) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    from kbit.backends.parallel import join, split

    group = join()
    found: dict[Any, Any] = {}
    if backend == "triton":
        from triton_cases import ON_GPU
        from triton_interpreter import install

        install()
        from kbit.backends.triton.backend import TritonBackend

        mine = split(TritonBackend("cuda" if ON_GPU else "cpu"), group)
        for case in TRITON_CASES:
            found[case] = few_logits(load_decoder(shard(triton_source(case), group.rank, group.size), mine))
    else:
        from kbit.backends.reference.backend import ReferenceBackend

        mine = split(ReferenceBackend(), group)
        found = {"describe": mine.describe(), "failures": failures(group)}
        for case in CASES:
            part = shard(source_for(case), group.rank, group.size)
            found[case] = {
                **logits(load_decoder(part, mine)),
                "intermediate": spec_from_config(part.config).intermediate_size,
            }
        short = split(ReferenceBackend(keeps_latents=True), group)
        found["latents"] = logits(load_decoder(shard(latent_source(), group.rank, group.size), short))
        for name in WRITERS:
            with open_model(str(folder / name)) as source:
                part = shard(source, group.rank, group.size)
                found[name] = written_logits(load_encoder_decoder(part, mine))
        toy_family.install()
        found["toy"] = whole_logits(load_decoder(shard(toy_source(), group.rank, group.size), mine))
    torch.save(found, folder / f"{backend}-{group.rank}.pt")
    group.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
