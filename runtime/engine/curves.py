"""What measurements say, as lines: of any number of rows, of any share of slots.

Interpolates between what was measured and goes on beyond it; the experts a step reads come from
replayed routes, bent to what the measured steps read. Knows no budget and no disk of today.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .measurements import Measurements, Size

# Where no step was seen to wait: reads begin with a layer's routes and go on through the next
# layer's attention, so nearly all computing hides some.
_HIDDEN = 0.9
_STALLED = 0.03  # of a step: less waiting tells nothing of how much could have been hidden
_FEW_BYTES = 1 << 20  # read in a step: fewer tell no speed
_LEAST = 1e-6  # share of experts that is always left out: its powers stay above 0
_MOST_POWER = 4.0

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Shape:
    """What of a model decides over times, beside what was measured."""

    n_layers: int  # with experts
    n_experts: int
    expert_bytes: int  # one expert of each layer, together
    cell_bytes: float  # of the KV cache for one token
    # Seconds that one row takes to pass over a cell of another sequence: alone, and in a tile of
    # rows of many sequences, which computes it for all of them (``costs.TILE``).
    masked_s: float = 0.0
    tiled_s: float = 0.0


@dataclass(frozen=True, eq=False)
class Curves:
    """Of one model on one machine. Numbers of rows may be fractions."""

    measured: Measurements
    shape: Shape

    # -- computing, while nothing is read

    @cached_property
    def decode_s(self) -> Points:
        """By rows: a step of decoding."""
        return rising([(size.rows, self._pure(size)) for size in self.measured.decode])

    @cached_property
    def prompt_s(self) -> Points:
        """By rows: a chunk of prompts. One of one row is a step of one."""
        sizes = [size for size in self.measured.prompt if size.rows > 1]
        first = (1.0, self._pure(self.measured.decode[0]))
        return rising([first, *((size.rows, self._pure(size)) for size in sizes)])

    @cached_property
    def expert_s(self) -> Points:
        """By rows: the part of a step of decoding that is experts."""
        return rising([(size.rows, size.expert_s) for size in self.measured.decode])

    def _pure(self, size: Size) -> float:
        cost = min(size.read_bytes * self.measured.read_cost_s, size.compute_s / 2)
        return size.compute_s - cost

    # -- experts of one layer

    def distinct(self, rows: float) -> float:
        """That a step of so many rows needs."""
        power = level(self._diversity, log(rows))
        return self.shape.n_experts * (1 - math.pow(self._left_out(rows), power))

    def missing(self, share: float) -> Points:
        """By log2 of the rows: of the needed experts, those without a slot, where ``share`` of all
        have one."""
        bent = []
        for x, left in self._replayed(share):
            bent.append((x, math.pow(left, level(self._novelty, x))))
        return bent

    def switch(self, share: float) -> float:
        """That are read more after another sequence had its turn, by one."""
        reuse = self.measured.reuse
        # Never more where there are more slots; what few slots cannot lose is the caller's limit.
        falling = _upwards(reuse.switch[::-1])[::-1]
        return at([*zip(reuse.shares, falling, strict=True), (1.0, 0.0)], share)

    @cached_property
    def _lefts(self) -> list[float]:
        needed = _upwards(self.measured.reuse.distinct)
        return [max(_LEAST, 1 - n / self.shape.n_experts) for n in needed]

    def _left_out(self, rows: float) -> float:
        """The share of experts that a step of so many rows needs none of, by the replay."""
        groups = self.measured.reuse.groups
        if rows <= groups[-1]:
            return at(_logs(groups, self._lefts), log(rows))
        # Each further row leaves out the same share of the rest.
        return math.pow(self._lefts[-1], rows / groups[-1])

    def _replayed(self, share: float) -> Points:
        """``missing`` by the replay."""
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
    def _diversity(self) -> Points:
        """By log2 of the rows: the power that makes the replay's experts those of the steps."""
        n = self.shape.n_experts
        powers = [
            (log(size.rows), _power(self._left_out(size.rows), 1 - size.distinct / n))
            for size in self.measured.decode
            if size.distinct > 0
        ]
        return powers or [(0.0, 1.0)]

    @cached_property
    def _novelty(self) -> Points:
        """By log2 of the rows: the power that makes the replay's reads those of the steps."""
        replayed = self._replayed(self.measured.share)
        powers = []
        for size in self.measured.decode:
            if size.distinct > 0:
                seen = size.read_bytes / (size.distinct * self.shape.expert_bytes)
                powers.append((log(size.rows), _power(level(replayed, log(size.rows)), seen)))
        return powers or [(0.0, 1.0)]

    # -- reading beside computing

    def speed_of(self, rows: float) -> float | None:
        """Bytes per second that a step's reads came at: a few at a time are slower than many."""
        return level(self._speeds, log(rows)) if self._speeds else None

    @cached_property
    def _speeds(self) -> Points:
        return rising(
            [
                (log(size.rows), size.read_bytes / size.disk_s)
                for size in self.measured.decode
                if size.read_bytes >= _FEW_BYTES and size.disk_s > 0
            ]
        )

    def hidden(self, rows: float) -> float:
        """The share of computing that hides reads."""
        known, floors = self._overlaps
        value = level(known, log(rows))
        return max(value, level(floors, log(rows))) if floors else value

    @cached_property
    def _overlaps(self) -> tuple[Points, Points]:
        """Of steps that waited, and of those that did not: these hid at least so much."""
        known: list[tuple[float, float]] = []
        floors: list[tuple[float, float]] = []
        for size in self.measured.decode:
            seen = max(0.0, min(1.0, (size.disk_s - size.stall_s) / size.compute_s))
            is_known = size.stall_s > _STALLED * size.seconds
            (known if is_known else floors).append((log(size.rows), seen))
        return known or [(0.0, _HIDDEN)], floors


# --- lines through points -----------------------------------------------------------------------


def at(points: Points, x: float) -> float:
    """On the line through points by growing x; beyond the last one it goes on as between the last
    two, before the first it is level."""
    if x <= points[0][0] or len(points) == 1:
        return points[0][1]
    i = next((i for i in range(1, len(points)) if x <= points[i][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (x - x0) / (x1 - x0) * (y1 - y0)


def level(points: Points, x: float) -> float:
    """The same, level beyond the last point too."""
    return at(points, min(x, points[-1][0]))


def _power(base: float, wanted: float) -> float:
    """The power of a share that gives another, as far as one can be believed to."""
    if not (0 < base < 1 and 0 < wanted < 1):
        return 1.0
    return min(_MOST_POWER, max(1 / _MOST_POWER, math.log(wanted) / math.log(base)))


def rising(points: Points) -> list[tuple[float, float]]:
    """No point lower than one before it: a step is never faster for having more rows."""
    values = _upwards([y for _, y in points])
    return [(x, y) for (x, _), y in zip(points, values, strict=True)]


def _upwards(values: Sequence[float]) -> list[float]:
    return [max(values[: i + 1]) for i in range(len(values))]


def log(rows: float) -> float:
    return math.log2(max(1.0, rows))


def _logs(groups: Sequence[int], values: Sequence[float]) -> list[tuple[float, float]]:
    return [(log(group), value) for group, value in zip(groups, values, strict=True)]
