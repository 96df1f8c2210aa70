"""Cache policies keep their contract and agree with slow, obvious twins of themselves."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Container

import pytest

from moe_gguf.policies import POLICIES, Facts, policy
from moe_gguf.policies import cache as cache_module
from moe_gguf.policies.arc import ARC
from moe_gguf.policies.base import CachePolicy
from moe_gguf.policies.cache import LFU, LRU, Belady, LoadOnDemand
from moe_gguf.policies.eap import ExpertPaths, PathCache
from moe_gguf.policies.layered import Layered
from moe_gguf.policies.order import FirstSeen, Popularity

N_KEYS, CAPACITY = 24, 9

CACHES: dict[str, Callable[[], CachePolicy]] = {
    "load-on-demand": LoadOnDemand,
    "lru": LRU,
    "lfu": LFU,
    "lfu-short": lambda: LFU(0.1),
    "arc": lambda: ARC(CAPACITY),
    "arc-small": lambda: ARC(3),  # resident beyond its capacity, as a layer in a shared arena
    "layered-arc": lambda: Layered(8, {0: 4, 1: 3, 2: 2}, lambda layer, quota: ARC(quota)),
    "layered-lfu": lambda: Layered(8, {0: 8, 1: 0, 2: 1}, lambda layer, quota: LFU()),
    "eap": lambda: PathCache(ExpertPaths(range(3), 8)),
    "belady": lambda: Belady(random.Random(5).choices(range(N_KEYS), k=700)),
    "belady-surprised": lambda: Belady([]),  # every demand comes unforeseen
}


class SlowLRU:
    """Looks through all ages at every eviction."""

    def __init__(self) -> None:
        self.last: dict[int, int] = {}
        self.now = 0

    def demand(self, key: int) -> None:
        self.now += 1
        self.last[key] = self.now

    def evict(self, pinned: Container[int]) -> int | None:
        victim = min(
            (k for k in self.last if k not in pinned), key=self.last.__getitem__, default=None
        )
        if victim is not None:
            del self.last[victim]
        return victim


class SlowLFU:
    """Remembers every single demand and weighs all of them again at every eviction."""

    def __init__(self, half_life: float) -> None:
        self.half_life = half_life
        self.demands: dict[int, list[float]] = {}
        self.resident: set[int] = set()
        self.now = 0.0  # in half-lives

    def demand(self, key: int) -> None:
        self.resident.add(key)
        self.demands.setdefault(key, []).append(self.now)
        self.now += 1 / (self.half_life * len(self.demands))

    def score(self, key: int) -> float:
        return math.fsum(math.pow(2, then - self.now) for then in self.demands[key])

    def evict(self, pinned: Container[int]) -> int | None:
        victim = min((k for k in self.resident if k not in pinned), key=self.score, default=None)
        if victim is not None:
            self.resident.remove(victim)
        return victim


@pytest.fixture(params=CACHES)
def cache(request: pytest.FixtureRequest) -> CachePolicy:
    return CACHES[request.param]()


@pytest.mark.parametrize("seed", range(8))
def test_random_calls_keep_the_contract(cache: CachePolicy, seed: int) -> None:
    rng = random.Random(seed)
    resident: set[int] = set()
    for _ in range(600):
        key = rng.randrange(N_KEYS)
        pinned = set(rng.sample(range(N_KEYS), rng.choice([0, 1, 4, N_KEYS])))
        what = rng.random()
        if key in resident:
            if what < 0.8:
                cache.touch(key)
            else:
                cache.remove(key)
                resident.remove(key)
        elif what < 0.8:
            if len(resident) == CAPACITY:
                victim = cache.evict(pinned, key)
                assert (victim is None) == (resident <= pinned)
                if victim is None:
                    continue
                assert victim in resident
                assert victim not in pinned
                resident.remove(victim)
            if cache.admit(key):
                resident.add(key)
        else:
            victim = cache.evict(pinned)
            assert (victim is None) == (resident <= pinned)
            if victim is not None:
                assert victim in resident - pinned
                resident.remove(victim)
        assert len(cache) == len(resident)
        assert set(cache) == resident
        assert all((k in cache) == (k in resident) for k in range(N_KEYS))
        cache.check_integrity()


def test_eviction_empties_the_cache_and_loses_no_pinned_key(cache: CachePolicy) -> None:
    keys = [key for key in range(CAPACITY) if cache.admit(key)]
    pinned = set(keys[::2])
    free = {cache.evict(pinned) for _ in keys[1::2]}
    assert free == set(keys[1::2])
    assert cache.evict(pinned) is None
    assert {cache.evict(()) for _ in keys[::2]} == pinned
    assert cache.evict(()) is None
    assert len(cache) == 0


def test_a_removed_key_can_return(cache: CachePolicy) -> None:
    for _ in range(3):
        if not cache.admit(7):
            return
        cache.remove(7)
        cache.check_integrity()
        assert 7 not in cache
        assert cache.evict(()) is None
        assert cache.admit(7)
        assert cache.evict({7}) is None
        assert cache.evict(()) == 7


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("half_life", [None, 0.05, 0.6, 5.0])
def test_same_victims_as_the_slow_twin(
    half_life: float | None, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rescaling once per run or so would prove little; this does it every ten half-lives.
    monkeypatch.setattr(cache_module, "MAX_WEIGHT", 1e3)
    fast = LRU() if half_life is None else LFU(half_life)
    slow = SlowLRU() if half_life is None else SlowLFU(half_life)
    rng = random.Random(seed)
    for _ in range(1500):
        key = min(int(rng.expovariate(0.15)), N_KEYS - 1)
        if key in fast:
            fast.touch(key)
        else:
            if len(fast) == CAPACITY:
                # Often the youngest keys, as in a layer; sometimes none, sometimes nearly all.
                pinned = set(rng.sample(sorted(fast), rng.choice([0, 1, 3, CAPACITY - 1])))
                assert fast.evict(pinned) == slow.evict(pinned)
            assert fast.admit(key)
        slow.demand(key)
        fast.check_integrity()


def test_lru_by_hand() -> None:
    lru = LRU()
    for key in (1, 2, 3):
        lru.admit(key)
    lru.touch(1)  # oldest to youngest: 2 3 1
    assert lru.evict({2}) == 3  # 2 is older but pinned
    lru.admit(4)  # 2 1 4
    assert [lru.evict(()) for _ in range(3)] == [2, 1, 4]


def test_lfu_by_hand() -> None:
    lfu = LFU(1000)  # so long a half-life is plain counting
    for key, n in ((1, 3), (2, 2), (3, 1)):
        lfu.admit(key)
        for _ in range(n - 1):
            lfu.touch(key)
    assert lfu.evict(()) == 3  # counts 3 2 1
    lfu.admit(4)
    assert lfu.evict(()) == 4  # counts 3 2, and 1 for the newcomer
    lfu.admit(3)  # its second demand: the first was not forgotten with its slot
    assert lfu.evict({2}) == 3  # 2 has as many and is older, but pinned
    lfu.admit(3)
    assert [lfu.evict(()) for _ in range(3)] == [2, 1, 3]  # 2; then 3 3: the older one goes


def test_lfu_forgets_at_its_half_life() -> None:
    lfu = LFU(1.0)
    # With one known key the half-life is one demand: weights 1 2 4 8, 15 together. The first
    # demand of key 2 weighs 16.
    lfu.admit(1)
    for _ in range(3):
        lfu.touch(1)
    lfu.admit(2)
    assert lfu.evict(()) == 1
    # Two known keys: the half-life is two demands. 16 * sqrt(2) more makes 37.6 for key 1.
    lfu.admit(1)
    assert lfu.evict(()) == 2


def test_lfu_survives_more_half_lives_than_a_float_has() -> None:
    lfu = LFU(0.5)
    for key in (1, 2):
        lfu.admit(key)
    for _ in range(5000):
        lfu.touch(1)
    lfu.touch(2)
    lfu.touch(2)
    lfu.touch(1)
    assert lfu.evict({1}) == 2
    assert lfu.evict(()) == 1


def test_belady_by_hand() -> None:
    belady = Belady([1, 2, 3, 4, 2, 1, 4, 3])
    for key in (1, 2, 3):
        belady.admit(key)
    # At the first 4 the next uses are 1: 5, 2: 4, 3: 7.
    assert belady.evict({4}) == 3
    belady.admit(4)
    belady.touch(2)  # never again
    assert belady.evict(()) == 2
    belady.touch(1)
    belady.touch(4)  # neither is needed again: either may go for 3
    assert belady.evict({3, 4}) == 1


def test_belady_bypasses_only_what_is_needed_last() -> None:
    belady = Belady([1, 2, 3, 4, 3, 1, 4])
    belady.admit(1)  # next at 5
    belady.admit(2)  # never
    assert not belady.bypass(3)  # next at 4: better than both
    assert belady.evict(()) == 2
    belady.admit(3)
    assert belady.bypass(4)  # next at 6: later than 1 and 3, and this demand is now past
    assert 4 not in belady


def test_popularity_is_descending_and_stable() -> None:
    assert list(Popularity().order([9, 8, 7, 6, 5], [1, 3, 1, 3, 2])) == [1, 3, 4, 0, 2]
    assert list(Popularity().order([9, 8, 7], [1, 1, 1])) == [0, 1, 2]
    assert list(FirstSeen().order([9, 8, 7], [1, 3, 2])) == [0, 1, 2]


def test_policies_by_name() -> None:
    facts = Facts(9, 8, 2, range(3))
    for name in POLICIES:
        caches = [policy(name, facts).cache for _ in range(2)]
        assert caches[0] is not caches[1], "a policy's state is shared"
    with pytest.raises(ValueError, match=r"'mru'.*load-on-demand, lru, lfu"):
        policy("mru", facts)
