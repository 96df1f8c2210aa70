"""The plugin's two callbacks: shared memory becomes values, and plans become shared memory.

Owns the arrays over the plugin's memory and the exception that a callback cannot raise through C.
Decides nothing: what is asked for goes to a ``Brain``, in ``runtime`` the controller.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from ...policies.base import Ids, Inputs, Phase, RouteEvent
from ...policies.pace import Meters
from ...policies.residency import Guessed, Plan
from .abi import MAX_GUESSES, MAX_SPARES, i32
from .model import PluginModel

_PHASES = tuple(Phase)  # calling the class takes ten times as long


class Brain(Protocol):
    """Who answers. Called with the model waiting, once per MoE layer and step."""

    def on_cancelled(self, keys: Sequence[int]) -> None:
        """Guesses that will not arrive any more."""

    def on_computed(self, now_ns: int, n_experts: int, n_pairs: int, ns: int) -> None:
        """The processor may compute experts of the event that comes, and has computed so many of
        the one before."""

    def rest(self) -> int:
        """So many events may pass before the processor is to compute any."""

    def may_pass(self) -> bool:
        """Whether a device's events may pass unasked from now on, as ``orders`` say."""

    def orders(self, layer: int, most: int) -> tuple[Sequence[int], Sequence[float]]:
        """For the next event of a device's layer: the slots of its pool that missing experts would
        get, in this order, and the chances that the first, second … guess after it must exceed to
        be copied to the device; at most so many of both."""

    def on_passed(
        self,
        event: RouteEvent,
        times: tuple[int, int],
        places: tuple[Sequence[int], Sequence[int]],
        copies: Sequence[tuple[int, int]],
        inputs: Callable[[], Inputs],
    ) -> bool:
        """An event passed as ordered, at a time and so long after copies could begin: its experts
        and their slots, those it found first, and (key, slot) of what was copied after it. Whether
        to copy ahead from now on."""

    def on_route(self, event: RouteEvent, ids: Callable[[], Ids], continuation: bool) -> Plan:
        """The plan of one event; ``continuation``: of further tensors of the event before.

        ``ids`` gives what the router chose, [n_tokens, n_used], valid during the call.
        """

    def foreseen(self, event: RouteEvent, plan: Plan, now_ns: int) -> Sequence[int]:
        """After the plan of a device's event, at a time: keys of the next layer that asks,
        likeliest first, to be copied to the device while this one is computed."""

    def wants_guesses(self, meters: Callable[[int, int], Meters]) -> bool:
        """Whether ``on_guess`` is to be called for the event just planned; not for continuations.

        ``meters`` gives what was measured by now, told how many experts the event before had to
        read and how many of its experts were there because they had been guessed.
        """

    def is_settled(self, event: RouteEvent) -> bool:
        """Whether the rest of this step will find all it needs, so that nobody need ask."""

    def on_guess(self, ids: Callable[[], Ids], inputs: Callable[[], Inputs]) -> Guessed:
        """What to do with guesses, once the event's own reads are under way."""


