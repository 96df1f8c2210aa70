"""Named policies: what ``--policy`` can say, for the engine and the simulator alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from moe_gguf.policies.base import CachePolicy, LoadOrder, Predictor
from moe_gguf.policies.cache import LFU, LRU, LoadOnDemand
from moe_gguf.policies.order import Popularity
from moe_gguf.policies.pace import IdleDisk, Pace


class Policy(NamedTuple):
    """The decisions of a policy, fresh: each has state and serves one model.

    ``pace`` says how many of the predictor's guesses are read.
    """

    cache: CachePolicy
    order: LoadOrder
    predictor: Predictor | None
    pace: Pace


POLICIES: Mapping[str, Callable[[], Policy]] = {
    "load-on-demand": lambda: Policy(LoadOnDemand(), Popularity(), None, IdleDisk()),
    "lru": lambda: Policy(LRU(), Popularity(), None, IdleDisk()),
    "lfu": lambda: Policy(LFU(), Popularity(), None, IdleDisk()),
}


def policy(name: str) -> Policy:
    """A fresh policy of that name; ValueError names the known ones."""
    if name not in POLICIES:
        raise ValueError(f"There is no policy {name!r}: choose one of {', '.join(POLICIES)}.")
    return POLICIES[name]()
