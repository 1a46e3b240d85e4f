"""kbit: k-bit quantized inference. Convert, run and measure language models at 2 to 8 bits per weight.

Importing this package imports nothing else: no torch, no GPU. Subpackages, lowest layer first: formats, kernels,
ops, checkpoint, quantizers, models, engine, evaluate, cli.
"""

__version__ = "0.1.0"
