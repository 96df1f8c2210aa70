"""Bytes on disk: GGUF headers, bundles, and where every byte of a model lies."""
