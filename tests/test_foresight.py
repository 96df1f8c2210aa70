"""What a wide event's next layer is said to want."""

from __future__ import annotations

import random

import pytest

from moe_gguf.policies.base import Phase, RouteEvent
from moe_gguf.policies.foresight import Foresight

N = 32
COPY_NS = 50_000


def event(layer: int, ids: list[int]) -> RouteEvent:
    experts = list(dict.fromkeys(ids))
    counts = [ids.count(e) for e in experts]
    return RouteEvent(layer, len(ids), experts, counts, Phase.PREFILL, 1)


def test_a_long_prompt_wants_all_of_a_layer_nobody_has_seen() -> None:
    assert sorted(Foresight(N, COPY_NS).likely(3, 1000)) == list(range(N))


def test_few_tokens_want_nothing_for_sure() -> None:
    assert Foresight(N, COPY_NS).likely(3, 8) == []


def test_likely_ones_are_named_likeliest_first() -> None:
    """Routing that is skewed as trained models' is: of those named nearly all are asked for."""
    dice, foresight = random.Random(1), Foresight(N, COPY_NS)
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
        foresight.observe(event(0, ids), 0, 0, 0)
    assert asked > 0.85 * named


def test_layers_are_apart() -> None:
    foresight = Foresight(N, COPY_NS)
    for _ in range(20):
        foresight.observe(event(0, [1, 2, 3] * 30), 0, 0, 0)
    assert set(foresight.likely(0, 90)) == {1, 2, 3}
    assert len(foresight.likely(1, 1000)) == N


class Link:
    """A link and a device: what is given to the link goes in order; a layer is computed when all it
    lacked is there, and then the next one's demands come."""

    def __init__(self, foresight: Foresight, copy_ns: float, compute_ns: float) -> None:
        self.foresight = foresight
        self.copy_ns = copy_ns
        self.compute_ns = compute_ns
        self.now_ns = self.free_ns = 0.0
        self.n_ahead = 0

    def step(self, lacking: int, share_in_vain: float, n_layers: int = 30) -> float:
        """The time of one; how many are ahead is what the foresight has room for, at most 3/4 of
        what a layer lacks and as many in vain as that share says."""
        began, coming = self.now_ns, 0
        for layer in range(n_layers):
            vain = round(share_in_vain * coming)
            n = lacking - (coming - vain)
            self.foresight.observe(event(layer, list(range(N))), round(self.now_ns), n, vain)
            there = max(self.free_ns, self.now_ns) + n * self.copy_ns
            coming = 0
            if layer < n_layers - 1:
                coming = self.n_ahead = min(lacking * 3 // 4, self.foresight.room())
                self.foresight.copied(coming)
            self.free_ns = there + coming * self.copy_ns
            self.now_ns = there + self.compute_ns
        return self.now_ns - began


@pytest.mark.parametrize("slower", [0.9, 1.0, 1.1])
def test_as_many_ahead_as_keep_the_link_busy(slower: float) -> None:
    """Computing takes as long as 10 copies, a layer lacks 80, and of four copies ahead one is in
    vain. Whatever was measured first, the link is hardly idle and little is in vain."""
    link = Link(Foresight(N, COPY_NS / slower), COPY_NS, 10 * COPY_NS)
    assert link.foresight.room() >= 80
    times = [link.step(80, 0.25) for _ in range(40)]
    assert 6 <= link.n_ahead <= 20
    best = 30 * 80 * COPY_NS
    assert times[0] > 1.18 * best
    assert max(times[-10:]) < 1.08 * best


def test_where_computing_takes_longer_all_that_is_likely_comes() -> None:
    link = Link(Foresight(N, COPY_NS), COPY_NS, 100 * COPY_NS)
    for _ in range(40):
        link.step(80, 0.25)
    assert link.n_ahead == 60


def test_steps_of_other_sizes_are_apart() -> None:
    foresight = Foresight(N, COPY_NS)
    link = Link(foresight, COPY_NS, 10 * COPY_NS)
    for _ in range(40):
        link.step(80, 0.25)
    assert foresight.room() < 30
    foresight.observe(event(0, list(range(N)) * 4), round(link.now_ns), 0, 0)
    assert foresight.room() > 80
