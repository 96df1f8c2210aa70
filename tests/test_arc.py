"""ARC decides as its paper says, step by step."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from moe_gguf.policies.arc import ARC

C, N_KEYS = 12, 60


class PaperARC:
    """The published pseudocode, line by line, on lists whose last key is the most recent."""

    def __init__(self, c: int) -> None:
        self.c = c
        self.p = 0.0
        self.t1: list[int] = []
        self.t2: list[int] = []
        self.b1: list[int] = []
        self.b2: list[int] = []

    def replace(self, x: int) -> None:
        n = len(self.t1)
        if n >= 1 and ((x in self.b2 and n == self.p) or n > self.p):
            self.b1.append(self.t1.pop(0))
        else:
            self.b2.append(self.t2.pop(0))

    def request(self, x: int) -> bool:
        """Case I to IV; returns whether it was a hit."""
        if x in self.t1 or x in self.t2:
            (self.t1 if x in self.t1 else self.t2).remove(x)
            self.t2.append(x)
            return True
        if x in self.b1:
            self.p = min(self.c, self.p + max(1.0, len(self.b2) / len(self.b1)))
            self.replace(x)
            self.b1.remove(x)
            self.t2.append(x)
            return False
        if x in self.b2:
            self.p = max(0.0, self.p - max(1.0, len(self.b1) / len(self.b2)))
            self.replace(x)
            self.b2.remove(x)
            self.t2.append(x)
            return False
        n1 = len(self.t1) + len(self.b1)
        n_all = n1 + len(self.t2) + len(self.b2)
        if n1 == self.c:
            if len(self.t1) < self.c:
                self.b1.pop(0)
                self.replace(x)
            else:
                self.t1.pop(0)
        elif n_all >= self.c:
            if n_all == 2 * self.c:
                self.b2.pop(0)
            self.replace(x)
        self.t1.append(x)
        return False


def uniform(rng: random.Random) -> list[int]:
    return rng.choices(range(N_KEYS), k=4000)


def skewed(rng: random.Random) -> list[int]:
    return [min(int(rng.expovariate(0.1)), N_KEYS - 1) for _ in range(4000)]


def loops(rng: random.Random) -> list[int]:
    """Loops just below, at and above the capacity."""
    lengths = (C - 1, C, C + 1, C + 5, 2 * C + 3) * 3
    return [i % n for n in lengths for i in range(rng.choice([80, 130]))]


def scans(rng: random.Random) -> list[int]:
    """A hot set, interrupted by scans over cold keys."""
    trace: list[int] = []
    for _ in range(60):
        trace += rng.choices(range(C - 3), k=rng.randrange(5, 50))
        trace += range(C, C + rng.randrange(3, N_KEYS - C))
    return trace


def shifts(rng: random.Random) -> list[int]:
    """What is hot moves on, so the target moves both ways."""
    return [(i // 150 * 7 + int(rng.expovariate(0.2))) % N_KEYS for i in range(4000)]


def demand(arc: ARC, key: int) -> bool:
    if key in arc:
        arc.touch(key)
        return True
    if len(arc) == arc.capacity:
        assert arc.evict((), key) is not None
    assert arc.admit(key)
    return False


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [uniform, skewed, loops, scans, shifts])
@pytest.mark.parametrize("capacity", [1, 2, C])
def test_every_step_is_the_papers(
    make: Callable[[random.Random], list[int]], seed: int, capacity: int
) -> None:
    arc, paper = ARC(capacity), PaperARC(capacity)
    targets = set()
    for key in make(random.Random(seed)):
        assert demand(arc, key) == paper.request(key)
        assert [list(arc.t1), list(arc.t2)] == [paper.t1, paper.t2]
        assert [list(arc.b1), list(arc.b2)] == [paper.b1, paper.b2]
        assert arc.p == paper.p
        arc.check_integrity()
        targets.add(arc.p)
    if capacity == C and make is not uniform:
        assert len(targets) > 3, "the trace did not make it adapt"


def run(keys: Sequence[int], arc: ARC) -> None:
    for key in keys:
        demand(arc, key)


def test_by_hand() -> None:
    arc = ARC(2)
    run([1, 1, 2, 3], arc)  # 1 is in t2; 3 takes the place of 2, since p = 0 wants no t1
    assert [list(arc.t1), list(arc.t2), list(arc.b1), list(arc.b2)] == [[3], [1], [2], []]
    run([2], arc)  # a ghost of t1: p becomes 1, t1 is not above it, so t2's 1 goes
    assert [list(arc.t1), list(arc.t2), list(arc.b1), list(arc.b2)] == [[3], [2], [], [1]]
    assert arc.p == 1
    # A ghost of t2: p falls back to 0, and 3 goes.
    run([1], arc)
    assert [list(arc.t1), list(arc.t2), list(arc.b1), list(arc.b2)] == [[], [2, 1], [3], []]
    assert arc.p == 0


def test_a_scan_does_not_flush_what_is_used_again() -> None:
    arc = ARC(4)
    run([1, 2, 1, 2, *range(10, 30)], arc)
    assert 1 in arc and 2 in arc


def test_pinned_keys_stay_and_the_other_list_serves() -> None:
    arc = ARC(3)
    run([1, 1, 2, 3], arc)  # t1: 2 3, t2: 1
    assert arc.evict({2}) == 3
    assert arc.evict({2}) == 1
    assert arc.evict({2}) is None
    arc.check_integrity()


def test_a_ghost_adapts_once_whoever_meets_it() -> None:
    arc = ARC(3)
    run([1, 1, 2, 3, 4], arc)  # 2 is a ghost
    assert arc.evict(set(arc), 2) is None  # everything is pinned: the caller recycles a slot
    arc.remove(4)
    arc.admit(2)
    assert arc.p == 1
    arc = ARC(3)
    run([1, 1, 2, 3, 4], arc)
    arc.remove(4)
    arc.admit(2)  # a slot was free, so nobody asked for a victim
    assert arc.p == 1
    arc.check_integrity()


def test_resizing_keeps_the_keys() -> None:
    arc = ARC(8)
    rng = random.Random(1)
    run(rng.choices(range(20), k=400), arc)
    before = set(arc)
    arc.resize(3)
    assert set(arc) == before
    arc.check_integrity()
    while len(arc) > 3:
        assert arc.evict(()) in before
        arc.check_integrity()
    run(rng.choices(range(20), k=100), arc)
    assert len(arc) == 3
    arc.resize(6)
    arc.check_integrity()
