"""Text on its way to token ids and back: tokenizers, chat templates, data sets, windows."""
