"""The thread that computes: takes requests in, computes steps, hands events out.

Owns the scheduler and the model's context, which no other thread touches. What others want of it
they post, and it is done between two steps. Knows nothing of prompts and templates.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import llama_cpp

from ..errors import UserError
from .constraint import Constraints
from .context import StepFailed
from .copies import Shelf
from .generation import Generation
from .model import Model
from .output import Output
from .request import (
    Cancelled,
    EngineClosed,
    Event,
    Finished,
    Logprob,
    Progress,
    PromptScored,
    Reason,
    Request,
    Timings,
    Token,
)
from .sampler import Sampled, Sampler, logprob
from .schedule import Schedule
from .scheduler import Limits, Piece, Scheduler, Step
from .sequence import Sequence
from .states import Kind, States
from .store import Store

T = TypeVar("T")

_STEP_SECONDS = 0.5  # that closing waits for a step; llama.cpp remarks on one that is interrupted

_SAMPLING_THREADS = 4  # beside the loop's own; sampling takes a fraction of a millisecond each


@dataclass(eq=False)
class Part:
    """What a sequence is to the loop."""

    sampler: Sampler
    output: Output
    generation: Generation
    submitted_s: float
    started_s: float | None = None
    first_s: float | None = None  # its first token, or that its prompt was scored

    def timings(self) -> Timings:
        now, start = time.perf_counter(), self.submitted_s
        return Timings((self.started_s or now) - start, (self.first_s or now) - start, now - start)


@dataclass
class Counts:
    """Of requests, since the engine was opened."""

    submitted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    cached_tokens: int = 0  # of prompts, not computed again


class Loop:
    """Computes what is submitted until it is closed; a sequence gets at most ``n_ctx`` tokens.

    What is computed is kept on the ``shelf`` and in the ``store``. ``plan`` gives the schedule for
    a number of sequences; without it there is only the one.
    """

    def __init__(
        self,
        model: Model,
        schedule: Schedule,
        n_ctx: int,
        shelf: Shelf | None = None,
        store: Store | None = None,
        plan: Callable[[int], Schedule] | None = None,
    ) -> None:
        self.model = model
        self._plan = plan
        self.n_ctx = n_ctx
        self.counts = Counts()
        context = model.context
        limits = Limits(
            model.cells,
            int(llama_cpp.llama_n_seq_max(context.ctx)),
            context.n_batch,
            context.n_outputs,
            model.wants_equal,
        )
        self.states = States(
            model.memory, Kind.of(model.model, model.memory), model.cells, shelf, store
        )
        self.scheduler = Scheduler(schedule, limits, self.states, self._drop)
        self._constraints = Constraints(model.vocabulary)
        self._alive: dict[Sequence, Part] = {}
        self._preparing: set[Sequence] = set()  # of them, those that wait for the disk
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._end: BaseException | None = None  # why nothing is computed any more
        self._is_orphan = False
        self._n_users = 0
        self._n_threads = min(_SAMPLING_THREADS, os.cpu_count() or 1) - 1
        self._pool: ThreadPoolExecutor | None = None
        self._thread = threading.Thread(target=self._run, name="moe-gguf engine", daemon=True)
        self._thread.start()

    # -- from any thread

    @contextmanager
    def using(self) -> Iterator[Model]:
        """The model, which is not freed meanwhile; raises why nothing is computed any more."""
        with self._wake:
            self._check()
            self._n_users += 1
        try:
            yield self.model
        finally:
            with self._wake:
                self._n_users -= 1
                self._wake.notify_all()

    def _check(self) -> None:
        if self._end is not None:
            raise self._end.with_traceback(None)

    def submit(self, request: Request, generation: Generation) -> None:
        """RequestError for what cannot be sampled as it is asked."""
        part = Part(
            Sampler(self.model.model, request, self._constraints),
            Output(self.model.vocabulary, request.stop, request.special, shown=request.shown),
            generation,
            time.perf_counter(),
        )
        sequence = Sequence(-1, request, part)
        generation.on_cancel(lambda: self._cancel(sequence))
        try:
            self.post(lambda: self._take(sequence))
        except BaseException:
            part.sampler.close()
            raise

    def post(self, work: Callable[[], T]) -> Future[T]:
        """Have this done between two steps; what comes of it."""
        future: Future[T] = Future()

        def do() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        with self._wake:
            self._check()
            self._inbox.append(do)
            self._wake.notify_all()
        return future

    def _cancel(self, sequence: Sequence) -> None:
        with self._wake:
            if self._end is None:
                self._inbox.append(lambda: self._cancelled(sequence))
                self._wake.notify_all()

    def close(self) -> None:
        """End what is being computed; whoever waits gets EngineClosed. Frees the model."""
        with self._wake:
            if self._end is None:
                self._end = EngineClosed()
            self._wake.notify_all()
        if threading.current_thread() is self._thread:
            self._is_orphan = True  # its last reference went with a request's: see _run
            return
        self._thread.join(_STEP_SECONDS)
        if self._thread.is_alive():
            self.model.arena.interrupt(EngineClosed())
            self._thread.join()
        self._free()

    def _free(self) -> None:
        with self._wake:
            while self._n_users:
                self._wake.wait()
        if self._pool is not None:
            self._pool.shutdown()
        self.states.close()
        self.model.close()

    def abandon(self) -> None:
        """In a forked child, where the thread is not."""
        error = UserError("an Engine does not survive a fork: open the model in the child")
        self._wake, self._end = threading.Condition(), error
        for part in list(self._alive.values()):
            part.generation.orphan(error)
        self.model.abandon()

    # -- the thread

    def _run(self) -> None:
        end: BaseException
        try:
            while self._wait():
                self._step()
            end = EngineClosed()
        except BaseException as error:  # a defect of ours: nobody is to wait for ever
            end = error
        with self._wake:
            self._end = self._end or end
            inbox = list(self._inbox)
            self._inbox.clear()
        for work in inbox:  # those that were not even taken in must hear of it too
            work()
        for part in list(self._alive.values()):
            part.sampler.close()
            part.generation.fail(end)
        self._alive.clear()
        if self._is_orphan:
            self._free()

    def _wait(self) -> bool:
        """Until there is something to do, and do what was posted; False: nothing any more."""
        scheduler = self.scheduler
        with self._wake:
            while not (self._end or self._inbox or scheduler.running or scheduler.waiting):
                self._wake.wait()
            if self._end is not None:
                return False
            inbox = list(self._inbox)
            self._inbox.clear()
        for work in inbox:
            work()
        return True

    def _take(self, sequence: Sequence) -> None:
        sequence.number = self.counts.submitted
        self.counts.submitted += 1
        self._alive[sequence] = sequence.part
        self._replan()
        self._prepare(sequence)

    def _prepare(self, sequence: Sequence) -> None:
        """Have it scheduled as soon as what the disk has of its start can be used; others are
        computed meanwhile."""
        owner = sequence.request.owner
        wanted = self.states.wanted(owner, sequence.tokens, sequence.first_output)
        if wanted is None:
            self._preparing.discard(sequence)
            self.scheduler.add(sequence)
            return

        def done(future: Future[None]) -> None:
            error = None if future.cancelled() else future.exception()
            with self._wake:
                if self._end is None:
                    self._inbox.append(lambda: self._prepared(sequence, error))
                    self._wake.notify_all()

        self._preparing.add(sequence)
        wanted.add_done_callback(done)

    def _prepared(self, sequence: Sequence, error: BaseException | None) -> None:
        if sequence not in self._preparing:  # it was cancelled
            return
        if error is None:
            self._prepare(sequence)
        else:
            self._fail(sequence, error)

    def _replan(self) -> None:
        """As many sequences as there are now may be served best in another way."""
        if self._plan is None:
            return
        schedule = self._plan(max(1, min(len(self._alive), self.scheduler.limits.slots)))
        if schedule != self.scheduler.schedule:
            self.scheduler.set(schedule)

    def _step(self) -> None:
        step = self.scheduler.next()
        if step is None:
            return
        batch = self.model.context.batch
        batch.clear()
        now = time.perf_counter()
        for sequence, start, n, outputs in step.pieces:
            tokens = sequence.tokens[start : start + n]
            batch.add(tokens, start, sequence.slot, outputs)
            part = sequence.part
            if part.started_s is None:
                part.started_s = now
                self._tell_progress(sequence)
        try:
            self.model.context.step(step.phase)
        except BaseException as error:
            self._failed(step, error)
        else:
            self.scheduler.done(step)
            for piece in step.pieces:
                self._tell_progress(piece.sequence)
            self._read(step)

    def _tell_progress(self, sequence: Sequence) -> None:
        part: Part = sequence.part
        if sequence.request.progress and len(sequence.tokens) == sequence.n_prompt:
            seconds = time.perf_counter() - (part.started_s or 0.0)
            part.generation.put(Progress(sequence.computed, sequence.cached, seconds))

    def _failed(self, step: Step, error: BaseException) -> None:
        """The step's sequences fail with it; but where only room is lacking, some have to wait."""
        if isinstance(error, StepFailed) and error.code == 1:
            if not self.scheduler.refused(step):
                self._finish(step.pieces[0].sequence, "context")
            return
        for piece in step.pieces:
            self._fail(piece.sequence, error)

    # -- what a step brought

    def _read(self, step: Step) -> None:
        """Logits to probabilities, tokens and events, before the next step overwrites them."""
        row, wanting = 0, []
        for piece in step.pieces:
            row += piece.n
            if piece.outputs:
                wanting.append((piece, row - 1))
        if not wanting:
            return
        # Waits, and puts the rows in order, which must not happen in several threads at once.
        llama_cpp.llama_get_logits(self.model.context.ctx)
        for (piece, _), sampled in zip(wanting, self._sample(wanting), strict=True):
            if isinstance(sampled, Exception):
                self._fail(piece.sequence, sampled)
            else:
                self._advance(piece.sequence, sampled)

    def _sample(self, wanting: list[tuple[Piece, int]]) -> list[Sampled | Exception | None]:
        """Of each piece, in order; several at once if there are several: llama.cpp needs no GIL."""
        n = min(self._n_threads + 1, len(wanting))
        shares = [wanting[i::n] for i in range(n)]
        others: list[Future[list[Sampled | Exception | None]]] = []
        try:
            if n > 1:
                others = [self._workers().submit(self._read_all, share) for share in shares[1:]]
        except RuntimeError:  # the interpreter is about to end, and no pool takes anything
            shares = [wanting]
        results = [self._read_all(shares[0]), *(other.result() for other in others)]
        merged: list[Sampled | Exception | None] = [None] * len(wanting)
        for i, share in enumerate(results):
            merged[i :: len(shares)] = share
        return merged

    def _workers(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._n_threads, "moe-gguf sampling")
        return self._pool

    def _read_all(self, share: list[tuple[Piece, int]]) -> list[Sampled | Exception | None]:
        return [self._read_one(piece, row) for piece, row in share]

    def _read_one(self, piece: Piece, row: int) -> Sampled | Exception | None:
        """Score the prompt's tokens of a piece that ends in ``row``, or sample; in any thread."""
        sequence = piece.sequence
        try:
            if sequence.is_scoring:
                for i in range(row - piece.outputs + 1, row + 1):
                    if len(sequence.scored) < sequence.n_prompt - 1:
                        sequence.scored.append(self._logprob(sequence, i))
            if sequence.n_left or sequence.request.max_tokens == 0:
                return None
            sampler: Sampler = sequence.part.sampler
            return sampler.sample(self.model.context.ctx, row)
        except Exception as error:  # a grammar that allows nothing, say
            return error

    def _logprob(self, sequence: Sequence, row: int) -> Logprob:
        token, n = sequence.tokens[len(sequence.scored) + 1], sequence.request.prompt_logprobs
        return logprob(self.model.context.logits(row), token, n or 0)

    def _advance(self, sequence: Sequence, sampled: Sampled | None) -> None:
        if sequence.n_left:
            return
        part: Part = sequence.part
        request, output = sequence.request, part.output
        events: list[Event] = []
        if len(sequence.tokens) == sequence.n_prompt:
            part.first_s = time.perf_counter()
            events.append(PromptScored(sequence.scored, sequence.cached))
        if sampled is None:
            self._finish(sequence, "length", events)
            return
        token = sampled.token
        # With ignore_eos too: the sampler only lets it by where a constraint leaves nothing else.
        if self.model.vocabulary.ends(token):
            self._finish(sequence, "stop", events, ending=sampled.logprob)
            return
        sequence.tokens.append(token)
        text, stop = output.push(token)
        events.append(Token(token, text, sampled.logprob, part.timings()))
        if stop is not None:
            self._finish(sequence, "stop", events, stop)
        elif len(sequence.tokens) - sequence.n_prompt == request.max_tokens:
            self._finish(sequence, "length", events)
        elif len(sequence.tokens) >= self.n_ctx:
            self._finish(sequence, "context", events)
        else:
            part.generation.put(*events)

    # -- ends

    def _finish(
        self,
        sequence: Sequence,
        reason: Reason,
        events: list[Event] | None = None,
        stop: str | None = None,
        ending: Logprob | None = None,
    ) -> None:
        part: Part = sequence.part
        finished = Finished(
            reason,
            stop,
            "" if stop is not None else part.output.flush(),
            sequence.n_prompt,
            sequence.cached,
            len(sequence.tokens) - sequence.n_prompt,
            part.timings(),
            ending,
        )
        self._leave(sequence, keep=True)
        self.counts.finished += 1
        self.counts.cached_tokens += sequence.cached
        part.generation.put(*(events or ()), finished)

    def _cancelled(self, sequence: Sequence) -> None:
        if sequence in self._alive:
            self._leave(sequence, keep=True)
            self.counts.cancelled += 1
            sequence.part.generation.fail(Cancelled("the request was cancelled"))

    def _fail(self, sequence: Sequence, error: BaseException) -> None:
        self._leave(sequence)
        self.counts.failed += 1
        sequence.part.generation.fail(error)

    def _leave(self, sequence: Sequence, keep: bool = False) -> None:
        if sequence in self._preparing:
            self._preparing.remove(sequence)
        else:
            self.scheduler.remove(sequence, keep)
        del self._alive[sequence]
        self._replan()
        sequence.part.sampler.close()

    def _drop(self, sequence: Sequence) -> None:
        self.model.meter.forget(sequence.slot)
