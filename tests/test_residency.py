"""One route event, one plan: checked by executing every plan on pretended slots."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from moe_gguf.policies import POLICIES, Plan, Residency, policy
from moe_gguf.policies.arc import ARC
from moe_gguf.policies.base import CachePolicy, RouteEvent
from moe_gguf.policies.cache import LFU, LRU, LoadOnDemand
from moe_gguf.policies.eap import ExpertPaths, PathCache
from moe_gguf.policies.layered import Layered, allocate, evenly
from moe_gguf.policies.order import Popularity

N_LAYERS, N_EXPERTS = 4, 12

# Caches that must know the arena or the model.
SIZED: dict[str, Callable[[int], CachePolicy]] = {
    "arc": ARC,
    "layered-arc": lambda n: Layered(
        N_EXPERTS, allocate(n, N_EXPERTS, range(N_LAYERS), {2: 0.1}, 3), ARC
    ),
    "even-lfu": lambda n: Layered(
        N_EXPERTS, evenly(n, N_EXPERTS, range(N_LAYERS)), lambda quota: LFU()
    ),
    "eap": lambda n: PathCache(ExpertPaths(range(N_LAYERS), N_EXPERTS)),
}


class Script:
    """A predictor that says what it is told."""

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        self.answers = list(answers)

    def guess(self, event: RouteEvent) -> Sequence[int]:
        return self.answers.pop(0)


class Slots:
    """An arena that only remembers which key each slot holds, and reads in the plan's order."""

    def __init__(self, residency: Residency) -> None:
        self.residency = residency
        self.held: list[int | None] = [None] * residency.n_slots

    def run(self, event: RouteEvent) -> Plan:
        before = dict(self.residency.slot_of)
        plan = self.residency.plan(event)
        base = event.layer * N_EXPERTS
        assert sorted(plan.experts) == sorted(event.experts), "an expert is lost or run twice"
        hits = [e for e in event.experts if base + e in before]
        assert plan.experts[: plan.n_hits] == hits, "resident experts come first"
        assert plan.loads == [0] * len(hits) + [1] * (len(event.experts) - len(hits))
        for expert, slot, load in zip(plan.experts, plan.slots, plan.loads, strict=True):
            if load:
                self.held[slot] = base + expert
            assert self.held[slot] == base + expert, "a slot holds another expert than planned"
        if len(event.experts) <= self.residency.n_slots:
            assert len(set(plan.slots)) == len(plan.slots), "a slot is recycled without need"
        for key, slot in plan.guesses:
            assert slot not in plan.slots, "a guess overwrites a slot in use"
            self.held[slot] = key
        for key, slot in self.residency.slot_of.items():
            assert self.held[slot] == key, "the table promises an expert that is not there"
        self.residency.check_integrity()
        return plan


def make(n_slots: int, name: str = "lru") -> Slots:
    if name in SIZED:
        return Slots(Residency(n_slots, N_EXPERTS, SIZED[name](n_slots), Popularity()))
    return Slots(Residency(n_slots, N_EXPERTS, *policy(name)))


def event(layer: int, *experts: int, counts: Sequence[int] | None = None) -> RouteEvent:
    return RouteEvent(layer, 1, experts, counts or [1] * len(experts))


def random_event(rng: random.Random) -> RouteEvent:
    n = rng.choice([1, 3, 3, 3, N_EXPERTS])
    experts = rng.sample(range(N_EXPERTS), n)
    counts = [rng.randrange(1, 5) for _ in experts]
    return RouteEvent(rng.randrange(N_LAYERS), sum(counts), experts, counts)


@pytest.mark.parametrize("n_slots", [1, 2, 5, 11, 12, 20, N_LAYERS * N_EXPERTS])
@pytest.mark.parametrize("name", [*POLICIES, *SIZED])
def test_random_events_and_failures(name: str, n_slots: int) -> None:
    rng = random.Random(n_slots)
    slots = make(n_slots, name)
    residency = slots.residency
    for _ in range(400):
        slots.run(random_event(rng))
        if rng.random() < 0.1:
            keys = list(residency.slot_of)
            lost = rng.sample(keys, rng.randrange(len(keys) + 1))
            residency.drop(lost)
            assert not set(lost) & set(residency.slot_of)
            residency.check_integrity()


def test_an_arena_for_everything_misses_each_expert_once() -> None:
    for name in ("lru", "lfu", *SIZED):
        rng = random.Random(3)
        slots = make(N_LAYERS * N_EXPERTS, name)
        events = [random_event(rng) for _ in range(200)]
        misses = sum(len(e.experts) - slots.run(e).n_hits for e in events)
        assert misses == len({(e.layer, x) for e in events for x in e.experts})


