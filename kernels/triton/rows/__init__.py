"""What is done to each row: norms, activations, embedding."""
