"""The model that is trained: Llama in plain torch, with the matrices that share an input kept as one.

One product for q, k and v, and one for gate and up: on a CPU small products cost more in starting than in multiplying.
`exported` cuts them apart again, under the names that Hugging Face's LlamaForCausalLM has.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from train.shapes import RMS_NORM_EPS, ROPE_THETA, Shape

# Standard deviation of the initial weights (GPT-2's, and Llama's in transformers).
INITIAL_STD = 0.02


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.head_dim = shape.heads, shape.head_dim
        self.attention_norm = nn.RMSNorm(shape.hidden, eps=RMS_NORM_EPS)
        self.qkv = nn.Linear(shape.hidden, 3 * shape.hidden, bias=False)
        self.out = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(shape.hidden, eps=RMS_NORM_EPS)
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.intermediate, bias=False)
        self.down = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        """x: (B, T, hidden) -> the same; cosine, sine: (T, head_dim)."""
        batch, length, hidden = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, self.head_dim).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).split(hidden, dim=-1)
        )
        q, k = _rotate(q, cosine, sine), _rotate(k, cosine, sine)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, hidden))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        added: torch.Tensor = self.down(functional.silu(gate) * up)
        return x + added


class Llama(nn.Module):
    """Decoder with tied embeddings.

    Args:
        shape: its sizes.
        vocabulary: tokens.
        context: the longest sequence.
        seed: of the initial weights: normal, and smaller by sqrt(2 * layers) in the two matrices that write into the
            residual stream (GPT-2's rule), so that its variance does not grow with depth.
    """

    cosine: torch.Tensor
    sine: torch.Tensor

    def __init__(self, shape: Shape, vocabulary: int, context: int, seed: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=RMS_NORM_EPS)
        inverse = ROPE_THETA ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim)
        angles = torch.arange(context, dtype=torch.float64)[:, None] * inverse
        angles = torch.cat([angles, angles], dim=1)
        self.register_buffer("cosine", angles.cos().float(), persistent=False)
        self.register_buffer("sine", angles.sin().float(), persistent=False)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                std = INITIAL_STD / (2 * shape.layers) ** 0.5 if residual else INITIAL_STD
                nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 (B, T) -> logits (B, T, vocabulary)."""
        x = self.embedding(ids)
        cosine, sine = self.cosine[: ids.shape[1]], self.sine[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cosine, sine)
        logits: torch.Tensor = functional.linear(self.norm(x), self.embedding.weight)
        return logits

    def loss(self, windows: torch.Tensor) -> torch.Tensor:
        """Mean loss in nats of predicting each token of a window from those before it; windows: int64 (B, T + 1)."""
        logits = self(windows[:, :-1])
        return functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def exported(state: Mapping[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """A Llama's parameters (its state_dict) under the names of transformers' LlamaForCausalLM, float16."""
    tensors = {"model.embed_tokens.weight": state["embedding.weight"]}
    for index in range(layers):
        ours, theirs = f"layers.{index}.", f"model.layers.{index}."
        q, k, v = state[ours + "qkv.weight"].chunk(3)
        gate, up = state[ours + "gate_up.weight"].chunk(2)
        tensors |= {
            theirs + "input_layernorm.weight": state[ours + "attention_norm.weight"],
            theirs + "self_attn.q_proj.weight": q,
            theirs + "self_attn.k_proj.weight": k,
            theirs + "self_attn.v_proj.weight": v,
            theirs + "self_attn.o_proj.weight": state[ours + "out.weight"],
            theirs + "post_attention_layernorm.weight": state[ours + "mlp_norm.weight"],
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": state[ours + "down.weight"],
        }
    tensors["model.norm.weight"] = state["norm.weight"]
    return {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in tensors.items()}


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021), halves paired as in transformers; x: (B, heads, T, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return (x * cosine + torch.cat([-second, first], dim=-1) * sine).to(x.dtype)
