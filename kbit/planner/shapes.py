"""Shapes of well-known open models, so that `kbit plan` can say what would fit before anything is downloaded.

Facts of configuration only, no weights: each row holds what the model's config.json on the Hugging Face hub says
(repository named beside it), in the order of _KEYS. `parameters` is the total that the repository's page shows; tests
compare it with what the shape adds up to. Licences and access are the repositories' own affair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class KnownModel:
    """A published model.

    Attributes:
        name: short name, in lower case.
        repository: on the Hugging Face hub, where the facts come from.
        parameters: all weights, a tied head once.
        dtype: what the weights are published in.
        config: keys of config.json that fix its shape.
    """

    name: str
    repository: str
    parameters: int
    dtype: str
    config: Mapping[str, Any]


# Windows as these versions' files have them, where the family's default is another.
_WINDOWS = {"mistral": None, "exaone4": None, "gemma3_text": 512}

# name, repository, parameters, model_type, the numbers of _KEYS, and "tied" where the head is the embedding.
_MODELS = """
smollm2-135m    HuggingFaceTB/SmolLM2-135M             134515008 llama        576 30  9  3  64  1536  49152   8192 tied
smollm2-360m    HuggingFaceTB/SmolLM2-360M             361821120 llama        960 32 15  5  64  2560  49152   8192 tied
smollm2-1.7b    HuggingFaceTB/SmolLM2-1.7B            1711376384 llama       2048 24 32 32  64  8192  49152   8192 tied
tinyllama-1.1b  TinyLlama/TinyLlama-1.1B-Chat-v1.0    1100048384 llama       2048 22 32  4  64  5632  32000   2048
llama-2-7b      meta-llama/Llama-2-7b-hf              6738415616 llama       4096 32 32 32 128 11008  32000   4096
llama-2-13b     meta-llama/Llama-2-13b-hf            13015864320 llama       5120 40 40 40 128 13824  32000   4096
llama-2-70b     meta-llama/Llama-2-70b-hf            68976648192 llama       8192 80 64  8 128 28672  32000   4096
llama-3.2-1b    meta-llama/Llama-3.2-1B               1235814400 llama       2048 16 32  8  64  8192 128256 131072 tied
llama-3.2-3b    meta-llama/Llama-3.2-3B               3212749824 llama       3072 28 24  8 128  8192 128256 131072 tied
llama-3.1-8b    meta-llama/Llama-3.1-8B               8030261248 llama       4096 32 32  8 128 14336 128256 131072
llama-3.1-70b   meta-llama/Llama-3.1-70B             70553706496 llama       8192 80 64  8 128 28672 128256 131072
mistral-7b-v0.3 mistralai/Mistral-7B-v0.3             7248023552 mistral     4096 32 32  8 128 14336  32768  32768
qwen2.5-0.5b    Qwen/Qwen2.5-0.5B                      494032768 qwen2        896 24 14  2  64  4864 151936  32768 tied
qwen2.5-1.5b    Qwen/Qwen2.5-1.5B                     1543714304 qwen2       1536 28 12  2 128  8960 151936 131072 tied
qwen2.5-3b      Qwen/Qwen2.5-3B                       3085938688 qwen2       2048 36 16  2 128 11008 151936  32768 tied
qwen2.5-7b      Qwen/Qwen2.5-7B                       7615616512 qwen2       3584 28 28  4 128 18944 152064 131072
qwen2.5-14b     Qwen/Qwen2.5-14B                     14770033664 qwen2       5120 48 40  8 128 13824 152064 131072
qwen2.5-32b     Qwen/Qwen2.5-32B                     32763876352 qwen2       5120 64 40  8 128 27648 152064 131072
qwen2.5-72b     Qwen/Qwen2.5-72B                     72706203648 qwen2       8192 80 64  8 128 29568 152064 131072
qwen3-0.6b      Qwen/Qwen3-0.6B                        596049920 qwen3       1024 28 16  8 128  3072 151936  40960 tied
qwen3-1.7b      Qwen/Qwen3-1.7B                       1720574976 qwen3       2048 28 16  8 128  6144 151936  40960 tied
qwen3-4b        Qwen/Qwen3-4B                         4022468096 qwen3       2560 36 32  8 128  9728 151936  40960 tied
qwen3-8b        Qwen/Qwen3-8B                         8190735360 qwen3       4096 36 32  8 128 12288 151936  40960
qwen3-14b       Qwen/Qwen3-14B                       14768307200 qwen3       5120 40 40  8 128 17408 151936  40960
qwen3-32b       Qwen/Qwen3-32B                       32762123264 qwen3       5120 64 64  8 128 25600 151936  40960
gemma-2b        google/gemma-2b                       2506172416 gemma       2048 18  8  1 256 16384 256000   8192 tied
gemma-7b        google/gemma-7b                       8537680896 gemma       3072 28 16 16 256 24576 256000   8192 tied
gemma-2-2b      google/gemma-2-2b                     2614341888 gemma2      2304 26  8  4 256  9216 256000   8192 tied
gemma-2-9b      google/gemma-2-9b                     9241705984 gemma2      3584 42 16  8 256 14336 256000   8192 tied
gemma-2-27b     google/gemma-2-27b                   27227128320 gemma2      4608 46 32 16 128 36864 256000   8192 tied
gemma-3-270m    google/gemma-3-270m                    268098176 gemma3_text  640 18  4  1 256  2048 262144  32768 tied
gemma-3-1b      google/gemma-3-1b-pt                   999885952 gemma3_text 1152 26  4  1 256  6912 262144  32768 tied
phi-3-mini      microsoft/Phi-3-mini-4k-instruct      3821079552 phi3        3072 32 32 32  96  8192  32064   4096
phi-4           microsoft/phi-4                      14659507200 phi3        5120 40 40 10 128 17920 100352  16384
phi-4-mini      microsoft/Phi-4-mini-instruct         3836021760 phi3        3072 32 24  8 128  8192 200064 131072 tied
granite-3.3-2b  ibm-granite/granite-3.3-2b-instruct   2533539840 granite     2048 40 32  8  64  8192  49159 131072 tied
smollm3-3b      HuggingFaceTB/SmolLM3-3B              3075098624 smollm3     2048 36 16  4 128 11008 128256  65536 tied
olmo-2-1b       allenai/OLMo-2-0425-1B                1484916736 olmo2       2048 16 16 16 128  8192 100352   4096
olmo-2-7b       allenai/OLMo-2-1124-7B                7298617344 olmo2       4096 32 32 32 128 11008 100352   4096
olmo-2-13b      allenai/OLMo-2-1124-13B              13716198400 olmo2       5120 40 40 40 128 13824 100352   4096
exaone-4-1.2b   LGAI-EXAONE/EXAONE-4.0-1.2B           1279391488 exaone4     2048 30 32  8  64  4096 102400  65536 tied
glm-4-9b-0414   zai-org/GLM-4-9B-0414                 9400279040 glm4        4096 40 32  2 128 13696 151552  32768
seed-oss-36b    ByteDance-Seed/Seed-OSS-36B-Instruct 36151104512 seed_oss    5120 64 80  8 128 27648 155136 524288
ernie-4.5-0.3b  baidu/ERNIE-4.5-0.3B-PT                360748032 ernie4_5    1024 18 16  2 128  3072 103424 131072 tied
"""


# And of models with experts: their number, how many are chosen, their width, and what else their family needs.
_EXPERTS = """
mixtral-8x7b mistralai/Mixtral-8x7B-v0.1 46702792704 mixtral 4096 32 32 8 128 14336 32000 32768 8 2
qwen1.5-moe-a2.7b Qwen/Qwen1.5-MoE-A2.7B 14315784192 qwen2_moe 2048 24 16 16 128 5632 151936 8192 60 4 1408 5632
qwen3-30b-a3b Qwen/Qwen3-30B-A3B 30532122624 qwen3_moe 2048 48 32 4 128 6144 151936 40960 128 8 768
qwen3-235b-a22b Qwen/Qwen3-235B-A22B 235093634560 qwen3_moe 4096 94 64 4 128 12288 151936 40960 128 8 1536
gpt-oss-20b openai/gpt-oss-20b 20914757184 gpt_oss 2880 24 64 8  64 2880 201088 131072 32 4
gpt-oss-120b openai/gpt-oss-120b 116829156672 gpt_oss 2880 36 64 8  64 2880 201088 131072 128 4
olmoe-1b-7b allenai/OLMoE-1B-7B-0924 6919161856 olmoe 2048 16 16 16 128 1024 50304 4096 64 8
"""


def _known_model(line: str) -> KnownModel:
    name, repository, parameters, model_type, *rest = line.split()
    config: dict[str, Any] = {"model_type": model_type, **dict(zip(_KEYS, map(int, rest[: len(_KEYS)]), strict=True))}
    config["tie_word_embeddings"] = rest[len(_KEYS) :] == ["tied"]
    if model_type in _WINDOWS:
        config["sliding_window"] = _WINDOWS[model_type]
    return KnownModel(name, repository, int(parameters), "bf16", config)


def _known_mixture(line: str) -> KnownModel:
    fields = line.split()
    numbers = 4 + len(_KEYS)
    model = _known_model(" ".join(fields[:numbers]))
    experts, chosen, *widths = map(int, fields[numbers:])
    names = ("moe_intermediate_size", "shared_expert_intermediate_size")
    config = {
        **model.config,
        "num_experts" if fields[3].startswith(("qwen", "olmoe")) else "num_local_experts": experts,
        "num_experts_per_tok": chosen,
        "norm_topk_prob": fields[3] == "qwen3_moe",
        **dict(zip(names, widths, strict=False)),
    }
    return replace(model, config=config)


KNOWN_MODELS: Mapping[str, KnownModel] = {
    model.name: model
    for model in (
        *map(_known_model, _MODELS.strip().splitlines()),
        *map(_known_mixture, _EXPERTS.strip().splitlines()),
    )
}


@dataclass(frozen=True)
class KnownGpu:
    """A GPU as its vendor's data sheet describes it.

    Attributes:
        name: short name, in lower case.
        bandwidth: of its memory, bytes per second.
        memory: bytes.
    """

    name: str
    bandwidth: float
    memory: int


_GPUS = (
    ("t4", 320, 16), ("v100-32gb", 900, 32), ("a10", 600, 24), ("l4", 300, 24), ("l40s", 864, 48),
    ("a100-40gb", 1555, 40), ("a100-80gb", 2039, 80), ("h100-pcie", 2000, 80), ("h100", 3350, 80), ("h200", 4800, 141),
    ("mi210", 1638, 64), ("mi250x", 3277, 128), ("mi300x", 5300, 192),
    ("rtx-3060", 360, 12), ("rtx-3090", 936, 24), ("rtx-4070", 504, 12), ("rtx-4080", 717, 16), ("rtx-4090", 1008, 24),
    ("rtx-5090", 1792, 32), ("rx-7900-xtx", 960, 24),
)  # fmt: skip
KNOWN_GPUS: Mapping[str, KnownGpu] = {
    name: KnownGpu(name, bandwidth * 1e9, memory * 10**9) for name, bandwidth, memory in _GPUS
}
