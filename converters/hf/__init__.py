"""Hugging Face checkpoints as a source of conversions."""
