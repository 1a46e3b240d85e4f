"""What a model is made of: operations, their recording, and the caches they write to."""
