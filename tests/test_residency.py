"""One route event, one plan: checked by executing every plan on pretended slots."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from moe_gguf.policies import POLICIES, Facts, Plan, Residency, policy
from moe_gguf.policies.base import Guess, Phase, RouteEvent
from moe_gguf.policies.cache import LRU
from moe_gguf.policies.order import Popularity

N_LAYERS, N_EXPERTS = 4, 12


class Slots:
    """An arena that only remembers which key each slot holds, and reads in the plan's order."""

    def __init__(self, residency: Residency) -> None:
        self.residency = residency
        self.held: list[int | None] = [None] * residency.n_slots

    def run(self, event: RouteEvent) -> Plan:
        """Plan an event and do what the plan says."""
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
        if len(event.experts) <= self.residency.n_slots and self.residency.scan is None:
            assert len(set(plan.slots)) == len(plan.slots), "a slot is recycled without need"
        self.check()
        return plan

    def guess(self, event: RouteEvent, plan: Plan, keys: Sequence[int]) -> list[int]:
        """Read these guesses after an event; which of them found a slot."""
        needed = {event.layer * N_EXPERTS + e for e in event.experts} & set(self.residency.slot_of)
        placed = self.residency.guess(event, [Guess(key, 1.0) for key in keys], keys)
        for key, slot in placed:
            self.held[slot] = key  # if the event computes there, once that is done
        assert needed <= set(self.residency.slot_of), "a guess evicts what is needed now"
        self.check()
        return [key for key, _ in placed]

    def check(self) -> None:
        for key, slot in self.residency.slot_of.items():
            assert self.held[slot] == key, "the table promises an expert that is not there"
        self.residency.check_integrity()


def make(n_slots: int, name: str = "lru") -> Slots:
    chosen = policy(name, Facts(n_slots, N_EXPERTS, 3, range(N_LAYERS)))
    return Slots(Residency(n_slots, N_EXPERTS, chosen.cache, chosen.order, chosen.scan))


def event(layer: int, *experts: int, counts: Sequence[int] | None = None) -> RouteEvent:
    return RouteEvent(layer, 1, experts, counts or [1] * len(experts), Phase.DECODE, 1)


def random_event(rng: random.Random) -> RouteEvent:
    n = rng.choice([1, 3, 3, 3, N_EXPERTS])
    experts = rng.sample(range(N_EXPERTS), n)
    counts = [rng.randrange(1, 5) for _ in experts]
    layer = rng.randrange(N_LAYERS)
    return RouteEvent(layer, sum(counts), experts, counts, Phase.PREFILL, rng.choice([1, 8]))


@pytest.mark.parametrize("n_slots", [1, 2, 5, 11, 12, 20, N_LAYERS * N_EXPERTS])
@pytest.mark.parametrize("name", POLICIES)
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
    for name in ("lru", "lfu"):
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


def test_a_guess_is_on_probation() -> None:
    slots = Slots(Residency(5, N_EXPERTS, LRU(), Popularity()))
    ahead = [N_EXPERTS + e for e in (1, 2, 3, 4)]
    demanded = event(0, 0, 5)
    plan = slots.run(demanded)
    assert slots.guess(demanded, plan, [*ahead[:2], ahead[0]]) == ahead[:2]  # no key twice
    # One slot is free. The fourth guess finds none: everything resident is needed or guessed.
    assert slots.guess(demanded, plan, ahead) == ahead[2:3]
    residency = slots.residency
    assert not set(ahead) & set(residency.cache), "the policy learns of a guess before its use"
    assert slots.run(event(1, 1, 2)).n_hits == 2  # two came true
    assert residency.guesses_used == 2
    assert set(ahead[:2]) <= set(residency.cache)
    # The third was wrong, so it goes first: the policy's own victim, 0 of layer 0, stays.
    assert ahead[2] in residency.stale
    slots.run(event(0, 7))
    assert ahead[2] not in residency.slot_of
    assert 0 in residency.slot_of


def test_a_stale_guess_may_still_come_true() -> None:
    slots = make(5)
    first = event(0, 0)
    slots.guess(first, slots.run(first), [N_EXPERTS + 3])
    slots.run(event(1, 1))
    assert slots.run(event(1, 3)).n_hits == 1
    assert slots.residency.guesses_used == 0
    assert not slots.residency.stale


def test_a_guess_evicts_what_the_policy_gives_but_nothing_needed() -> None:
    slots = make(3)
    slots.run(event(1, 7))
    demanded = event(0, 1, 2)
    plan = slots.run(demanded)
    ahead = [N_EXPERTS + e for e in (4, 5)]
    assert slots.guess(demanded, plan, ahead) == ahead[:1]  # in the place of 7


@pytest.mark.parametrize("name", POLICIES)
def test_random_guesses(name: str) -> None:
    rng = random.Random(4)
    keys = range(N_LAYERS * N_EXPERTS)
    slots = make(15, name)
    for _ in range(300):
        demanded = random_event(rng)
        plan = slots.run(demanded)
        before = set(slots.residency.slot_of)
        placed = slots.guess(demanded, plan, rng.sample(keys, 6))
        assert not set(placed) & before
        if rng.random() < 0.2:
            slots.residency.drop(placed)  # as when the plugin cancelled them
            slots.check()


def test_guesses_under_load_on_demand() -> None:
    """They find the slots that are not in use, and are used once like everything else."""
    slots = make(4, "load-on-demand")
    first = event(0, 1)
    assert slots.guess(first, slots.run(first), [N_EXPERTS + 1]) in ([], [N_EXPERTS + 1])
    slots.run(event(1, 1))
    assert not slots.residency.slot_of


def test_a_dropped_expert_is_loaded_again() -> None:
    slots = make(4)
    slots.run(event(0, 1, 2))
    slots.residency.drop([1])
    plan = slots.run(event(0, 1, 2))
    assert plan.experts == [2, 1]
    assert plan.loads == [0, 1]
