"""ARC: a cache that learns how much of itself to give to recency and how much to frequency.

After Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache" (FAST 2003), with
its adaptation rule unchanged. Knows keys only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator

Keys = OrderedDict[int, None]  # from the least to the most recent


class ARC:
    """Adaptive Replacement Cache over ``capacity`` keys.

    ``t1`` holds the resident keys demanded once lately, ``t2`` those demanded at least twice;
    ``b1`` and ``b2`` remember what was evicted from each. ``p`` is how large ``t1`` should be: a
    demand for a key in ``b1`` says that ``t1`` is too small, one in ``b2`` that it is too large.

    Two differences from the paper, neither visible without pins and failed reads:

    - The caller asks for a victim before it admits, so ``p`` is adapted by whichever call meets
      the ghost first.
    - The paper keeps the ghosts within bounds by cases, before it replaces. Here each eviction
      turns one resident key into a ghost, and what is too much is dropped once the missing key is
      in, which is the same key. This also holds when the cache is not full, or larger than its
      capacity, as a layer may be for a while in a shared arena.
    """

    def __init__(self, capacity: int) -> None:
        assert capacity >= 0
        self.capacity = capacity
        self.p = 0.0
        self.t1: Keys = OrderedDict()
        self.t2: Keys = OrderedDict()
        self.b1: Keys = OrderedDict()
        self.b2: Keys = OrderedDict()
        self._adapted = -1  # the ghost that evict() adapted p for, until it is admitted

    def touch(self, key: int, votes: int = 1) -> None:
        if key in self.t2:
            self.t2.move_to_end(key)
        else:
            del self.t1[key]
            self.t2[key] = None

    def admit(self, key: int, votes: int = 1) -> bool:
        for ghosts in (self.b1, self.b2):
            if key in ghosts:
                self._adapt(key)
                del ghosts[key]
                self.t2[key] = None
                break
        else:
            self.t1[key] = None
        self._adapted = -1
        self._trim()
        return True

    def remove(self, key: int) -> None:
        del (self.t1 if key in self.t1 else self.t2)[key]

    def evict(
        self, pinned: Container[int], incoming: int = -1, demanded: bool = True
    ) -> int | None:
        if demanded:
            self._adapt(incoming)
        n = len(self.t1)
        lists = [(self.t1, self.b1), (self.t2, self.b2)]
        if not (n > self.p or (n == self.p and incoming in self.b2)):
            lists.reverse()
        for keys, ghosts in lists:
            # Pinned keys were demanded just now, so they are the youngest: the first mostly fits.
            for key in keys:
                if key not in pinned:
                    del keys[key]
                    ghosts[key] = None
                    self._trim()
                    return key
        return None

    def resize(self, capacity: int) -> None:
        """Change the capacity; the resident keys stay, even where they are now too many."""
        assert capacity >= 0
        self.capacity = capacity
        self.p = min(self.p, capacity)
        self._trim()

    def _adapt(self, key: int) -> None:
        if key == self._adapted:
            return
        n1, n2 = len(self.b1), len(self.b2)
        if key in self.b1:
            self.p = min(float(self.capacity), self.p + max(1.0, n2 / n1))
        elif key in self.b2:
            self.p = max(0.0, self.p - max(1.0, n1 / n2))
        else:
            return
        self._adapted = key

    def _trim(self) -> None:
        b1, b2 = self.b1, self.b2
        while b1 and len(self.t1) + len(b1) > self.capacity:
            b1.popitem(last=False)
        while b2 and len(self) + len(b1) + len(b2) > 2 * self.capacity:
            b2.popitem(last=False)

    def check_integrity(self) -> None:
        lists = (self.t1, self.t2, self.b1, self.b2)
        assert len(set().union(*lists)) == sum(map(len, lists)), "a key is in two lists"
        assert 0 <= self.p <= self.capacity, "the target is out of range"
        assert not self.b1 or len(self.t1) + len(self.b1) <= self.capacity, "too many ghosts"
        assert not self.b2 or sum(map(len, lists)) <= 2 * self.capacity, "too many ghosts"

    def __contains__(self, key: object) -> bool:
        return key in self.t1 or key in self.t2

    def __len__(self) -> int:
        return len(self.t1) + len(self.t2)

    def __iter__(self) -> Iterator[int]:
        yield from self.t1
        yield from self.t2
