"""The memory budget: what the whole process may use, and how many slots that leaves for experts.

Pure arithmetic over numbers others measured, plus the few system files that say how much memory
there is. ``--memory`` covers everything: trunk, KV cache, compute buffers, Python, slots.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import psutil

from moe_gguf.runtime.errors import UserError

KB, MB, GB = 10**3, 10**6, 10**9
_UNITS = {
    "": 1,
    "B": 1,
    "K": KB,
    "KB": KB,
    "M": MB,
    "MB": MB,
    "G": GB,
    "GB": GB,
    "T": 10**12,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}

# Enough to overlap a few reads with the expert being computed; below it every layer is served
# in turns of one or two experts.
MIN_SLOTS = 4
# What a process grows by between its start and its peak beyond the items counted: allocator
# slack, thread stacks, Python objects of a request. A choice, not a measurement;
# the tests in a cgroup of exactly the budget hold with it.
MARGIN_BYTES = 32 * MB
# `auto` leaves this share of the memory it finds to others.
AUTO_HEADROOM = 0.10


def parse_size(text: str, what: str = "a memory budget") -> int:
    """Bytes of ``2.4GB``, ``4GiB``, ``512m`` or a plain number of bytes."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise UserError(f"{text!r} is not a size: write it like 2.4GB, 4GiB or auto")
    size = int(float(match[1]) * unit)
    if size < MB:
        raise UserError(f"{what} of {text} is too small for any model: give it in MB or GB")
    return size


def format_size(n_bytes: float) -> str:
    """Decimal units, as people name disks and memory: ``2.40 GB``, ``57.1 MB``."""
    for unit, scale in (("GB", GB), ("MB", MB), ("KB", KB)):
        if n_bytes >= scale:
            return (
                f"{n_bytes / scale:.2f} {unit}" if unit == "GB" else f"{n_bytes / scale:.1f} {unit}"
            )
    return f"{int(n_bytes)} B"


class Needs(NamedTuple):
    """Bytes a process needs besides its expert slots."""

    trunk: int
    kv: int
    compute: int  # llama.cpp's graph buffers and the executor's own
    process: int  # Python, libraries, vocabulary, margin

    @property
    def total(self) -> int:
        return sum(self)

    def with_slots(self, n_slots: int, slot_bytes: int) -> int:
        """The budget that leaves room for this many slots."""
        return self.total + n_slots * slot_bytes


class Budget(NamedTuple):
    """A budget that works: what each part takes, and the slots that fit."""

    total: int
    needs: Needs
    slot_bytes: int
    n_slots: int
    n_all: int  # slots that would hold every expert of the model
    working_set: int  # experts one token asks for over all layers

    @property
    def experts(self) -> int:
        """Bytes of the arena."""
        return self.n_slots * self.slot_bytes

    @property
    def resident_share(self) -> float:
        return self.n_slots / self.n_all

    def rows(self) -> list[tuple[str, int, str]]:
        """(name, bytes, remark) of every item of the table."""
        share = f"{self.n_slots} of {self.n_all} slots, {self.resident_share:.0%} of the experts"
        return [
            ("trunk", self.needs.trunk, "every weight that is not a routed expert"),
            ("KV cache", self.needs.kv, ""),
            ("compute", self.needs.compute, "graph and work buffers"),
            ("process", self.needs.process, "Python, libraries, vocabulary, margin"),
            ("experts", self.experts, share),
            ("total", self.needs.total + self.experts, f"of {format_size(self.total)}"),
        ]

    def table(self) -> str:
        return "\n".join(
            f"  {name:<9}{format_size(n_bytes):>10}  {remark}".rstrip()
            for name, n_bytes, remark in self.rows()
        )

    def warning(self) -> str | None:
        """One sentence when the arena is below one token's working set."""
        if self.n_slots >= self.working_set:
            return None
        enough = self.needs.with_slots(self.working_set, self.slot_bytes)
        return (
            f"{self.n_slots} slots are fewer than the {self.working_set} experts one token uses: "
            "with --policy lru nearly all of them are read again for every token, "
            f"fate and lfu keep some; {format_size(enough)} would hold all"
        )


def min_slots(n_all: int) -> int:
    """The fewest slots a model runs with."""
    return min(MIN_SLOTS, n_all)


def smallest(needs: Needs, slot_bytes: int, n_all: int) -> int:
    """The budget to name as the smallest that works.

    In whole MB, and one more than computed: a process measures 300 KB more or less from run to run,
    and a refusal must not be followed by another.
    """
    return (-(-needs.with_slots(min_slots(n_all), slot_bytes) // MB) + 1) * MB


def fit(total: int, needs: Needs, slot_bytes: int, n_all: int, working_set: int) -> Budget:
    """Divide ``total`` bytes; raises UserError naming the smallest budget that works."""
    n_slots = min(n_all, (total - needs.total) // slot_bytes)
    floor = min_slots(n_all)
    if n_slots < floor:
        raise UserError(
            f"{format_size(total)} of memory is too little for this model: the smallest budget "
            f"that works is {smallest(needs, slot_bytes, n_all) // MB}MB "
            f"(trunk {format_size(needs.trunk)}, KV cache {format_size(needs.kv)}, "
            f"compute {format_size(needs.compute)}, process {format_size(needs.process)}, "
            f"{floor} slots of {format_size(slot_bytes)}); a smaller --ctx also helps"
        )
    return Budget(total, needs, slot_bytes, n_slots, n_all, working_set)


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
