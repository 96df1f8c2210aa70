"""Events of a device that pass unasked: what was ordered before is what would have been answered.

The controller plans each such event again when it hears of it, and a plan that differs ends the
step. A pass proves:

 1  coldest   a cache names beforehand whom it evicts, and naming changes nothing
 2  spares    the slots named beforehand are those that a plan gives, wrong guesses and all
 3  passing   with all in memory, every event of decoding passes, for one sequence and several, and
              the counts, the tables and the output are those of asking; anyone may ask for counts
 4  failures  a controller that cannot go on fails that step alone; what the device holds is kept
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence

import llama_cpp
import numpy as np
import pytest
import tiny
from conftest import TinyFile
from harness import Logits, Model, Ours, Row, ours, random_tokens, rows, same, stock, token_by_token
from lag import NAME, Lag, lag

from moe_gguf.policies.base import CachePolicy, Guess, Phase, RouteEvent
from moe_gguf.policies.cache import LFU, LRU
from moe_gguf.policies.order import FirstSeen, Popularity
from moe_gguf.policies.pace import Everything
from moe_gguf.policies.residency import WRONG_GUESSES, Residency

__all__ = ["lag"]  # a fixture

DEVICE = {"device": NAME.lower(), "pace": Everything()}
N_USED = {"mixtral": 2, "llama4": 1}  # experts per token; of other layouts 4
CACHES = {"lru": LRU, "lfu": lambda: LFU(1.0)}


def event(experts: Sequence[int], counts: Sequence[int]) -> RouteEvent:
    return RouteEvent(0, sum(counts), experts, counts, Phase.DECODE, 1)


# --- 1 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CACHES)
def test_1_coldest_is_whom_it_evicts(kind: str) -> None:
    cache, dice = CACHES[kind](), random.Random(3)
    for _ in range(400):
        key = dice.randrange(16)
        if key in cache:
            cache.touch(key)
        else:
            while len(cache) >= 6:
                named = cache.coldest(6)
                pinned = set(dice.sample(range(16), 3))
                victim = cache.evict(pinned, key)
                assert victim == next((k for k in named if k not in pinned), None)
                if victim is None:
                    cache.remove(named[0])
            cache.admit(key)
        assert cache.coldest(3) == cache.coldest(16)[:3]
    cache.check_integrity()


# --- 2 ------------------------------------------------------------------------------------------


def ordered(
    pool: Residency, spares: Sequence[int], asked: RouteEvent, guessed: set[int]
) -> list[int]:
    """What the plugin makes of them: the slots of missing experts, those of ``guessed`` taken."""
    held = {slot: key for key, slot in pool.slot_of.items()}
    wrong = [pool.slot_of[key] for key in sorted(guessed - set(asked.experts))]
    slots: list[int] = []
    for spare in spares:
        if spare == WRONG_GUESSES:
            slots += wrong
        elif held.get(spare, -1) not in asked.experts:
            slots.append(spare)
    return slots[: sum(expert not in pool.slot_of for expert in asked.experts)]


@pytest.mark.parametrize("kind", CACHES)
def test_2_spares_are_what_a_plan_gives(kind: str) -> None:
    dice, compared = random.Random(5), 0
    pool = Residency(6, 16, CACHES[kind](), Popularity())
    for _ in range(600):
        spares, guessed = pool.spares(32), set[int]()
        if dice.random() < 0.5:
            before = event([dice.randrange(16)], [1])._replace(layer=-1)
            keys = dice.sample(range(16), 2)
            placed = pool.guess(before, [Guess(key, 0.5) for key in keys])
            guessed = {key for key, _ in placed}
            taken = [slot for _, slot in placed]
            first = [slot for slot in spares if slot != WRONG_GUESSES][: len(taken)]
            assert taken == first
            spares = [slot for slot in spares if slot not in taken]
        n = dice.randrange(1, 5)
        asked = event(dice.sample(range(16), n), [dice.randrange(1, 4) for _ in range(n)])
        expected = ordered(pool, spares, asked, guessed)
        plan = pool.plan(asked)
        assert plan.slots[plan.n_hits :] == expected
        compared += len(expected)
        pool.check_integrity()
    assert compared > 300


def test_2_who_does_not_say() -> None:
    class Whim(LRU):
        coldest = None

    whim: CachePolicy = Whim()
    assert Residency(4, 16, LRU(), FirstSeen()).spares(8) == []
    assert Residency(4, 16, whim, Popularity()).spares(8) == []


# --- 3 ------------------------------------------------------------------------------------------


def in_pairs(model: Model) -> Logits:
    context = model.context(n_seq_max=2)
    steps = [[Row(7 * i + s, i, seq=s) for s in range(2)] for i in range(12)]
    return np.concatenate([context.decode(step) for step in steps])


def with_all_in_memory(model: Ours) -> Ours:
    n_experts, layers = model.found.layout.n_experts, model.found.layout.layers
    model.arena.fill(e.layer * n_experts + i for e in layers for i in range(n_experts))
    return model


@pytest.mark.parametrize("policy", ["lru", "lfu", "fate", "layered-lfu"])
@pytest.mark.parametrize("layout", ["qwen3moe", "gpt-oss", "mixtral", "deepseek2"])
def test_3_every_event_passes(layout: str, policy: str, tiny_file: TinyFile, lag: Lag) -> None:
    path, n_pool = tiny_file(layout), 2 * N_USED.get(layout, 4)
    with stock(path, device=NAME) as model:
        expected = token_by_token(model), in_pairs(model)
    counts = []
    for asks in (True, False):
        with ours(path, n_pool=n_pool, policy=policy, **DEVICE) as model:
            with_all_in_memory(model)
            if asks:
                model.controller.may_pass = lambda: False  # type: ignore[method-assign]
            same(token_by_token(model), expected[0])
            same(token_by_token(model), expected[0])
            model.reset_stats()
            same(token_by_token(model), expected[0])
            same(in_pairs(model), expected[1])
            n_layers = len(model.found.layout.layers)
            stats = model.stats()
            assert stats.events == stats.waits == 36 * n_layers
            assert stats.passed == (0 if asks else stats.events)
            assert stats.uploads == model.misses + stats.uploads_ahead
            counts.append((model.hits + model.misses, model.meter.demands().pairs))
            if policy != "fate":  # which copies by time
                counts[-1] += (model.hits,)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_3_smallest_pools(layout: str, tiny_file: TinyFile, lag: Lag) -> None:
    path = tiny_file(layout)
    with stock(path, device=NAME) as model:
        expected = token_by_token(model)
    with (
        lag.delayed(us=300),
        ours(path, n_pool=N_USED.get(layout, 4), policy="fate", **DEVICE) as model,
    ):
        with_all_in_memory(model)
        for _ in range(3):
            same(token_by_token(model), expected)
        assert model.stats().passed > 0


def test_3_events_too_wide_between(tiny_file: TinyFile, lag: Lag) -> None:
    path = tiny_file("qwen3moe")

    def mixed(model: Model) -> Logits:
        context, logits = model.context(n_seq_max=2), []
        for i in range(6):
            for k, token in enumerate(random_tokens(3, seed=i)):
                logits.append(context.decode(rows([token], 3 * i + k)))
            logits.append(context.decode(rows(random_tokens(12, seed=i), 12 * i, seq=1)))
            for k in range(3):  # of two sequences, which sometimes want more than there is room for
                at = 3 * i + 3 + k, 12 * i + 12 + k
                tokens = random_tokens(2, seed=i + 10 * k)
                both = [Row(t, p, seq=s) for s, (t, p) in enumerate(zip(tokens, at, strict=True))]
                logits.append(context.decode(both))
            for s, end in enumerate((3 * i + 3, 12 * i + 12)):
                llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context.ctx), s, end, -1)
        return np.concatenate(logits)

    with stock(path, device=NAME) as model:
        expected = mixed(model)
    for n_windows in (0, 1, 2):
        with ours(path, n_pool=7, n_windows=n_windows, policy="fate", **DEVICE) as model:
            same(mixed(with_all_in_memory(model)), expected)
            assert model.stats().passed > 0


def test_3_with_part_in_memory_only_hits_pass(tiny_file: TinyFile, lag: Lag) -> None:
    path = tiny_file("qwen3moe")
    with stock(path, device=NAME) as model:
        expected = token_by_token(model)
    with ours(path, 30, n_pool=9, policy="lru", **DEVICE) as model:
        for _ in range(2):
            same(token_by_token(model), expected)
        assert 0 < model.stats().passed < model.stats().events
        assert model.stats().uploads == model.misses


def test_3_whoever_asks_for_counts_meanwhile(tiny_file: TinyFile, lag: Lag) -> None:
    path = tiny_file("qwen3moe")
    with stock(path, device=NAME) as model:
        expected = token_by_token(model)
    with lag.delayed(us=300), ours(path, n_pool=7, policy="fate", **DEVICE) as model:
        with_all_in_memory(model)
        done, asked = threading.Event(), [0]

        def ask() -> None:
            while not done.is_set():
                asked[0] = max(asked[0], model.hits + model.misses)

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            for _ in range(3):
                same(token_by_token(model), expected)
        finally:
            done.set()
            asking.join()
        assert 0 < asked[0] <= model.hits + model.misses
        assert model.hits + model.misses == 3 * 24 * 4 * len(model.found.layout.layers)


# --- 4 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 5, 20])
def test_4_a_controller_that_cannot_go_on(at: int, tiny_file: TinyFile, lag: Lag) -> None:
    path = tiny_file("qwen3moe")
    with stock(path, device=NAME) as model:
        expected = token_by_token(model)
    with ours(path, n_pool=9, policy="fate", **DEVICE) as model:
        same(token_by_token(with_all_in_memory(model)), expected)
        controller, told = model.controller, 0
        answer = controller.on_passed

        def fail(*args: object) -> bool:
            nonlocal told
            told += 1
            if told == at + 1:
                raise ZeroDivisionError
            return answer(*args)  # type: ignore[arg-type]

        controller.on_passed = fail  # type: ignore[method-assign]
        with pytest.raises(ZeroDivisionError):
            token_by_token(model)
        model.check()
        for _ in range(2):
            same(token_by_token(model), expected)
        assert model.stats().passed > 0


def test_4_an_answer_that_differs(tiny_file: TinyFile, lag: Lag) -> None:
    with ours(tiny_file("qwen3moe"), n_pool=9, policy="lru", **DEVICE) as model:
        token_by_token(with_all_in_memory(model))
        controller = model.controller
        honest = controller.orders
        controller.orders = lambda layer, most: (honest(layer, most)[0][::-1], ())  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="and not with"):
            token_by_token(model)
        controller.orders = honest  # type: ignore[method-assign]
        token_by_token(model)
