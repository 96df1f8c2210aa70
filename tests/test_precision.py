"""Which experts may be low, by hand; and a table of both copies, checked on pretended slots."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from moe_gguf.policies import POLICIES, Facts, MixedResidency, Plan, Precision, policy
from moe_gguf.policies.base import Guess, Phase, RouteEvent
from moe_gguf.policies.precision import tail

N_LAYERS, N_EXPERTS = 3, 12
FIRST_LOW = N_LAYERS * N_EXPERTS


def event(layer: int, counts: dict[int, int], phase: Phase = Phase.PREFILL) -> RouteEvent:
    """A prompt's, unless another phase is given."""
    n_tokens = max(counts.values())
    return RouteEvent(layer, n_tokens, list(counts), list(counts.values()), phase, 1)


def token(layer: int, *experts: int) -> RouteEvent:
    return event(layer, dict.fromkeys(experts, 1), Phase.DECODE)


# --- the rule -------------------------------------------------------------------------------------


def test_the_tail_has_at_most_its_share_of_the_votes() -> None:
    routed = event(0, {3: 7, 5: 1, 8: 2, 1: 6, 9: 4})  # 20 votes; from the end 5, 8, 9, 1, 3
    shares = {0.0: set(), 0.04: set(), 0.05: {5}, 0.149: {5}, 0.15: {5, 8}, 0.25: {5, 8}}
    shares |= {0.35: {5, 8, 9}, 0.65: {5, 8, 9, 1}, 0.99: {5, 8, 9, 1}, 1.0: {5, 8, 9, 1, 3}}
    for share, low in shares.items():
        assert tail(routed, share) == low


def test_of_equally_popular_experts_the_tail_has_those_seen_last() -> None:
    assert tail(event(0, {4: 2, 7: 2, 2: 2, 0: 2}), 0.5) == {2, 0}


def test_the_tail_ends_at_the_first_expert_that_does_not_fit() -> None:
    # 2 votes are left after expert 1, and 6 has them; but 0 is less popular and comes first.
    assert tail(event(0, {6: 8, 0: 3, 1: 1}), 0.25) == {1}


def test_prefill_and_decode_have_rules_of_their_own() -> None:
    prompt, one = event(0, {1: 3, 2: 1}), token(0, 1, 2)
    assert set(Precision(low_share=0.25).may_be_low(prompt)) == {2}
    assert set(Precision(low_share=0.25).may_be_low(one)) == set()
    assert set(Precision(low_on_miss=True).may_be_low(prompt)) == set()
    assert set(Precision(low_on_miss=True).may_be_low(one)) == {1, 2}


def test_eight_sequences_decode_by_the_decode_rule() -> None:
    eight = event(0, {1: 8, 2: 5, 3: 3}, Phase.DECODE)._replace(n_sequences=8, n_tokens=8)
    assert set(Precision(low_share=0.5).may_be_low(eight)) == set()
    assert set(Precision(low_on_miss=True).may_be_low(eight)) == {1, 2, 3}
    assert set(Precision(0.25, low_on_miss=True).may_be_low(eight)) == {1, 2, 3}


def test_of_a_mixed_step_only_what_both_rules_allow_is_low() -> None:
    """Its experts work for prompts and for generated tokens, and nobody knows for which."""
    mixed = event(0, {1: 3, 2: 1}, Phase.MIXED)
    assert set(Precision(low_share=0.25).may_be_low(mixed)) == set()
    assert set(Precision(low_on_miss=True).may_be_low(mixed)) == set()
    assert set(Precision(0.25, low_on_miss=True).may_be_low(mixed)) == {2}


def test_a_prompt_s_last_token_alone_has_no_tail() -> None:
    """llama.cpp may compute a prompt's last layer for it only; it is no decoding either."""
    last = event(0, {4: 1, 5: 1, 6: 1, 7: 1})
    assert set(Precision(0.5, low_on_miss=True).may_be_low(last)) == set()


def test_lossy_is_whatever_is_not_the_default() -> None:
    assert not Precision().lossy
    assert Precision(0.25).lossy
    assert Precision(low_on_miss=True).lossy


# --- the table ------------------------------------------------------------------------------------


