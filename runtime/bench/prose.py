"""The texts that benches and quality read where none are given."""

from __future__ import annotations

import functools
from pathlib import Path


@functools.cache
def prose() -> str:
    """One paragraph on one line, ending in a space, so that it can be told over and over:
    ``prose.txt``, in plain English, so that a trained router does what it does on text."""
    words = Path(__file__).with_name("prose.txt").read_text(encoding="utf-8").split()
    return " ".join(words) + " "


def passages(n: int) -> list[str]:
    """``n`` texts of at least some hundred words, none the beginning of another: from the manual
    that comes with Python."""
    from pydoc_data.topics import topics

    words = " ".join(text for _, text in sorted(topics.items())).split()
    step = len(words) // (n + 1)
    return [" ".join(words[i * step + step // 2 :][:_WORDS]) for i in range(n)]


_WORDS = 1000
