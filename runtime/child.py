"""A Python process of our own beside this one: the same interpreter, running one of our modules."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

# Where it starts. Not in the user's folder: with -m that leads sys.path, and may hold a source tree
# of this package or a file named like a module of Python's. What a child is told therefore names
# files by absolute paths.
FOLDER = sys.prefix


def command(module: str, *arguments: str) -> list[str]:
    """The command line of a child, to be started in ``FOLDER``."""
    return [sys.executable, "-m", module, *arguments]


def limit(most: Mapping[int, int]) -> None:
    """In a child: bound what it may take, by kind of resource, and offer it first where memory runs
    out."""
    for kind, value in {resource.RLIMIT_CORE: 0, **most}.items():
        _, hard = resource.getrlimit(kind)
        kept = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (kept, hard))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
