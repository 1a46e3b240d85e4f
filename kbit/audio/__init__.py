"""Sound: files of samples, and the features that models read."""
