"""Dividing a device's missing experts between the link and the processor, by hand-worked times."""

from __future__ import annotations

from moe_gguf.policies.base import Phase, RouteEvent
from moe_gguf.policies.cache import LRU
from moe_gguf.policies.coexecution import NOBODY, Division, Measured
from moe_gguf.policies.tiers import ON_CPU, Tiers

BYTES = 1000
COPY_NS = 1000  # of one expert


def measured(compute_ns: int, n_rows: int = 1) -> Measured:
    """Has seen one expert with so many rows."""
    dividing = Measured(COPY_NS / BYTES, {0: BYTES})
    dividing.learn(0, 0, 0, 0)
    assert dividing.divide(0, [n_rows]).computed == {0}, "the first is tried"
    dividing.learn(10**6, 1, n_rows, compute_ns)
    return dividing


def test_nothing_is_known_so_one_is_tried() -> None:
    dividing = Measured(COPY_NS / BYTES, {0: BYTES})
    assert len(dividing.divide(0, [3, 1, 2]).computed) == 1
    assert dividing.divide(0, [3, 1, 2]) == NOBODY, "until it is measured"


def test_both_sides_end_together() -> None:
    # 5 experts, 400 ns each or 1000: 3 computed take 1200, 2 copied 2000; 4 take 1600, 1 1000.
    assert len(measured(400).divide(0, [1] * 5).computed) == 4
    # Of 800: 3 take 2400 beside 2000; 2 take 1600 beside 3000.
    assert len(measured(800).divide(0, [1] * 5).computed) == 3
    # Of 100 none is worth a copy.
    assert len(measured(100).divide(0, [1] * 5).computed) == 5


def test_fewest_rows_are_computed() -> None:
    # One row takes 900 ns, up to 8 rows at most 7200: a copy is sooner.
    assert measured(900).divide(0, [8, 1, 8]).computed == {1}


def test_a_processor_that_is_slower_is_left_alone_but_for_a_try_now_and_then() -> None:
    dividing = measured(5000)
    n_tried = n_events = 0
    while n_events < 2000:
        computed = dividing.divide(0, [1, 1]).computed
        n_tried += len(computed)
        n_events += 1 + dividing.rest
        dividing.learn(10**7 * n_events, len(computed), len(computed), 5000 * len(computed))
    assert 0 < n_tried < 10


def test_one_slow_measurement_is_forgotten() -> None:
    dividing = measured(5000)  # the first time, threads were started
    for i in range(100):
        computed = dividing.divide(0, [1, 1]).computed
        dividing.learn(10**7 * (i + 1), len(computed), len(computed), 300 * len(computed))
    assert len(dividing.divide(0, [1, 1]).computed) == 2


def test_the_link_is_never_more_than_one_copy_behind() -> None:
    dividing = measured(100)
    # Five computed in 500 ns: one copy afterwards, and no other while it goes on.
    first = dividing.divide(0, [1] * 5)
    assert first == Division(frozenset(range(5)), frozenset(range(1, 5)))
    dividing.learn(10**6 + 500, 5, 5, 500)
    assert dividing.divide(0, [1] * 5).passing == set(range(5))
    dividing.learn(10**6 + 2000, 5, 5, 500)
    assert dividing.divide(0, [1, 2]).passing == {0}, "more rows, more use"


class Told:
    rest = 0

    def __init__(self, division: Division) -> None:
        self.division = division

    def learn(self, now_ns: int, n_experts: int, n_pairs: int, ns: int) -> None: ...

    def divide(self, layer: int, counts: object) -> Division:
        return self.division


def test_a_plan_names_who_computes() -> None:
    tiers = Tiers(8, 8, LRU(), None, {0: 4}, lambda layer, n: LRU())
    event = RouteEvent(0, 1, [5, 6, 7], [1, 1, 1], Phase.DECODE, 1, may_compute=True)
    tiers.dividing = Told(Division(frozenset({0, 2}), frozenset({2})))
    plan = tiers.plan(event)
    place = dict(zip(plan.experts, plan.pools, strict=True))
    slot_of = tiers.pools[0].slot_of
    assert place == {5: ON_CPU - 1 - slot_of[5], 6: slot_of[6], 7: ON_CPU}
    assert 7 not in slot_of
    assert sorted(plan.experts) == [5, 6, 7]
    assert plan.n_hits == 0
    tiers.check_integrity()
    # An event that the processor may not compute in goes all to the device.
    plan = tiers.plan(event._replace(may_compute=False))
    assert min(plan.pools) >= 0
