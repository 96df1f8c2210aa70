"""The scheduler alone, against a pretended context that keeps count of cells and slots.

What a pass proves, for any requests, schedules, pools and cancels: a step is within its limits, a
token is computed once and in order wherever its sequence did not have to give way, nothing that
gave way leaves anything behind, every wanted row of logits comes exactly once, and everything ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_gguf.policies.base import Phase
from moe_gguf.runtime.engine.request import Logprob, Request
from moe_gguf.runtime.engine.schedule import Schedule
from moe_gguf.runtime.engine.scheduler import Limits, Scheduler, Step
from moe_gguf.runtime.engine.sequence import Sequence
from moe_gguf.runtime.engine.states import Place
from moe_gguf.runtime.errors import UserError

LIMITS = Limits(cells=1000, slots=4, rows=68, outputs=8)


class Forgetful:
    """States that nobody goes on from."""

    cuts = True

    def enter(self, owner: str, tokens: list[int], most: int, free: Collection[int]) -> Place:
        return Place(min(free), 0)

    def leave(self, slot: int, keep: bool) -> None: ...
    def adopt(self, slot: int, source: int, n: int) -> int:
        raise AssertionError("the prompts have no start in common")

    def grew(self, slot: int, n: int) -> None: ...
    def room(self, n: int) -> None: ...
    def evict_all(self) -> bool:
        return False

    def shared(self, slots: Collection[int]) -> int:
        return 0

    def stops(self, n_prompt: int) -> set[int]:
        return set()

    def checkpoint(self, slot: int) -> None: ...


class Pretended:
    """A context of ``cells``, perhaps fewer than the scheduler is told, and who samples from it."""

    def __init__(self, schedule: Schedule, limits: Limits, cells: int, n_ctx: int = 100) -> None:
        self.scheduler = Scheduler(schedule, limits, Forgetful(), self.drop)
        self.limits, self.cells, self.n_ctx = limits, cells, n_ctx
        self.held: dict[int, int] = {}  # tokens by slot
        self.ends: dict[int, str] = {}  # by number
        self.steps: list[list[tuple[int, int]]] = []  # (number, tokens) of each
        self.refused = self.number = 0

    def submit(self, n_prompt: int, n: int, priority: int = 0, scored: bool = False) -> Sequence:
        request = Request(
            tokens=[self.number] * n_prompt,
            max_tokens=n,
            priority=priority,
            prompt_logprobs=0 if scored else None,
        )
        sequence = Sequence(self.number, request)
        self.number += 1
        self.scheduler.add(sequence)
        return sequence

    def drop(self, sequence: Sequence) -> None:
        self.held.pop(sequence.slot, None)

    def end(self, sequence: Sequence, reason: str) -> None:
        self.scheduler.remove(sequence)
        assert sequence.number not in self.ends
        self.ends[sequence.number] = reason

    def step(self) -> bool:
        step = self.scheduler.next()
        self.scheduler.check_integrity()
        if step is None:
            return False
        check_step(step, self.scheduler, self.limits)
        if sum(self.held.values()) + step.n_rows > self.cells:
            self.refused += 1
            if not self.scheduler.refused(step):
                self.end(step.pieces[0].sequence, "context")
            return True
        self.steps.append([(p.sequence.number, p.n) for p in step.pieces])
        for piece in step.pieces:
            slot = piece.sequence.slot
            assert self.held.get(slot, 0) == piece.start, "the memory holds something else"
            self.held[slot] = piece.start + piece.n
        self.scheduler.done(step)
        for piece in step.pieces:
            self.read(piece.sequence, piece.start + piece.n - piece.outputs, piece.outputs)
        return True

    def read(self, sequence: Sequence, first: int, n: int) -> None:
        """What the engine does with rows of logits of positions ``first`` on."""
        for position in range(first, first + n):
            if sequence.is_scoring:
                assert position == len(sequence.scored)
                sequence.scored.append(Logprob(0, 0.0, ()))
        if sequence.n_left:
            return
        assert n, "the last token's logits are wanted"
        assert not sequence.is_scoring
        if sequence.request.max_tokens != 0:
            sequence.tokens.append(0)
        if len(sequence.tokens) - sequence.n_prompt == sequence.request.max_tokens:
            self.end(sequence, "length")
        elif len(sequence.tokens) >= self.n_ctx:
            self.end(sequence, "context")

    def run(self) -> None:
        while self.step():
            assert len(self.steps) + self.refused < 20_000, "it does not end"
        assert not self.held
        assert not self.scheduler.running and not self.scheduler.waiting


def check_step(step: Step, scheduler: Scheduler, limits: Limits) -> None:
    pieces, schedule = step.pieces, scheduler.schedule
    assert pieces
    assert step.n_rows <= limits.rows
    assert sum(p.outputs for p in pieces) <= limits.outputs
    assert len({p.sequence for p in pieces}) == len(pieces)
    assert all(p.n >= 1 and 0 <= p.outputs <= p.n for p in pieces)
    decoding = [p for p in pieces if p.sequence.decodes]
    prompts = [p for p in pieces if not p.sequence.decodes]
    assert len(decoding) <= schedule.group
    assert sum(p.n for p in prompts) <= schedule.chunk
    expected = Phase.MIXED if decoding and prompts else Phase.DECODE if decoding else Phase.PREFILL
    assert step.phase == expected
    if limits.equal:
        assert not (decoding and prompts)
        assert len({p.n for p in prompts}) <= 1
    if not schedule.quantum:
        assert len(scheduler.running) <= schedule.group


# --- anything -------------------------------------------------------------------------------------


@st.composite
def contexts(draw: st.DrawFn) -> Pretended:
    slots = draw(st.integers(1, 6))
    chunk = draw(st.integers(1, 80))
    cells = draw(st.integers(100, 400))
    limits = Limits(
        cells,
        slots,
        rows=chunk + (slots if slots > 1 else 0),
        outputs=max(slots, draw(st.sampled_from([1, 8]))),
        equal=draw(st.booleans()),
    )
    schedule = Schedule(draw(st.integers(1, slots)), draw(st.sampled_from([0, 1, 5])), chunk)
    # Now and then there is less room than llama.cpp said.
    return Pretended(schedule, limits, draw(st.sampled_from([cells, cells, cells - 60])))


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 40),  # when
        st.integers(1, 99),  # prompt
        st.integers(0, 30),  # tokens
        st.integers(0, 2),  # priority
        st.booleans(),  # scored
        st.none() | st.integers(0, 60),  # cancelled
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(contexts(), REQUESTS)
def test_any_requests_end_and_leave_nothing(context: Pretended, requests: list[Any]) -> None:
    made: dict[int, tuple[Sequence, int | None]] = {}
    for now in range(100):
        for when, n_prompt, n, priority, scored, cancelled in requests:
            if when == now:
                sequence = context.submit(n_prompt, n, priority, scored)
                made[sequence.number] = sequence, cancelled
        for number, (sequence, cancelled) in made.items():
            if cancelled == now and number not in context.ends:
                context.end(sequence, "cancelled")
        context.step()
    context.run()
    for number, (sequence, cancelled) in made.items():
        reason = context.ends[number]
        assert reason != "cancelled" or cancelled is not None
        if reason == "length":
            assert len(sequence.tokens) == sequence.n_prompt + sequence.request.max_tokens
            if sequence.request.prompt_logprobs is not None:
                assert len(sequence.scored) == sequence.n_prompt - 1
        if reason == "context":
            assert len(sequence.tokens) >= min(context.n_ctx, context.cells)


# --- by hand --------------------------------------------------------------------------------------


def numbers(context: Pretended, n: int) -> list[list[int]]:
    """The sequences of each of the next steps."""
    first = len(context.steps)
    for _ in range(n):
        context.step()
    return [[number for number, _ in step] for step in context.steps[first:]]


def pretended(schedule: Schedule, **limits: Any) -> Pretended:
    given = LIMITS._replace(**limits)
    return Pretended(schedule, given, given.cells)


def test_turns_of_one_after_another() -> None:
    """Two tokens for each, and one that is done makes room at once."""
    context = pretended(Schedule(group=1, quantum=2))
    for n in (5, 3, 9):
        context.submit(4, n)
    assert numbers(context, 1) == [[0, 1, 2]]  # the prompts, and each one's first token
    assert numbers(context, 10) == [[0], [0], [1], [1], [2], [2], [0], [0], [2], [2]]
    assert context.ends == {0: "length", 1: "length"}


def test_turns_of_groups() -> None:
    context = pretended(Schedule(group=2, quantum=3))
    for _ in range(4):
        context.submit(4, 7)
    numbers(context, 1)
    assert numbers(context, 9) == [[0, 1]] * 3 + [[2, 3]] * 3 + [[0, 1]] * 3


def test_without_turns_no_more_run_than_a_group() -> None:
    context = pretended(Schedule(group=2))
    for _ in range(3):
        context.submit(4, 3)
    assert numbers(context, 3) == [[0, 1]] * 3
    assert numbers(context, 3) == [[2]] * 3


def test_a_prompt_is_computed_beside_those_that_decode() -> None:
    context = pretended(Schedule(group=4, chunk=10))
    context.submit(4, 50)
    numbers(context, 2)
    context.submit(25, 5)
    context.step(), context.step(), context.step(), context.step()
    assert context.steps[2:] == [[(0, 1), (1, 10)]] * 2 + [[(0, 1), (1, 5)], [(0, 1), (1, 1)]]


def test_hybrid_models_get_equal_pieces_and_decode_in_between() -> None:
    context = pretended(Schedule(group=4, chunk=12), equal=True)
    context.submit(4, 50)
    numbers(context, 2)
    context.submit(10, 5)
    context.submit(6, 5)
    for _ in range(5):
        context.step()
    assert context.steps[2:] == [
        [(1, 10)],
        [(0, 1), (1, 1)],
        [(2, 6)],
        [(0, 1), (1, 1), (2, 1)],
        [(0, 1), (1, 1), (2, 1)],
    ]


def test_the_youngest_of_the_lowest_priority_gives_way_and_comes_back_first() -> None:
    context = pretended(Schedule(group=4), cells=120)
    for priority in (0, 1, 0):
        context.submit(20, 30, priority)
    late = context.submit(20, 1)
    context.run()
    assert context.scheduler.n_preempted >= 1
    last_of = {number: i for i, step in enumerate(context.steps) for number, _ in step}
    assert last_of[1] < last_of[2], "the higher priority did not give way"
    assert {late.number, 2} <= {number for number, _ in context.steps[last_of[late.number]]}
    assert set(context.ends.values()) == {"length"}


def test_a_higher_priority_takes_the_place_of_lower_ones() -> None:
    context = pretended(Schedule(group=2), slots=2)
    for _ in range(2):
        context.submit(20, 30)
    numbers(context, 5)
    context.submit(10, 3, priority=1)
    assert numbers(context, 1) == [[0, 2]]
    assert context.scheduler.n_preempted == 1
    context.run()
    assert set(context.ends.values()) == {"length"}


def test_equal_priority_never_displaces() -> None:
    context = pretended(Schedule(group=2), slots=2)
    for _ in range(5):
        context.submit(20, 10)
    context.run()
    assert context.scheduler.n_preempted == 0


def test_nobody_starves_among_newcomers() -> None:
    """Short ones keep coming, and the long one gets its share of turns."""
    context = pretended(Schedule(group=1, quantum=2), slots=3)
    long = context.submit(4, 40)
    for _ in range(400):
        if len(context.scheduler.waiting) < 3:
            context.submit(2, 3)
        context.step()
        if long.number in context.ends:
            break
    share = Counter(number for step in context.steps for number, _ in step)
    assert context.ends[long.number] == "length"
    assert share[long.number] / len(context.steps) > 0.2


def test_room_that_is_not_there_is_learned_once() -> None:
    """No endless halving: after one refusal the pool is as small as it is."""
    context = Pretended(Schedule(group=4), LIMITS, cells=90)
    for _ in range(4):
        context.submit(30, 8)
    context.run()
    assert 1 <= context.refused <= 3
    assert set(context.ends.values()) == {"length"}


def test_one_that_alone_outgrows_the_memory_ends() -> None:
    context = Pretended(Schedule(group=4), LIMITS._replace(cells=60), cells=60)
    context.submit(30, 80)
    context.submit(90, 8)
    context.submit(30, 8)
    context.run()
    assert context.ends == {0: "context", 1: "context", 2: "length"}


def test_scoring_takes_its_rows_in_pieces() -> None:
    context = pretended(Schedule(group=4, chunk=64), outputs=8)
    context.submit(30, 0, scored=True)
    context.run()
    assert context.steps == [[(0, 8)]] * 3 + [[(0, 6)]]


@pytest.mark.parametrize("given", [(0, 0, 1), (1, -1, 1), (1, 0, 0)])
def test_what_is_no_schedule(given: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="no schedule"):
        Schedule(*given)


def test_another_schedule_holds_from_the_next_step_on() -> None:
    context = pretended(Schedule(group=4))
    for _ in range(4):
        context.submit(4, 20)
    numbers(context, 2)
    context.scheduler.set(Schedule(group=1, quantum=2))
    assert numbers(context, 4) == [[0], [0], [1], [1]]
