"""How a model's files are best read on this machine: direct or buffered, and with how many lanes.

Chooses by a short measurement and says why in one phrase; the reads themselves are native.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

from .errors import UserError, option
from .formats.layout import ModelLayout
from .plugin.library import DirectProbe, probe_direct, probe_speed

# Beside threads that compute a lane waits for a processor between two reads, so that more are
# needed than on the idle machine that a probe sees (LOG.md).
DIRECT_LANES, BUFFERED_LANES = 16, 4
_PROBE_BYTES = 1 << 20
_PROBE_SECONDS = 0.06  # per setting: start-up may cost a second, this is a few of those slices
_CEILING_SECONDS, _CEILING_TRIES = 0.4, 3
_PAGE = 4096


class ReadMode(NamedTuple):
    """What is in force; ``reason`` ends the mode line."""

    direct: bool
    lanes: int
    offset_align: int
    memory_align: int
    reason: str

    @property
    def name(self) -> str:
        return "direct" if self.direct else "buffered"

    def __str__(self) -> str:
        return f"{self.name} x{self.lanes} ({self.reason})"


def probe_all(files: tuple[Path, ...]) -> DirectProbe:
    """One answer for a split set: direct only if every file can be, at the strictest alignments."""
    probes = [probe_direct(file) for file in files]
    return DirectProbe(
        all(p.direct for p in probes),
        max(p.offset_align for p in probes) or _PAGE,
        max(p.memory_align for p in probes) or _PAGE,
    )


def choose(
    layout: ModelLayout, probe: DirectProbe, reads: str, lanes: int | None, spare_bytes: int
) -> ReadMode:
    """Decide for a model; ``spare_bytes`` is free memory outside the budget, for the page cache."""
    sampler = _Sampler(layout)
    if reads == "buffered":
        direct, reason = False, "as asked"
    elif not probe.direct:
        if reads == "direct":
            raise UserError(
                f"direct reads do not work where {layout.path} lies: "
                f"use {option('reads', 'buffered')}"
            )
        direct, reason = False, "this file system refuses direct reads"
    elif reads == "direct":
        direct, reason = True, "as asked"
    elif spare_bytes >= layout.expert_bytes:
        direct, reason = False, "free memory outside the budget can cache every expert"
    else:
        fast, slow = sampler.speed(4, True), sampler.speed(4, False)
        # Buffered reads also cost a copy and the reclaim of pages: in a full cgroup they decode
        # at half the speed of direct ones that probe alike (LOG.md).
        direct = fast >= 0.5 * slow
        reason = f"measured: direct {fast / 1e6:.0f} MB/s, buffered cold {slow / 1e6:.0f} MB/s"
    if lanes is None:
        lanes = DIRECT_LANES if direct else BUFFERED_LANES
    return ReadMode(direct, lanes, probe.offset_align, probe.memory_align, reason)


class Ceiling(NamedTuple):
    """The fastest that expert reads were seen to go, and how they were read."""

    bytes_per_s: float
    read_bytes: int
    lanes: int
    direct: bool


def ceiling(layout: ModelLayout, lanes: int | None) -> Ceiling:
    """Measure what the disk gives to expert reads of the size and lanes the engine uses.

    Direct where that works; ``lanes`` None as ``choose`` has them. The best of a few tries,
    since whatever disturbs one makes it slower.
    """
    probe = probe_all(layout.files)
    mode = choose(layout, probe, "direct" if probe.direct else "buffered", lanes, 0)
    sampler = _Sampler(layout, _CEILING_SECONDS)
    sampler.speed(mode.lanes, mode.direct)  # sets the number of reads
    best = max(sampler.speed(mode.lanes, mode.direct) for _ in range(_CEILING_TRIES))
    return Ceiling(best, sampler.n_bytes, mode.lanes, mode.direct)


def speed(layout: ModelLayout, mode: ReadMode, seconds: float = _PROBE_SECONDS) -> float:
    """Bytes per second of cold expert reads the way they will be done."""
    sampler = _Sampler(layout, seconds)
    sampler.speed(mode.lanes, mode.direct)  # sets the number of reads
    return sampler.speed(mode.lanes, mode.direct)


class _Sampler:
    """Times reads at random places of one file's experts, never the same place twice."""

    def __init__(self, layout: ModelLayout, seconds: float = _PROBE_SECONDS) -> None:
        self.seconds = seconds
        pieces = [piece for layer in layout.layers for piece in layer.copies[0].pieces]
        file = int(pieces[0].file[0])
        self.path = layout.files[file]
        self.n_bytes = min(_PROBE_BYTES, max(_PAGE, pieces[0].n_bytes & -_PAGE))
        self.offsets: list[int] = [
            offset
            for piece in pieces
            for offset in (piece.offset[piece.file == file] & -_PAGE).tolist()
        ]
        # Seeded: two starts of the same model must not differ in what they read.
        random.Random(0).shuffle(self.offsets)
        self.next = 0
        self.n_reads = 8

    def speed(self, lanes: int, direct: bool) -> float:
        """Bytes per second; adapts the number of reads to the disk, so that a slow one takes no
        longer."""
        offsets = [self.offsets[(self.next + i) % len(self.offsets)] for i in range(self.n_reads)]
        self.next += self.n_reads
        speed = probe_speed(self.path, offsets, self.n_bytes, lanes, direct)
        most = int(128 * self.seconds / _PROBE_SECONDS)  # in case the disk was not what answered
        self.n_reads = max(8, min(most, int(speed * self.seconds / self.n_bytes)))
        return speed
