"""What this system gives the process: memory, its limits, processor cores."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import psutil

from .errors import UserError

# `auto` leaves this share of the memory it finds to others.
AUTO_HEADROOM = 0.10


def cgroup_limit(root: Path = Path("/")) -> int | None:
    """Bytes this process may still grow to under its memory cgroup (v1 or v2), None for no limit.

    A cgroup's page cache is reclaimed before anything is killed, so only its other use counts.
    """
    limits: list[int] = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit_name, stat_key = root / "sys/fs/cgroup", "memory.max", "anon"
        elif "memory" in controllers.split(","):
            base, limit_name, stat_key = (
                root / "sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "total_rss",
            )
        else:
            continue
        folder = base / path.lstrip("/")
        for directory in _upwards(folder, base):
            limit = _read_int(directory / limit_name)
            if limit is None or limit >= 2**60:
                continue
            used = _read_stat(directory / "memory.stat", stat_key)
            limits.append(limit - used + psutil.Process().memory_info().rss)
    return max(0, min(limits)) if limits else None


def _upwards(folder: Path, base: Path) -> Iterable[Path]:
    """``folder`` and its parents up to ``base``; inside a container only ``base`` may exist."""
    while folder != base and base in folder.parents:
        yield folder
        folder = folder.parent
    yield base


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or v2's "max"
        return None


def _read_stat(path: Path, key: str) -> int:
    try:
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    except OSError:
        return 0
    return 0


def auto_size(root: Path = Path("/")) -> int:
    """What ``auto`` means: the memory free now, or the cgroup's limit if lower, less headroom."""
    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    limit = cgroup_limit(root)
    return int((min(free, limit) if limit is not None else free) * (1 - AUTO_HEADROOM))


def rss_peak() -> int:
    """Peak resident bytes of this process so far.

    From VmHWM, which starts at exec; getrusage's ru_maxrss can carry a parent's peak across fork.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(psutil.Process().memory_info().rss)


def usable_cores() -> int:
    """Hardware threads this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def physical_cores() -> int:
    """Cores this process may use, one thread each: ggml's barriers spin, so more is slower."""
    return max(1, min(psutil.cpu_count(logical=False) or usable_cores(), usable_cores()))


def check_writable(path: Path) -> None:
    """Raise now, as a UserError, what writing ``path`` would raise after the work."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: its folder does not exist")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: its folder may not be written to")
