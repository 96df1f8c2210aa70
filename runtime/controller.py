"""One route event in, one plan out: the Python end of the two callbacks.

Owns the residency table, the hit counts and the exception a callback cannot raise through C.
Runs once per MoE layer per step with the model waiting, so the common path makes a handful of
list and dict operations per expert and nothing per token. Guesses have a callback of their own,
after the layer's reads are under way. Does not know files, bytes or threads.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..policies.base import Guess, Ids, Inputs, Predictor, RouteEvent
from ..policies.pace import Meters, Pace
from ..policies.residency import Residency
from .plugin.abi import MAX_GUESSES, PHASES, i32
from .plugin.model import PluginModel


@functools.lru_cache(maxsize=256)  # making one takes 20 us, and the plugin's memory rarely moves
def _over(address: int, kind: str, n: int, width: int, stride: int) -> Any:
    """Memory at an address as an array [n, width] of 4-byte numbers."""
    memory = memoryview((ctypes.c_char * ((n - 1) * stride + 4 * width)).from_address(address))
    return np.ndarray((n, width), kind, memory, 0, (stride, 4))


class Recorder(Protocol):
    """Receives every route event as the router made it (``trace`` records these)."""

    def record(
        self, layer: int, n_tokens: int, n_used: int, ids: list[int], continuation: bool
    ) -> None: ...


class Guessing(NamedTuple):
    """What it takes to read ahead; without a predictor the plugin's gates make the guesses."""

    predictor: Predictor | None
    pace: Pace
    blob_bytes: Mapping[int, int]  # by layer


