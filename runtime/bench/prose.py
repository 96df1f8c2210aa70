"""The text that benches and quality read where none is given: ``prose.txt``, in plain English."""

from __future__ import annotations

import functools
from pathlib import Path


@functools.cache
def prose() -> str:
    """One paragraph on one line, ending in a space, so that it can be told over and over.

    Plain prose, so that a trained router does what it does on text.
    """
    words = Path(__file__).with_name("prose.txt").read_text(encoding="utf-8").split()
    return " ".join(words) + " "
