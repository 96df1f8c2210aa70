"""Experts that are copied to a device before they are asked for: the output is stock's.

The device is the one of native/lag.cpp, whose kernels are the processor's. A pass proves:

 1  trial     what makes steps shorter goes on, and what does not stops, for a while
 2  link      guesses are copied into the room there is, the surer ones first
 3  identity  every layout, policy and size: logits to the last bit, one wait per layer; what is
              copied is what was missing and what was guessed, and guesses are found later; the
              device applies the next layer's router, and guesses are what the processor's would be
 4  prompts   an event that needs more than the pool has, right after copies that nobody waits for;
              guesses fill the next window where only they know what it wants
 5  failures  a guess for the device that is not in memory
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import TinyFile
from harness import Logits, Model, Ours, Row, ours, random_tokens, rows, same, stock, token_by_token
from lag import NAME, Lag, lag

from moe_gguf.policies.base import Guess, Phase, RouteEvent
from moe_gguf.policies.cache import LRU
from moe_gguf.policies.copying import IdleLink, Trial
from moe_gguf.policies.foresight import Foresight
from moe_gguf.policies.pace import Everything
from moe_gguf.policies.residency import Plan
from moe_gguf.policies.tiers import Tiers

__all__ = ["lag"]  # a fixture

DEVICE = {"device": NAME.lower(), "policy": "fate", "pace": Everything()}
N_USED = {"mixtral": 2, "llama4": 1}  # experts per token; of other layouts 4


class Chance:
    """Copies some of what there is, with dice."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)

    def event(self, event: RouteEvent, now_ns: int, since_ns: int, n_missing: int) -> bool:
        return event.phase == Phase.DECODE

    def chances(self, layer: int, most: int) -> Sequence[float]:
        return [0.0] * self.dice.randrange(4)


def with_chance(model: Ours, seed: int = 0) -> Tiers:
    residency = model.controller.residency
    assert isinstance(residency, Tiers)
    residency.copying = Chance(seed)
    model.reset_stats()
    return residency


def n_used(residency: Tiers) -> int:
    """Guesses that were asked for, on the device."""
    return sum(pool.guesses_used for pool in residency.pools.values())


def several(model: Model) -> Logits:
    context = model.context(n_seq_max=3)
    steps = [[Row(7 * i + s, i, seq=s) for s in range(3)] for i in range(12)]
    return np.concatenate([context.decode(step) for step in steps])


def prompts_between(model: Model) -> Logits:
    context, logits = model.context(n_seq_max=2), []
    for i in range(8):
        for k, token in enumerate(random_tokens(3, seed=i)):
            logits.append(context.decode(rows([token], 3 * i + k)))
        logits.append(context.decode(rows(random_tokens(12, seed=i), 12 * i, seq=1)))
    return np.concatenate(logits)


# --- 1 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gain", "goes_on"), [(0.8, True), (1.1, False)])
def test_1_what_pays_goes_on(gain: float, goes_on: bool) -> None:
    trial, on = Trial(8, 3, learned=5), []
    for _ in range(5):
        assert trial.is_on
        trial.step(10**9)  # does not count
    turns = ([True] * 6 + [False] * 6) * 2
    for i in range(90):
        new = 50 if i % 6 < 2 and i < 24 else 1  # what is new has to be set up
        on.append(trial.is_on)
        idle = 100 if i % 11 == 3 else 1  # a caller thinks now and then
        warm = 1 + 1 / (1 + i)  # steps become shorter by themselves
        trial.step(int(1000 * warm * idle * new * (gain if trial.is_on else 1)))
    assert on[:24] == turns
    assert on[24:48] == [goes_on] * 24
    assert on[48:72] == turns
    trial.again()
    assert trial.is_on


# --- 2 ------------------------------------------------------------------------------------------


def events(
    link: IdleLink, n_steps: int, layer_ns: int, n_missing: int, since_ns: int = 1 << 40
) -> int:
    """Steps of two layers; how many of ten guesses are chosen after the first."""
    chosen, now = 0, 0
    for _ in range(n_steps):
        for layer in (0, 1):
            event = RouteEvent(layer, 1, (0,), (1,), Phase.DECODE, 1)
            wants = link.event(event, now, since_ns, n_missing)
            if layer == 0 and wants:
                chances = link.chances(layer, 10)
                chosen = sum(0.95 - 0.1 * i > chance for i, chance in enumerate(chances))
            now += layer_ns
    return chosen


def test_2_room_is_what_demands_leave() -> None:
    assert (
        events(IdleLink(100), 10, 1000, 4) == 5
    )  # 0.9 of 600; the sixth, half beyond it, is not sure enough
    assert events(IdleLink(100), 10, 1000, 8) == 2
    assert events(IdleLink(100), 10, 1000, 10) == 0
    assert events(IdleLink(100), 10, 10_000, 0) == 10
    assert events(IdleLink(100), 10, 10_000, 0, 600) == 5  # no copy begins before there are guesses


