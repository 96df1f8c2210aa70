"""Expert activation paths: the baseline that prefetches and evicts by counting what follows what.

As MoE-Infinity does (and Fate compares against): no router is looked at, only which experts were
activated so far. Owns the counts; the cache and the predictor below read them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from .base import Guess, Ids, Inputs, Phase, RouteEvent

Floats = npt.NDArray[np.float32]

# How many observations the sequence's own frequencies weigh in a transition that was hardly seen.
_PRIOR = 1.0
# What is left of the transitions when a new sequence begins.
_KEEP = 0.5
# How many tokens the transitions of earlier runs weigh at first: a sequence of usual length, so
# that this run's own soon count for more.
_EARLIER = 256
# Victims chosen at a time: more than the misses of nearly all decode events.
_BATCH = 32


class ExpertPaths:
    """Counts over the MoE layers ``layers``, in model order. ``n_bytes`` says what they take.

    - ``uses[l, e]``: tokens of this sequence that layer l sent to expert e.
    - ``follows[l, a, b]``: tokens that used a at layer l and b at the next, in this sequence and,
      halved with each new one, in those before. A batch's events tell only how many tokens chose
      each expert, so there it grows by the expected number if the two choices were independent:
      count(a) * count(b) / n_tokens. For one token that is exact.

    A sequence begins when a prefill event reaches the first layer after one of another phase did:
    a prompt after decoding. Where several sequences run at once they are counted as one, and a
    prompt that joins them in a mixed step begins nothing. ``begin_sequence`` says so otherwise.

    Of earlier runs, ``popularity`` gives each key's uses per token, and ``transitions`` what
    ``follows`` counts, per token. The first weighs as one token of every sequence, so that experts
    differ in worth before any was used.
    """

    def __init__(
        self,
        layers: Sequence[int],
        n_experts: int,
        popularity: Mapping[int, float] | None = None,
        transitions: Floats | None = None,
    ) -> None:
        self.layers = list(layers)
        self.n_experts = n_experts
        self.index = {layer: i for i, layer in enumerate(self.layers)}
        self._usual = np.zeros((len(layers), n_experts), np.float32)  # uses as a sequence begins
        for key, uses in (popularity or {}).items():
            self._usual[self.index[key // n_experts], key % n_experts] = uses
        self.uses = self._usual.copy()
        self.follows = np.zeros((max(0, len(layers) - 1), n_experts, n_experts), np.float32)
        if transitions is not None:
            np.multiply(transitions, np.float32(_EARLIER), out=self.follows)
        self.tokens = np.zeros(len(layers), np.float32)  # seen by each layer in this sequence
        self.tokens[:] = self._usual.any(axis=1)
        self.events = 0
        self.at = len(layers) - 1  # index of the layer of the latest event
        self._experts: npt.NDArray[np.intp] | None = None  # of the latest event
        self._counts = np.zeros(0, np.float32)
        self._n_tokens = 1
        self._phase = Phase.PREFILL

    @property
    def n_bytes(self) -> int:
        return self.uses.nbytes + self._usual.nbytes + self.follows.nbytes + self.tokens.nbytes

    def begin_sequence(self) -> None:
        self.uses[:] = self._usual
        self.tokens[:] = self._usual.any(axis=1)
        self.follows *= np.float32(_KEEP)
        self._experts = None

    def observe(self, event: RouteEvent) -> None:
        i = self.index[event.layer]
        begins = event.phase == Phase.PREFILL and self._phase != Phase.PREFILL
        if begins and i == 0:
            self.begin_sequence()
        experts = np.fromiter(event.experts, np.intp, len(event.experts))
        counts = np.fromiter(event.counts, np.float32, len(event.counts))
        self.uses[i, experts] += counts
        self.tokens[i] += event.n_tokens
        before = self._experts
        if i > 0 and i == self.at + 1 and before is not None and self._n_tokens == event.n_tokens:
            row = np.zeros(self.n_experts, np.float32)
            row[experts] = counts
            if event.n_tokens > 1:
                self.follows[i - 1, before] += np.outer(self._counts / event.n_tokens, row)
            else:
                self.follows[i - 1, before] += row
        self.at, self._experts, self._counts = i, experts, counts
        self._n_tokens, self._phase = event.n_tokens, event.phase
        self.events += 1

    def next_uses(self) -> Floats | None:
        """Expected uses [n_experts] of the layer after the latest event's; None after the last.

        Each expert a used there adds count(a) * P(b follows a) / n_used, where P comes from
        ``follows``, and from this sequence's frequencies as long as a was hardly seen.
        """
        i, experts = self.at, self._experts
        if i + 1 >= len(self.layers) or experts is None:
            return None
        rows = self.follows[i, experts]
        n_used = self._counts.sum() / self._n_tokens
        # A row adds up to n_used for each time that its expert was seen.
        seen = rows.sum(axis=1) / n_used + np.float32(_PRIOR)
        weight = self._counts / (seen * n_used)
        usual = weight.sum() * _PRIOR / max(1, self.tokens[i + 1])
        uses: Floats = weight @ rows + self.uses[i + 1] * usual
        return uses

    def worth(self) -> Floats:
        """How much each expert [n_layers, n_experts] deserves its slot now.

        Its share of this sequence's tokens, times how near its layer is: 1 for the next layer, down
        to 1 / n_layers for the one that was just computed and comes round last.
        """
        n = len(self.layers)
        ahead = (np.arange(n) - self.at - 1) % n
        near: Floats = (1 - ahead / n).astype(np.float32)
        worth: Floats = self.uses + np.float32(1e-3)
        worth *= (near / np.maximum(self.tokens, np.float32(1)))[:, None]
        return worth


class PathPredictor:
    """Prefetches for the next layer what most often followed; feeds the paths as it goes.

    Guesses as many experts as one token uses.
    """

    def __init__(self, paths: ExpertPaths) -> None:
        self.paths = paths
        self.recall: dict[int, float] = {}
        self._guessed: set[int] = set()

    def observe(self, event: RouteEvent, ids: Callable[[], Ids]) -> None:
        self.paths.observe(event)
        if self._guessed and event.phase == Phase.DECODE:
            base = event.layer * self.paths.n_experts
            votes = zip(event.experts, event.counts, strict=True)
            now = sum(n for e, n in votes if base + e in self._guessed) / sum(event.counts)
            mean = self.recall.get(event.layer, now)
            self.recall[event.layer] = mean + (now - mean) / 256

    def guess(self, event: RouteEvent, x: Callable[[], Inputs]) -> Sequence[Guess]:
        paths = self.paths
        uses = paths.next_uses()
        if uses is None:
            return ()
        n = max(1, sum(event.counts) // event.n_tokens)
        best = np.argsort(-uses)[:n]
        best = best[uses[best] > 0]
        base = paths.layers[paths.at + 1] * paths.n_experts
        chance = np.minimum(uses[best], 1.0).tolist()
        keys = [base + e for e in best.tolist()]
        self._guessed = set(keys)
        return [Guess(key, p) for key, p in zip(keys, chance, strict=True)]


class PathCache:
    """Evicts the expert of least worth, by the paths that a ``PathPredictor`` feeds.

    Worth changes with every event, so victims are chosen some at a time, once per event.
    """

    def __init__(self, paths: ExpertPaths) -> None:
        self.paths = paths
        self._keys: set[int] = set()
        self._resident = np.zeros((len(paths.layers), paths.n_experts), np.bool_)
        self._victims: list[int] = []  # the least worth last
        self._events = -1  # when they were chosen

    def touch(self, key: int, votes: int = 1) -> None:
        pass

    def admit(self, key: int, votes: int = 1) -> bool:
        self._keys.add(key)
        self._mark(key, True)
        return True

    def remove(self, key: int) -> None:
        self._keys.remove(key)
        self._mark(key, False)

    def evict(
        self, pinned: Container[int], incoming: int = -1, demanded: bool = True
    ) -> int | None:
        if self._events != self.paths.events:
            self._victims, self._events = self._choose(_BATCH), self.paths.events
        victim = self._next(pinned)
        if victim is None:  # all of them are pinned or gone
            self._victims = self._choose(len(self._keys))
            victim = self._next(pinned)
        if victim is not None:
            self.remove(victim)
        return victim

    def _next(self, pinned: Container[int]) -> int | None:
        victims = self._victims
        while victims:
            key = victims.pop()
            if key in self._keys and key not in pinned:
                return key
        return None

    def _choose(self, n: int) -> list[int]:
        """The n resident keys of least worth, in descending order."""
        n = min(n, len(self._keys))
        worth = np.where(self._resident, self.paths.worth(), np.inf).ravel()
        least = np.argpartition(worth, n - 1)[:n] if 0 < n < worth.size else np.arange(worth.size)
        least = least[np.argsort(-worth[least], kind="stable")]
        least = least[np.isfinite(worth[least])]
        places, experts = np.divmod(least, self.paths.n_experts)
        layers = np.take(self.paths.layers, places)
        keys: list[int] = (layers * self.paths.n_experts + experts).tolist()
        return keys

    def _mark(self, key: int, resident: bool) -> None:
        layer, expert = divmod(key, self.paths.n_experts)
        self._resident[self.paths.index[layer], expert] = resident

    def check_integrity(self) -> None:
        layers, n = self.paths.layers, self.paths.n_experts
        marked = {layers[i] * n + e for i, e in zip(*np.nonzero(self._resident), strict=True)}
        assert marked == self._keys, "the map and the set disagree"

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[int]:
        return iter(self._keys)
