"""Products and attention on a GPU: kbit at every width beside other libraries, and beside what the GPU can do.

    pytest benchmarks/test_gpu_layers.py --device cuda -s
    pytest benchmarks/test_gpu_layers.py --device cuda -s -k "product and 1tokens"
    kbit tune MODEL                                   # first, for configurations timed on this GPU

Products with activations in 8 bits (`--compute int8`, `fp8`) are contestants of their own, where the GPU has them.
These have not run on a GPU here: there is none. Every result is compared with the reference on the GPU before it is
timed; nothing is asserted about time. Weights are rotated through more memory than any cache holds, and launches
replayed from CUDA graphs (gpu.Rotation). `share_of_roofline` is the least time that this GPU's measured copy bandwidth
and fp16 products allow, over the time taken. `error` is the distance from the product of the unquantized weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from gpu import Rotation, assert_product, bandwidth, copies_for, facts, relative_error, roofline
from gpu_peers import PEERS, absent
from measuring import ROUNDS, Contestant, report, take_turns

from kbit.formats.quant_format import QuantFormat, default_dtype
from kbit.gpu_check.measuring import rotated
from kbit.host.errors import UnsupportedError

WIDTHS = range(2, 9)
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
TOKENS = (1, 4, 16, 64, 256, 2048)
KINDS = ("int8", "fp8")  # of rounded activations
KV_KINDS = ("fp16", "8", "4", "3", "2")
CONTEXTS = (2048, 8192, 32768, 131072)
PROMPTS = (2048, 8192)
HEADS = (32, 8, 128)  # query heads, key heads, features: Llama 3 8B's

by_shape = pytest.mark.parametrize("shape", SHAPES, ids=[f"{rows}x{columns}" for rows, columns in SHAPES])


def random_weight(shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """As large as a model's: products of unit size."""
    generator = torch.Generator(device).manual_seed(0)
    return (torch.randn(shape, generator=generator, device=device) * shape[1] ** -0.5).half()


def contestant(
    engine: str, name: str, launches: list[Callable[[], object]], nbytes: int, operations: int, **about: Any
) -> Contestant:
    """Microseconds of a product, with its share of the roofline to be filled in once it is measured."""
    rotation = Rotation(launches)
    about = {"bytes": nbytes, "operations": operations, "graph": rotation.graph, **about}
    return Contestant(engine, name, lambda: rotation.seconds() * 1e6, about)


def add_rates(contestants: list[Contestant]) -> None:
    for one in contestants:
        seconds = one.median / 1e6
        one.about["GB/s"] = one.about["bytes"] / seconds / 1e9
        one.about["TFLOP/s"] = one.about["operations"] / seconds / 1e12
        one.about["share_of_roofline"] = roofline(one.about["bytes"], one.about["operations"]) / seconds


