"""Refuse models that would bring llama.cpp down."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_gguf.runtime.layout import ModelLayout


def validate(layout: ModelLayout) -> None:
    """Placeholder until the rules are in."""
