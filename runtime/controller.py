"""One route event in, one plan out.

Owns the counts of demands and what one event hands to the next; ``Residency`` owns the slot table,
a pace and a predictor choose what is read ahead. Runs once per MoE layer per step with the model
waiting, so the common path makes a handful of list and dict operations per expert and nothing per
token. Does not know files, bytes, threads or the plugin's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from ..policies.base import Guess, Ids, Inputs, Phase, Predictor, RouteEvent
from ..policies.pace import Meters, Pace
from ..policies.residency import Guessed, Plan, Residency
from ..policies.tiers import Tiers


class Recorder(Protocol):
    """Receives every route event as the router made it (``trace`` records these)."""

    def record(
        self, event: RouteEvent, ids_flat: list[int], continuation: bool, cancelled: Sequence[int]
    ) -> None:
        """An event, its ids token by token, and the guesses that were given up before it."""

    def record_guesses(self, offered: Sequence[Guess], chosen: Sequence[Guess]) -> None:
        """What there was to be read ahead after the event recorded last, and what was chosen."""


class Guessing(NamedTuple):
    """What it takes to read ahead."""

    predictor: Predictor
    pace: Pace
    blob_bytes: Mapping[int, int]  # by layer
    most: int  # guesses after one event
    is_native: bool = False  # the plugin can make these guesses without asking


class Demands(NamedTuple):
    """Counts since the model was opened; they only grow. The mappings are by layer."""

    hits: Mapping[int, int]  # experts found in a slot or on their way
    misses: Mapping[int, int]
    low_loads: Mapping[int, int]  # low copies read
    pairs: int  # (token, rank)
    low_pairs: int  # of them computed from low copies
    guesses_used: int

    def since(self, mark: Demands) -> Demands:
        """What was counted after ``mark`` was taken."""
        return Demands(
            _less(self.hits, mark.hits),
            _less(self.misses, mark.misses),
            _less(self.low_loads, mark.low_loads),
            self.pairs - mark.pairs,
            self.low_pairs - mark.low_pairs,
            self.guesses_used - mark.guesses_used,
        )


class Controller:
    """Answers the route events of one model, whose MoE layers are ``layers``."""

    def __init__(
        self,
        residency: Residency,
        layers: Sequence[int],
        recorder: Recorder | None = None,
        guessing: Guessing | None = None,
    ) -> None:
        self.residency = residency
        self.recorder = recorder
        self.guessing = guessing
        self.layers = list(layers)
        self._n_all = len(layers) * residency.n_experts
        self.layer_hits: dict[int, int] = {}
        self.layer_misses: dict[int, int] = {}
        self.low_loads: dict[int, int] = {}
        self.pairs = self.low_pairs = 0
        self.uses = [0] * (
            (max(layers) + 1) * residency.n_experts
        )  # pairs by key, those that settled left out
        self._event = RouteEvent(-1, 0, (), (), Phase.PREFILL, 0)
        self._cancelled: Sequence[int] = ()  # since the event before
        self._n_missing = self._n_guessed = 0  # of that event: experts read for it, good guesses
        self._before = (0, 0)  # likewise of the event before
        self._pays = False  # whether to read ahead after the event
        self._copies = False  # likewise to copy to a device
        self._foresees = False  # likewise into the next layer's window

    # -- the two callbacks

    def on_cancelled(self, keys: Sequence[int]) -> None:
        self.residency.drop(keys)
        self._cancelled = keys

    def on_computed(self, now_ns: int, n_experts: int, n_pairs: int, ns: int) -> None:
        if isinstance(self.residency, Tiers) and self.residency.dividing is not None:
            self.residency.dividing.learn(now_ns, n_experts, n_pairs, ns)

    def rest(self) -> int:
        residency = self.residency
        dividing = residency.dividing if isinstance(residency, Tiers) else None
        return dividing.rest if dividing is not None else 0

    def may_pass(self) -> bool:
        """Nobody wants to hear of each event first, and nothing is left to be read."""
        residency = self.residency
        return (
            isinstance(residency, Tiers)
            and residency.keeps
            and self.recorder is None
            and (self.guessing is None or residency.is_complete(self.layers))
        )

    def orders(self, layer: int, most: int) -> tuple[Sequence[int], Sequence[float]]:
        residency, guessing = self.residency, self.guessing
        if not isinstance(residency, Tiers) or not residency.is_complete(self.layers):
            return (), ()
        if guessing is not None and not guessing.is_native:
            return (), ()
        return residency.orders(layer, most)

    def on_passed(
        self,
        event: RouteEvent,
        times: tuple[int, int],
        places: tuple[Sequence[int], Sequence[int]],
        copies: Sequence[tuple[int, int]],
        inputs: Callable[[], Inputs],
    ) -> bool:
        residency = self.residency
        assert isinstance(residency, Tiers)
        plan = self._plan(event, False)
        if (plan.experts, list(plan.pools)) != places:
            raise RuntimeError(f"layer {event.layer} passed with {places}, and not with {plan}")
        if copies:
            assert self.guessing is not None
            residency.copied(event, self.guessing.predictor.guess(event, inputs), copies)
        return residency.copies_ahead(event, *times, self._n_missing)

    def on_route(self, event: RouteEvent, ids: Callable[[], Ids], continuation: bool) -> Plan:
        self._event = event
        if self.recorder is not None:
            flat = ids().reshape(-1).tolist()
            self.recorder.record(event, flat, continuation, self._cancelled)
            self._cancelled = ()
        return self._plan(event, continuation)

    def _plan(self, event: RouteEvent, continuation: bool) -> Plan:
        """The plan, counted."""
        residency, layer = self.residency, event.layer
        guesses_used = residency.guesses_used
        plan = residency.plan(event)
        if plan.n_low_loads:
            self.low_loads[layer] = self.low_loads.get(layer, 0) + plan.n_low_loads
        if not continuation:
            n_missing = len(event.experts) - plan.n_hits
            self.pairs += sum(event.counts)
            self.low_pairs += plan.n_low_pairs
            hits, misses = self.layer_hits, self.layer_misses
            hits[layer] = hits.get(layer, 0) + plan.n_hits
            misses[layer] = misses.get(layer, 0) + n_missing
            base, uses = layer * residency.n_experts, self.uses
            for expert, count in zip(event.experts, event.counts, strict=True):
                uses[base + expert] += count
            self._before = self._n_missing, self._n_guessed
            self._n_missing = n_missing
            self._n_guessed = residency.guesses_used - guesses_used
        return plan

    def foreseen(self, event: RouteEvent, plan: Plan, now_ns: int) -> Sequence[int]:
        residency = self.residency
        return residency.foreseen(event, plan, now_ns) if isinstance(residency, Tiers) else ()

    def wants_guesses(self, meters: Callable[[int, int], Meters]) -> bool:
        if self.guessing is None:
            return False
        now = meters(*self._before)
        self._pays = self.guessing.pace.event(now)
        residency = self.residency
        is_full = len(residency.slot_of) == self._n_all
        if isinstance(residency, Tiers):
            is_full = residency.is_complete(self.layers)
            self._copies = residency.copies_ahead(
                self._event, now.now_ns, now.since_ns, self._n_missing
            )
            self._foresees = residency.foresees(self._event)
        # With everything there, nothing is worth guessing; but a recording wants to know how good
        # guesses would be.
        wants = self._pays and not is_full
        return wants or self._copies or self._foresees or self.recorder is not None

    def is_settled(self, event: RouteEvent) -> bool:
        """Every expert has its slot, and nobody wants to hear of each event."""
        return (
            event.phase == Phase.DECODE
            and event.layer == self.layers[0]
            and len(self.residency.slot_of) == self._n_all
            and self.recorder is None
            and self.residency.is_plain
        )

    def on_guess(self, ids: Callable[[], Ids], inputs: Callable[[], Inputs]) -> Guessed:
        assert self.guessing is not None
        predictor, pace, blob_bytes, most, _ = self.guessing
        event, residency = self._event, self.residency
        predictor.observe(event, ids)
        guesses = predictor.guess(event, inputs)
        missing = [guess for guess in guesses if not residency.holds(guess.key)]
        chosen: Sequence[Guess] = ()
        if missing and self._pays:
            n_bytes = blob_bytes[missing[0].key // residency.n_experts]
            chosen = pace.choose(missing, n_bytes)[:most]
        if self.recorder is not None:
            self.recorder.record_guesses(guesses, chosen)
        placed: list[tuple[int, int, int]] = []
        if chosen:
            reads = residency.guess(event, chosen, (guess.key for guess in guesses))
            placed += [(key, slot, -1) for key, slot in reads]
        if not isinstance(residency, Tiers):
            return Guessed(placed)
        if self._foresees:
            foreseen = residency.foresee(event, guesses)
            if foreseen:
                return Guessed(placed, foreseen)
        if self._copies:
            placed += residency.guess_above(event, guesses, most - len(placed))
        return Guessed(placed)

    # -- counts

    @property
    def hits(self) -> int:
        return sum(self.layer_hits.values())

    @property
    def misses(self) -> int:
        return sum(self.layer_misses.values())

    def demands(self) -> Demands:
        return Demands(
            dict(self.layer_hits),
            dict(self.layer_misses),
            dict(self.low_loads),
            self.pairs,
            self.low_pairs,
            self.residency.guesses_used,
        )


def _less(counts: Mapping[int, int], mark: Mapping[int, int]) -> dict[int, int]:
    """Layer by layer; a layer that has counted nothing since is left out."""
    return {layer: n - mark.get(layer, 0) for layer, n in counts.items() if n != mark.get(layer)}