class Controller:
    """Answers the route events of one model, whose MoE layers are ``layers``."""

    def __init__(
        self,
        plugin: PluginModel,
        residency: Residency,
        layers: Sequence[int],
        recorder: Recorder | None = None,
        guessing: Guessing | None = None,
    ) -> None:
        self.plugin = plugin
        self.residency = residency
        self.recorder = recorder
        self.guessing = guessing
        self.layers = list(layers)
        self._n_all = len(layers) * residency.n_experts
        # Demands by layer that were asked for: found (in the slots or on their way), and not. The
        # plugin counts those of settled events.
        self._asked_hits: dict[int, int] = {}
        self.layer_misses: dict[int, int] = {}
        # (token, rank) pairs asked for, of all those computed low, and low copies read by layer.
        self._asked_pairs = self.low_pairs = 0
        self.low_loads: dict[int, int] = {}
        # Once set, every step fails with it: a thread that computes cannot be stopped otherwise.
        self.stop: Exception | None = None
        self._event = RouteEvent(-1, 0, (), ())
        self._n_missing = self._n_guessed = 0  # of that event: experts read for it, good guesses
        self._failure: BaseException | None = None
        call, n = plugin.call, residency.n_experts
        self._call = call
        self._plan_experts: Any = (i32 * n).from_address(call.plan_experts)
        self._plan_slots: Any = (i32 * n).from_address(call.plan_slots)
        self._plan_loads: Any = (i32 * n).from_address(call.plan_loads)
        self._guess_keys: Any = (i32 * MAX_GUESSES).from_address(call.guess_keys)
        self._guess_slots: Any = (i32 * MAX_GUESSES).from_address(call.guess_slots)
        self._predicted_keys: Any = (i32 * (2 * n)).from_address(call.predicted_keys)
        self._predicted_chances: Any = (ctypes.c_float * (2 * n)).from_address(
            call.predicted_chances
        )
        self._bind()

    def _bind(self) -> None:
        routes, guesses = self._answers(self.on_route), self._answers(self.on_guess)
        next(routes)
        next(guesses)
        self.plugin.bind(routes.__next__, guesses.__next__)

    def _answers(self, on_call: Callable[[], None]) -> Iterator[int]:
        """Answer one call per item: 1 when it was served, 0 when that raised.

        ctypes would print and swallow an exception; this keeps it for whoever called decode. A
        generator, because Ctrl-C during a step is raised at the next bytecode of Python that runs:
        in a function that is its entry, before any ``try``, but a generator resumes inside one.
        """
        answer = 0
        while True:
            try:
                while True:
                    yield answer
                    answer = 0
                    on_call()
                    answer = 1
            except GeneratorExit:
                return
            except BaseException as error:
                self._failure, answer = error, 0

    def on_route(self) -> None:
        if self.stop is not None:
            raise self.stop
        call = self._call
        if call.n_cancelled:
            self.residency.drop(call.cancelled[: call.n_cancelled])
        n, n_tokens = call.n_experts, call.n_tokens
        self._event = event = RouteEvent(call.layer, n_tokens, call.experts[:n], call.counts[:n])
        if self.recorder is not None:
            n_used = call.n_used
            self.recorder.record(
                event.layer,
                n_tokens,
                n_used,
                self._ids().reshape(-1).tolist(),
                bool(call.continuation),
            )
        guesses_used = self.residency.guesses_used
        plan = self.residency.plan(event)
        self._plan_experts[:n] = plan.experts
        self._plan_slots[:n] = plan.slots
        self._plan_loads[:n] = plan.loads
        if plan.n_low_loads:
            self.low_loads[event.layer] = self.low_loads.get(event.layer, 0) + plan.n_low_loads
        if not call.continuation:
            self._asked_pairs += n_tokens * call.n_used
            self.low_pairs += plan.n_low_pairs
            layer, hits, misses = event.layer, self._asked_hits, self.layer_misses
            hits[layer] = hits.get(layer, 0) + plan.n_hits
            misses[layer] = misses.get(layer, 0) + n - plan.n_hits
            if self.guessing is not None:
                call.wants_guesses = self._wants_guesses(self.guessing)
                self._n_missing = n - plan.n_hits
                self._n_guessed = self.residency.guesses_used - guesses_used
            if call.phase == PHASES["decode"] and layer == self.layers[0] and self._has_everything:
                call.settled = 1

    @property
    def _has_everything(self) -> bool:
        """Every expert has its slot, and nobody wants to hear of each event."""
        held = len(self.residency.slot_of)
        return held == self._n_all and self.recorder is None and self.residency.is_plain

    def _wants_guesses(self, guessing: Guessing) -> bool:
        call = self._call
        meters = Meters(
            call.layer,
            call.n_tokens,
            call.now_ns,
            call.disk_ns,
            call.read_bytes,
            call.stall_ns,
            call.guess_ns,
            self._n_missing + call.n_late,
            self._n_missing + self._n_guessed,
        )
        pays = guessing.pace.event(meters)
        # With everything there, nothing is worth guessing; but a recording wants to know how good
        # guesses would be.
        return (pays and len(self.residency.slot_of) < self._n_all) or self.recorder is not None

    def on_guess(self) -> None:
        assert self.guessing is not None
        predictor, pace, blob_bytes = self.guessing
        call, event, residency = self._call, self._event, self.residency
        guesses: Sequence[Guess]
        if predictor is None:
            n = call.n_predicted
            chances = self._predicted_chances[:n]
            guesses = list(map(Guess, self._predicted_keys[:n], chances))
        else:
            predictor.observe(event, self._ids())
            guesses = predictor.guess(event, self._inputs())
        missing = [guess for guess in guesses if guess.key not in residency.slot_of]
        if not missing:
            return
        chosen = pace.choose(missing, blob_bytes[missing[0].key // residency.n_experts])
        placed = residency.guess(event, chosen[:MAX_GUESSES], (guess.key for guess in guesses))
        n = len(placed)
        self._guess_keys[:n] = [key for key, _ in placed]
        self._guess_slots[:n] = [slot for _, slot in placed]
        call.n_guesses = n

    def _inputs(self) -> Inputs:
        """The layer's gate input, [n_tokens, n_embd], over the plugin's memory."""
        call = self._call
        x: Inputs = _over(call.x, "f4", call.n_tokens, call.n_embd, call.x_stride)
        return x

    def _ids(self) -> Ids:
        """What the router chose, [n_tokens, n_used], over the plugin's memory."""
        call = self._call
        ids: Ids = _over(call.ids, "i4", call.n_tokens, call.n_used, 4 * call.n_used)
        return ids

    def cancel_guesses(self) -> None:
        """Drop every guess that no lane has started; only between steps."""
        self.plugin.cancel_guesses()
        self.residency.reconcile(self.plugin.slot_keys())

    def recover(self) -> BaseException:
        """After a failed step: make the table true again and return the reason of the failure."""
        self.residency.reconcile(self.plugin.slot_keys())
        self._bind()  # a second Ctrl-C within microseconds of the first ends the generator
        failure, self._failure = self._failure, None
        native = self.plugin.take_error()
        return failure or native or RuntimeError("llama.cpp could not compute a step")

    @property
    def layer_hits(self) -> dict[int, int]:
        """Demands by layer that were found in the slots or on their way."""
        hits, settled = self._asked_hits.copy(), self._call.settled_hits
        for layer in self.layers:
            if settled[layer]:
                hits[layer] = hits.get(layer, 0) + settled[layer]
        return hits

    @property
    def pairs(self) -> int:
        """(token, rank) pairs computed."""
        return int(self._asked_pairs + self._call.settled_pairs)

    @property
    def hits(self) -> int:
        return sum(self.layer_hits.values())

    @property
    def misses(self) -> int:
        return sum(self.layer_misses.values())

    def reset_stats(self) -> None:
        """Forget what was asked for; what settled, the plugin forgets with its own stats."""
        self._asked_hits.clear()
        self.layer_misses.clear()
        self._asked_pairs = self.low_pairs = 0
        self.low_loads.clear()
        self.residency.guesses_used = 0
