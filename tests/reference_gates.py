"""What native/gates.cpp does, in numpy: rule, ranking, calibration and votes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moe_gguf.policies.predict import Variant
from moe_gguf.runtime.plugin.gates import Floats, Router, RoutingRule

Ids = npt.NDArray[np.integer[Any]]

# Of the averages that follow a run: the last few hundred tokens count.
_RATE = 1 / 256


def gate(rule: RoutingRule, logits: Floats) -> Floats:
    """The router's scores [..., n_experts], before any bias."""
    if rule.gating == "softmax":
        return _softmax(logits)
    if rule.gating == "sigmoid":
        return _sigmoid(logits)
    if rule.gating == "sqrt_softplus":
        return np.sqrt(np.logaddexp(0, logits, dtype=np.float32))
    return logits  # softmax_weight gates after the choice


def scores(rule: RoutingRule, logits: Floats) -> Floats:
    """What the choice compares, [..., n_experts]: the highest are chosen; -inf never is.

    Every gating grows with the logit, so without bias and groups that is the logits themselves.
    """
    if rule.bias is None and rule.n_groups <= 1:
        return logits
    biased = gate(rule, logits)
    if rule.bias is not None:
        biased = biased + rule.bias
    return biased if rule.n_groups <= 1 else _mask(rule, biased)


def _mask(rule: RoutingRule, scores: Floats) -> Floats:
    """Scores with every expert outside the best groups at -inf."""
    groups = scores.reshape(*scores.shape[:-1], rule.n_groups, -1)
    best_two = np.partition(groups, -2, axis=-1)[..., -2:].sum(axis=-1)
    out = np.argpartition(best_two, -rule.n_groups_used, axis=-1)[..., : -rule.n_groups_used]
    masked = groups.copy()
    np.put_along_axis(masked, out[..., None], -np.inf, axis=-2)
    return masked.reshape(scores.shape)


def select(rule: RoutingRule, logits: Floats, n_used: int) -> Ids:
    """The experts chosen, [..., n_used], best first."""
    return top(scores(rule, logits), n_used)


def confidence(rule: RoutingRule, logits: Floats) -> Floats:
    """A number in [0, 1] per expert that grows with the chance of being chosen.

    Not that chance: a softmax is over all experts and several are chosen, a sigmoid knows
    neither the others nor the bias. Calibration makes it one.
    """
    if rule.gating in ("softmax", "softmax_weight"):
        return _softmax(logits)
    return _sigmoid(logits)


def top(scores: Floats, n: int) -> Ids:
    """Indices of the n highest scores along the last axis, the highest first."""
    if n < scores.shape[-1] // 4:  # below that a plain sort is as fast
        some = np.argpartition(scores, -n, axis=-1)[..., -n:]
        order = np.argsort(-np.take_along_axis(scores, some, axis=-1), axis=-1)
        return np.take_along_axis(some, order, axis=-1)
    return np.argsort(-scores, axis=-1)[..., :n]


def _softmax(logits: Floats) -> Floats:
    e: Floats = np.exp(logits - logits.max(axis=-1, keepdims=True))
    e /= e.sum(axis=-1, keepdims=True)
    return e


def _sigmoid(logits: Floats) -> Floats:
    # The detour by tanh cannot overflow.
    half: Floats = np.tanh(logits * np.float32(0.5))
    half += 1
    half *= np.float32(0.5)
    return half


def rank(router: Router, x: Floats, width: int, shift: Floats | None = None) -> tuple[Ids, Floats]:
    """The experts a router would choose first for x + shift, and its confidence in each.

    Both are [n_tokens, width], best first; ``x`` is [n_tokens, n_embd], ``shift`` [n_embd].
    """
    logits = (x if shift is None else x + shift) @ router.weight.T
    if router.logit_bias is not None:
        logits = logits + router.logit_bias
    ranked = top(scores(router.rule, logits), width)
    return ranked, np.take_along_axis(confidence(router.rule, logits), ranked, axis=-1)


