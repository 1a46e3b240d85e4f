"""What the benchmarks share: the default model, and the machine's read bandwidth as the yardstick."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model's GGUF file, downloaded into the cache on first use."""
    from kbit.checkpoint.pull import pull
    from kbit.errors import KbitError

    try:
        return pull("smollm2-135m-instruct")
    except KbitError as error:
        pytest.skip(f"the default model could not be fetched: {error}")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of evaluation text: KBIT_DATA, else shared/data beside the checkout."""
    named = os.environ.get("KBIT_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no evaluation data at {folder}: set KBIT_DATA")
    return folder


@pytest.fixture(scope="session")
def read_bandwidth() -> Callable[[], float]:
    """A function that measures the machine's read bandwidth: to be called in the run it is compared with."""
    return measure_read_bandwidth


def measure_read_bandwidth(seconds: float = 1.0) -> float:
    """Bytes per second that torch reads with all its threads: the median of many sums over 256 MB of float32."""
    import torch

    data = torch.ones(64 << 20, dtype=torch.float32)
    rates, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(rates) < 5:
        begin = time.perf_counter()
        data.sum()
        rates.append(data.numel() * 4 / (time.perf_counter() - begin))
    return median(rates)
