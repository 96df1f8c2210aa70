"""What this system gives the process: memory, its limits, processor cores.

Every limit that a container or a shell may set is read here and nowhere else: control groups of
both versions, affinity, ``ulimit``. What is done about one is the caller's business.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import psutil

try:
    import resource
except ImportError:  # Windows has none of these limits
    resource = None  # type: ignore[assignment]

from .errors import UserError
from .sizes import MB, format_size

# `auto` leaves this share of the memory it finds to others.
AUTO_HEADROOM = 0.10
_ROOT = Path("/")

_LARGE_BYTES, _M_MMAP_THRESHOLD = 1 << 20, -3  # the latter is glibc's name for mallopt

# What of a cgroup's use is not given back under pressure, as memory.stat names it. Page cache is.
_V1_USE = ("total_rss", "total_shmem")
_V2_USE = ("anon", "shmem", "sock")
# Older kernels do not say the sum, which counts what of it can be given back as well.
_V2_KERNEL = ("kernel_stack", "pagetables", "sec_pagetables", "percpu", "vmalloc", "slab")


def return_what_is_freed() -> None:
    """Have large pieces of memory go back to the system when they are freed.

    glibc learns from the first large piece that is freed to keep such pieces, and by thread: copies
    of sequences that came and went took twice the memory that they had together, beyond the budget.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


class Stolen:
    """What others had of the processors since this was made.

    On a virtual machine the host's work for the disk counts too: it may take from the processors
    that compute. Where the system does not say, it is nothing.
    """

    def __init__(self) -> None:
        self._before = psutil.cpu_times()

    @property
    def share(self) -> float:
        """Of the time of all processors."""
        now = psutil.cpu_times()
        grown = {name: getattr(now, name) - getattr(self._before, name) for name in now._fields}
        for part in ("guest", "guest_nice"):  # counted in user and nice already
            grown.pop(part, None)
        return float(grown.get("steal", 0.0) / max(1e-9, sum(grown.values())))


# --- control groups -----------------------------------------------------------------------------


def _groups(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """(version, folder) of every cgroup that limits this process, from its own up."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base = mounts / "unified" if (mounts / "unified").is_dir() else mounts
            version = 2
        elif controller in controllers.split(","):
            # Those mounted together also have a link of their own name, mostly.
            base = next(filter(Path.is_dir, (mounts / controllers, mounts / controller)), mounts)
            version = 1
        else:
            continue
        for folder in _upwards(base / path.lstrip("/"), base):
            yield version, folder


def _upwards(folder: Path, base: Path) -> Iterable[Path]:
    """``folder`` and its parents up to ``base``; inside a container only ``base`` may exist."""
    while folder != base and base in folder.parents:
        yield folder
        folder = folder.parent
    yield base


def cgroup_limit(root: Path = _ROOT) -> int | None:
    """Bytes this process may still grow to under its memory cgroups, None for no limit.

    A cgroup's page cache is reclaimed before anything is killed, so only its other use counts.
    """
    limits: list[int] = []
    own = int(psutil.Process().memory_info().rss)
    for version, folder in _groups("memory", root):
        files = ("memory.limit_in_bytes",) if version == 1 else ("memory.max", "memory.high")
        found = [n for name in files if (n := _read_int(folder / name)) is not None and n < 2**60]
        if found:
            limits.append(min(found) - _used(version, folder) + own)
    return max(0, min(limits)) if limits else None


def _used(version: int, folder: Path) -> int:
    """Bytes of a cgroup that stay in use under pressure, so far as it tells."""
    stat = _stat(folder / "memory.stat")
    if version == 1:
        kernel = _read_int(folder / "memory.kmem.usage_in_bytes") or 0
        return sum(stat.get(key, 0) for key in _V1_USE) + kernel
    kernel = stat.get("kernel", sum(stat.get(key, 0) for key in _V2_KERNEL))
    reclaimable = min(kernel, stat.get("slab_reclaimable", 0))
    return sum(stat.get(key, 0) for key in _V2_USE) + kernel - reclaimable


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or v2's "max"
        return None


def _stat(path: Path) -> Mapping[str, int]:
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdigit()}


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Processors' worth of time this process may use, None for no limit."""
    quotas: list[float] = []
    for version, folder in _groups("cpu", root):
        try:
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text()
                period = (folder / "cpu.cfs_period_us").read_text()
            if int(quota) > 0 and int(period) > 0:
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError):  # absent, v2's "max"; v1 says -1
            continue
    return min(quotas, default=None)


