"""Launches of the attention kernels and of the cache append, for tools/aot.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from kbit.kernels.triton.attention import configs
from kbit.kernels.triton.attention.decode import attention_decode
from kbit.kernels.triton.attention.kv_append import kv_append
from kbit.kernels.triton.attention.kv_layout import PAGE, KVFormat
from kbit.kernels.triton.attention.prefill import attention_prefill, attention_prefill_paged
from kbit.kernels.triton.product.limits import PART_FEATURES
from triton_lint.cases import Case, Gate
from triton_lint.chips import TARGETS
from triton_lint.driver import Launch
from triton_lint.model import Work

HALF, INT = torch.float16, torch.int64
MATRIX = ("HMMA", "HGMMA", "UTC", "v_mfma", "v_wmma")
HEADS, KV_HEADS = 32, 8  # Llama-3-8B's, heads of 128
CONTEXT = 32768
PROMPT = 2048


def meta(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def pages(tokens: int, format: KVFormat) -> torch.Tensor:
    return meta(tokens // PAGE, KV_HEADS, format.page_bytes, dtype=torch.uint8)


def cases() -> list[Case]:
    return [
        decode_case("4", "4", gates={"sm_90": Gate(load_bits=0, mma=("HMMA",), over_floor=1.3)}, quick=True),
        decode_case("fp16", "fp16", quick=True),
        decode_case("8", "8"),
        decode_case("8", "4"),
        decode_case("3", "3"),
        decode_case("2", "2"),
        decode_case("4", "4", dim=64),
        decode_case("4", "4", dim=256),
        decode_case("4", "4", dim=512),
        decode_case("fp16", "fp16", dim=512),
        decode_case("4", "4", tokens=4),
        decode_case("4", "4", dim=64, sinks=True),
        packed_case(quick=True),
        packed_case(dim=64),
        paged_case("4", "4", quick=True),
        paged_case("fp16", "fp16"),
        paged_case("4", "4", dim=512),
        packed_case(dim=512),
        paged_case("4", "4", dim=64, sinks=True),
        append_case("4", "4", quick=True),
        append_case("3", "2"),
        append_case("8", "8"),
        append_case("fp16", "fp16"),
        append_case("4", "4", dim=512),
    ]


def gates_of(given: Mapping[str, Gate] | None, plain: Gate) -> dict[str, Gate]:
    return dict.fromkeys(TARGETS, plain) | dict(given or {})


def decode_case(
    k_kind: str,
    v_kind: str,
    *,
    dim: int = 128,
    tokens: int = 1,
    context: int = CONTEXT,
    sinks: bool = False,
    gates: Mapping[str, Gate] | None = None,
    quick: bool = False,
) -> Case:
    """One sequence at `context`."""
    k_format, v_format = KVFormat(k_kind, dim), KVFormat(v_kind, dim)

    def launch(arch: str, config: Any) -> None:
        attention_decode(
            meta(1, tokens, HEADS, dim),
            pages(context, k_format),
            pages(context, v_format),
            meta(1, context // PAGE, dtype=torch.int32),
            meta(1, tokens, dtype=INT),
            meta(1, dtype=INT),
            dim**-0.5,
            k_kind=k_kind,
            v_kind=v_kind,
            sinks=meta(HEADS, dtype=torch.float32) if sinks else None,
            config=config,
        )

    def work(launch: Launch, config: Any) -> Work | None:
        if launch.kernel != "attention_decode_kernel" or launch.arguments["PART"] < dim:
            # The second kernel reads what the first one wrote, 2 % of the bytes. Of heads in parts the hot loop is over
            # the parts of a step, which the model does not know.
            return None
        return Work(
            bytes=context // PAGE * KV_HEADS * (k_format.page_bytes + v_format.page_bytes),
            units=context * KV_HEADS * 2 * dim,
            steps=KV_HEADS * context // launch.arguments["BN"],
        )

    return Case(
        f"attention_decode/k{k_kind}-v{v_kind}/{dim}x{context}x{tokens}{'/sinks' if sinks else ''}",
        launch,
        configs=lambda arch: [None, *configs.decode_candidates(arch)] if tokens == 1 else [None],
        work=work,
        gates=gates_of(gates, Gate(mma=MATRIX)),
        gated="attention_decode_kernel",
        quick=quick,
    )


def prefill_work(dim: int) -> Callable[[Launch, Any], Work | None]:
    def work(launch: Launch, config: Any) -> Work | None:
        if launch.arguments.get("PART") != dim:
            return None  # as in decode_case
        rows, block = launch.arguments["M"], launch.arguments["BN"]
        group = HEADS // KV_HEADS
        seen = (-(-((tile + 1) * rows // group) // block) for tile in range(PROMPT * group // rows))
        return Work(
            bytes=PROMPT * 2 * (HEADS + KV_HEADS) * dim * 2,
            units=PROMPT * PROMPT // 2 * HEADS,
            flops=2 * dim * PROMPT * PROMPT * HEADS,
            steps=KV_HEADS * sum(seen),
        )

    return work


def packed_case(dim: int = 128, *, quick: bool = False) -> Case:
    """One prompt of PROMPT tokens to itself, fp16. Work is the causal half; units are pairs of tokens and heads."""

    def launch(arch: str, config: Any) -> None:
        q, kv, bounds = meta(PROMPT, HEADS, dim), meta(PROMPT, KV_HEADS, dim), meta(2, dtype=torch.int32)
        attention_prefill(q, bounds, kv, kv, dim**-0.5, max_queries=PROMPT, config=config)

    return Case(
        f"attention_prefill/packed/{dim}x{PROMPT}",
        launch,
        configs=lambda arch: [None, *configs.prefill_candidates(arch)],
        work=prefill_work(dim),
        gates=gates_of({"sm_90": Gate(mma=("HGMMA",), tensor_share=0.6)} if dim == 128 else None, Gate(mma=MATRIX)),
        gated="attention_prefill_kernel",
        quick=quick,
    )


def paged_case(k_kind: str, v_kind: str, dim: int = 128, *, sinks: bool = False, quick: bool = False) -> Case:
    """One prompt of PROMPT tokens, read from the cache it was put into."""
    k_format, v_format = KVFormat(k_kind, dim), KVFormat(v_kind, dim)

    def launch(arch: str, config: Any) -> None:
        attention_prefill_paged(
            meta(PROMPT, HEADS, dim),
            meta(2, dtype=torch.int32),
            pages(PROMPT, k_format),
            pages(PROMPT, v_format),
            meta(1, PROMPT // PAGE, dtype=torch.int32),
            meta(1, dtype=INT),
            dim**-0.5,
            k_kind=k_kind,
            v_kind=v_kind,
            max_queries=PROMPT,
            sinks=meta(HEADS, dtype=torch.float32) if sinks else None,
            config=config,
        )

    return Case(
        f"attention_prefill/k{k_kind}-v{v_kind}/{dim}x{PROMPT}{'/sinks' if sinks else ''}",
        launch,
        configs=lambda arch: [None, *configs.prefill_candidates(arch)],
        work=prefill_work(dim),
        gates=gates_of(
            {"sm_90": Gate(mma=("HGMMA",)), "sm_80": Gate(spills=12 if dim > PART_FEATURES else 0, mma=MATRIX)},
            Gate(mma=MATRIX),
        ),
        gated="attention_prefill_kernel",
        quick=quick,
    )


def append_case(k_kind: str, v_kind: str, *, tokens: int = 512, dim: int = 128, quick: bool = False) -> Case:
    """A chunk of a prompt into the cache."""
    k_format, v_format = KVFormat(k_kind, dim), KVFormat(v_kind, dim)

    def launch(arch: str, config: Any) -> None:
        kv_append(
            meta(tokens, HEADS, dim),
            meta(tokens, KV_HEADS, dim),
            meta(tokens, KV_HEADS, dim),
            meta(CONTEXT, dim // 2, dtype=torch.float32),
            meta(CONTEXT, dim // 2, dtype=torch.float32),
            meta(tokens, dtype=INT),
            pages(CONTEXT, k_format),
            pages(CONTEXT, v_format),
            k_kind=k_kind,
            v_kind=v_kind,
            rope_rows=meta(tokens, dtype=INT),
        )

    def work(launch: Launch, config: Any) -> Work:
        read = tokens * (HEADS + 2 * KV_HEADS) * dim * 2
        written = tokens * (HEADS * dim * 2 + KV_HEADS * (k_format.page_bytes + v_format.page_bytes) // PAGE)
        return Work(bytes=read + written, units=tokens * (HEADS + 2 * KV_HEADS) * dim, steps=launch.programs)

    return Case(
        f"kv_append/k{k_kind}-v{v_kind}/{tokens}x{dim}",
        launch,
        work=work,
        gates=gates_of({"sm_90": Gate(over_floor=1.5)}, Gate()),
        quick=quick,
    )
