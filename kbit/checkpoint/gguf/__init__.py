"""Reading GGUF files: header, blocks, names, configuration, tokenizer."""
