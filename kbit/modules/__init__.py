"""k-bit matrices as modules of torch, inside models that kbit did not write: `kbit.quantize_`, and what
`kbit.transformers` and PEFT build on."""
