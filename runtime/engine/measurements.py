"""What was measured of a model on this machine, and the file in which that is remembered.

Owns the value, its JSON and its place in the user's cache folder. Knows neither how it is measured
nor what is concluded from it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .. import cache
from ..files import replacing
from ..formats.stream import stream_of
from ..opening import Found
from ..system import physical_cores

PROTOCOL = 2  # of what is measured and how: others' files do not count


class Size(NamedTuple):
    """What a step of so many rows took on average, with the slots there were then."""

    rows: int
    other_s: float  # all but experts and waiting: attention, trunk, routers, deciding
    expert_s: float  # the processor at work on experts
    stall_s: float  # nothing to compute until a read was done
    disk_s: float  # of all that time: some lane was reading
    read_bytes: float
    distinct: float  # experts of a layer that were needed

    @property
    def compute_s(self) -> float:
        return self.other_s + self.expert_s

    @property
    def seconds(self) -> float:
        return self.compute_s + self.stall_s


class Reuse(NamedTuple):
    """How many experts of one layer a step needs and reads, by groups of so many sequences and by
    shares of the experts that have a slot. A mean over layers and steps."""

    groups: tuple[int, ...]  # growing, from 1 on
    shares: tuple[float, ...]  # growing, between 0 and 1
    distinct: tuple[float, ...]  # [groups] needed
    reads: tuple[tuple[float, ...], ...]  # [groups][shares] and read
    # [shares] read more for the first tokens of a sequence, after others had their turns.
    switch: tuple[float, ...]


@dataclass(frozen=True)
class Measurements:
    """``decode`` are steps of one token of each sequence, ``prompt`` chunks of prompts, both by
    growing rows."""

    decode: tuple[Size, ...]
    prompt: tuple[Size, ...]
    reuse: Reuse
    disk_bytes_per_s: float  # of an idle machine, then
    share: float  # of all experts had a slot then
    trunk_bytes_per_s: float  # at which one row goes through weights in memory
    read_cost_s: float  # of processor time, for reading one byte
    calm: bool  # nobody else had the processors
    took_s: float

    def to_json(self) -> str:
        return json.dumps({"protocol": PROTOCOL, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Measurements:
        """ValueError for what this class never wrote."""
        try:
            found = json.loads(text)
            if found.pop("protocol") != PROTOCOL:
                raise ValueError("another protocol")
            reuse = Reuse(*(_tuple(value) for value in found.pop("reuse")))
            decode, prompt = (
                tuple(Size(*size) for size in found.pop(name)) for name in ("decode", "prompt")
            )
            made = cls(decode, prompt, reuse, **found)
            made._check()
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not measurements: {error}") from None
        return made

    def _check(self) -> None:
        groups, shares, distinct, reads, switch = self.reuse
        if not isinstance(self.calm, bool):
            raise ValueError("calm is no answer")
        for sizes in (self.decode, self.prompt):
            rows = [size.rows for size in sizes]
            if not rows or rows[0] < 1 or not _grows(rows):
                raise ValueError("sizes are out of order")
        if groups[:1] != (1,) or not (_grows(groups) and _grows(shares)):
            raise ValueError("groups or shares are out of order")
        if not len(groups) == len(distinct) == len(reads):
            raise ValueError("groups are missing")
        if any(len(row) != len(shares) for row in (*reads, switch)):
            raise ValueError("shares are missing")
        every = [*self.decode, *self.prompt, groups, shares, distinct, *reads, switch]
        speeds = (self.disk_bytes_per_s, self.trunk_bytes_per_s)
        rest = (*speeds, self.share, self.read_cost_s, self.took_s)
        for value in (*(v for values in every for v in values), *rest):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError("a number is none")
        if min(*speeds, *distinct, *(size.compute_s for size in self.decode)) <= 0:
            raise ValueError("a speed is none")


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


def _grows(values: Sequence[float]) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))


# --- what is remembered -------------------------------------------------------------------------


def folder() -> Path:
    """Where measurements are kept, one small file each."""
    return cache.folder() / "measured"


def place(found: Found, n_threads: int | None) -> Path | None:
    """The file for this model, held and read this way, on this machine; None: nowhere."""
    import llama_cpp
    import xxhash

    try:
        version = importlib.metadata.version("moe-gguf")
        stream = stream_of(found.layout)
        who = (
            PROTOCOL,
            version,
            llama_cpp.__version__,
            llama_cpp.llama_print_system_info().decode(),
            platform.machine(),
            _processor(),
            n_threads or physical_cores(),
            [os.stat(file).st_dev for file in found.layout.files],
            stream.n_bytes,
            found.n_used,
            found.kernels.is_repacked,
            found.mode.direct,
            found.mode.lanes,
            found.options.policy,
            found.options.losses(),
        )
        name = xxhash.xxh3_128_hexdigest(repr(who).encode() + stream.header)
        return folder() / f"{name}.json"
    except (RuntimeError, OSError, importlib.metadata.PackageNotFoundError):
        return None  # a user without a home, say


def recall(place: Path | None) -> Measurements | None:
    """What was measured before; None where nothing was, or its file is damaged."""
    if place is None:
        return None
    try:
        return Measurements.from_json(place.read_text())
    except (OSError, ValueError):
        return None


def age_s(place: Path | None) -> float:
    """Seconds since it was measured; for ever, if it was not."""
    try:
        return math.inf if place is None else time.time() - place.stat().st_mtime
    except OSError:
        return math.inf


def remember(place: Path | None, measured: Measurements) -> None:
    """Keep it if that is possible; if not, the next time costs as much as this one."""
    if place is None:
        return
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as partial:
            partial.write_text(measured.to_json())


def _processor() -> str:
    """What kind it is, as Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told: Mapping[str, str] = dict(line.split(":", 1) for line in lines if ":" in line)
    return told.get("model name\t", "").strip()
