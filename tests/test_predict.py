"""The gate predictor: what it feeds to which router, how tokens vote, and what it learns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moe_gguf.policies.predict import Calibration, GatePredictor, Router, Variant
from moe_gguf.policies.router import Floats, Ids, RoutingRule

N_EXPERTS, N_EMBD, N_USED = 16, 48, 4
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
    return router.rule.select(router.logits(x), N_USED)


def test_logits_are_the_product_and_the_bias() -> None:
    bias = np.arange(N_EXPERTS, dtype=np.float32)
    router = routers(logit_bias=bias)[1]
    x = vectors(7)
    np.testing.assert_allclose(router.logits(x), x @ router.weight.T + bias, rtol=1e-4, atol=1e-5)
    # As the engine has it: a view with a stride.
    wide = np.hstack([x, x])[:, :N_EMBD]
    assert (router.logits(wide) == router.logits(x)).all()


@pytest.mark.parametrize(
    "rule",
    [
        RoutingRule(),
        RoutingRule("sigmoid", np.linspace(-0.3, 0.3, N_EXPERTS, dtype=np.float32), 4, 2),
    ],
)
def test_raw_is_the_next_routers_own_choice(rule: RoutingRule) -> None:
    predictor = GatePredictor(routers(rule), N_USED, ahead=2)
    x = vectors(1)
    for ahead, target in ((1, 2), (2, 5)):
        prediction = predictor.predict(1, x, ahead)
        assert prediction is not None
        assert prediction.layer == target
        assert len(prediction.experts) == len(prediction.confidence) == 2 * N_USED
        assert (prediction.experts[:N_USED] == routed(predictor.routers[target], x)[0]).all()
        assert (prediction.confidence == 0.5).all()  # nothing learned yet
    assert predictor.predict(5, x) is None
    assert predictor.predict(2, x, 2) is None


def test_renorm_swaps_the_norm_weights() -> None:
    rng = np.random.default_rng(3)
    norms = {layer: rng.uniform(0.5, 2, N_EMBD).astype(np.float32) for layer in LAYERS}
    norms[1][[0, 7]] = 0
    with_norms = {k: replace(r, norm=norms[k]) for k, r in routers().items()}
    predictor = GatePredictor(with_norms, N_USED, "renorm")
    inner = vectors(1)
    prediction = predictor.predict(1, inner * norms[1])
    assert prediction is not None
    kept = inner.copy()
    kept[:, [0, 7]] = 0  # what a zero has wiped out cannot come back, and must not become infinite
    want = routed(with_norms[2], kept * norms[2])[0]
    assert prediction.experts[:N_USED].tolist() == want.tolist()


def test_residual_learns_a_constant_step() -> None:
    predictor = GatePredictor(routers(), N_USED, "residual")
    step = vectors(1, seed=9)[0] * 3
    right = {"before": 0, "after": 0}
    for t in range(40):
        x = vectors(1, seed=100 + t)
        prediction = predictor.predict(1, x)
        assert prediction is not None
        truth = routed(predictor.routers[2], x + step)[0]
        n = len(set(prediction.experts[:N_USED].tolist()) & set(truth.tolist()))
        right["before" if t == 0 else "after"] += n
        predictor.predict(2, x + step)
    assert right["before"] < N_USED
    assert right["after"] == 39 * N_USED


@pytest.mark.parametrize("variant", ["raw", "residual"])
def test_recall_and_confidence_are_learned(variant: Variant) -> None:
    """The next gate input is this one plus noise: sure guesses come true more often."""
    predictor = GatePredictor(routers(), N_USED, variant)
    rng = np.random.default_rng(4)
    made = np.zeros(3)
    right = np.zeros(3)
    recalls: list[float] = []
    for t in range(900):
        x = vectors(1, seed=t)
        prediction = predictor.predict(1, x)
        assert prediction is not None
        after = x + rng.standard_normal(x.shape).astype(np.float32) * 0.7
        truth = routed(predictor.routers[2], after)
        hit = np.isin(prediction.experts, truth[0])
        predictor.observe(2, truth)
        recalls.append(float(hit[:N_USED].mean()))
        if t >= 300:
            bins = np.digitize(prediction.confidence, [1 / 3, 2 / 3])
            made += np.bincount(bins, minlength=3)
            right += np.bincount(bins, hit, 3)
    assert (made > 200).all()
    shares = right / made
    assert shares[0] < 1 / 3 < shares[1] < 2 / 3 < shares[2]
    assert abs(predictor.recall[2] - np.mean(recalls[-300:])) < 0.05
    assert 1 not in predictor.recall  # the first layer is never predicted


def test_tokens_vote() -> None:
    predictor = GatePredictor(routers(), N_USED)
    x = vectors(1)
    twice = np.vstack([x, x, x, vectors(1, 5)])
    prediction = predictor.predict(1, twice)
    assert prediction is not None
    first = {int(e) for e in prediction.experts}
    one = predictor.predict(1, x)
    other = predictor.predict(1, vectors(1, 5))
    assert one is not None and other is not None
    assert first == set(one.experts.tolist()) | set(other.experts.tolist())
    shared = set(one.experts.tolist()) & set(other.experts.tolist())
    # Before anything is learned each of the tokens means one half.
    for expert, confidence in zip(prediction.experts, prediction.confidence, strict=True):
        n = 3 * (expert in one.experts) + (expert in other.experts)
        assert confidence == pytest.approx(1 - 0.5**n)
        assert (n == 4) == (expert in shared)
    assert (np.diff(prediction.confidence) <= 1e-12).all()


def test_a_batch_teaches_like_its_tokens() -> None:
    single, batch = (GatePredictor(routers(), N_USED) for _ in range(2))
    x = vectors(30)
    truth = routed(single.routers[2], x + vectors(30, 1) / 2)
    for t in range(30):
        single.predict(1, x[t : t + 1])
        single.observe(2, truth[t : t + 1])
    batch.predict(1, x)
    batch.observe(2, truth)
    probe = vectors(1, 77)
    a, b = single.predict(1, probe), batch.predict(1, probe)
    assert a is not None and b is not None
    np.testing.assert_allclose(a.confidence, b.confidence)


def test_a_batch_cut_to_its_outputs_teaches_nothing() -> None:
    predictor = GatePredictor(routers(), N_USED)
    predictor.predict(1, vectors(5))
    predictor.observe(2, np.zeros((1, N_USED), np.intp))  # the last layer of a prompt
    predictor.observe(2, np.zeros((5, N_USED), np.intp))  # too late: each guess is judged once
    predictor.observe(1, np.zeros((5, N_USED), np.intp))  # never predicted
    assert predictor.recall == {}


def cells(calibration: Calibration, values: Sequence[float]) -> Ids:
    return calibration.cells(np.array(values, np.float32))


def test_calibration_by_hand() -> None:
    calibration = Calibration(16, 4)
    sure, weak = cells(calibration, [0.9, 0.02])
    assert sure != weak
    assert cells(calibration, [0.9, 0.9])[1] == sure  # ranks 0 and 1 share a bin of half of 4
    assert cells(calibration, [0.9, 0.9, 0.9])[2] != sure
    for _ in range(7):
        calibration.learn(np.array([sure, weak]), np.array([True, False]))
    # Beta(1, 1): (7 + 1) / (7 + 2) and 1 / 9.
    np.testing.assert_allclose(calibration.chance(np.array([sure, weak])), [8 / 9, 1 / 9])


def test_calibration_follows_a_change() -> None:
    calibration = Calibration(16, 4)
    cell = cells(calibration, [0.5])
    for _ in range(20000):
        calibration.learn(cell, np.array([True]))
    assert 0.99 < calibration.chance(cell)[0] < 1
    for _ in range(2000):
        calibration.learn(cell, np.array([False]))
    assert calibration.chance(cell)[0] < 0.2


def test_no_blas_thread_starts() -> None:
    """Threads of BLAS would fight the model's own: a product large enough for them takes no more
    processor time than wall time."""
    rng = np.random.default_rng(0)
    router = Router(rng.standard_normal((256, 4096)).astype(np.float32), RoutingRule())
    x = rng.standard_normal((8, 4096)).astype(np.float32)
    router.logits(x)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(20):
        router.logits(x)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert cpu < 1.2 * wall + 0.01
