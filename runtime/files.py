"""Files that appear whole or not at all.

This file owns how bytes reach the disk before a name does. It does not know what is written.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

STALE_SECONDS = 3600  # no writer takes that long between two writes: a killed one left it


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another name to write to: when the block ends, what is there becomes ``path``.

    A block that fails leaves nothing. Writers at the same time have a name each, and the last
    to end wins. What a killed writer left is removed by a later one.
    """
    _remove_stale(path)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256(path: Path) -> str:
    """Of a whole file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_stale(path: Path) -> None:
    for partial in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if time.time() - partial.stat().st_mtime > STALE_SECONDS:
                partial.unlink()
