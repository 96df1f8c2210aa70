"""How long a step takes, from what was measured: with so many slots, on a disk of this speed.

The model is two clocks. Computing takes what it took when it was measured; reading takes the bytes
that a group of this size misses in slots of this share, over the disk's speed. Of the computing a
measured share hides reads (the next layer's are under way while this one computes); the rest of the
reads is waited for. Knows no memory and no schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from .measurements import Measurements, Size

# Where no step was seen to wait: reads begin with a layer's routes and go on through the next
# layer's attention, so nearly all computing hides some.
_HIDDEN = 0.9
_STALLED = 0.03  # of a step: less waiting tells nothing of how much could have been hidden
_FEW_BYTES = 1 << 20  # read in a step: fewer tell no speed
_LEAST = 1e-6  # share of experts that is always left out: its powers stay above 0
_MOST_POWER = 4.0

Points = Sequence[tuple[float, float]]


class StepTime(NamedTuple):
    """Seconds of one step. ``read_s`` is what the disk is busy, behind ``compute_s`` and then
    alone, for ``stall_s``."""

    compute_s: float
    read_s: float
    stall_s: float
    read_bytes: float

    @property
    def seconds(self) -> float:
        return self.compute_s + self.stall_s


@dataclass(frozen=True)
class Shape:
    """What of a model decides over times, beside what was measured."""

    n_layers: int  # with experts
    n_experts: int
    expert_bytes: int  # one expert of each layer, together
    cell_bytes: float  # of the KV cache for one token


@dataclass(frozen=True)
class Costs:
    """``share`` of all experts have a slot; ``faster`` is a processor of so many times the speed.

    More slots, a faster disk and a faster processor never make a step longer.
    """

    measured: Measurements
    shape: Shape
    share: float
    disk_bytes_per_s: float
    direct: bool = True
    faster: float = 1.0

    def with_disk(self, bytes_per_s: float) -> Costs:
        return replace(self, disk_bytes_per_s=bytes_per_s)

    def decode(self, rows: int, cells: float = 0.0) -> StepTime:
        """A token of each of ``rows`` sequences that hold ``cells`` tokens each."""
        attention = rows * cells * self.shape.cell_bytes / self.measured.trunk_bytes_per_s
        return self._step(self.measured.decode, rows, attention)

    def prompt(self, rows: int, beside: int = 0, cells: float = 0.0) -> StepTime:
        """A chunk of prompts, and a token of each of ``beside`` sequences with it."""
        more = _rising([(size.rows, size.compute_s) for size in self.measured.decode])
        attention = beside * cells * self.shape.cell_bytes / self.measured.trunk_bytes_per_s
        others = max(0.0, at(more, beside) - at(more, 0)) if beside else 0.0
        return self._step(self.measured.prompt, rows, attention + others, rows + beside)

    def switch_s(self, group: int) -> float:
        """What the first tokens after another group's turn cost more."""
        switch = self.measured.reuse.switch
        extra = at([(0.0, 0.0), *zip(self.measured.reuse.shares, switch, strict=True)], self.share)
        extra = min(group * extra, self.distinct(group) - self.reads(group))
        return max(0.0, extra) * self.shape.expert_bytes / self._speed(group)

    def expert_s(self, rows: int) -> float:
        """Of a step of decoding: the processor at work on experts."""
        return at(_rising([(s.rows, s.expert_s) for s in self.measured.decode]), rows) / self.faster

    # -- experts of one layer

    def distinct(self, rows: float) -> float:
        """That a step of so many rows needs."""
        n = self.shape.n_experts
        return n * (1 - self._left_out(rows) ** _level(self._diversity, math.log2(max(1.0, rows))))

    def reads(self, rows: float) -> float:
        """That are not there and must be read."""
        x = math.log2(max(1.0, rows))
        missing = _level(self._missing(self.share), x) ** _level(self._novelty, x)
        return missing * self.distinct(rows)

    def _left_out(self, rows: float) -> float:
        """The share of experts that a step of so many rows needs none of, by the replay."""
        groups, _, distinct, _, _ = self.measured.reuse
        left = [max(_LEAST, 1 - d / self.shape.n_experts) for d in _upwards(distinct)]
        if rows <= groups[-1]:
            return at(_logs(groups, left), math.log2(max(1.0, rows)))
        return left[-1] ** (rows / groups[-1])  # each row leaves out the same share of the rest

    def _missing(self, share: float) -> list[tuple[float, float]]:
        """By log2 of the group: the share of needed experts without a slot, by the replay."""
        groups, shares, distinct, reads, _ = self.measured.reuse
        by_group: list[float] = []
        for needed, row in zip(distinct, reads, strict=True):
            # Without slots all is read, with one for each nothing; more slots never read more.
            curve = [1.0, *(min(1.0, n / needed) for n in row), 0.0]
            falling = [min(curve[: i + 1]) for i in range(len(curve))]
            by_group.append(at(list(zip((0.0, *shares, 1.0), falling, strict=True)), share))
        return _logs(groups, by_group)

    # The replayed prompts are texts; what a model writes may repeat itself less or more, and
    # guesses read a little for nothing. As a power of a share, what was seen keeps 0 and 1.

    @cached_property
    def _diversity(self) -> list[tuple[float, float]]:
        """By log2 of the group: the power that makes the replay's experts those of the steps."""
        n = self.shape.n_experts
        powers = [
            (math.log2(size.rows), _power(self._left_out(size.rows), 1 - size.distinct / n))
            for size in self.measured.decode
            if size.distinct > 0
        ]
        return powers or [(0.0, 1.0)]

    @cached_property
    def _novelty(self) -> list[tuple[float, float]]:
        """By log2 of the group: the power that makes the replay's reads those of the steps."""
        replayed = self._missing(self.measured.share)
        powers = [
            (
                math.log2(size.rows),
                _power(
                    _level(replayed, math.log2(size.rows)),
                    size.read_bytes / (size.distinct * self.shape.expert_bytes),
                ),
            )
            for size in self.measured.decode
            if size.distinct > 0
        ]
        return powers or [(0.0, 1.0)]

    # -- the two clocks

    def _step(
        self, sizes: Sequence[Size], rows: int, more_s: float, needing: int | None = None
    ) -> StepTime:
        n_bytes = self.reads(needing or rows) * self.shape.expert_bytes
        base = _rising([(size.rows, self._pure(size)) for size in sizes])
        if sizes is self.measured.prompt:  # a chunk of one row is a step of one
            first = self._pure(self.measured.decode[0])
            base = _rising([(1.0, first), *((rows, s) for rows, s in base if rows > 1)])
        own = (at(base, rows) + more_s) / self.faster
        compute = own + n_bytes * self.measured.read_cost_s / self.faster
        read = n_bytes / self._speed(needing or rows)
        stall = max(0.0, read - self._hidden(needing or rows) * compute)
        return StepTime(compute, read, stall, n_bytes)

    def _pure(self, size: Size) -> float:
        """What it would take to compute if nothing were read."""
        cost = min(size.read_bytes * self.measured.read_cost_s, size.compute_s / 2)
        return size.compute_s - cost

    def _speed(self, rows: float) -> float:
        """Bytes per second that a step's reads come at: a few at a time are slower than many."""
        now, then = self.disk_bytes_per_s, self.measured.disk_bytes_per_s
        seen = [
            (math.log2(size.rows), size.read_bytes / size.disk_s)
            for size in self.measured.decode
            if size.read_bytes >= _FEW_BYTES and size.disk_s > 0
        ]
        if not seen:
            return now
        speed = at(_rising(seen), min(seen[-1][0], math.log2(max(1.0, rows))))
        # Buffered reads come from the page cache or the disk, and no probe knows which.
        return min(now, speed * max(1.0, now / then)) if self.direct else speed

    def _hidden(self, rows: float) -> float:
        """The share of computing that hides reads."""
        known: list[tuple[float, float]] = []
        floors: list[tuple[float, float]] = []
        for size in self.measured.decode:
            seen = max(0.0, min(1.0, (size.disk_s - size.stall_s) / size.compute_s))
            is_known = size.stall_s > _STALLED * size.seconds
            (known if is_known else floors).append((math.log2(size.rows), seen))
        known = known or [(0.0, _HIDDEN)]
        x = math.log2(max(1.0, rows))
        value = _level(known, x)
        return max(value, _level(floors, x)) if floors else value