def test_2_a_prompt_gets_nothing() -> None:
    link = IdleLink(100)
    event = RouteEvent(0, 40, (0,), (40,), Phase.PREFILL, 1)
    assert not link.event(event, 0, 0, 0)
    assert not link.event(event._replace(layer=1, phase=Phase.MIXED), 0, 0, 0)


# --- 3 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_slots", [None, 44])
@pytest.mark.parametrize("layout", [*tiny.LAYOUTS, "scaled", "mixed"])
def test_3_identity(layout: str, n_slots: int | None, tiny_file: TinyFile, lag: Lag) -> None:
    flags = {"scaled": {"scales": True}, "mixed": {"mixed": True}}.get(layout, {})
    path = tiny_file("qwen3moe" if flags else layout, **flags)
    with stock(path, device=NAME) as model:
        expected = token_by_token(model), several(model)
    with ours(path, n_slots, n_pool=2 * N_USED.get(layout, 4), **DEVICE) as model:
        residency = with_chance(model)
        lag.count()
        same(token_by_token(model), expected[0])
        stats = model.stats()
        assert stats.uploads_ahead >= n_used(residency) > 0
        assert stats.uploads == model.misses + stats.uploads_ahead
        assert lag.count().upload_bytes == stats.upload_bytes
        assert stats.waits == 24 * len(model.found.layout.layers)
        model.check()
        same(several(model), expected[1])


@pytest.mark.parametrize("policy", ["fate-paper", "eap", "klotski"])
def test_3_policies(policy: str, tiny_file: TinyFile, lag: Lag) -> None:
    path = tiny_file("qwen3moe")
    with stock(path, device=NAME) as model:
        expected = token_by_token(model)
    with ours(path, 44, n_pool=7, **{**DEVICE, "policy": policy}) as model:
        with_chance(model)
        same(token_by_token(model), expected)
        assert model.stats().uploads_ahead > 0


def test_3_with_all_in_memory_events_that_find_all_pass_unasked(
    tiny_file: TinyFile, lag: Lag
) -> None:
    path = tiny_file("qwen3moe")
    with stock(path, device=NAME) as model:
        expected = token_by_token(model)
    with ours(path, n_pool=14, **DEVICE) as model:
        n_experts, layers = model.found.layout.n_experts, model.found.layout.layers
        model.arena.fill(e.layer * n_experts + i for e in layers for i in range(n_experts))
        residency = with_chance(model)
        for _ in range(3):
            same(token_by_token(model), expected)
        assert n_used(residency) > 0
        assert model.controller.may_pass()
        assert model.hits + model.misses == 3 * 24 * 4 * len(model.found.layout.layers)


def test_3_by_measured_room(tiny_file: TinyFile, lag: Lag) -> None:
    """The one that engines have."""
    path = tiny_file("qwen3moe")
    with stock(path, device=NAME) as model:
        expected = token_by_token(model)
    with lag.delayed(us=300), ours(path, n_pool=7, **DEVICE) as model:
        residency = model.controller.residency
        assert isinstance(residency, Tiers)
        assert isinstance(residency.copying, IdleLink)
        assert residency.copying.copy_ns > 0
        same(token_by_token(model), expected)
        same(token_by_token(model), expected)


# Of the changes between layers the device knows those of some tokens before.
@pytest.mark.parametrize(("policy", "least"), [("fate-paper", 0.99), ("fate", 0.6)])
@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_3_the_next_router_on_the_device(
    layout: str, policy: str, least: float, tiny_file: TinyFile, lag: Lag
) -> None:
    def guessed(model: Ours) -> dict[int, set[int]]:
        """By number of the event: the first guesses after it, where any were looked at."""
        controller, by_event = model.controller, dict[int, set[int]]()
        assert controller.guessing is not None
        predictor, route, n = controller.guessing.predictor, controller.on_route, count()
        guess, at = predictor.guess, 0

        def on_route(*args: Any) -> Plan:
            nonlocal at
            at = next(n)
            return route(*args)

        def recorded(event: RouteEvent, inputs: Any) -> Sequence[Guess]:
            guesses = guess(event, inputs)
            by_event[at] = {g.key for g in guesses[:n_used]}
            return guesses

        predictor.guess, controller.on_route = recorded, on_route  # type: ignore[method-assign]
        controller.may_pass = lambda: False  # type: ignore[method-assign]
        token_by_token(model)
        return by_event

    path, n_used = tiny_file(layout), N_USED.get(layout, 4)
    with ours(path, 3 * n_used, policy=policy, pace=Everything()) as model:
        expected = guessed(model)
    with ours(path, n_pool=2 * n_used, **{**DEVICE, "policy": policy}) as model:
        with_chance(model)
        got = guessed(model)
        # The first guess of all is made before there are gates, and the last layer makes none.
        n_layers = len(model.found.layout.layers)
        assert 24 * (n_layers - 1) - 2 <= model.stats().routed <= 24 * (n_layers - 1)
    alike = [len(got[k] & expected[k]) / n_used for k in got if expected.get(k)]
    assert len(alike) > 10
    assert np.mean(alike) > least