# --- the shell's limits -------------------------------------------------------------------------


# What opening and running map beyond what is counted: threads' stacks and the vocabulary, and of
# addresses also the heaps that malloc reserves for each thread. Choices, on the safe side: where
# a limit is met inside llama.cpp, it ends the process.
_UNCOUNTED = {"-v": 256 * MB, "-d": 96 * MB}


def _shell_limits() -> Iterator[tuple[str, int, int]]:
    """(how ulimit calls it, bytes, bytes in use) of each limit on what a process may map."""
    if resource is None:
        return
    status = _status()
    for flag, number, used in (
        ("-v", resource.RLIMIT_AS, status.get("VmSize")),
        ("-d", resource.RLIMIT_DATA, status.get("VmData")),
    ):
        limit = resource.getrlimit(number)[0]
        if limit != resource.RLIM_INFINITY and used is not None:
            yield flag, limit, used


def check_room(reserved: int, used: int | None = None) -> None:
    """UserError if the shell's limits leave no room for so many bytes of addresses that are only
    ``reserved``, and of memory that is ``used``, beyond what this process has already.

    Without ``used`` opening begins, and needs what is not known yet.
    """
    for flag, limit, mapped in _shell_limits():
        need = _UNCOUNTED[flag] if used is None else used
        need += reserved if flag == "-v" else 0
        if mapped + need > limit:
            raise UserError(
                f"this shell lets a process map {format_size(limit)} (ulimit {flag}), and this one "
                f"needs {format_size(mapped + need)}: lift the limit with ulimit {flag} unlimited"
            )


def shell_limits() -> str:
    """The limits in force, for a sentence about memory that was refused; perhaps empty."""
    named = (f"ulimit {flag} is {format_size(limit)}" for flag, limit, _ in _shell_limits())
    return ", ".join(named)


def shell_room(reserved: int = 0) -> int | None:
    """Bytes this process may still grow to under the shell's limits, None for no limit."""
    rss = int(psutil.Process().memory_info().rss)
    rooms = [
        limit - mapped - _UNCOUNTED[flag] - (reserved if flag == "-v" else 0) + rss
        for flag, limit, mapped in _shell_limits()
    ]
    return max(0, min(rooms)) if rooms else None


# --- what is left -------------------------------------------------------------------------------


def auto_size(root: Path = _ROOT, reserved: int = 0) -> int:
    """What ``auto`` means: the memory free now, or the lowest limit if that is less, less headroom.

    ``reserved`` bytes of addresses are going to be taken without any memory.
    """
    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    limits = [n for n in (cgroup_limit(root), shell_room(reserved)) if n is not None]
    return int(min([free, *limits]) * (1 - AUTO_HEADROOM))


def _status() -> Mapping[str, int]:
    """The sizes in /proc/self/status, in bytes; nothing where there is no such file."""
    try:
        lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    except OSError:
        return {}
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[-1:] == ["kB"]}


def rss_peak() -> int:
    """Peak resident bytes of this process so far.

    From VmHWM, which starts at exec; getrusage's ru_maxrss can carry a parent's peak across fork.
    """
    return _status().get("VmHWM") or int(psutil.Process().memory_info().rss)


def rss() -> int:
    """Resident bytes of this process now."""
    return int(psutil.Process().memory_info().rss)


def usable_cores(root: Path = _ROOT) -> int:
    """Hardware threads' worth of time that this process may use.

    Under a quota more threads would be stopped together, most of the time while one waits for
    another.
    """
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS and Windows
    threads = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    quota = cpu_quota(root)
    return threads if quota is None else max(1, min(threads, int(quota)))


def physical_cores(root: Path = _ROOT) -> int:
    """Cores this process may use, one thread each: ggml's barriers spin, so more is slower."""
    usable = usable_cores(root)
    return max(1, min(psutil.cpu_count(logical=False) or usable, usable))


def check_writable(path: Path) -> None:
    """Raise now, as a UserError, what writing ``path`` would raise after the work."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: its folder does not exist")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: its folder may not be written to")