@pytest.mark.parametrize("tokens", TOKENS, ids=[f"{tokens}tokens" for tokens in TOKENS])
@by_shape
def test_product(benchmark: Any, gpu: torch.device, shape: tuple[int, int], tokens: int) -> None:
    """x W^T at every width."""
    from kbit.formats.blockwise import quantize_blockwise
    from kbit.kernels.triton.codecs.layout import prepare_weight
    from kbit.kernels.triton.product.limits import ROUNDED_TOKENS
    from kbit.kernels.triton.product.matmul import describe, matmul
    from kbit.tuning.stored import use_tuned

    use_tuned(gpu)
    rows, columns = shape
    original = random_weight(shape, gpu)
    x = torch.randn((tokens, columns), generator=torch.Generator(gpu).manual_seed(1), device=gpu).half()
    exact = x.double() @ original.double().T
    moved = 2 * tokens * (rows + columns)  # activations, read and written once
    operations = 2 * tokens * rows * columns
    contestants, missing = [], []
    for bits in WIDTHS:
        format = QuantFormat(default_dtype(bits), bits)
        quantized = quantize_blockwise(original.float().cpu(), format)
        weight = prepare_weight(quantized.to(gpu), gpu)
        assert_product(matmul(x, weight), x, quantized.dequantize().to(gpu))
        about = {
            "bits_per_weight": weight.nbytes * 8 / (rows * columns),
            "error": relative_error(matmul(x, weight), exact),
            "kernel": describe(weight, tokens),
        }
        launches = [partial(matmul, x, copy) for copy in rotated(weight)]
        contestants.append(contestant("kbit", f"kbit {format}", launches, weight.nbytes + moved, operations, **about))
    for kind in KINDS if tokens > ROUNDED_TOKENS else ():
        for bits in WIDTHS:
            name = f"kbit int{bits}-b128 with {kind} activations"
            try:
                contestants.append(rounded_contestant(name, kind, bits, original, x, exact))
            except UnsupportedError as error:  # a GPU without fp8, or too many bits for it
                missing.append(f"{name}: {error}")
    for peer in PEERS:
        reason = absent(peer)
        if reason is not None:
            missing.append(reason)
            continue
        try:
            layers = [peer.make(original) for _ in range(copies_for(original.numel() // 2))]
            given = x.to(layers[0].dtype)
            error = relative_error(layers[0].run(given), exact)
            assert error < 0.3, f"its result is {error:.0%} off"  # 4 bits and 128 weights per scale: about 0.1
            about = {"bits_per_weight": layers[0].nbytes * 8 / (rows * columns), "error": error}
            launches = [partial(layer.run, given) for layer in layers]
            nbytes = layers[0].nbytes + moved
            contestants.append(contestant(peer.engine, peer.name, launches, nbytes, operations, **about))
        except Exception as error:  # another library's: of any kind
            missing.append(f"{peer.name}: {(str(error) or type(error).__name__).splitlines()[0][:200]}")
    take_turns(benchmark, contestants, ROUNDS)
    add_rates(contestants)
    report(
        benchmark,
        "product",
        "microseconds",
        contestants,
        missing=missing,
        goal="85 % of the roofline at every width; ahead of every library at the same width",
        higher_is_better=False,
        columns={"GB/s": ".0f", "TFLOP/s": ".1f", "share_of_roofline": ".0%", "bits_per_weight": ".2f", "error": ".4f"},
        shape=f"{rows}x{columns}",
        tokens=tokens,
        **facts(),
    )


def rounded_contestant(
    name: str, kind: str, bits: int, original: torch.Tensor, x: torch.Tensor, exact: torch.Tensor
) -> Contestant:
    """A product whose activations are rounded to 8 bits, as `--compute int8` or fp8 runs it.

    Raises:
        UnsupportedError: on this GPU or at this width they are not rounded.
    """
    from kbit.formats.blockwise import quantize_blockwise
    from kbit.kernels import reference
    from kbit.kernels.triton.codecs.layout import prepare_weight
    from kbit.kernels.triton.product.matmul import describe, matmul
    from kbit.kernels.triton.product.rounded import check_arch, segment_of, with_activations
    from kbit.kernels.triton.target import current_arch

    tokens, (rows, columns) = len(x), original.shape
    check_arch(kind, current_arch())
    quantized = quantize_blockwise(original.float().cpu(), QuantFormat("int", bits, block_size=128))
    weight = with_activations(prepare_weight(quantized.to(original.device), original.device), kind)
    out = matmul(x, weight, out_dtype=torch.float32)
    rounded = reference.round_int8(x, segment_of(weight)) if kind == "int8" else reference.round_fp8(x)
    assert_product(out, rounded, quantized.dequantize().to(original.device))
    about = {
        "bits_per_weight": weight.nbytes * 8 / (rows * columns),
        "error": relative_error(out, exact),
        "kernel": describe(weight, tokens),
    }
    launches = [partial(matmul, x, copy) for copy in rotated(weight)]
    moved = 2 * tokens * (rows + columns)
    return contestant("kbit", name, launches, weight.nbytes + moved, 2 * tokens * rows * columns, **about)


def attention_contestant(gpu: torch.device, kind: str, new: int, held: int) -> Contestant:
    """kbit's attention of `new` tokens over `held` ones; at 1 new token decoding, else prefill."""
    from kbit.tuning.jobs import Heads
    from kbit.tuning.timing import GpuTimer

    heads, kv_heads, dim = HEADS
    model = Heads(heads, kv_heads, dim, dim**-0.5, None, kind, torch.float16, gpu)
    job = model.decode_job(1, [held]) if new == 1 else model.prefill_job([(new, held)])
    (trial,) = job.prepare()
    assert not trial.is_wrong(trial.launch(None)), f"{job.label}: wrong"
    timer = GpuTimer(gpu)
    nbytes = held * kv_heads * dim * model.format.bits_per_value / 8 * 2 + 2 * 2 * new * heads * dim
    operations = 4 * heads * dim * (new * held - new * (new - 1) // 2)
    about = {"bytes": nbytes, "operations": operations, "bits_per_value": model.format.bits_per_value}
    return Contestant("kbit", f"kbit {kind} KV", lambda: timer(lambda: trial.launch(None)) * 1e6, about)


def torch_attention(gpu: torch.device, new: int, held: int) -> Contestant:
    """torch's scaled_dot_product_attention in fp16."""
    from kbit.tuning.timing import GpuTimer

    heads, kv_heads, dim = HEADS
    q = torch.randn((1, heads, new, dim), device=gpu).half()
    k, v = (torch.randn((1, kv_heads, held, dim), device=gpu).half() for _ in range(2))
    attend = partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=new > 1, enable_gqa=True)
    timer = GpuTimer(gpu)
    nbytes = 4 * held * kv_heads * dim + 4 * new * heads * dim
    operations = 4 * heads * dim * (new * held - new * (new - 1) // 2)
    about = {"bytes": nbytes, "operations": operations, "bits_per_value": 16.0}
    return Contestant("torch", "torch sdpa fp16", lambda: timer(attend) * 1e6, about)


@pytest.mark.parametrize("held", CONTEXTS)
def test_attention_decode(benchmark: Any, gpu: torch.device, held: int) -> None:
    """One token over a context, every width of keys and values."""
    _attention(benchmark, gpu, "decode attention", 1, held, "75 % of the bandwidth at every width")


@pytest.mark.parametrize("held", PROMPTS)
def test_attention_prefill(benchmark: Any, gpu: torch.device, held: int) -> None:
    """A prompt over itself, read back from the cache it was put into."""
    _attention(benchmark, gpu, "prefill attention", held, held, "60 % of the fp16 products' rate")


def _attention(benchmark: Any, gpu: torch.device, case: str, new: int, held: int, goal: str) -> None:
    from kbit.tuning.stored import use_tuned

    use_tuned(gpu)
    contestants = [attention_contestant(gpu, kind, new, held) for kind in KV_KINDS]
    contestants.append(torch_attention(gpu, new, held))
    take_turns(benchmark, contestants, ROUNDS)
    add_rates(contestants)
    report(
        benchmark,
        case,
        "microseconds",
        contestants,
        goal=goal,
        higher_is_better=False,
        columns={"GB/s": ".0f", "TFLOP/s": ".1f", "share_of_roofline": ".0%", "bits_per_value": ".2f"},
        context=held,
        heads="/".join(map(str, HEADS)),
        read_bandwidth_GB_per_s=bandwidth() / 1e9,
        **facts(),
    )
