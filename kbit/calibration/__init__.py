"""Which errors of the weights a model feels: both factors of the Fisher information of every matrix."""
