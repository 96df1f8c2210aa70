"""Cache policies: which experts keep their slot.

They own an order over keys. They know neither slots nor layers, and take microseconds: they run
inside the route callback, between the gate and the experts of a layer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from itertools import islice

# Replayed on routing recorded from three models: 30 layers x 32 experts, top 8, on real text; 8 x
# 32, top 4, and 16 x 64, top 8, random weights with calibrated locality. With slots for 40 to 80 %
# of the experts 0.6 beat LRU on each, by 0.2 to 2.1 points of hit rate. 1 gains another 0.6 to 2 on
# the real text, but loses to LRU on the other two at 40 %. There LRU wins in small arenas anyway
# (by 0.7 and 2.6 points at 30 %, by 4 at 20 %), while on the real text it falls off its cliff.
HALF_LIFE = 0.6

# Far below the largest float (1.8e308), so that a sum of weights cannot overflow either.
MAX_WEIGHT = 1e200


class LoadOnDemand:
    """Keeps nothing between layers: the papers' baseline and the smallest arena that works."""

    def touch(self, key: int, votes: int = 1) -> None:
        raise AssertionError("nothing is resident")

    def admit(self, key: int, votes: int = 1) -> bool:
        return False

    def remove(self, key: int) -> None:
        raise AssertionError("nothing is resident")

    def evict(
        self, pinned: Container[int], incoming: int = -1, demanded: bool = True
    ) -> int | None:
        return None

    def check_integrity(self) -> None:
        pass

    def __contains__(self, key: object) -> bool:
        return False

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[int]:
        return iter(())


class LRU:
    """Evicts the key whose last demand is the oldest."""

    def __init__(self) -> None:
        # Not a plain dict: taking its first key again and again walks over all deleted ones.
        self._keys: OrderedDict[int, None] = OrderedDict()

    def touch(self, key: int, votes: int = 1) -> None:
        self._keys.move_to_end(key)

    def admit(self, key: int, votes: int = 1) -> bool:
        self._keys[key] = None
        return True

    def remove(self, key: int) -> None:
        del self._keys[key]

    def evict(
        self, pinned: Container[int], incoming: int = -1, demanded: bool = True
    ) -> int | None:
        # A layer's hits were just touched, so pinned keys are the youngest: the first key fits.
        for key in self._keys:
            if key not in pinned:
                del self._keys[key]
                return key
        return None

    def coldest(self, n: int) -> list[int]:
        return list(islice(self._keys, n))

    def check_integrity(self) -> None:
        pass

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[int]:
        return iter(self._keys)


