"""Named policies: what ``--policy`` can say, for the engine and the simulator alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from moe_gguf.policies.base import CachePolicy, LoadOrder, Predictor
from moe_gguf.policies.cache import LFU, LRU, LoadOnDemand
from moe_gguf.policies.order import Popularity


class Policy(NamedTuple):
    """The three decisions of a policy, fresh: each has state and serves one ``Residency``."""

    cache: CachePolicy
    order: LoadOrder
    predictor: Predictor | None


POLICIES: Mapping[str, Callable[[], Policy]] = {
    "load-on-demand": lambda: Policy(LoadOnDemand(), Popularity(), None),
    "lru": lambda: Policy(LRU(), Popularity(), None),
    "lfu": lambda: Policy(LFU(), Popularity(), None),
}


def policy(name: str) -> Policy:
    """A fresh policy of that name; ValueError names the known ones."""
    if name not in POLICIES:
        raise ValueError(f"There is no policy {name!r}: choose one of {', '.join(POLICIES)}.")
    return POLICIES[name]()
