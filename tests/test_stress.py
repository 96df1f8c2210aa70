"""Random schedules: the native reads in a program of their own, and the slot table of every policy.

`make stress` runs both for long (``STRESS_STEPS``), `make tsan` the first under the thread
sanitizer.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from moe_gguf.policies import POLICIES, Facts, Residency, policy
from moe_gguf.policies.base import Guess, LoadOrder, Phase, RouteEvent

ROOT = Path(__file__).parent.parent
STEPS = int(os.environ.get("STRESS_STEPS", "100000"))
N_LAYERS, N_EXPERTS, N_USED = 4, 12, 3
N_KEYS = N_LAYERS * N_EXPERTS
EMPTY = -1


def test_native_reads(tmp_path: Path) -> None:
    subprocess.run(["make", "-s", "build/stress"], cwd=ROOT, check=True)
    ended = subprocess.run(
        [ROOT / "build" / "stress", "20000", "7", tmp_path], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


class Interrupted(Exception):
    """Raised where a plan is half made."""


class BrokenOrder:
    """An order that fails once when it is told to."""

    def __init__(self, order: LoadOrder) -> None:
        self.inner = order
        self.broken = False

    def order(self, experts: Sequence[int], counts: Sequence[int]) -> Sequence[int]:
        if self.broken:
            self.broken = False
            raise Interrupted
        return self.inner.order(experts, counts)


class Schedule:
    """One residency and pretended slots, in which reads may fail and guesses may be given up."""

    def __init__(self, name: str, n_slots: int, rng: random.Random) -> None:
        facts = Facts(n_slots, N_EXPERTS, N_USED, range(N_LAYERS))
        chosen = policy(name, facts)
        self.predictor = chosen.predictor
        self.order = BrokenOrder(chosen.order)
        self.residency = Residency(n_slots, N_EXPERTS, chosen.cache, self.order, chosen.scan)
        self.held = [EMPTY] * n_slots  # the key each slot holds or is being filled with
        self.rng = rng
        self.layer = -1
        self.plans = self.placed = self.reconciled = 0

    def step(self) -> None:
        rng, residency = self.rng, self.residency
        self._give_up_guesses()
        self.layer = rng.randrange(N_LAYERS) if rng.random() < 0.1 else (self.layer + 1) % N_LAYERS
        n = N_EXPERTS if rng.random() < 0.03 else rng.randrange(1, 2 * N_USED)
        # Squared, so that some experts are popular and policies have something to keep.
        experts = list(dict.fromkeys(int(N_EXPERTS * rng.random() ** 2) for _ in range(n)))
        event = RouteEvent(
            self.layer, 1, experts, [1] * len(experts), Phase.DECODE, rng.choice((1, 8))
        )
        self.order.broken = rng.random() < 0.01
        try:
            self._plan(event)
        except Interrupted:
            self._reconcile()
            return
        finally:
            self.order.broken = False
        if rng.random() < 0.01:  # some reads of this step fail
            for slot in rng.sample(range(residency.n_slots), rng.randrange(residency.n_slots + 1)):
                self.held[slot] = EMPTY
            self._reconcile()
            return
        if self.predictor is not None:
            self.predictor.observe(event, lambda: np.asarray([experts], np.int32))
        if rng.random() < 0.5:
            self._guess(event)

    def _plan(self, event: RouteEvent) -> None:
        base = event.layer * N_EXPERTS
        before = dict(self.residency.slot_of)
        plan = self.residency.plan(event)
        self.plans += 1
        assert sorted(plan.experts) == sorted(event.experts), "an expert is lost or run twice"
        assert all(base + expert in before for expert in plan.experts[: plan.n_hits])
        assert not any(base + expert in before for expert in plan.experts[plan.n_hits :])
        for expert, slot, load in zip(plan.experts, plan.slots, plan.loads, strict=True):
            if load:
                self.held[slot] = base + expert
            assert self.held[slot] == base + expert, "a pinned expert lost its slot"
        if len(event.experts) <= self.residency.n_slots and self.residency.scan is None:
            assert len(set(plan.slots)) == len(plan.slots), "a slot is recycled without need"

    def _guess(self, event: RouteEvent) -> None:
        rng, residency = self.rng, self.residency
        keys = [rng.randrange(N_KEYS) for _ in range(rng.randrange(6))]
        if self.predictor is not None and rng.random() < 0.5:
            keys = [
                key for key, _ in self.predictor.guess(event, lambda: np.zeros((1, 1), np.float32))
            ]
        pinned = {event.layer * N_EXPERTS + expert for expert in event.experts}
        kept = (pinned | set(keys) | residency.guessed) & residency.slot_of.keys()
        placed = residency.guess(event, [Guess(key, 0.5) for key in keys], keys)
        assert kept <= residency.slot_of.keys(), "a guess evicts what is pinned"
        for key, slot in placed:
            self.held[slot] = key  # if the event computes there, once that is done
            self.placed += 1

    def _give_up_guesses(self) -> None:
        """As the plugin does before it asks for the plan: what it gave up it reports at once."""
        residency, rng = self.residency, self.rng
        if rng.random() < 0.2:
            guesses = [*residency.guessed, *residency.stale]
            lost = rng.sample(guesses, rng.randrange(len(guesses) + 1))
            for key in lost:
                self.held[residency.slot_of[key]] = EMPTY
            residency.drop(lost)

    def _reconcile(self) -> None:
        self.residency.reconcile(self.held)
        self.reconciled += 1
        for slot in self.residency.free:
            self.held[slot] = EMPTY
        self.check()

    def check(self) -> None:
        self.residency.check_integrity()
        for key, slot in self.residency.slot_of.items():
            assert self.held[slot] == key, "the table promises an expert that is not there"


@pytest.mark.parametrize("name", POLICIES)
def test_slot_table(name: str) -> None:
    rng = random.Random(name)
    sizes = [1, 3, 8, 15, 30, N_KEYS]
    n_steps = STEPS // len(POLICIES) // len(sizes)
    for n_slots in sizes:
        schedule = Schedule(name, n_slots, rng)
        for i in range(n_steps):
            schedule.step()
            if i % 50 == 0:
                schedule.check()
        schedule.check()
        assert schedule.reconciled, "no step failed"
        assert schedule.placed or n_slots == 1, "no guess found a slot"
        residency = schedule.residency
        residency.drop(list(residency.slot_of))
        assert sorted(residency.free) == list(range(n_slots)), "a slot is lost"