class Slots:
    """An arena that only remembers which of the plugin's keys each slot holds."""

    def __init__(self, n_slots: int, precision: Precision, name: str = "lru") -> None:
        cache, order, *_ = policy(name, Facts(n_slots, N_EXPERTS, 3, range(N_LAYERS)))
        self.residency = MixedResidency(n_slots, N_EXPERTS, cache, order, precision, FIRST_LOW)
        self.held = [-1] * n_slots

    def run(self, routed: RouteEvent) -> Plan:
        """Plan an event and do what the plan says."""
        residency, base = self.residency, routed.layer * N_EXPERTS
        may_be_low = residency.precision.may_be_low(routed)
        plan = residency.plan(routed)
        assert sorted(plan.experts) == sorted(routed.experts)
        assert [load > 0 for load in plan.loads] == [i >= plan.n_hits for i in range(len(plan[0]))]
        counts = dict(zip(routed.experts, routed.counts, strict=True))
        n_low = 0
        for expert, slot, load in zip(plan.experts, plan.slots, plan.loads, strict=True):
            if load:
                assert load == 1 + (expert in may_be_low)
                self.held[slot] = base + expert + (load - 1) * FIRST_LOW
            assert self.held[slot] % FIRST_LOW == base + expert, "another expert than planned"
            if self.held[slot] >= FIRST_LOW:
                assert expert in may_be_low, "an expert is computed low that may not be"
                n_low += counts[expert]
        assert plan.n_low_pairs == n_low
        assert plan.n_low_loads == plan.loads.count(2)
        self.check()
        return plan

    def guess(self, routed: RouteEvent, keys: Sequence[int]) -> None:
        for key, slot in self.residency.guess(routed, [Guess(key, 1.0) for key in keys], keys):
            self.held[slot] = key
        self.check()

    def fail(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.held[slot] = -1
        self.residency.reconcile(self.held)
        self.check()

    def check(self) -> None:
        for key, slot in self.residency.slot_of.items():
            assert self.held[slot] == key + FIRST_LOW * (slot in self.residency.low)
        self.residency.check_integrity()


@pytest.mark.parametrize("n_slots", [1, 2, 5, 12, FIRST_LOW])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("precision", [Precision(0.4), Precision(0.4, True), Precision(0.0, True)])
def test_random_events_guesses_and_failures(name: str, n_slots: int, precision: Precision) -> None:
    rng = random.Random(n_slots)
    slots = Slots(n_slots, precision, name)
    for _ in range(300):
        experts = rng.sample(range(N_EXPERTS), rng.choice([1, 3, 3, N_EXPERTS]))
        layer, one = rng.randrange(N_LAYERS), rng.random() < 0.5
        counts = {e: 1 if one else rng.randrange(1, 5) for e in experts}
        routed = event(layer, counts, rng.choice(list(Phase)))
        slots.run(routed)
        if name != "load-on-demand" and rng.random() < 0.5:
            slots.guess(routed, rng.sample(range(FIRST_LOW), 3))
        if rng.random() < 0.1:
            slots.fail(rng.sample(range(n_slots), rng.randrange(n_slots + 1)))


def test_a_prompt_s_tail_is_read_low_and_whole_again_when_generation_needs_it() -> None:
    slots = Slots(8, Precision(low_share=0.25))
    plan = slots.run(event(0, {1: 5, 2: 1, 3: 2}))
    assert plan[:3] == ([1, 3, 2], plan.slots, [1, 1, 2])
    assert (plan.n_low_pairs, plan.n_low_loads) == (1, 1)
    # Unpopular again: used as it is. Popular: read whole, into the same slot, after the hits.
    assert slots.run(event(0, {1: 5, 2: 1})).n_hits == 2
    slot = slots.residency.slot_of[2]
    again = slots.run(token(0, 2, 1))
    assert again[:4] == ([1, 2], [again.slots[0], slot], [0, 1], 1)
    # Whole now, and so it is used even where low would do.
    assert slots.run(event(0, {1: 5, 2: 1})).n_low_pairs == 0


def test_low_on_miss_keeps_using_what_it_read() -> None:
    slots = Slots(8, Precision(low_on_miss=True))
    assert slots.run(token(0, 4, 5)).loads == [2, 2]
    again = slots.run(token(0, 4, 5, 6))
    assert again.loads == [0, 0, 2]
    assert again.n_low_pairs == 3
    assert slots.run(event(0, {4: 2, 5: 2})).loads == [1, 1]  # a prompt needs them whole
    assert slots.run(token(0, 4, 5)).n_low_pairs == 0


def test_a_low_expert_in_a_full_arena_is_read_again_before_its_slot_is_used_in_turns() -> None:
    slots = Slots(2, Precision(low_share=0.4))
    assert slots.run(event(0, {1: 3, 2: 2})).loads == [1, 2]
    plan = slots.run(event(0, {3: 9, 2: 9, 4: 9}))  # 2 must be whole; of the others 4 may be low
    assert plan.experts == [2, 3, 4]
    assert plan.loads == [1, 1, 2]
    assert len(set(plan.slots)) == 2


def test_a_guess_takes_the_place_of_a_low_copy() -> None:
    slots = Slots(1, Precision(low_on_miss=True))
    assert slots.run(token(0, 4)).loads == [2]
    first = token(1, 5)
    slots.run(first)
    slots.residency.drop([N_EXPERTS + 5])
    slots.guess(first, [2 * N_EXPERTS + 7])
    plan = slots.run(token(2, 7))
    assert (plan.n_hits, plan.n_low_pairs) == (1, 0)
