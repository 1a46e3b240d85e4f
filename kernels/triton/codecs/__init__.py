"""From stored codes to values and back."""
