"""One route event in, one plan out: the Python end of the route callback.

Owns the residency table, the hit counts and the exception a callback cannot raise through C.
Runs once per MoE layer per step with the model waiting, so the common path makes a handful of
list and dict operations per expert and nothing per token. Does not know files, bytes or threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from moe_gguf.policies.base import RouteEvent
from moe_gguf.policies.residency import Residency
from moe_gguf.runtime.plugin import MAX_GUESSES, PluginModel, i32


class Recorder(Protocol):
    """Receives every route event as the router made it (``trace`` records these)."""

    def record(
        self, layer: int, n_tokens: int, n_used: int, ids: list[int], continuation: bool
    ) -> None: ...


class Controller:
    """Answers the route events of one model."""

    def __init__(
        self, plugin: PluginModel, residency: Residency, recorder: Recorder | None = None
    ) -> None:
        self.plugin = plugin
        self.residency = residency
        self.recorder = recorder
        self.hits = 0
        self.misses = 0
        self._failure: BaseException | None = None
        call, n = plugin.call, residency.n_experts
        self._call = call
        self._plan_experts: Any = (i32 * n).from_address(call.plan_experts)
        self._plan_slots: Any = (i32 * n).from_address(call.plan_slots)
        self._plan_loads: Any = (i32 * n).from_address(call.plan_loads)
        self._guess_keys: Any = (i32 * MAX_GUESSES).from_address(call.guess_keys)
        self._guess_slots: Any = (i32 * MAX_GUESSES).from_address(call.guess_slots)
        self._bind()

    def _bind(self) -> None:
        answers = self._answers()
        next(answers)
        self.plugin.bind(answers.__next__, answers.__next__)

    def _answers(self) -> Iterator[int]:
        """Answer one event per item: 1 when the plan is filled, 0 when that raised.

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
                    self.on_route()
                    answer = 1
            except GeneratorExit:
                return
            except BaseException as error:
                self._failure, answer = error, 0

    def on_route(self) -> None:
        call = self._call
        if call.n_cancelled:
            self.residency.drop(call.cancelled[: call.n_cancelled])
        n, n_tokens = call.n_experts, call.n_tokens
        event = RouteEvent(call.layer, n_tokens, call.experts[:n], call.counts[:n])
        if self.recorder is not None:
            n_used = call.n_used
            self.recorder.record(
                event.layer,
                n_tokens,
                n_used,
                call.ids[: n_tokens * n_used],
                bool(call.continuation),
            )
        plan = self.residency.plan(event)
        self._plan_experts[:n] = plan.experts
        self._plan_slots[:n] = plan.slots
        self._plan_loads[:n] = plan.loads
        if plan.guesses:
            n_guesses = min(len(plan.guesses), MAX_GUESSES)
            self.residency.drop(key for key, _ in plan.guesses[n_guesses:])
            self._guess_keys[:n_guesses] = [key for key, _ in plan.guesses[:n_guesses]]
            self._guess_slots[:n_guesses] = [slot for _, slot in plan.guesses[:n_guesses]]
            call.n_guesses = n_guesses
        if not call.continuation:
            self.hits += plan.n_hits
            self.misses += n - plan.n_hits

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

    def reset_stats(self) -> None:
        self.hits = self.misses = self.residency.guesses_used = 0