# --- lines through points -----------------------------------------------------------------------


def at(points: Points, x: float) -> float:
    """On the line through points by growing x; beyond the last one it goes on as between the last
    two, before the first it is level."""
    if x <= points[0][0] or len(points) == 1:
        return points[0][1]
    i = next((i for i in range(1, len(points)) if x <= points[i][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (x - x0) / (x1 - x0) * (y1 - y0)


def _level(points: Points, x: float) -> float:
    """The same, level beyond the last point too."""
    return at(points, min(x, points[-1][0]))


def _power(base: float, wanted: float) -> float:
    """The power of a share that gives another, as far as one can be believed to."""
    if not (0 < base < 1 and 0 < wanted < 1):
        return 1.0
    return min(_MOST_POWER, max(1 / _MOST_POWER, math.log(wanted) / math.log(base)))


def _rising(points: Points) -> list[tuple[float, float]]:
    """No point lower than one before it: a step is never faster for having more rows."""
    values = _upwards([y for _, y in points])
    return [(x, y) for (x, _), y in zip(points, values, strict=True)]


def _upwards(values: Sequence[float]) -> list[float]:
    return [max(values[: i + 1]) for i in range(len(values))]


def _logs(groups: Sequence[int], values: Sequence[float]) -> list[tuple[float, float]]:
    return [(math.log2(group), value) for group, value in zip(groups, values, strict=True)]