# --- 4 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_windows", [0, 1, 2])
def test_4_prompts_between(n_windows: int, tiny_file: TinyFile, lag: Lag) -> None:
    path = tiny_file("qwen3moe")
    with stock(path, device=NAME) as model:
        expected = prompts_between(model)
    with lag.delayed(us=1000), ours(path, n_pool=6, n_windows=n_windows, **DEVICE) as model:
        with_chance(model)
        same(prompts_between(model), expected)
        assert model.stats().uploads_ahead > 0


def in_eights(model: Model) -> Logits:
    context = model.context(n_seq_max=8)
    steps = [[Row(7 * i + s, i, seq=s) for s in range(8)] for i in range(10)]
    return np.concatenate([context.decode(step) for step in steps])


@pytest.mark.parametrize("layout", ["qwen3moe", "gpt-oss", "deepseek2"])
def test_4_guesses_fill_the_next_window(layout: str, tiny_file: TinyFile, lag: Lag) -> None:
    """Where several sequences ask for more than a pool has, but not for all."""
    path = tiny_file(layout)
    with stock(path, device=NAME) as model:
        expected = in_eights(model)
    with lag.delayed(us=300), ours(path, n_pool=4, n_windows=2, **DEVICE) as model:
        residency = model.controller.residency
        assert isinstance(residency, Tiers)
        residency.copying = None
        foresee = residency.foresee
        same(in_eights(model), expected)  # brings all into memory
        before = model.stats().uploads_ahead
        residency.foresee = lambda event, guesses: (  # type: ignore[method-assign]
            foresee(event, [g._replace(confidence=1.0) for g in guesses])
        )
        same(in_eights(model), expected)
        assert model.stats().uploads_ahead > before


def test_4_what_guesses_say_of_the_next_window() -> None:
    tiers = Tiers(64, 16, LRU(), None, dict.fromkeys((0, 1, 2), 4), lambda layer, n: LRU())
    wide = RouteEvent(0, 3, tuple(range(8)), (1,) * 8, Phase.DECODE, 3)
    assert not tiers.foresees(wide)
    tiers.foresight = Foresight(16, 1000)
    tiers.fill(range(48))
    assert tiers.foreseen(wide, tiers.plan(wide), 0) == []  # of 8 pairs hardly any is sure
    assert tiers.foresees(wide)
    assert not tiers.foresees(wide._replace(experts=tuple(range(7)), counts=(1,) * 7))
    assert not tiers.foresees(wide._replace(experts=(1, 2, 3), counts=(1, 1, 1)))
    assert not tiers.foresees(wide._replace(phase=Phase.PREFILL))
    many = wide._replace(n_tokens=30, counts=(30,) * 8)
    assert len(tiers.foreseen(many, tiers.plan(many), 0)) == 16
    assert not tiers.foresees(many)  # there is no need
    guesses = [Guess(16 + i, c) for i, c in enumerate((0.9, 0.5, 0.8, 0.99, 0.9))]
    assert tiers.foresee(wide, guesses) == [19, 16, 20, 18]
    assert tiers.foresee(wide, guesses[:4]) == ()  # its pool will do
    assert tiers.foresee(wide._replace(layer=2), guesses) == ()
    tiers.foresight.room = lambda: 2  # type: ignore[method-assign]
    assert tiers.foresee(wide, guesses) == [19, 16]
    tiers.pools[1].fill([16])
    assert tiers.foresee(wide, guesses) == [19, 16, 20]  # what its pool has takes no room


def test_4_over_a_layer_that_is_whole(tiny_file: TinyFile, lag: Lag) -> None:
    """Guesses are for the next layer that is asked for, by the device's own router too."""
    path = tiny_file("qwen3moe")
    with stock(path, device=NAME) as model:
        expected = token_by_token(model)
    pools = {0: 8, 1: 16, 2: 8}
    with ours(path, n_pool=pools, **DEVICE) as model:
        residency = with_chance(model)
        model.arena.fill(range(48))
        same(token_by_token(model), expected)
        stats = model.stats()
        assert stats.waits == 2 * len(expected)
        assert stats.uploads_ahead >= n_used(residency) > 0
        assert stats.routed > 0


# --- 5 ------------------------------------------------------------------------------------------


def test_5_a_guess_that_is_not_in_memory(tiny_file: TinyFile, lag: Lag) -> None:
    with ours(tiny_file("qwen3moe"), 9, n_pool=7, **DEVICE) as model:
        residency = with_chance(model)
        residency.guess_above = lambda event, guesses, most: [(16, 3, 0)]  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="not in memory, or has no slot there"):
            token_by_token(model)
