"""What a layer will be asked for by many tokens, before it is known.

A prompt asks for nearly every expert of every layer, a step of many sequences for most. So the next
layer's can be copied to a device while one is computed. One that is copied for nothing takes the
link from one that is wanted, and one that is not foreseen waits for its layer as before: only the
likely ones come, and the likeliest first.
"""

from __future__ import annotations

from .base import RouteEvent

_DECAY = 0.8  # of what was asked, by event of the layer
LEAST = 0.75  # chance of being asked for


class Foresight:
    """By layer, the share of (token, rank) pairs that each expert had lately.

    If pairs choose independently, an expert of the share f is among n of them with the chance
    1 - (1 - f)^n.
    """

    def __init__(self, n_experts: int) -> None:
        self._even = [1 / n_experts] * n_experts
        self._shares: dict[int, list[float]] = {}

    def observe(self, event: RouteEvent) -> None:
        n = sum(event.counts)
        shares = [_DECAY * share for share in self._shares.get(event.layer, self._even)]
        for expert, count in zip(event.experts, event.counts, strict=True):
            shares[expert] += (1 - _DECAY) * count / n
        self._shares[event.layer] = shares

    def likely(self, layer: int, n_pairs: int) -> list[int]:
        """The experts that so many pairs will probably ask for, likeliest first."""
        shares = self._shares.get(layer, self._even)
        least = 1 - (1 - LEAST) ** (1 / n_pairs)
        return sorted(
            (e for e, share in enumerate(shares) if share >= least),
            key=shares.__getitem__,
            reverse=True,
        )
