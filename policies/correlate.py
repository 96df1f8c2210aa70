"""Which experts follow which: votes of a group's tokens for the next layer's experts.

After Klotski (arXiv 2502.06888): a table of counts per layer, expert of the layer before to expert
of this one, from earlier runs and learning on in memory. Every token of a group looks up the
experts it just used, and the votes are summed; the first layer, which nothing comes before, is
voted for by how often its experts are used. Owns the counts. Asks no router and knows no time: how
many of the hottest are read ahead is a pace's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from .base import Guess, Ids, Inputs, Phase, RouteEvent

Floats = npt.NDArray[np.float32]

# How many observations the usual frequencies weigh in a row of the table that was hardly seen.
_PRIOR = np.float32(1)
# How many tokens the table of earlier runs weighs at first: a sequence of usual length.
_EARLIER = np.float32(256)
_SURE = np.float32(0.999)  # a vote is never certain, so that the chances of many can be multiplied
_RATE = 1 / 256  # of recall's mean


class Correlations:
    """The predictor: guesses all experts of the layer that comes next, hottest first.

    ``popularity`` and ``transitions`` are those of earlier runs, per token, as in ``Facts``. A
    guess's confidence is the chance that any token asks for it, its rank the number of tokens
    expected to.
    """

    def __init__(
        self,
        layers: Sequence[int],
        n_experts: int,
        popularity: Mapping[int, float],
        transitions: Floats | None = None,
    ) -> None:
        self.recall: dict[int, float] = {}
        self.layers = list(layers)
        self.n_experts = n_experts
        self.index = {layer: i for i, layer in enumerate(self.layers)}
        self.uses = np.zeros((len(self.layers), n_experts), np.float32)  # tokens, by layer
        for key, uses in popularity.items():
            self.uses[self.index[key // n_experts], key % n_experts] = uses * _EARLIER
        self.follows = np.zeros((max(0, len(layers) - 1), n_experts, n_experts), np.float32)
        if transitions is not None:
            np.multiply(transitions, _EARLIER, out=self.follows)
        self._at = -1  # index of the latest event's layer
        self._chosen = np.zeros((0, n_experts), np.float32)  # of that event, [n_tokens, n_experts]
        self._hot: npt.NDArray[np.intp] | None = None  # experts guessed for the next, hottest first

    def observe(self, event: RouteEvent, ids: Callable[[], Ids]) -> None:
        chosen = np.zeros((event.n_tokens, self.n_experts), np.float32)
        np.put_along_axis(chosen, ids().astype(np.intp), 1, axis=1)
        i, before = self.index[event.layer], self._chosen
        if i > 0 and i == self._at + 1 and len(before) == len(chosen):
            self.follows[i - 1] += before.T @ chosen
        votes = chosen.sum(axis=0)
        self.uses[i] += votes
        if self._hot is not None and event.phase == Phase.DECODE and event.n_tokens == 1:
            n_used = int(votes.sum())
            now = float(votes[self._hot[:n_used]].sum() / votes.sum())
            mean = self.recall.get(event.layer, now)
            self.recall[event.layer] = mean + (now - mean) * _RATE
        self._at, self._chosen, self._hot = i, chosen, None

    def guess(self, event: RouteEvent, x: Callable[[], Inputs]) -> Sequence[Guess]:
        i = (self._at + 1) % len(self.layers)
        chances = self._chances(i)
        votes = chances.sum(axis=0)
        any_of_them = -np.expm1(np.log1p(-np.minimum(chances, _SURE)).sum(axis=0))
        hot = np.argsort(-votes, kind="stable")
        self._hot = hot[votes[hot] > 0]
        keys = (self.layers[i] * self.n_experts + self._hot).tolist()
        return list(map(Guess, keys, any_of_them[self._hot].tolist()))

    def _chances(self, i: int) -> Floats:
        """By token [n_tokens, n_experts] of the latest event, what it will ask layer i for."""
        chosen = self._chosen
        n_used = chosen[0].sum()
        usual = self.uses[i] * (n_used / max(np.float32(1), self.uses[i].sum()))
        if i == 0:
            return np.broadcast_to(usual, chosen.shape)
        rows = self.follows[i - 1]
        # A row adds up to n_used for each time that its expert was seen.
        seen = rows.sum(axis=1, keepdims=True) / n_used
        table = (rows + _PRIOR * usual) / (seen + _PRIOR)
        chances: Floats = chosen @ table / n_used
        return chances
