"""Named policies: what ``--policy`` can say, for the engine and the simulator alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple

from .arc import ARC
from .base import CachePolicy, LoadOrder, Predictor
from .cache import LFU, LRU, LoadOnDemand
from .correlate import Correlations
from .eap import ExpertPaths, Floats, PathCache, PathPredictor
from .layered import Layered, allocate, evenly
from .order import Popularity
from .pace import Everything, HotSet, IdleDisk, Pace
from .predict import Gates, GatesMaker
from .scan import Scan


class Policy(NamedTuple):
    """The decisions of a policy, fresh: each has state and serves one model.

    ``predictor`` makes guesses, and ``pace`` says how many of them are read. With a ``scan``, what
    is worth least of demand that goes round streams through a few slots.
    """

    cache: CachePolicy
    order: LoadOrder
    predictor: Predictor | None = None
    pace: Pace = Everything()
    scan: Scan | None = None


@dataclass(frozen=True)
class Facts:
    """What a policy may know of the model and the arena it is for.

    ``n_used`` experts are used by one token in a layer; at most ``n_sequences`` decode at once. Of
    reads: whether they are ``buffered``, and how many bytes of one cannot be called back.
    ``gates`` makes the guesses of the model's routers, if it has any that are understood.
    ``stored`` are the layers that the arena is for, if not all ``layers``.

    Of earlier runs, where known: ``recall``, what gate guesses were worth in each layer;
    ``popularity``, by key its uses per token, unused ones left out; ``transitions``
    [n_layers - 1, n_experts, n_experts], how often per token one expert followed another.
    """

    n_slots: int
    n_experts: int
    n_used: int
    layers: Sequence[int]
    _: KW_ONLY
    n_sequences: int = 1
    buffered: bool = False
    chunk_bytes: int = 0
    gates: GatesMaker = lambda how: None
    stored: Sequence[int] = ()
    recall: Mapping[int, float] = field(default_factory=dict)
    popularity: Mapping[int, float] = field(default_factory=dict)
    transitions: Callable[[], Floats | None] = lambda: None

    def history(self, layer: int) -> dict[int, float]:
        """``popularity`` in one layer."""
        return {k: uses for k, uses in self.popularity.items() if k // self.n_experts == layer}


def _layered_lfu(facts: Facts) -> Layered:
    """Every layer its share. Forgetting slowly is right where layers do not compete (LOG.md)."""
    quotas = evenly(facts.n_slots, facts.n_experts, facts.stored or facts.layers)
    return Layered(facts.n_experts, quotas, lambda layer, quota: LFU(1.0, facts.history(layer)))


def _shallow_favoring(facts: Facts) -> Layered:
    """Fate's cache: layers that predict badly hold all their experts, one ARC per layer."""
    together = facts.n_used * facts.n_sequences  # used by one decode step, at most
    layers = facts.stored or facts.layers
    quotas = allocate(facts.n_slots, facts.n_experts, layers, facts.recall, together)
    return Layered(facts.n_experts, quotas, lambda layer, quota: ARC(quota))


def _eap(facts: Facts) -> Policy:
    paths = ExpertPaths(facts.layers, facts.n_experts, facts.popularity, facts.transitions())
    return Policy(PathCache(paths), Popularity(), PathPredictor(paths), Everything())


def _scanning(facts: Facts) -> Policy:
    """What fits stays as under ``layered-lfu``; demand that goes round and does not fit streams."""
    cache = _layered_lfu(facts)
    scan = Scan(cache, facts.n_slots, facts.n_experts, facts.stored or facts.layers)
    return Policy(cache, Popularity(), scan=scan)


def _klotski(facts: Facts) -> Policy:
    """The paper's: a hot set by what follows what, the others in the order they arrive."""
    votes = Correlations(facts.layers, facts.n_experts, facts.popularity, facts.transitions())
    return _scanning(facts)._replace(predictor=votes, pace=HotSet())


def _fate(facts: Facts) -> Policy:
    """For one sequence Fate's gate over counts; the same gate votes for a group that streams."""
    pace = IdleDisk(facts.chunk_bytes, facts.buffered)
    return _scanning(facts)._replace(predictor=facts.gates(Gates()), pace=pace)


def _fate_paper(facts: Facts) -> Policy:
    pace = IdleDisk(facts.chunk_bytes, facts.buffered)
    return Policy(_shallow_favoring(facts), Popularity(), facts.gates(Gates("raw")), pace)


# What makes a fresh policy for a model; one of these names, or a function of one's own.
PolicyMaker = Callable[[Facts], Policy]

POLICIES: Mapping[str, PolicyMaker] = {
    "load-on-demand": lambda facts: Policy(LoadOnDemand(), Popularity()),
    "lru": lambda facts: Policy(LRU(), Popularity()),
    "lfu": lambda facts: Policy(LFU(history=facts.popularity), Popularity()),
    "arc": lambda facts: Policy(ARC(facts.n_slots), Popularity()),
    "eap": _eap,
    "layered-lfu": lambda facts: Policy(_layered_lfu(facts), Popularity()),
    "scan": _scanning,
    "klotski": _klotski,
    "fate": _fate,
    "fate-paper": _fate_paper,
}


def policy(name: str, facts: Facts) -> Policy:
    """A fresh policy of that name; ValueError names the known ones."""
    check_policy(name)
    return POLICIES[name](facts)


def check_policy(name: str) -> None:
    if name not in POLICIES:
        raise ValueError(f"There is no policy {name!r}: choose one of {', '.join(POLICIES)}.")
