"""The folder of files that are made for the user and can be made again: where it is.

One owner, so that whoever starts the process can move everything at once. Does not know what lies
in it, and makes nothing.
"""

from __future__ import annotations

from pathlib import Path

_chosen: Path | None = None


def use(folder: Path) -> None:
    """Keep such files of this process here from now on."""
    global _chosen
    _chosen = folder.absolute()


def chosen() -> Path | None:
    """The folder that ``use`` named, for processes that this one starts."""
    return _chosen


def folder() -> Path:
    """Where such files are; it need not exist. RuntimeError for a user without a home."""
    import platformdirs  # not everybody who imports this asks

    return _chosen or Path(platformdirs.user_cache_dir("moe-gguf"))