class Callbacks:
    """Answers one model's callbacks until the model is closed."""

    def __init__(self, plugin: PluginModel, brain: Brain, n_experts: int) -> None:
        self.plugin = plugin
        self.brain = brain
        # Once set, every step fails with it: a thread that computes cannot be stopped otherwise.
        self.stop: Exception | None = None
        self._failure: BaseException | None = None
        call, n = plugin.call, n_experts
        self._call = call
        self._n_experts = n_experts
        self._plan_experts: Any = (i32 * n).from_address(call.plan_experts)
        self._plan_slots: Any = (i32 * n).from_address(call.plan_slots)
        self._plan_loads: Any = (i32 * n).from_address(call.plan_loads)
        self._plan_pools: Any = (i32 * n).from_address(call.plan_pools)
        self._window_keys: Any = (i32 * n).from_address(call.window_keys)
        self._guess_keys: Any = (i32 * MAX_GUESSES).from_address(call.guess_keys)
        self._guess_slots: Any = (i32 * MAX_GUESSES).from_address(call.guess_slots)
        self._guess_pools: Any = (i32 * MAX_GUESSES).from_address(call.guess_pools)
        self._spares: Any = ((i32 * MAX_SPARES) * call.n_layers).from_address(call.spares)
        chances = (ctypes.c_float * MAX_SPARES) * call.n_layers
        self._copy_chances: Any = chances.from_address(call.copy_chances)
        self._bind()

    def _bind(self) -> None:
        calls = [self._answers(on_call) for on_call in (self._route, self._guess, self._told)]
        for answers in calls:
            next(answers)
        self.plugin.bind(*(answers.__next__ for answers in calls))

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

    def _route(self) -> None:
        if self.stop is not None:
            raise self.stop
        call, brain = self._call, self.brain
        if call.n_cancelled:
            brain.on_cancelled(call.cancelled[: call.n_cancelled])
        n, continuation = call.n_experts, bool(call.continuation)
        event = self._event()
        if event.may_compute:
            brain.on_computed(call.now_ns, call.cpu_experts, call.cpu_pairs, call.cpu_ns)
            call.cpu_experts = call.cpu_pairs = call.cpu_ns = 0
        plan = brain.on_route(event, self._ids, continuation)
        if event.may_compute:
            call.cpu_rest = brain.rest()
        self._plan_experts[:n] = plan.experts
        self._plan_slots[:n] = plan.slots
        self._plan_loads[:n] = plan.loads
        if plan.pools:
            self._plan_pools[:n] = plan.pools
        if not continuation:
            if plan.pools:
                self._foresee(brain.foreseen(event, plan, call.now_ns))
            call.wants_guesses = brain.wants_guesses(self._meters)
            call.settled = brain.is_settled(event)
            call.may_pass = brain.may_pass()
        if plan.pools:
            self._order(event.layer)

    def _event(self) -> RouteEvent:
        call = self._call
        n = call.n_experts
        return RouteEvent(
            call.layer,
            call.n_tokens,
            call.experts[:n],
            call.counts[:n],
            _PHASES[call.phase],
            call.n_sequences,
            bool(call.may_compute),
        )

    def _told(self) -> None:
        if self.stop is not None:
            raise self.stop
        call, n = self._call, self._call.n_experts
        event = self._event()
        copies: list[tuple[int, int]] = []
        if k := call.n_guesses:
            copies = list(zip(self._guess_keys[:k], self._guess_pools[:k], strict=True))
        places = self._plan_experts[:n], self._plan_pools[:n]
        call.may_copy = self.brain.on_passed(
            event, (call.now_ns, call.since_ns), places, copies, self._inputs
        )
        self._order(event.layer)

    def _order(self, layer: int) -> None:
        """Leave word for the layer's next event."""
        may_pass = self._call.may_pass
        spares, chances = self.brain.orders(layer, MAX_SPARES) if may_pass else ((), ())
        for row, given, end in (
            (self._spares[layer], spares, -1),
            (self._copy_chances[layer], chances, 2.0),
        ):
            n = len(given)
            row[:n] = given
            if n < MAX_SPARES:
                row[n] = end

    def withdraw(self) -> None:
        """What was left for the events to come is not true any more; between steps."""
        for row in self._spares:
            row[0] = -1

    def flush(self) -> None:
        """Hear of an event that passed unasked."""
        if not self.plugin.tell():
            raise self.failure()

    def _meters(self, n_missing: int, n_guessed: int) -> Meters:
        call = self._call
        return Meters(
            call.layer,
            _PHASES[call.phase],
            call.n_sequences,
            call.now_ns,
            call.disk_ns,
            call.read_bytes,
            call.stall_ns,
            call.guess_ns,
            n_missing + call.n_late,
            n_missing + n_guessed,
            call.since_ns,
        )

    def _guess(self) -> None:
        placed, foreseen = self.brain.on_guess(self._ids, self._inputs)
        n = len(placed)
        self._guess_keys[:n] = [key for key, _, _ in placed]
        self._guess_slots[:n] = [slot for _, slot, _ in placed]
        self._guess_pools[:n] = [pool for _, _, pool in placed]
        self._call.n_guesses = n
        copied = [key for key, _, pool in placed if pool >= 0]
        if copied:  # all to one layer
            self._order(copied[0] // self._n_experts)
        if foreseen:
            self._foresee(foreseen)

    def _foresee(self, keys: Sequence[int]) -> None:
        self._call.n_window = n = len(keys)
        self._window_keys[:n] = keys

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

    def settled(self, layers: Sequence[int]) -> tuple[dict[int, int], int]:
        """What was found without asking: experts by layer, and (token, rank) pairs."""
        call = self._call
        found = {layer: call.settled_hits[layer] for layer in layers if call.settled_hits[layer]}
        return found, int(call.settled_pairs)

    def failure(self) -> BaseException:
        """After a failed step: its reason, once; the callbacks answer again."""
        self._bind()  # a second Ctrl-C within microseconds of the first ends the generator
        failure, self._failure = self._failure, None
        native = self.plugin.take_error()
        return failure or native or RuntimeError("llama.cpp could not compute a step")


@functools.lru_cache(maxsize=256)  # making one takes 20 us, and the plugin's memory rarely moves
def _over(address: int, kind: str, n: int, width: int, stride: int) -> Any:
    """Memory at an address as an array [n, width] of 4-byte numbers."""
    memory = memoryview((ctypes.c_char * ((n - 1) * stride + 4 * width)).from_address(address))
    return np.ndarray((n, width), kind, memory, 0, (stride, 4))
