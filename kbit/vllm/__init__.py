"""kbit inside vLLM, which finds this package by its entry point: folders of `kbit quantize`, with kbit's kernels.

    pip install vllm .
    vllm serve out/

docs/vllm.md has the rest. Importing this loads neither vLLM nor torch.
"""

from __future__ import annotations


def register() -> None:
    """What vLLM calls in each of its processes, any number of times."""
    from kbit.vllm.loader import register_loader
    from kbit.vllm.method import register_method

    register_method()
    register_loader()
