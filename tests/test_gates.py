"""The native gates: what they feed to which router, how tokens vote, what they learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from conftest import TinyFile
from harness import Ours, RandomGuesses, ours, rows
from reference_gates import Ids, ReferenceGates, rank

from moe_gguf.policies.base import Guess, RouteEvent
from moe_gguf.policies.pace import Everything
from moe_gguf.policies.predict import Gates, Variant
from moe_gguf.runtime.plugin.gates import (
    Floats,
    Gating,
    NativeGates,
    Prediction,
    Router,
    RoutingRule,
)
from moe_gguf.runtime.routers import read_routers

N_EXPERTS, N_EMBD, N_USED = 16, 53, 4
LAYERS = [1, 2, 5]


def routers(rule: RoutingRule | None = None, **more: Any) -> dict[int, Router]:
    rng = np.random.default_rng(1)
    shape = N_EXPERTS, N_EMBD
    return {
        layer: Router(
            rng.standard_normal(shape).astype(np.float32) / 5, rule or RoutingRule(), **more
        )
        for layer in LAYERS
    }


def vectors(n: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((n, N_EMBD)).astype(np.float32)


def routed(router: Router, x: Floats) -> Ids:
    return rank(router, x, N_USED)[0]


@contextmanager
def gates(
    of: dict[int, Router] | None = None, variant: Variant = "raw", ahead: int = 1
) -> Iterator[NativeGates]:
    with closing(NativeGates(of or routers(), N_USED, Gates(variant, ahead))) as made:
        yield made


def columns(predictions: list[Prediction], layer: int) -> tuple[list[int], list[float]]:
    """Experts and chances of one layer."""
    mine = [p for p in predictions if p.layer == layer]
    return [p.expert for p in mine], [p.chance for p in mine]


@pytest.mark.parametrize("variant", get_args(Variant))
@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("gating", get_args(Gating))
@pytest.mark.parametrize("extras", ["", "bias", "groups", "logits"])
def test_they_do_what_the_reference_does(
    variant: Variant, ahead: int, gating: Gating, extras: str
) -> None:
    rng = np.random.default_rng(6)

    def values(*shape: int) -> Floats:
        return rng.standard_normal(shape).astype(np.float32)

    bias = values(N_EXPERTS) if extras in ("bias", "groups") else None
    rule = RoutingRule(gating, bias, *((4, 2) if extras == "groups" else ()))
    more = {"logit_bias": values(N_EXPERTS) if extras == "logits" else None}
    made = routers(rule, norm=values(N_EMBD), **more)
    reference = ReferenceGates(made, N_USED, variant, ahead=ahead)
    with gates(made, variant, ahead) as native:
        for n_tokens in (1, 1, 6, 1, 3, 1, 1):
            x = values(n_tokens, N_EMBD + 7)[:, :N_EMBD]  # rows lie apart
            for i, layer in enumerate(LAYERS):
                ids = rng.permuted(np.tile(np.arange(N_EXPERTS), (n_tokens, 1)), axis=1)[:, :N_USED]
                native.observe(layer, ids)
                reference.observe(layer, ids)
                x = x + values(N_EMBD) / 2
                got = native.predict(layer, x)
                for a in range(1, ahead + 1):
                    want = reference.predict(layer, x, a)
                    if want is None:
                        continue
                    experts, chances = columns(got, LAYERS[i + a])
                    assert experts == want.experts.tolist()
                    np.testing.assert_allclose(chances, want.confidence, 1e-4)
        assert native.recall == pytest.approx(reference.recall)


@pytest.mark.parametrize(
    "rule",
    [
        RoutingRule(),
        RoutingRule("sigmoid", np.linspace(-0.3, 0.3, N_EXPERTS, dtype=np.float32), 4, 2),
    ],
)
def test_raw_is_the_next_routers_own_choice(rule: RoutingRule) -> None:
    made = routers(rule)
    x = vectors(1)
    with gates(made, ahead=2) as native:
        predictions = native.predict(1, x)
        assert [p.layer for p in predictions] == [2] * 8 + [5] * 8
        for target in (2, 5):
            experts, chances = columns(predictions, target)
            assert experts[:N_USED] == routed(made[target], x)[0].tolist()
            assert chances == [0.5] * 8  # nothing learned yet
        assert native.predict(5, x) == []
        assert {p.layer for p in native.predict(2, x)} == {5}


def test_renorm_swaps_the_norm_weights() -> None:
    rng = np.random.default_rng(3)
    norms = {layer: rng.uniform(0.5, 2, N_EMBD).astype(np.float32) for layer in LAYERS}
    norms[1][[0, 7]] = 0
    with_norms = {k: replace(r, norm=norms[k]) for k, r in routers().items()}
    inner = vectors(1)
    with gates(with_norms, "renorm") as native:
        experts, _ = columns(native.predict(1, inner * norms[1]), 2)
    kept = inner.copy()
    kept[:, [0, 7]] = 0  # what a zero has wiped out cannot come back, and must not become infinite
    assert experts[:N_USED] == routed(with_norms[2], kept * norms[2])[0].tolist()


def test_residual_learns_a_constant_step() -> None:
    made = routers()
    step = vectors(1, seed=9)[0] * 3
    right = {"before": 0, "after": 0}
    with gates(made, "residual") as native:
        for t in range(40):
            x = vectors(1, seed=100 + t)
            experts, _ = columns(native.predict(1, x), 2)
            truth = routed(made[2], x + step)[0].tolist()
            n = len(set(experts[:N_USED]) & set(truth))
            right["before" if t == 0 else "after"] += n
            native.predict(2, x + step)
    assert right["before"] < N_USED
    assert right["after"] == 39 * N_USED


@pytest.mark.parametrize("variant", ["raw", "residual"])
def test_recall_and_confidence_are_learned(variant: Variant) -> None:
    """The next gate input is this one plus noise: sure guesses come true more often."""
    made = routers()
    rng = np.random.default_rng(4)
    n_made, n_right = np.zeros(3), np.zeros(3)
    recalls: list[float] = []
    with gates(made, variant) as native:
        for t in range(900):
            x = vectors(1, seed=t)
            experts, chances = columns(native.predict(1, x), 2)
            after = x + rng.standard_normal(x.shape).astype(np.float32) * 0.7
            truth = routed(made[2], after)
            hit = np.isin(experts, truth[0])
            native.observe(2, truth)
            recalls.append(float(hit[:N_USED].mean()))
            if t >= 300:
                bins = np.digitize(chances, [1 / 3, 2 / 3])
                n_made += np.bincount(bins, minlength=3)
                n_right += np.bincount(bins, hit, 3)
        recall = native.recall
    assert (n_made > 200).all()
    shares = n_right / n_made
    assert shares[0] < 1 / 3 < shares[1] < 2 / 3 < shares[2]
    assert abs(recall[2] - np.mean(recalls[-300:])) < 0.05
    assert 1 not in recall  # the first layer is never predicted


def test_tokens_vote() -> None:
    x, y = vectors(1), vectors(1, 5)
    with gates() as native:
        first, second = (set(columns(native.predict(1, v), 2)[0]) for v in (x, y))
        experts, chances = columns(native.predict(1, np.vstack([x, x, x, y])), 2)
    assert set(experts) == first | second
    # Before anything is learned each of the tokens means one half.
    votes = [3 * (e in first) + (e in second) for e in experts]
    assert votes == sorted(votes, reverse=True)
    np.testing.assert_allclose(chances, [1 - 0.5**n for n in votes], 1e-6)


def test_a_batch_cut_to_its_outputs_teaches_nothing() -> None:
    with gates() as native:
        native.predict(1, vectors(5))
        native.observe(2, np.zeros((1, N_USED), np.int32))  # the last layer of a prompt
        native.observe(2, np.zeros((5, N_USED), np.int32))  # too late: each guess is judged once
        native.observe(1, np.zeros((5, N_USED), np.int32))  # never predicted
        assert native.recall == {}


def test_what_is_forgotten_teaches_nothing() -> None:
    with gates() as native:
        native.predict(1, vectors(1))
        native.forget()
        native.observe(2, np.zeros((1, N_USED), np.int32))
        assert native.recall == {}


def test_confidence_follows_a_change() -> None:
    """Beta(1, 1) plus what came true, of the last few hundred."""
    made = routers()
    x = vectors(1)
    right = routed(made[2], x)
    wrong = np.array([[e for e in range(N_EXPERTS) if e not in right[0]][:N_USED]])
    with gates(made) as native:
        for _ in range(7):
            native.predict(1, x)
            native.observe(2, right)
        best = native.predict(1, x)[0].chance
        assert 8 / 9 <= best < 1  # ranks 0 and 1 may share a cell
        for _ in range(20000):
            native.predict(1, x)
            native.observe(2, right)
        assert 0.99 < native.predict(1, x)[0].chance < 1
        for _ in range(2000):
            native.predict(1, x)
            native.observe(2, wrong)
        assert native.predict(1, x)[0].chance < 0.2


def test_damaged_weights_are_ranked_last() -> None:
    weight = np.full((8, 16), np.nan, np.float32)
    weight[5] = 1
    made = {layer: Router(weight, RoutingRule()) for layer in (0, 1)}
    with closing(NativeGates(made, 2, Gates("raw"))) as native:
        experts, _ = columns(native.predict(0, np.ones((1, 16), np.float32)), 1)
    assert experts[0] == 5
    assert len(set(experts)) == 4


def test_without_a_router_nothing_is_guessed_and_the_mode_line_says_so(
    tiny_file: TinyFile,
) -> None:
    path = tiny_file("qwen3moe")
    with ours(path, 19, policy="fate") as model:
        assert "policy fate;" in model.arena.mode_line()
    with ours(path, 19, policy="fate", routers=lambda *_: {}) as model:
        for token in range(20):
            model.context().decode(rows([token]))
        assert "policy fate without guesses (" in model.arena.mode_line()
        assert model.stats().guess_loads == 0
        assert model.arena.recall() == {}


class Twin:
    """A recorder with gates of its own, which are asked from Python what the plugin should say."""

    def __init__(self) -> None:
        self.model: Ours | None = None
        self.gates: NativeGates | None = None
        self.expected: list[Guess] = []
        self.n_compared = 0

    def record(
        self, event: RouteEvent, ids: list[int], continuation: bool, cancelled: Sequence[int]
    ) -> None:
        assert self.model is not None
        assert self.gates is not None
        self.gates.observe(event.layer, np.array(ids, np.int32).reshape(event.n_tokens, -1))
        predicted = self.gates.predict(event.layer, self.model.arena.callbacks._inputs())
        self.expected = [Guess(16 * p.layer + p.expert, p.chance) for p in predicted]

    def record_guesses(self, offered: Sequence[Guess], chosen: Sequence[Guess]) -> None:
        assert offered == self.expected
        self.n_compared += 1


def test_inside_the_plugin_they_guess_what_they_guess_alone(tiny_file: TinyFile) -> None:
    """5 slots never hold all that is predicted, so every event but the last layer's asks."""
    twin = Twin()
    with ours(tiny_file("qwen3moe"), 5, policy="fate", pace=Everything(), recorder=twin) as model:
        found = model.found
        routers_ = read_routers(found.layout, model.plugin)
        with closing(NativeGates(routers_, found.n_used, Gates())) as twin.gates:
            twin.model = model
            context = model.context()
            context.decode(rows([3, 1, 4, 1, 5]))
            for i in range(10):
                context.decode(rows([7 * i], 5 + i))
            assert twin.n_compared == 11 * 2
            assert model.arena.recall() == twin.gates.recall != {}


def test_another_predictor_is_not_kept_from_guessing_by_gates(tiny_file: TinyFile) -> None:
    """A policy may be given another predictor than its own: its gates then do not run."""
    guesses = RandomGuesses(range(3), 16, 3)
    with ours(tiny_file("qwen3moe"), 19, policy="fate", predictor=guesses) as model:
        model.context().decode(rows([3, 1, 4, 1, 5]))
        assert model.stats().guess_loads > 0
        assert model.plugin.call.n_predicted == 0
