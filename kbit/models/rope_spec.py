"""RopeSpec: a rotary position embedding, as `rope_config.py` reads it and `rope.py` turns it into angles."""

from __future__ import annotations

from dataclasses import dataclass

# Longest context that is believed; a hostile factor could ask for any.
MAX_CONTEXT = 1 << 31


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding: rope_config.py reads it, rope.py turns it into angles.

    Attributes:
        kind: "default", "linear", "dynamic", "llama3", "yarn", "longrope" or "proportional".
        dim: rotated features of a head, even.
        turning: proportional: how many of the pairs turn; the angles of the others are 0.
        theta: base of the wavelengths.
        factor: context extension factor (all kinds but default).
        max_positions: M, max_position_embeddings; dynamic: the length beyond which the base grows.
        original_positions: llama3, yarn, longrope: context length of pretraining.
        low_freq_factor, high_freq_factor: llama3: borders of the smoothed band.
        beta_fast, beta_slow: yarn: rotations over the original context at the borders of the ramp.
        truncate: yarn: round the borders of the ramp to whole features.
        attention_factor: multiplies cosines and sines (yarn, longrope; else 1).
        long_attention_factor: longrope: the same for texts beyond the original length; 0: it is the same.
        temperature: of mscale_all_dim, which latent attention multiplies scores with, squared; 1 where there is none.
        short_factors, long_factors: longrope: every pair's divisor, for texts up to and beyond the original length.
    """

    kind: str
    dim: int
    theta: float
    factor: float = 1.0
    max_positions: int = 0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    temperature: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    turning: int = 0
    long_attention_factor: float = 0.0

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's rotation depends on the length of the text around it, and not on its position alone.

        Beyond `constant_up_to` such a text must go through the model at once: in pieces, the keys of each piece would
        be rotated with other frequencies. Up to there pieces are as good as the whole.
        """
        changes = self.short_factors != self.long_factors or self.long_attention_factor not in (
            0.0,
            self.attention_factor,
        )
        return self.kind == "dynamic" or (self.kind == "longrope" and changes)

    @property
    def constant_up_to(self) -> int:
        """Length of the longest text whose rotation depends on positions alone, where `depends_on_length`."""
        return self.original_positions if self.kind == "longrope" else self.max_positions

    @property
    def context_length(self) -> int:
        """Tokens the embedding is meant for, M or more where it extends a shorter context.

        yarn: factor times the original length, which is what M itself leaves out where a model is extended by its
        user (Qwen2.5). dynamic: factor times M, as its base grows from M on. llama3: M, the extended length in every
        published model; factor times original says something else (64k for Llama 3.1 and 256k for 3.2, both tuned for
        128k). linear: M; the rotation does not refer to it, and transformers asks for the extended length there.
        """
        if self.kind == "yarn":
            extended = round(self.factor * self.original_positions)
        elif self.kind == "dynamic":
            extended = round(self.factor * self.max_positions)
        else:
            extended = self.max_positions
        return max(self.max_positions, min(extended, MAX_CONTEXT))