class Guessed(NamedTuple):
    """Experts of one layer, best first, and for each the chance that any token asks for it."""

    layer: int
    experts: Ids
    confidence: npt.NDArray[np.float64]


class Calibration:
    """From the router's own confidence and the rank of a guess to the chance that it is right.

    A table of how often guesses came true, over bins of both. Each cell starts from a Beta(1, 1)
    prior, which is one half, and forgets slowly, so that it follows the text.
    """

    CONFIDENCE = np.array([0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95], np.float32)
    RANKS = 8  # in halves of the experts one token uses; the last bin takes the rest

    def __init__(self, n_experts: int, n_used: int) -> None:
        self._rank_bin = np.minimum(np.arange(n_experts) * 2 // n_used, self.RANKS - 1)
        n = (len(self.CONFIDENCE) + 1) * self.RANKS
        self._right = np.zeros(n)
        self._made = np.zeros(n)
        self._chance = np.full(n, 0.5)

    def cells(self, confidence: Floats) -> Ids:
        """The table's cells of guesses [..., rank] in descending order."""
        cells: Ids = np.searchsorted(self.CONFIDENCE, confidence, side="right")
        cells *= self.RANKS
        cells += self._rank_bin[: confidence.shape[-1]]
        return cells

    def chance(self, cells: Ids) -> npt.NDArray[np.float64]:
        chance: npt.NDArray[np.float64] = self._chance[cells]
        return chance

    def learn(self, cells: Ids, right: npt.NDArray[np.bool_]) -> None:
        """Take in what became of guesses."""
        n = len(self._made)
        made = np.bincount(cells.ravel(), minlength=n)
        self._right += np.bincount(cells.ravel(), right.ravel(), n)
        self._made += made
        many = self._made > 2 / _RATE  # half of a full cell's past goes
        if many.any():
            self._right[many] /= 2
            self._made[many] /= 2
        np.divide(self._right + 1, self._made + 2, out=self._chance)


class _Guess(NamedTuple):
    """A prediction waiting for the truth; arrays are [n_tokens, width], best guess first."""

    ranked: Ids
    cells: Ids


class ReferenceGates:
    """Predicts the MoE layer ``ahead`` layers on with that layer's own router.

    ``routers`` holds the MoE layers in model order. Variants differ in what is fed to the router:

    - ``raw``: this layer's gate input as it is (the paper).
    - ``renorm``: with this layer's norm weight taken out and the predicted layer's put in.
    - ``residual``: plus the mean of how the gate input changed between these two layers so far.

    Per layer event, call ``observe`` with what was routed, then ``predict``. ``width`` is how many
    experts are ranked per token: twice those used covers most of what can be guessed with profit.
    ``ahead`` is the farthest look-ahead that will be asked for.
    """

    def __init__(
        self,
        routers: Mapping[int, Router],
        n_used: int,
        variant: Variant = "raw",
        width: int | None = None,
        ahead: int = 1,
    ) -> None:
        assert routers
        self.ahead = ahead
        self.routers = dict(routers)
        self.layers = list(routers)
        self.variant = variant
        n_experts = min(len(router.weight) for router in routers.values())
        self.n_used = n_used
        self.width = min(n_experts, width or 2 * n_used)
        self.recall: dict[int, float] = {}  # of the n_used best guesses, one layer ahead
        self._index = {layer: i for i, layer in enumerate(self.layers)}
        self._calibrations: dict[tuple[int, int], Calibration] = {}  # by (layer, ahead)
        self._waiting: dict[tuple[int, int], _Guess] = {}
        self._ratios: dict[tuple[int, int], Floats] = {}  # renorm: by (from, to)
        self._steps: dict[tuple[int, int], Floats] = {}  # residual: by (from, to)
        self._seen: dict[tuple[int, int], int] = {}  # tokens behind each of these
        self._means: dict[int, Floats] = {}  # residual: of the gate input of this step's layers

    def predict(self, layer: int, x: Floats, ahead: int = 1) -> Guessed | None:
        """Guesses for the MoE layer ``ahead`` of ``layer``; None if there is none.

        ``x`` [n_tokens, n_embd] is the gate input of ``layer``; it is not kept.  For one token
        the experts come in the order its router would choose them. For several, tokens vote: an
        expert's votes are the number of tokens expected to choose it, and its confidence is
        1 - prod(1 - p) over them.
        """
        assert 1 <= ahead <= self.ahead
        i = self._index[layer]
        if self.variant == "residual" and ahead == 1:
            self._follow(i, x)
        if i + ahead >= len(self.layers):
            return None
        target = self.layers[i + ahead]
        router = self.routers[target]
        if self.variant == "renorm":
            x = x * self._ratio(layer, target)
        ranked, trust = rank(router, x, self.width, self._steps.get((layer, target)))
        key = target, ahead
        calibration = self._calibrations.get(key)
        if calibration is None:
            n_experts = len(router.weight)
            calibration = self._calibrations[key] = Calibration(n_experts, self.n_used)
        cells = calibration.cells(trust)
        self._waiting[key] = _Guess(ranked, cells)
        if len(x) == 1:
            return Guessed(target, ranked[0], calibration.chance(cells[0]))
        return _vote(target, ranked, calibration.chance(cells), len(router.weight))

    def observe(self, layer: int, ids: npt.NDArray[Any]) -> None:
        """What was routed at ``layer``: ``ids`` [n_tokens, n_used]. Teaches what was predicted."""
        for ahead in range(1, self.ahead + 1):
            guess = self._waiting.pop((layer, ahead), None)
            # llama.cpp computes the last layer for fewer tokens where only those give output.
            if guess is None or len(guess.ranked) != len(ids):
                continue
            right = (guess.ranked[:, :, None] == ids[:, None, :]).any(axis=-1)
            self._calibrations[layer, ahead].learn(guess.cells, right)
            if ahead == 1:
                now = float(right[:, : ids.shape[1]].sum()) / ids.size
                keep = (1 - _RATE) ** len(ids)
                self.recall[layer] = now + keep * (self.recall.get(layer, now) - now)

    def forget(self) -> None:
        """Drop what waits to be observed: the truth is not going to come."""
        self._waiting.clear()
        self._means.clear()

    def _ratio(self, layer: int, target: int) -> Floats:
        ratio = self._ratios.get((layer, target))
        if ratio is None:
            mine, theirs = self.routers[layer].norm, self.routers[target].norm
            assert mine is not None and theirs is not None, "renorm needs the norm weights"
            # A weight of zero has wiped out what it multiplied: nothing to bring back.
            dead = mine == 0
            ratio = np.where(dead, np.float32(0), theirs / np.where(dead, np.float32(1), mine))
            self._ratios[layer, target] = ratio
        return ratio

    def _follow(self, i: int, x: Floats) -> None:
        """Learn how the gate input changes from each layer before to layer i."""
        mean: Floats = x.mean(axis=0) if len(x) > 1 else x[0].copy()
        self._means[i] = mean
        for before in range(i - self.ahead, i):
            earlier = self._means.get(before)
            if earlier is None:
                continue
            key = self.layers[before], self.layers[i]
            step = self._steps.setdefault(key, np.zeros_like(mean))
            seen = self._seen[key] = self._seen.get(key, 0) + len(x)
            step += np.float32(max(_RATE, len(x) / seen)) * (mean - earlier - step)


def _vote(layer: int, ranked: Ids, chance: npt.NDArray[np.float64], n_experts: int) -> Guessed:
    flat = ranked.ravel()
    votes = np.bincount(flat, chance.ravel(), n_experts)
    none = np.bincount(flat, np.log1p(-chance.ravel()), n_experts)  # the prior keeps it below 1
    experts = np.argsort(-votes, kind="stable")[: np.count_nonzero(votes)]
    return Guessed(layer, experts, -np.expm1(none[experts]))
