"""How many guesses there is disk time for, and which of them pay.

Time is an argument. Everything is measured on the machine while it runs: how fast it reads, and
how long the disk has nothing to do between one layer's route event and the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from .base import Guess, Phase

# A wrong guess takes the slot of what would be evicted next anyway, a little too early.
VICTIM_VALUE = 0.05
_DECAY = 0.8  # of the running means: about five tokens, or layers
_SLOW_DECAY = 0.95  # of those over all layers: about a token
_STALLED = 0.5  # reads: a layer that waits for less has a hot set that is large enough
_SHRINK = 0.125  # experts by which a hot set that hides everything shrinks, per step
_FEW = 8  # reads before the speed is believed
# Buffered reads faster than 4 GB/s are copies out of the page cache: the processor makes them.
_COPY_NS_PER_BYTE = 0.25


class Meters(NamedTuple):
    """What one route event finds measured."""

    layer: int
    phase: Phase
    n_sequences: int
    now_ns: int
    disk_ns: int  # of the time so far: the disk was reading
    read_bytes: int  # so far
    # Of the event before this one:
    stall_ns: int  # nothing to compute
    guess_ns: int  # guessing
    n_waits: int  # experts that were not there when they were asked for
    n_unguessed: int  # experts that would not have been there without guesses
    since_ns: int = 0  # since those after it could be copied to a device


class Pace(Protocol):
    """Chooses among guesses."""

    def event(self, meters: Meters) -> bool:
        """A route event arrived. Whether to guess after it."""

    def choose(self, guesses: Sequence[Guess], n_bytes: int) -> list[Guess]:
        """Those worth reading now, of ``n_bytes`` each; ``guesses`` are best first, and so is
        what comes back."""


class Everything:
    """Reads whatever is guessed: for tests, and for what naive prefetching costs."""

    def event(self, meters: Meters) -> bool:
        return True

    def choose(self, guesses: Sequence[Guess], n_bytes: int) -> list[Guess]:
        return list(guesses)


class _Stakes:
    """What guessing can win and costs, per event of one phase."""

    def __init__(self) -> None:
        self.idle_ns: dict[int, float] = {}  # by layer: of the disk after its event, unguessed
        self.guess_ns = 0.0
        self.n_unguessed: float | None = None
        self._stall_ns = self._waits = 0.0  # decayed sums

    def wait_ns(self, most: float) -> float:
        """How long an expert that is not there holds its layer up; ``most``, if not known."""
        return min(most, self._stall_ns / self._waits) if self._waits else most

    def learn(self, meters: Meters) -> None:
        if meters.n_waits:
            self._stall_ns = _SLOW_DECAY * self._stall_ns + meters.stall_ns
            self._waits = _SLOW_DECAY * self._waits + meters.n_waits
        if self.n_unguessed is None:
            self.n_unguessed = meters.n_unguessed
        self.n_unguessed += (1 - _SLOW_DECAY) * (meters.n_unguessed - self.n_unguessed)
        if meters.guess_ns:
            self.guess_ns += (1 - _SLOW_DECAY) * (meters.guess_ns - self.guess_ns)


class IdleDisk:
    """Guesses only into the time the disk would idle, and only those that save more than they cost.

    Fate's budget n = window / t_expert, with the window measured as idle time of the disk itself,
    so that it shrinks to nothing when demands keep the disk busy. What an expert saves by being
    there is not the time of its read but of the stall it causes, which is almost nothing where the
    page cache serves the reads. Within the window a guess of confidence p, of whose read the share
    e falls into idle time, is expected to save p * e * stall; if wrong, it costs the chunks that
    cannot be stopped any more and the early end of its victim. There are no guesses at all where
    the stalls of an event are worth less than the guessing takes, nor where ``buffered`` reads come
    from the page cache: copying what is not needed takes the processor from what is.

    A reader in the middle of a chunk of ``chunk_bytes`` cannot be stopped: that is what a wrong
    guess may cost a demand.

    Stakes are measured by phase: a prompt's long computation is no window for a generated token.
    Mixed steps have stakes of their own, for their length is the scheduler's choice and like
    neither. The number of sequences is not told apart: it changes slowly, and the means follow.
    """

    def __init__(self, chunk_bytes: int, buffered: bool = False) -> None:
        self.chunk_bytes = chunk_bytes
        self.buffered = buffered
        self._stakes = tuple(_Stakes() for _ in Phase)
        self._bytes = self._busy_ns = 0.0  # decayed sums: their ratio is the speed
        self._n_reads = 0
        self._last: Meters | None = None
        self._guessed_ns = 0.0  # disk time of the guesses made since the last event

    @property
    def ns_per_byte(self) -> float:
        return self._busy_ns / self._bytes if self._bytes else 0.0

    def event(self, meters: Meters) -> bool:
        last = self._last
        if last is not None:
            busy, n_bytes = meters.disk_ns - last.disk_ns, meters.read_bytes - last.read_bytes
            if n_bytes:
                self._bytes = _DECAY * self._bytes + n_bytes
                self._busy_ns = _DECAY * self._busy_ns + busy
                self._n_reads += 1
            stakes = self._stakes[last.phase]
            stakes.learn(meters)
            idle = meters.now_ns - last.now_ns - busy + min(busy, self._guessed_ns)
            mean = stakes.idle_ns.get(last.layer, idle)
            stakes.idle_ns[last.layer] = mean + (1 - _DECAY) * (idle - mean)
        self._last = meters
        self._guessed_ns = 0.0
        if self._n_reads < _FEW or (self.buffered and self.ns_per_byte < _COPY_NS_PER_BYTE):
            return False
        stakes = self._stakes[meters.phase]
        if stakes.n_unguessed is None or meters.layer not in stakes.idle_ns:
            return True
        worth = stakes.n_unguessed * stakes.wait_ns(math.inf)
        return stakes.idle_ns[meters.layer] > 0 and worth > stakes.guess_ns

    def choose(self, guesses: Sequence[Guess], n_bytes: int) -> list[Guess]:
        assert self._last is not None
        stakes = self._stakes[self._last.phase]
        each = n_bytes * self.ns_per_byte
        wait = stakes.wait_ns(each)
        chunk = self.chunk_bytes * self.ns_per_byte
        idle = stakes.idle_ns.get(self._last.layer, 0.0)
        chosen: list[Guess] = []
        for guess in guesses:
            room = idle - len(chosen) * each
            if room <= 0:
                break
            early = min(each, room)
            cost = min(chunk, each - early) + VICTIM_VALUE * wait
            p = guess.confidence
            if p * wait * early > (1 - p) * cost * each:
                chosen.append(guess)
        self._guessed_ns = len(chosen) * each
        return chosen


class HotSet:
    """Klotski's K: after each layer, the smallest hot set whose computing hides the other reads.

    A layer that still stalls had too few of its experts read ahead: K grows by the reads that the
    stall would have held. One that does not stall may have too many, and K shrinks by a little: a
    hot expert read ahead takes a slot for longer than one that arrives as it is needed. So K
    follows the machine and the group without a model of either, and stays by what the paper's
    inequality gives, with which the planner foretells it. Always guesses, since a predictor that
    counts what follows what learns as it guesses.
    """

    def __init__(self) -> None:
        self._k: dict[int, float] = {}  # by layer: to be read ahead for the one after it
        self._last: Meters | None = None
        self._earlier = -1  # the layer before that
        self._bytes = self._busy_ns = 0.0  # decayed sums: their ratio is the speed
        self._each_ns = 0.0  # of one expert's read; 0: not known yet

    def event(self, meters: Meters) -> bool:
        last = self._last
        if last is not None:
            if n_bytes := meters.read_bytes - last.read_bytes:
                self._bytes = _DECAY * self._bytes + n_bytes
                self._busy_ns = _DECAY * self._busy_ns + meters.disk_ns - last.disk_ns
            if self._each_ns:
                more = meters.stall_ns / self._each_ns
                k = self._k.get(self._earlier, 0.0)
                self._k[self._earlier] = k + (more if more >= _STALLED else -_SHRINK)
            self._earlier = last.layer
        self._last = meters
        return True

    def choose(self, guesses: Sequence[Guess], n_bytes: int) -> list[Guess]:
        assert self._last is not None
        self._each_ns = n_bytes * self._busy_ns / self._bytes if self._bytes else 0.0
        layer = self._last.layer
        k = self._k[layer] = min(max(0.0, self._k.get(layer, 0.0)), float(len(guesses)))
        return list(guesses[: math.ceil(k)])
