"""Quotas favour the layers that predict badly, and a layered cache keeps to them."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from moe_gguf.policies import Residency
from moe_gguf.policies.arc import ARC
from moe_gguf.policies.base import CachePolicy, Phase, RouteEvent
from moe_gguf.policies.cache import LFU, LRU
from moe_gguf.policies.layered import Layered, allocate, evenly

N_LAYERS, N_EXPERTS, USED = 5, 12, 3
LAYERS = range(1, 1 + N_LAYERS)
INNER: dict[str, Callable[[int, int], CachePolicy]] = {
    "arc": lambda layer, quota: ARC(quota),
    "lru": lambda layer, quota: LRU(),
    "lfu": lambda layer, quota: LFU(),
}


def test_badly_predicted_layers_hold_everything() -> None:
    recall = {2: 0.3, 3: 0.8, 4: 0.49}  # nothing is known of 5, and 1 cannot be predicted
    quotas = allocate(45, N_EXPERTS, LAYERS, recall, USED)
    assert quotas == {1: 12, 2: 12, 3: 5, 4: 12, 5: 4}


def test_too_few_slots_fill_the_shallow_layers_but_starve_none() -> None:
    recall = dict.fromkeys(LAYERS, 0.1)
    assert allocate(30, N_EXPERTS, LAYERS, recall, USED) == {1: 12, 2: 9, 3: 3, 4: 3, 5: 3}
    # Not even the floors fit.
    assert allocate(12, N_EXPERTS, LAYERS, recall, USED) == {1: 4, 2: 2, 3: 2, 4: 2, 5: 2}
    assert allocate(2, N_EXPERTS, LAYERS, recall, USED) == {1: 2, 2: 0, 3: 0, 4: 0, 5: 0}


def test_even_quotas() -> None:
    assert evenly(17, N_EXPERTS, LAYERS) == {1: 4, 2: 4, 3: 3, 4: 3, 5: 3}
    assert evenly(100, N_EXPERTS, LAYERS) == dict.fromkeys(LAYERS, N_EXPERTS)
    assert evenly(3, N_EXPERTS, []) == {}


@pytest.mark.parametrize("seed", range(20))
def test_quotas_add_up(seed: int) -> None:
    rng = random.Random(seed)
    n_layers, n_experts = rng.randrange(1, 9), rng.randrange(1, 20)
    layers = sorted(rng.sample(range(20), n_layers))
    recall = {layer: rng.random() for layer in layers if rng.random() < 0.8}
    for n_slots in range(1, n_layers * n_experts + 5):
        quotas = allocate(n_slots, n_experts, layers, recall, rng.randrange(1, n_experts + 1))
        assert list(quotas) == layers
        assert sum(quotas.values()) == min(n_slots, n_layers * n_experts)
        assert all(0 <= quota <= n_experts for quota in quotas.values())


def event(layer: int, experts: list[int]) -> RouteEvent:
    return RouteEvent(layer, 1, experts, [1] * len(experts), Phase.DECODE, 1)


def random_event(rng: random.Random, layer: int) -> RouteEvent:
    return event(layer, rng.sample(range(N_EXPERTS), rng.choice([USED, USED, USED, N_EXPERTS])))


@pytest.mark.parametrize("inner", INNER)
def test_layers_settle_at_their_quotas_and_move_when_these_change(inner: str) -> None:
    rng = random.Random(2)
    quotas = allocate(30, N_EXPERTS, LAYERS, {2: 0.1}, USED)
    cache = Layered(N_EXPERTS, quotas, INNER[inner])
    residency = Residency(30, N_EXPERTS, cache)

    def sizes() -> dict[int, int]:
        return {layer: len(c) for layer, c in cache.caches.items()}

    def run(steps: int) -> None:
        for _ in range(steps):
            for layer in LAYERS:
                residency.plan(random_event(rng, layer))
                residency.check_integrity()

    run(30)
    # A layer that needs all its experts at once borrows slots that come back later.
    for _ in range(40):
        for layer in LAYERS:
            residency.plan(event(layer, rng.sample(range(N_EXPERTS), USED)))
    assert sizes() == quotas
    changed = allocate(30, N_EXPERTS, LAYERS, {5: 0.1}, USED)
    assert changed != quotas
    before = set(cache)
    cache.set_quotas(changed)
    assert set(cache) == before
    cache.check_integrity()
    for _ in range(40):
        for layer in LAYERS:
            residency.plan(event(layer, rng.sample(range(N_EXPERTS), USED)))
    assert sizes() == changed


@pytest.mark.parametrize("inner", INNER)
def test_an_incoming_key_takes_from_its_own_layer_at_quota(inner: str) -> None:
    cache = Layered(10, {0: 2, 1: 2}, INNER[inner])
    for key in (0, 1, 10, 11):
        cache.admit(key)
    assert cache.evict((), 12) == 10  # older keys of layer 0 are not touched
    cache.admit(12)
    assert cache.evict({11, 12}, 13) == 0  # unless its own are all pinned
    cache.admit(13)
    assert cache.evict((), 2) in (11, 12)  # layer 1 is over its quota and layer 0 below
    cache.check_integrity()


def test_what_arc_remembers_is_its_own_layers() -> None:
    cache = Layered(10, {0: 2, 1: 2}, INNER["arc"])
    for key in (0, 1, 10, 11):
        cache.admit(key)
    cache.touch(11)
    assert cache.evict((), 12) == 10
    cache.admit(12)
    assert cache.evict((), 10) == 11  # the ghost raises the target, so t2 gives way
    cache.admit(10)
    arc = cache.caches[1]
    assert isinstance(arc, ARC)
    assert list(arc.t2) == [10]
