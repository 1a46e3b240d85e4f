"""Names of the activation functions that every backend has; `kbit.kernels.reference.activate` says what they mean.

Apart from it, so that a model's structure can be checked without torch.
"""

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "elu")
