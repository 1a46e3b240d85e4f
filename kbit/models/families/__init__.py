"""The model families that kbit runs: one file each, and one line each in FAMILIES."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kbit.models.families import (
    bart,
    bert,
    bloom,
    cohere,
    deepseek_v2,
    deepseek_v3,
    distilbert,
    ernie4_5,
    exaone4,
    falcon,
    gemma,
    gemma2,
    gemma3,
    gemma4,
    glm,
    glm4,
    glm4_moe,
    glm4_moe_lite,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    granitemoe,
    hunyuan_v1_dense,
    llama,
    m2m_100,
    marian,
    mbart,
    minicpm3,
    minimax_m2,
    ministral,
    ministral3,
    mistral,
    mistral4,
    mixtral,
    modernbert,
    mpnet,
    mt5,
    nomic_bert,
    olmo2,
    olmo3,
    olmoe,
    opt,
    pegasus,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    roberta,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
    t5,
    youtu,
)
from kbit.models.family import Family, read_spec
from kbit.models.spec import ModelSpec

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        llama.FAMILY,
        mistral.FAMILY,
        qwen2.FAMILY,
        qwen3.FAMILY,
        gemma.FAMILY,
        gemma2.FAMILY,
        gemma3.FAMILY,
        gemma4.FAMILY,
        phi3.FAMILY,
        granite.FAMILY,
        smollm3.FAMILY,
        olmo2.FAMILY,
        olmo3.FAMILY,
        ministral.FAMILY,
        ministral3.FAMILY,
        exaone4.FAMILY,
        glm.FAMILY,
        glm4.FAMILY,
        seed_oss.FAMILY,
        hunyuan_v1_dense.FAMILY,
        ernie4_5.FAMILY,
        qwen3_moe.FAMILY,
        mixtral.FAMILY,
        qwen2_moe.FAMILY,
        glm4_moe.FAMILY,
        minimax_m2.FAMILY,
        olmoe.FAMILY,
        gpt_oss.FAMILY,
        granitemoe.FAMILY,
        deepseek_v2.FAMILY,
        deepseek_v3.FAMILY,
        deepseek_v3.KIMI_K2,
        glm4_moe_lite.FAMILY,
        youtu.FAMILY,
        minicpm3.FAMILY,
        mistral4.FAMILY,
        bert.FAMILY,
        roberta.FAMILY,
        roberta.XLM_ROBERTA,
        roberta.CAMEMBERT,
        distilbert.FAMILY,
        mpnet.FAMILY,
        modernbert.FAMILY,
        nomic_bert.FAMILY,
        bloom.FAMILY,
        cohere.FAMILY,
        falcon.FAMILY,
        gpt2.FAMILY,
        gpt_neox.FAMILY,
        opt.FAMILY,
        stablelm.FAMILY,
        starcoder2.FAMILY,
        t5.FAMILY,
        mt5.FAMILY,
        mt5.UMT5,
        marian.FAMILY,
        bart.FAMILY,
        mbart.FAMILY,
        m2m_100.FAMILY,
        pegasus.FAMILY,
    )
}


def spec_from_config(config: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
    """The ModelSpec of a Hugging Face configuration.

    Args:
        config: the parsed config.json.
        where: what to call it in errors.

    Raises:
        UnsupportedError: an unknown family, architecture, RoPE scaling or layer type.
        CheckpointError: a missing or senseless value; the line names key and value.
    """
    return read_spec(FAMILIES, config, where)
