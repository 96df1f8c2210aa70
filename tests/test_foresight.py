"""What a wide event's next layer is said to want."""

from __future__ import annotations

import random

from moe_gguf.policies.base import Phase, RouteEvent
from moe_gguf.policies.foresight import Foresight

N = 32


def event(layer: int, ids: list[int]) -> RouteEvent:
    experts = list(dict.fromkeys(ids))
    counts = [ids.count(e) for e in experts]
    return RouteEvent(layer, len(ids), experts, counts, Phase.PREFILL, 1)


def test_a_long_prompt_wants_all_of_a_layer_nobody_has_seen() -> None:
    assert sorted(Foresight(N).likely(3, 1000)) == list(range(N))


def test_few_tokens_want_nothing_for_sure() -> None:
    assert Foresight(N).likely(3, 8) == []


def test_likely_ones_are_named_likeliest_first() -> None:
    """Routing that is skewed as trained models' is: of those named nearly all are asked for."""
    dice, foresight = random.Random(1), Foresight(N)
    weights = [1 / (1 + e) for e in range(N)]
    named = asked = 0
    for step in range(40):
        ids = dice.choices(range(N), weights, k=64)
        likely = foresight.likely(0, 64)
        if step >= 10:
            named += len(likely)
            asked += len(set(likely) & set(ids))
            assert 4 < len(likely) < N
            assert likely.index(0) < likely.index(4)
        foresight.observe(event(0, ids))
    assert asked > 0.85 * named


def test_layers_are_apart() -> None:
    foresight = Foresight(N)
    for _ in range(20):
        foresight.observe(event(0, [1, 2, 3] * 30))
    assert set(foresight.likely(0, 90)) == {1, 2, 3}
    assert len(foresight.likely(1, 1000)) == N
