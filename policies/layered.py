"""A cache per layer over one arena: quotas, and how many slots each layer should have.

Knows layers and how well they predict; what to keep within a layer is an inner policy's business.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence

from .arc import ARC
from .base import CachePolicy

# Below this recall a layer predicts badly: more of its guesses are wrong than right.
BAD_RECALL = 0.5


def evenly(n_slots: int, n_experts: int, layers: Sequence[int]) -> dict[int, int]:
    """The same quota for all layers; what does not divide goes to the first ones."""
    n_slots = min(n_slots, n_experts * len(layers))
    return {
        layer: n_slots // len(layers) + (i < n_slots % len(layers))
        for i, layer in enumerate(layers)
    }


def allocate(
    n_slots: int,
    n_experts: int,
    layers: Sequence[int],
    predictability: Mapping[int, float],
    working_set: int,
) -> dict[int, int]:
    """Shallow-favoring quotas, which add up to the smaller of ``n_slots`` and all experts.

    ``layers`` are the MoE layers in model order; ``predictability`` is the measured recall of the
    guesses for each, where known; ``working_set`` is the experts one step uses in a layer. A miss
    that was guessed in time costs nothing, so slots are worth most where guesses fail: layers below
    ``BAD_RECALL``, and the first one, for which nothing can be guessed, hold all their experts.
    Layers of unknown recall count as good. The rest is divided evenly.

    If there are too few slots the bad layers are filled in model order, as in the paper, but only
    from what is left once every layer has its floor, the working set. Below that a layer evicts
    what the very same step still needs, and all its demands miss at every step: more than a
    shallow layer can win with those slots.
    """
    n_slots = min(n_slots, n_experts * len(layers))
    floor = min(working_set, n_experts, n_slots // len(layers))
    quotas = dict.fromkeys(layers, floor)
    left = n_slots - floor * len(layers)
    bad = [layer for layer in layers[1:] if predictability.get(layer, 1.0) < BAD_RECALL]
    full = [layers[0], *bad]
    for layer in full:
        more = min(left, n_experts - floor)
        quotas[layer] += more
        left -= more
    rest = [layer for layer in layers if layer not in full]
    for layer, more in evenly(left, n_experts, rest).items():
        quotas[layer] += more
    return quotas


def hottest(popularity: Mapping[int, float], n_slots: int, cache: CachePolicy) -> list[int]:
    """The most popular keys that ``cache`` has room for, best first: a quota is not exceeded."""
    keys = sorted(popularity, key=popularity.__getitem__, reverse=True)
    if isinstance(cache, Layered):
        left = dict(cache.quotas)
        ranked, keys = keys, []
        for key in ranked:
            layer = key // cache.n_experts
            if left[layer] > 0:
                left[layer] -= 1
                keys.append(key)
    return keys[:n_slots]


class Layered:
    """One inner cache per layer; a layer may exceed its quota only while another is below its own.

    ``quotas`` gives every MoE layer's share and adds up to the arena; ``make(layer, quota)`` makes
    the inner cache of a layer, and must make an ARC or something that needs no capacity.

    Slots are lent while there are free ones, and taken back from the layer that is most over its
    quota when a layer below its own asks. A layer at its quota evicts its own keys.
    """

    def __init__(
        self, n_experts: int, quotas: Mapping[int, int], make: Callable[[int, int], CachePolicy]
    ) -> None:
        self.n_experts = n_experts
        self.quotas = dict(quotas)
        self.caches = {layer: make(layer, quota) for layer, quota in quotas.items()}
        self._n = 0

    def set_quotas(self, quotas: Mapping[int, int]) -> None:
        """New quotas for the same layers. Nothing is evicted now: the next demands do that."""
        assert quotas.keys() == self.quotas.keys()
        self.quotas = dict(quotas)
        for layer, cache in self.caches.items():
            if isinstance(cache, ARC):
                cache.resize(quotas[layer])

    def touch(self, key: int, votes: int = 1) -> None:
        self.caches[key // self.n_experts].touch(key, votes)

    def admit(self, key: int, votes: int = 1) -> bool:
        kept = self.caches[key // self.n_experts].admit(key, votes)
        self._n += kept
        return kept

    def remove(self, key: int) -> None:
        self.caches[key // self.n_experts].remove(key)
        self._n -= 1

    def evict(
        self, pinned: Container[int], incoming: int = -1, demanded: bool = True
    ) -> int | None:
        caches, quotas = self.caches, self.quotas
        own = incoming // self.n_experts
        if incoming >= 0 and len(caches[own]) >= quotas[own]:
            victim = caches[own].evict(pinned, incoming, demanded)
            if victim is not None:
                self._n -= 1
                return victim
        # Rare once every layer has its quota, so the walk over the layers may cost something.
        for layer in sorted(caches, key=lambda layer: quotas[layer] - len(caches[layer])):
            # A key of another layer is no ghost of this one: it must not adapt to it.
            victim = caches[layer].evict(pinned, incoming if layer == own else -1, demanded)
            if victim is not None:
                self._n -= 1
                return victim
        return None

    def check_integrity(self) -> None:
        assert self._n == sum(map(len, self.caches.values())), "a key is not counted"
        for layer, cache in self.caches.items():
            cache.check_integrity()
            assert all(key // self.n_experts == layer for key in cache), "a key is in a wrong layer"

    def __contains__(self, key: object) -> bool:
        return isinstance(key, int) and key in self.caches.get(key // self.n_experts, ())

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[int]:
        for cache in self.caches.values():
            yield from cache