def test_hits_first_then_misses_by_popularity() -> None:
    slots = make(8)
    slots.run(event(0, 4, 6))
    plan = slots.run(event(0, 1, 4, 2, 6, 3, counts=[1, 1, 5, 9, 2]))
    # 4 and 6 are resident and stay in the router's order, though 6 is more popular.
    assert plan.experts == [4, 6, 2, 3, 1]
    assert plan.n_hits == 2


def test_an_event_larger_than_the_arena_is_served_in_turns() -> None:
    slots = make(2)
    slots.run(event(0, 5))
    plan = slots.run(event(0, 1, 5, 2, 3))
    # 5 is there and runs first; 1 takes the free slot; then each slot is reused in the order of
    # execution: 2 over 5, 3 over 1.
    assert plan.experts == [5, 1, 2, 3]
    assert plan.slots[2:] == plan.slots[:2]
    assert sorted(slots.residency.resident(0)) == [2, 3]


def test_other_layers_are_evicted_before_slots_are_reused() -> None:
    slots = make(3)
    slots.run(event(1, 0, 1, 2))
    plan = slots.run(event(0, 7, 8, 9))
    assert len(set(plan.slots)) == 3
    assert not slots.residency.resident(1)


def test_an_expert_of_the_event_is_never_evicted_for_another() -> None:
    slots = make(3)
    slots.run(event(0, 1, 2, 3))
    plan = slots.run(event(0, 1, 4))  # 1 is the oldest, but needed now
    assert plan.n_hits == 1
    assert 1 in slots.residency.resident(0)


def test_nothing_stays_under_load_on_demand() -> None:
    slots = make(4, "load-on-demand")
    for _ in range(3):
        assert slots.run(event(0, 1, 2, 3)).n_hits == 0
        assert not slots.residency.slot_of
        assert len(slots.residency.free) == 4


def test_guesses_take_free_slots_only() -> None:
    ahead = [N_EXPERTS + e for e in (1, 2, 3, 4)]
    script = Script([[*ahead[:2], ahead[0]], ahead, ahead, []])
    slots = Slots(Residency(5, N_EXPERTS, LRU(), Popularity(), script))
    assert [key for key, _ in slots.run(event(0, 0)).guesses] == ahead[:2]  # no key twice
    # Two slots are free and one is demanded, so one guess fits: the best that is not there yet.
    assert [key for key, _ in slots.run(event(0, 0, 5)).guesses] == ahead[2:3]
    before = set(slots.residency.slot_of)
    assert slots.run(event(0, 0)).guesses == []  # full: nothing is evicted for a guess
    assert set(slots.residency.slot_of) == before
    assert slots.run(event(1, 1, 2)).n_hits == 2  # the guesses came true


@pytest.mark.parametrize("name", POLICIES)
def test_random_guesses_evict_nothing(name: str) -> None:
    rng = random.Random(4)
    keys = range(N_LAYERS * N_EXPERTS)
    script = Script([rng.sample(keys, 6) for _ in range(300)])
    cache, order, _ = policy(name)
    slots = Slots(Residency(15, N_EXPERTS, cache, order, script))
    for _ in range(300):
        demanded = random_event(rng)
        before = set(slots.residency.slot_of)
        plan = slots.run(demanded)
        wanted = {demanded.layer * N_EXPERTS + e for e in demanded.experts}
        lost = before - set(slots.residency.slot_of)
        assert len(lost) <= sum(plan.loads), "more was evicted than demanded"
        assert not {key for key, _ in plan.guesses} & (before | wanted)
        if rng.random() < 0.2:
            slots.residency.drop([key for key, _ in plan.guesses])
            slots.residency.drop(rng.sample(sorted(slots.residency.slot_of), 0))
            slots.residency.check_integrity()


def test_load_on_demand_takes_no_guess() -> None:
    slots = Slots(Residency(4, N_EXPERTS, LoadOnDemand(), None, Script([[20, 21]])))
    assert slots.run(event(0, 1)).guesses == []


def test_a_dropped_expert_is_loaded_again() -> None:
    slots = make(4)
    slots.run(event(0, 1, 2))
    slots.residency.drop([1])
    plan = slots.run(event(0, 1, 2))
    assert plan.experts == [2, 1]
    assert plan.loads == [0, 1]
