"""Which experts that a device lacks the processor computes, while others are copied there.

Both take time at the same time: what is copied comes one after the other over the link, what is
computed one after the other from memory. So the division with the least of the longer of the two
is chosen. Time is an argument; what computing takes is measured as it happens, what copying takes
is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

_RISE = 0.2  # share of a slower measurement that is believed
_REST, _LONGEST_REST = 32, 1024  # events without any before one is tried again


class Division(NamedTuple):
    """Indices of missing experts. Those that are computed and not passing are copied afterwards."""

    computed: frozenset[int]
    passing: frozenset[int]  # of the computed: they get no slot on the device


NOBODY = Division(frozenset(), frozenset())


class Dividing(Protocol):
    """Divides the missing experts of one event.

    ``rest``: so many events need not be divided, and the processor computes nothing of them.
    """

    rest: int

    def learn(self, now_ns: int, n_experts: int, n_pairs: int, ns: int) -> None:
        """It is now, and the processor has computed so much of the event divided last."""

    def divide(self, layer: int, counts: Sequence[int]) -> Division:
        """``counts``: (token, rank) pairs of each missing expert."""


class Measured:
    """Divides by what both sides take here.

    ``expert_bytes`` is by layer; ``copy_ns_per_byte`` of one link, which is busy for as long as
    what was given to it takes. A computed expert is copied afterwards if that keeps the link busy
    for no longer than the event takes, or one copy: a demand never waits for more.
    """

    def __init__(self, copy_ns_per_byte: float, expert_bytes: Mapping[int, int]) -> None:
        self.copy_ns_per_byte = copy_ns_per_byte
        self.expert_bytes = expert_bytes
        self.ns_per_byte: dict[int, float] = {}  # of computing one expert, by size of its rows
        self._now_ns = self._free_ns = 0  # the link is free from then on
        self._layer = -1
        self.rest = 0
        self._next_rest = _REST
        self._tries = True  # where nothing pays, the next event tries one all the same

    def learn(self, now_ns: int, n_experts: int, n_pairs: int, ns: int) -> None:
        self._now_ns = now_ns
        if n_experts == 0:
            return
        size = _size(n_pairs // n_experts)
        new = ns / n_experts / self.expert_bytes[self._layer]
        old = self.ns_per_byte.get(size, new)
        # One that took long may have been disturbed: an estimate falls at once and rises slowly.
        self.ns_per_byte[size] = min(new, old + _RISE * (new - old))

    def compute_ns(self, layer: int, n_rows: int) -> float | None:
        """Of one expert with so many rows, or at most; None: nothing is known."""
        size = _size(n_rows)
        known = [s for s in self.ns_per_byte if s <= size]
        if known:
            nearest = max(known)
            each = self.ns_per_byte[nearest] * (1 << size - nearest)
        elif self.ns_per_byte:
            each = self.ns_per_byte[min(self.ns_per_byte)]
        else:
            return None
        return each * self.expert_bytes[layer]

    def divide(self, layer: int, counts: Sequence[int]) -> Division:
        self._layer, self.rest = layer, 0
        copy_ns = self.copy_ns_per_byte * self.expert_bytes[layer]
        busy_ns = float(max(0, self._free_ns - self._now_ns))
        fewest_first = sorted(range(len(counts)), key=counts.__getitem__)
        n, cpu_ns = self._best(layer, [counts[i] for i in fewest_first], busy_ns, copy_ns)
        computed = fewest_first[:n]
        busy_ns += (len(counts) - n) * copy_ns
        passing = set(computed)
        # Of equally many rows the router's first choice is the likeliest to be asked for again.
        for i in sorted(computed, key=lambda i: (-counts[i], i)):
            if busy_ns + copy_ns > max(cpu_ns, copy_ns):
                break
            passing.remove(i)
            busy_ns += copy_ns
        self._free_ns = self._now_ns + int(busy_ns)
        return Division(frozenset(computed), frozenset(passing))

    def _best(
        self, layer: int, rows: Sequence[int], busy_ns: float, copy_ns: float
    ) -> tuple[int, float]:
        """How many of the first are to be computed, and what that takes."""
        if not rows:
            return 0, 0.0
        best, best_ns, least, cpu_ns = 0, 0.0, busy_ns + len(rows) * copy_ns, 0.0
        for n, n_rows in enumerate(rows, 1):
            each = self.compute_ns(layer, n_rows)
            if each is None:
                break
            cpu_ns += each
            longer = max(cpu_ns, busy_ns + (len(rows) - n) * copy_ns if n < len(rows) else 0.0)
            if longer < least:
                best, best_ns, least = n, cpu_ns, longer
        if best:
            self._next_rest, self._tries = _REST, False
            return best, best_ns
        if self._tries:
            self._tries = False
            return 1, self.compute_ns(layer, rows[0]) or 0.0
        self.rest, self._tries = self._next_rest, True
        self._next_rest = min(_LONGEST_REST, 2 * self._next_rest)
        return 0, 0.0


def _size(n_rows: int) -> int:
    return max(1, n_rows).bit_length()
