"""A Python process of our own beside this one: the same interpreter, running one of our modules."""

from __future__ import annotations

import sys

# Where it starts. Not in the user's folder: with -m that leads sys.path, and may hold a source tree
# of this package or a file named like a module of Python's. What a child is told therefore names
# files by absolute paths.
FOLDER = sys.prefix


def command(module: str, *arguments: str) -> list[str]:
    """The command line of a child, to be started in ``FOLDER``."""
    return [sys.executable, "-m", module, *arguments]
