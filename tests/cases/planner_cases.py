"""Two small models whose losses are known, and a machine that reads at a known speed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from laws_cases import Size, measure

from kbit.formats.quant_format import QuantFormat
from kbit.models.families import spec_from_config
from kbit.planner.choose import make_recommendation
from kbit.planner.kernel_timing import AttentionRate, KernelRate, Overheads
from kbit.planner.machine import MachineSpeed, attention_key
from kbit.planner.models import PlanModel
from kbit.planner.types import Recommendation, Requirements
from kbit.planner.weights import planned_weights
from kbit.scaling.laws.fit import fit_laws

FORMATS = ("nf3-b64", "nf4-b64", "int4-b64", "int8-b64")


def config(width: int, layers: int) -> dict[str, Any]:
    """A small Llama: its linear layers have 16 width^2 weights each."""
    return {
        "model_type": "llama",
        "vocab_size": 2000,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
    }


SHAPES = {"small": config(128, 4), "large": config(256, 8)}
LINEAR = {name: 16 * shape["hidden_size"] ** 2 * shape["num_hidden_layers"] for name, shape in SHAPES.items()}
FAMILY = (Size("small", LINEAR["small"], None, 4.2, 0.4), Size("large", LINEAR["large"], None, 3.5, -0.2))
POINTS = measure(FAMILY, FORMATS)
LAWS = fit_laws(POINTS, draws=200)


def model(name: str, **facts: Any) -> PlanModel:
    spec = spec_from_config(SHAPES[name])
    weights = planned_weights(spec, "fp16")
    return PlanModel(name, spec, weights, "fp16", **{"measured": name, **facts})


MODELS = [model("small"), model("large")]


def rates(kernels: Iterable[str], shapes: Iterable[tuple[str, int, int]]) -> MachineSpeed:
    """A machine that is quicker the fewer bytes it reads."""

    def kernel(key: str) -> KernelRate:
        size = 2.0 if key in ("fp16", "bf16", "fp32") else QuantFormat.parse(key).bits / 8
        return KernelRate(size * 1e-10, size * 1e-10, 1e-11, size, 0.0)

    return MachineSpeed(
        machine={"cpu": "test", "instruction_set": "scalar"},
        threads=1,
        compute="int8",
        bandwidth=1e10,
        misses=[(1, 1.0)],
        overheads=Overheads(0, 0, 0, 1e-6, 0, 0),
        constant_bytes=10_000_000,
        kernels={key: kernel(key) for key in kernels},
        attention={
            attention_key(*shape): AttentionRate(*[int(shape[0].removeprefix("fp")) * 1e-8] * 3, 0, 1)
            for shape in shapes
        },
        created="2026-01-01T00:00:00+00:00",
    )


def choose(
    memory: int = 10**9, context: int = 512, models: list[PlanModel] | None = None, **more: Any
) -> Recommendation:
    options = {"points": POINTS, "laws": LAWS, "rates": rates, "constant": 10_000_000, "notes": ()}
    given = {name: more.pop(name) for name in tuple(more) if name in options}
    return make_recommendation(
        Requirements(memory, context, **more), MODELS if models is None else models, **{**options, **given}
    )
