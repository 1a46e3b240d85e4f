"""Layers that keep states of fixed size: short convolutions, gated delta rules, state spaces."""
