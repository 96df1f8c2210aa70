"""How many guesses there is disk time for, and which of them pay.

Time is an argument. Everything is measured on the machine while it runs: how fast it reads, and
how long the disk has nothing to do between one layer's route event and the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from moe_gguf.policies.base import Guess

# A reader in the middle of a chunk cannot be stopped: what a wrong guess may cost a demand.
CHUNK_BYTES = 1 << 20  # native/reads.h
# A wrong guess takes the slot of what would be evicted next anyway, a little too early.
VICTIM_VALUE = 0.05
_DECAY = 0.8  # of the running means: about five tokens, or layers
_FEW = 8  # reads before the speed is believed


class Pace(Protocol):
    """Chooses among guesses."""

    def event(self, layer: int, now_ns: int, disk_ns: int, read_bytes: int) -> None:
        """A route event arrived. ``disk_ns`` of the time so far the disk was reading."""

    def choose(self, guesses: Sequence[Guess], n_bytes: int) -> list[Guess]:
        """Those worth reading now, of ``n_bytes`` each; ``guesses`` are best first."""


class Everything:
    """Reads whatever is guessed: for tests, and for what naive prefetching costs."""

    def event(self, layer: int, now_ns: int, disk_ns: int, read_bytes: int) -> None:
        pass

    def choose(self, guesses: Sequence[Guess], n_bytes: int) -> list[Guess]:
        return list(guesses)


class IdleDisk:
    """Guesses only into the time the disk would idle, and only those that save more than they cost.

    Fate's budget n = window / t_expert, with the window measured as idle time of the disk itself,
    so that it shrinks to nothing when demands keep the disk busy. Within it a guess of confidence
    p, of whose read e falls into idle time, is expected to save p * e; if wrong, it costs the
    chunks that cannot be stopped any more and the early end of its victim.
    """

    def __init__(self) -> None:
        self._idle_ns: dict[int, float] = {}  # per layer: after its event, without guesses
        self._bytes = self._busy_ns = 0.0  # decayed sums: their ratio is the speed
        self._n_reads = 0
        self._last: tuple[int, int, int, int] | None = None
        self._guessed_ns = 0.0  # disk time of the guesses made since the last event

    @property
    def ns_per_byte(self) -> float:
        return self._busy_ns / self._bytes if self._bytes else 0.0

    def event(self, layer: int, now_ns: int, disk_ns: int, read_bytes: int) -> None:
        if self._last is not None:
            before, then_ns, then_disk_ns, then_bytes = self._last
            busy, n_bytes = disk_ns - then_disk_ns, read_bytes - then_bytes
            if n_bytes:
                self._bytes = _DECAY * self._bytes + n_bytes
                self._busy_ns = _DECAY * self._busy_ns + busy
                self._n_reads += 1
            idle = now_ns - then_ns - busy + min(busy, self._guessed_ns)
            mean = self._idle_ns.get(before, idle)
            self._idle_ns[before] = mean + (1 - _DECAY) * (idle - mean)
        self._last = layer, now_ns, disk_ns, read_bytes
        self._guessed_ns = 0.0

    def choose(self, guesses: Sequence[Guess], n_bytes: int) -> list[Guess]:
        assert self._last is not None
        if self._n_reads < _FEW:
            return []
        each = n_bytes * self.ns_per_byte
        chunk = CHUNK_BYTES * self.ns_per_byte
        idle = self._idle_ns.get(self._last[0], 0.0)
        chosen: list[Guess] = []
        for guess in guesses:
            room = idle - len(chosen) * each
            if room <= 0:
                break
            saved = min(each, room)
            cost = min(chunk, each - saved) + VICTIM_VALUE * each
            p = guess.confidence
            if p * saved > (1 - p) * cost:
                chosen.append(guess)
        self._guessed_ns = len(chosen) * each
        return chosen