class LFU:
    """Evicts the key with the smallest demand count, where a demand's weight halves with age.

    ``half_life`` is in demands per key ever seen: at 1, a demand weighs half after as many further
    demands as there are known keys, which is ``n_experts / n_experts_used`` tokens. So one value
    serves models of all sizes.

    Scores survive eviction: an expert that comes back is judged by its whole past. Instead of
    ageing every score, each demand weighs a little more than the one before it. Two keys therefore
    never tie: of two equal histories the younger one is higher. A demand of several votes weighs as
    many times as much, but ages the others like one of a single vote: half of a group's votes are
    as old as a step.

    ``history`` says how often keys were demanded before, in any unit. Their scores begin where they
    would be if these demands, evenly mixed, had never ended.
    """

    def __init__(
        self, half_life: float = HALF_LIFE, history: Mapping[int, float] | None = None
    ) -> None:
        assert half_life >= 0.01  # shorter is LRU, and its weights overflow
        self.half_life = half_life
        self._scores: dict[int, float] = {}  # of every key ever demanded, resident or not
        self._resident: set[int] = set()
        self._weight = 1.0  # of the next demand
        self._growth = 2.0
        # Each resident key, and no key twice, is in one of these two. The heap's entries may be out
        # of date; they are then too low, since scores only grow, and evict() corrects the ones it
        # meets. That keeps the heap out of touch().
        self._heap: list[tuple[float, int]] = []
        self._aside: list[int] = []  # just admitted, or pinned when evict() met them
        self._queued: set[int] = set()
        if history:
            self._growth = self._growth_for(len(history))
            # The sum of weights that shrink by that factor with each demand.
            scale = 1 / (1 - 1 / self._growth) / sum(history.values())
            self._scores = {key: scale * demands for key, demands in history.items()}

    def _growth_for(self, n_keys: int) -> float:
        growth: float = 2.0 ** (1.0 / (self.half_life * n_keys))
        return growth

    def touch(self, key: int, votes: int = 1) -> None:
        self._scores[key] += votes * self._weight
        self._weight *= self._growth
        if self._weight > MAX_WEIGHT:
            self._rescale()

    def admit(self, key: int, votes: int = 1) -> bool:
        self._resident.add(key)
        if key not in self._queued:  # else an entry outlived remove()
            self._queued.add(key)
            self._aside.append(key)
        if key not in self._scores:
            self._scores[key] = 0.0
            self._growth = self._growth_for(len(self._scores))
        self.touch(key, votes)
        return True

    def worth(self, key: int) -> float:
        """What a key deserves its slot by, resident or not; to be compared, and soon."""
        return self._scores.get(key, 0.0)

    def remove(self, key: int) -> None:
        self._resident.remove(key)

    def evict(
        self, pinned: Container[int], incoming: int = -1, demanded: bool = True
    ) -> int | None:
        heap, scores = self._heap, self._scores
        if self._aside:
            aside, self._aside = self._aside, []
            for key in aside:
                if key in pinned:
                    self._aside.append(key)
                else:
                    heappush(heap, (scores[key], key))
        while heap:
            score, key = heap[0]
            if key not in self._resident:
                heappop(heap)
                self._queued.remove(key)
            elif score != scores[key]:
                heapreplace(heap, (scores[key], key))
            elif key in pinned:
                heappop(heap)
                self._aside.append(key)
            else:
                heappop(heap)
                self._queued.remove(key)
                self._resident.remove(key)
                return key
        return None

    def coldest(self, n: int) -> list[int]:
        return sorted(self._resident, key=self._scores.__getitem__)[:n]

    def _rescale(self) -> None:
        """Divide all scores by the weight before it overflows: rare, so it may visit every key."""
        for key in self._scores:
            self._scores[key] /= self._weight
        self._weight = 1.0
        self._heap = [(self._scores[key], key) for _, key in self._heap]
        heapify(self._heap)

    def check_integrity(self) -> None:
        entries = [key for _, key in self._heap] + self._aside
        assert len(entries) == len(set(entries)), "a key is queued twice"
        assert set(entries) == self._queued, "the queue forgot a key"
        assert self._resident <= self._queued, "a key is lost"
        assert all(score <= self._scores[key] for score, key in self._heap), "an entry is too high"

    def __contains__(self, key: object) -> bool:
        return key in self._resident

    def __len__(self) -> int:
        return len(self._resident)

    def __iter__(self) -> Iterator[int]:
        return iter(self._resident)


class Belady:
    """Evicts the key whose next demand is farthest: knows the future, so it serves replay only.

    ``future`` holds the keys in demand order. No policy has fewer misses, where ``bypass`` lets
    pass what is not worth a slot.
    """

    def __init__(self, future: Sequence[int]) -> None:
        self._never = len(future)
        self._uses: dict[int, list[int]] = {}  # positions in the future, the next one last
        for position in range(len(future) - 1, -1, -1):
            self._uses.setdefault(future[position], []).append(position)
        self._next: dict[int, int] = {}  # of resident keys
        self._heap: list[tuple[int, int]] = []  # (-next use, key); entries of the past sink

    def touch(self, key: int, votes: int = 1) -> None:
        self._next[key] = position = self._consume(key)
        heappush(self._heap, (-position, key))

    def admit(self, key: int, votes: int = 1) -> bool:
        self.touch(key)
        return True

    def remove(self, key: int) -> None:
        del self._next[key]

    def evict(
        self, pinned: Container[int], incoming: int = -1, demanded: bool = True
    ) -> int | None:
        aside = []
        victim = None
        while victim is None and (entry := self._farthest()) is not None:
            heappop(self._heap)
            if entry[1] in pinned:
                aside.append(entry)
            else:
                victim = entry[1]
                del self._next[victim]
        for entry in aside:
            heappush(self._heap, entry)
        return victim

    def bypass(self, key: int) -> bool:
        """Whether a missing key is needed again later than everything resident.

        If so its demand counts as served without a slot. A real arena cannot do that.
        """
        farthest = self._farthest()
        uses = self._uses.get(key, ())
        if farthest is None or (uses[-2] if len(uses) > 1 else self._never) < -farthest[0]:
            return False
        self._consume(key)
        return True

    def _consume(self, key: int) -> int:
        """Take one demand of the key from the future and return the position of the next."""
        uses = self._uses.get(key)
        if uses:
            uses.pop()
        return uses[-1] if uses else self._never

    def _farthest(self) -> tuple[int, int] | None:
        heap = self._heap
        while heap and self._next.get(heap[0][1]) != -heap[0][0]:
            heappop(heap)
        return heap[0] if heap else None

    def check_integrity(self) -> None:
        live = {key for entry, key in self._heap if self._next.get(key) == -entry}
        assert live == set(self._next), "a key is lost"

    def __contains__(self, key: object) -> bool:
        return key in self._next

    def __len__(self) -> int:
        return len(self._next)

    def __iter__(self) -> Iterator[int]:
        return iter(self._next)
