"""What a trained encoder can do: context extension."""
