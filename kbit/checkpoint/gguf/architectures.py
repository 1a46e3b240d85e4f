"""The GGUF architectures that kbit reads: names, row order, and what llama.cpp knows that the file does not say.

What an architecture's configuration needs besides: `kbit.checkpoint.gguf.configure`, and of older ones, and those whose
layers differ, the module that they are in. Not in a file, only in llama.cpp's code: the activation; Gemma's factor on
embeddings; in which layers SmolLM3 does not rotate. Norm weights of Gemma have their 1 added already.
"""

from __future__ import annotations

from kbit.checkpoint.gguf.dense import DENSE
from kbit.checkpoint.gguf.mixed import MIXED
from kbit.checkpoint.gguf.mixtures import MIXTURES
from kbit.checkpoint.gguf.older import OLDER

ARCHITECTURES = {architecture.name: architecture for architecture in (*DENSE, *MIXTURES, *MIXED, *OLDER)}
