"""Klotski's votes, by hand; and K, the smallest hot set that hides the other reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from moe_gguf.policies.base import Guess, Ids, Inputs, Phase, RouteEvent
from moe_gguf.policies.correlate import Correlations
from moe_gguf.policies.pace import HotSet, Meters
from moe_gguf.runtime.engine.planner import Pipeline

LAYERS, N_EXPERTS = [1, 2], 4
BLOB, READ_NS = 1000, 2000  # a disk of half a byte per ns


def feed(votes: Correlations, layer: int, tokens: Sequence[Sequence[int]]) -> list[Guess]:
    ids: Ids = np.array(tokens, np.int32)
    experts, counts = np.unique(ids, return_counts=True)
    n = len(tokens)
    event = RouteEvent(layer, n, experts.tolist(), counts.tolist(), Phase.DECODE, n)
    votes.observe(event, lambda: ids)
    no_inputs: Inputs = np.zeros((1, 0), np.float32)
    return list(votes.guess(event, lambda: no_inputs))


def test_every_token_votes_with_what_followed_its_own_experts() -> None:
    votes = Correlations(LAYERS, N_EXPERTS, {})
    for _ in range(50):  # token by token: 0 is followed by 2, 1 by 3
        feed(votes, 1, [[0], [1]])
        feed(votes, 2, [[2], [3]])
    guesses = feed(votes, 1, [[0], [0], [0], [1]])
    assert [guess.key for guess in guesses] == [2 * N_EXPERTS + 2, 2 * N_EXPERTS + 3]
    # Three tokens each surely want 2; one wants 3.
    assert guesses[0].confidence > guesses[1].confidence > 0.9


def test_the_first_layer_is_voted_for_by_use() -> None:
    votes = Correlations(LAYERS, N_EXPERTS, {})
    for _ in range(4):
        feed(votes, 1, [[3], [3], [1]])
        guesses = feed(votes, 2, [[0], [0], [0]])
    assert [guess.key for guess in guesses] == [N_EXPERTS + 3, N_EXPERTS + 1]


def test_earlier_runs_vote_at_once_and_are_outvoted_in_time() -> None:
    transitions = np.zeros((1, N_EXPERTS, N_EXPERTS), np.float32)
    transitions[0, 0, 2] = 1.0
    votes = Correlations(LAYERS, N_EXPERTS, {N_EXPERTS: 1.0, 2 * N_EXPERTS + 2: 1.0}, transitions)
    assert feed(votes, 1, [[0]])[0].key == 2 * N_EXPERTS + 2
    for _ in range(300):
        feed(votes, 1, [[0]])
        feed(votes, 2, [[1]])
    assert feed(votes, 1, [[0]])[0].key == 2 * N_EXPERTS + 1
    assert transitions[0, 0].tolist() == [0, 0, 1, 0], "what was stored does not change"


class Layers:
    """Two layers in turn; the second stalls unless ``enough`` were read ahead for it, for a read of
    each that is lacking or for what ``stall`` says of them."""

    def __init__(self, enough: int, stall: Callable[[int], float] | None = None) -> None:
        self.pace = HotSet()
        self.enough = enough
        self.stall_of = stall or (lambda n: max(0, self.enough - n) * READ_NS)
        self.chosen = [0, 0]
        self.now = self.read = self.stall = 0

    def run(self, n_steps: int) -> int:
        guesses = [Guess(key, 0.9) for key in range(12)]
        for i in range(2 * n_steps):
            meters = Meters(
                i % 2, Phase.DECODE, 8, self.now, self.read * 2, self.read, self.stall, 0, 4, 4
            )
            assert self.pace.event(meters)
            self.stall = int(self.stall_of(self.chosen[0])) if i % 2 == 1 else 0
            self.read += 4 * BLOB
            self.now += 10 * READ_NS
            self.chosen[i % 2] = len(self.pace.choose(guesses, BLOB))
        return self.chosen[0]


@pytest.mark.parametrize("enough", [0, 3, 7])
def test_the_hot_set_grows_until_nothing_stalls_and_not_beyond(enough: int) -> None:
    layers = Layers(enough)
    found = {layers.run(1) for _ in range(60) if layers.run(4) >= 0}
    assert max(found) <= enough + 1
    assert layers.chosen[0] in (enough, enough + 1, max(0, enough - 1))
    assert layers.chosen[1] == 0, "the first layer never stalls"


@pytest.mark.parametrize("expert_s", [100, 700, 3000])
@pytest.mark.parametrize(("resident", "missing"), [(4, 12), (0, 9), (20, 12), (2, 3)])
def test_what_is_found_while_running_is_what_the_planner_foretells(
    resident: int, missing: int, expert_s: int
) -> None:
    """Klotski's K solves an inequality of measured times; the pace finds it without them."""
    foretold = Pipeline(1, expert_s, READ_NS, resident, missing).hot

    def stall(hot: int) -> float:
        return (missing - hot) * READ_NS - (resident + hot) * expert_s

    layers = Layers(0, lambda hot: max(0.0, stall(min(hot, missing))))
    layers.run(60)
    found = {layers.run(1) for _ in range(20)}
    assert foretold - 2 <= min(found) <= max(found) <= foretold + 1, (foretold, found)


def test_the_hot_set_shrinks_with_the_need() -> None:
    layers = Layers(7)
    assert layers.run(20) >= 6
    layers.enough = 0
    assert layers.run(100) == 0
