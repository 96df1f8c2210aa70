"""How sequences are to share a model: the schedule, and the division of memory, that serve a goal.

A pure function of what was measured (``Measurements``), of the machine and the model (``Facts``)
and of the goal. It tries every sensible number of sequences, group, chunk and turn, predicts each
by ``Costs``, and keeps the best; serving in turns, each sequence alone, is always among them, so
what is chosen is never predicted slower than that. Klotski's inequalities (arXiv 2502.06888) say
from which group on computing hides every read, and how many missing experts must be read ahead.

Opens nothing and measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from ..budget import min_slots
from ..errors import UserError, option
from ..formats.ggml_types import pad_up
from ..sizes import format_size
from .costs import TILE, Costs, StepTime
from .curves import Curves, Shape
from .measurements import Measurements
from .room import Room
from .schedule import Schedule

Goal = Literal["latency", "throughput"]
GOALS: tuple[Goal, ...] = ("latency", "throughput")

_SEQUENCES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_CHUNKS = (32, 64, 128, 256, 512, 1024)
_QUANTA = (4, 8, 16, 32, 64, 128, 256)
# What a turn may lose to the reads of its first tokens: who waits for others' turns wants short
# ones, who only counts tokens long ones.
_SWITCH_LOSS: dict[Goal, float] = {"latency": 0.1, "throughput": 0.02}
# Fewer slots for others' cells may make one sequence alone this much slower.
_ALONE_LOSS = 0.05
_MOST_AUTO = 8  # sequences in memory where the goal is latency and nobody says how many come
# Predictions closer than this are alike, and what waits less is chosen.
_TIE: dict[Goal, float] = {"latency": 0.03, "throughput": 0.01}
_WORTH = 1.05  # of the predicted speed: a lossy cache that gains less is not mentioned
_SPARE = 0.01  # of the budget: so much more than foretold the opened model may take
SCORE_ROWS = 64  # tokens of prompts that are scored in a step, where few prompts are
KV_Q8_0 = 34 / 64  # bytes of a block of q8_0 over those of f16


class Workload(NamedTuple):
    """What is expected of the sequences to come, in tokens on average; ``most`` of them, if that is
    known. ``scored``: of every token of their prompts the probability is asked for."""

    prompt: int = 256
    answer: int = 256
    most: int | None = None
    scored: bool = False

    @property
    def tokens(self) -> int:
        return self.prompt + self.answer


class Facts(NamedTuple):
    """What a plan must know of model, budget and disk."""

    shape: Shape
    room: Room
    total_bytes: int  # the budget
    slot_bytes: int
    n_all: int  # slots for every expert
    n_ctx: int  # the longest that one sequence may get
    disk_bytes_per_s: float  # now
    direct: bool = True
    score_rows: int | None = None  # None: as many as the workload wants

    def scored_with(self, chunk: int, workload: Workload) -> int:
        """Tokens of prompts that can be scored in a step; each takes a row of logits."""
        return self.score_rows or (chunk if workload.scored else SCORE_ROWS)


class Pipeline(NamedTuple):
    """One layer of one step, as Klotski's planner sees it; seconds.

    Weights of attention and gates are in memory here, so the paper's io_A and io_G are 0, and of
    the experts only the ``missing`` ones are read; those that are there compute first.
    """

    attention_s: float  # of the whole group, its gate included
    expert_s: float  # computing one expert's tokens
    read_s: float  # reading one expert
    resident: float
    missing: float

    @property
    def hot(self) -> int:
        """K: the fewest missing experts that must be on their way before their layer begins, so
        that computing them and the resident ones hides the reads that remain."""
        left = self.missing * self.read_s - self.resident * self.expert_s
        k = math.ceil(left / (self.read_s + self.expert_s) - 1e-9) if left > 0 else 0
        return min(k, math.ceil(self.missing))

    @property
    def slack_s(self) -> tuple[float, float, float]:
        """By how much the paper's inequalities 2, 3 and 4 hold (the first is n tA >= io_G): reads
        of the hot experts behind attention; one more behind them; all of them behind everything."""
        hot = min(self.hot, self.missing)
        hot_s = (self.resident + hot) * self.expert_s
        return (
            self.attention_s - hot * self.read_s,
            self.attention_s + hot_s - min(hot + 1, self.missing) * self.read_s,
            self.attention_s
            + hot_s
            + (self.missing - hot) * self.expert_s
            - self.missing * self.read_s,
        )

    @property
    def hides(self) -> bool:
        return min(self.slack_s) >= 0


class Prediction(NamedTuple):
    """What a number of sequences decoding at once may expect; speeds are of all together."""

    sequences: int
    group: int
    quantum: int
    decode_tps: float
    prompt_tps: float
    first_token_s: float  # of one prompt of the expected length, from when its turn comes
    token_s: float  # between two tokens of a sequence, on average
    gap_s: float  # and at most: others' turns, and chunks of prompts
    stall_share: float  # bubbles: of the time, nothing to compute
    bytes_per_token: float
    distinct: float  # experts of a layer in one step
    resident_share: float

    @property
    def serial(self) -> bool:
        return self.group < self.sequences


@dataclass(frozen=True)
class Plan:
    """What to open and how to schedule it."""

    goal: Goal
    workload: Workload
    schedule: Schedule
    n_seq_max: int
    cells: int
    score_rows: int  # tokens of prompts that are scored in a step
    n_slots: int
    predicted: Prediction  # of as many sequences as there may be
    curve: tuple[Prediction, ...]  # of fewer, one of them alone first
    binds: str  # disk, compute or memory
    hot: int
    hides_from: int | None  # the smallest group whose computing hides all reads
    kv_offer_tps: float | None  # with a lossy q8_0 cache, where that is worth it
    calm: bool  # nobody else had the processors when it was measured
    disk_bytes_per_s: float  # as it was when this was planned

    def at(self, active: int) -> Schedule:
        """The schedule while so many sequences are there."""
        here = next((p for p in self.curve if p.sequences >= active), self.curve[-1])
        if here.serial:
            return replace(self.schedule, group=here.group, quantum=here.quantum)
        return replace(self.schedule, group=self.n_seq_max, quantum=0)


def plan(
    measured: Measurements,
    facts: Facts,
    goal: Goal = "latency",
    workload: Workload | None = None,
    parallel: int | None = None,
) -> Plan:
    """The best there is for ``parallel`` sequences at once; None: for a number of the planner's.

    UserError where so many do not fit.
    """
    workload = workload or Workload(min(256, facts.n_ctx // 2), min(256, facts.n_ctx // 2))
    curves = Curves(measured, facts.shape)
    chosen = _best(curves, facts, goal, workload, parallel)
    predicted = chosen.predict(chosen.sequences)
    counts = [n for n in _SEQUENCES if n < chosen.sequences]
    curve = tuple(chosen.predict(n) for n in (*counts, chosen.sequences))
    group = predicted.group
    return Plan(
        goal,
        workload,
        chosen.schedule,
        chosen.sequences,
        chosen.cells,
        facts.scored_with(chosen.chunk, workload),
        chosen.n_slots,
        predicted,
        curve,
        _binds(chosen),
        pipeline(chosen.costs, group, chosen.held).hot,
        _hides_from(chosen),
        _offer(chosen, predicted, parallel),
        measured.calm,
        facts.disk_bytes_per_s,
    )


# --- one division of memory ---------------------------------------------------------------------


class _Choice(NamedTuple):
    """A number of sequences and a chunk, and the slots that leaves."""

    facts: Facts
    goal: Goal
    workload: Workload
    costs: Costs
    sequences: int
    cells: int
    chunk: int
    n_slots: int

    @property
    def held(self) -> float:
        """Tokens a sequence holds while it decodes, on average."""
        return self.workload.prompt + self.workload.answer / 2

    @property
    def schedule(self) -> Schedule:
        here = self.predict(self.sequences)
        return Schedule(here.group, here.quantum, self.chunk)

    def predict(self, active: int) -> Prediction:
        """Of so many sequences at once, in the group and the turns that are best for them."""
        groups = sorted({n for n in (*_SEQUENCES, TILE - 1) if n < active} | {active})
        first = self._first_token_s()
        tried = [self._with_group(active, group, first) for group in groups]
        most = max(p.decode_tps for p in tried)
        # Never below serving one by one.
        least = max(most * (1 - _TIE[self.goal]), tried[0].decode_tps)
        alike = [p for p in tried if p.decode_tps >= least]
        if self.goal == "throughput":
            return max(alike, key=lambda p: (p.decode_tps, -p.group))
        return min(alike, key=lambda p: (p.gap_s, p.group))

    def _with_group(self, active: int, group: int, first: float) -> Prediction:
        step = self.costs.decode(group, self.held, active)
        quantum, lost = 0, 0.0
        if group < active:
            quantum, lost = self._quantum(group, active, step)
        each = step.seconds + lost
        tps = group / each
        chunk = self.costs.prompt(self.chunk, group if active > 1 else 0, self.held, active)
        others = math.ceil(active / group) - 1
        gap = others * quantum * each + (chunk.seconds if active > 1 else each)
        return Prediction(
            active, group, quantum, tps, self.workload.prompt / first, first, active / tps,
            max(gap, each), (step.stall_s + lost) / each, step.read_bytes / group,
            self.costs.distinct(group), self.n_slots / self.facts.n_all,
        )  # fmt: skip

    def _quantum(self, group: int, active: int, step: StepTime) -> tuple[int, float]:
        """The shortest turn that loses little, and the seconds per step it loses."""
        extra = self.costs.switch_s(group) * min(1.0, active / group - 1)  # by who is new in it
        for quantum in _QUANTA:
            if extra / quantum <= _SWITCH_LOSS[self.goal] * step.seconds:
                break
        return quantum, extra / quantum

    def _first_token_s(self) -> float:
        """Of one prompt of the expected length."""
        whole, rest = divmod(self.workload.prompt, self.chunk)
        steps = whole * self.costs.prompt(self.chunk).seconds
        return steps + (self.costs.prompt(rest).seconds if rest else 0.0)

    def _job_s(self, n: int) -> float:
        """Of ``n`` sequences, as many at once as there may be: the rest of a job does not fill the
        memory that it is given."""
        waves, rest = divmod(n, self.sequences)
        return waves * self._wave_s(self.sequences) + (self._wave_s(rest) if rest else 0.0)

    def _wave_s(self, n: int) -> float:
        """Of ``n`` sequences that begin together. Those whose prompts are there decode beside the
        prompts of the others, half of them on average, and the steps that are left hold as many
        rows fewer."""
        prompt, answer = self.workload[:2]
        steps = n * prompt / self.chunk
        beside = n // 2 if steps > 1 and answer > 1 else 0
        time_s = steps * self.costs.prompt(self.chunk, beside, self.held, n).seconds
        left = n * answer - beside * min(steps, answer)
        if left > 0:
            time_s += left / self.predict(max(1, round(left / answer))).decode_tps
        return time_s

    @property
    def worth(self) -> float:
        """What is to be made large."""
        prompt, answer = self.workload[:2]
        if self.goal == "throughput":
            # Tokens generated over the whole job's time; scoring alone counts the prompt's.
            n = self.workload.most or self.sequences
            return n * (answer or prompt) / self._job_s(n)
        here = self.predict(self.sequences)
        alone = here if self.sequences == 1 else self.predict(1)
        late = here.first_token_s + (here.gap_s if self.sequences > 1 else 0.0)
        return -(late + answer * (alone.token_s + here.token_s) / 2)


def _choices(
    curves: Curves, facts: Facts, goal: Goal, workload: Workload, sequences: int
) -> Iterator[_Choice]:
    """What fits of a number of sequences, by chunk."""
    longest = pad_up(facts.n_ctx, 256)
    cells = max(longest, pad_up(sequences * min(workload.tokens, facts.n_ctx), 256))
    most = max(workload.prompt * (sequences if goal == "throughput" else 1), _CHUNKS[0])
    for chunk in _CHUNKS:
        if chunk > _CHUNKS[0] and chunk >= 2 * most:
            return
        scored = facts.scored_with(chunk, workload)
        if workload.scored and chunk > max(scored, _CHUNKS[0]):
            return
        outputs = max(sequences, scored)
        rows = min(cells, chunk + (sequences if sequences > 1 else 0))
        free = facts.total_bytes - facts.room.bytes(sequences, cells, rows, outputs)
        n_slots = min(facts.n_all, free // facts.slot_bytes)
        if free - _SPARE * facts.total_bytes < min_slots(facts.n_all) * facts.slot_bytes:
            return
        costs = Costs(curves, n_slots / facts.n_all, facts.disk_bytes_per_s, facts.direct)
        yield _Choice(facts, goal, workload, costs, sequences, cells, chunk, n_slots)


def _best(
    curves: Curves, facts: Facts, goal: Goal, workload: Workload, parallel: int | None
) -> _Choice:
    def best(n: int) -> _Choice | None:
        return _enough(list(_choices(curves, facts, goal, workload, n)))

    if parallel is not None:
        if (chosen := best(parallel)) is None:
            raise UserError(_too_many(facts, workload, parallel))
        return chosen
    most = min(workload.most or _SEQUENCES[-1], _SEQUENCES[-1])
    counts = sorted({n for n in _SEQUENCES if n <= most} | {most})
    fitting = [choice for n in counts if (choice := best(n)) is not None]
    if not fitting:
        raise UserError(_too_many(facts, workload, 1))
    if goal == "throughput":
        chosen = _enough(fitting)
        assert chosen is not None
        return chosen
    alone = fitting[0].predict(1).decode_tps * (1 - _ALONE_LOSS)
    few = [c for c in fitting if c.sequences <= _MOST_AUTO]
    return [c for c in few if c.predict(1).decode_tps >= alone][-1]


def _enough(choices: Sequence[_Choice]) -> _Choice | None:
    """The first, that is the smallest, of those that are as good as the best."""
    if not choices:
        return None
    worths = [choice.worth for choice in choices]
    least = max(worths) - _TIE[choices[0].goal] * abs(max(worths))
    return next(c for c, worth in zip(choices, worths, strict=True) if worth >= least)


def _too_many(facts: Facts, workload: Workload, parallel: int) -> str:
    cells = max(facts.n_ctx, parallel * min(workload.tokens, facts.n_ctx))
    outputs = max(parallel, facts.scored_with(_CHUNKS[0], workload))
    needed = facts.room.bytes(parallel, cells, _CHUNKS[0] + parallel, outputs)
    needed += int(min_slots(facts.n_all) * facts.slot_bytes + _SPARE * facts.total_bytes)
    those = "1 sequence" if parallel == 1 else f"{parallel} sequences"
    return (
        f"{those} of {workload.tokens} tokens: too much for "
        f"{format_size(facts.total_bytes)}; that takes {format_size(needed)}; ask for fewer with "
        f"{option('parallel')}, or for a smaller {option('n_ctx')}"
    )


# --- what is said of it -------------------------------------------------------------------------


def pipeline(costs: Costs, group: int, cells: float = 0.0) -> Pipeline:
    """One layer of a step of this group."""
    n_layers = costs.curves.shape.n_layers
    step = costs.decode(group, cells)
    distinct, missing = costs.distinct(group), costs.reads(group)
    experts = min(step.compute_s, costs.expert_s(group))
    read = step.read_s / n_layers / missing if missing > 0 else 0.0
    return Pipeline(
        (step.compute_s - experts) / n_layers,
        experts / n_layers / distinct,
        read,
        distinct - missing,
        missing,
    )


def _hides_from(chosen: _Choice) -> int | None:
    groups = (n for n in _SEQUENCES if n <= max(_SEQUENCES[-1], chosen.sequences))
    return next((n for n in groups if pipeline(chosen.costs, n, chosen.held).hides), None)


def _binds(chosen: _Choice) -> str:
    """Of what a tenth more would gain most."""

    def tps(costs: Costs, n_slots: int | None = None) -> float:
        here = chosen._replace(costs=costs, n_slots=n_slots or chosen.n_slots)
        return here.predict(chosen.sequences).decode_tps

    costs, facts = chosen.costs, chosen.facts
    more = min(facts.n_all, chosen.n_slots + facts.total_bytes // 10 // facts.slot_bytes)
    gains = {
        "compute": tps(replace(costs, faster=1.1)),
        "disk": tps(replace(costs, disk_faster=1.1)),
        "memory": tps(replace(costs, share=more / facts.n_all), more),
    }
    return max(gains, key=gains.__getitem__)


def _offer(chosen: _Choice, predicted: Prediction, parallel: int | None) -> float | None:
    """What a cache of q8_0 would gain; it is lossy, so it is only spoken of."""
    facts = chosen.facts._replace(room=chosen.facts.room.with_cells(KV_Q8_0))
    n = chosen.sequences
    counts = [n] if parallel is not None or chosen.goal == "latency" else [n, 2 * n]
    found = [
        _best(chosen.costs.curves, facts, chosen.goal, chosen.workload, count)
        for count in counts
        if count <= _SEQUENCES[-1] and _fits(chosen.costs.curves, facts, chosen, count)
    ]
    tps = max((c.predict(c.sequences).decode_tps for c in found), default=0.0)
    return tps if tps >= predicted.decode_tps * _WORTH else None


def _fits(curves: Curves, facts: Facts, chosen: _Choice, sequences: int) -> bool:
    choices = _choices(curves, facts, chosen.goal, chosen.workload, sequences)
    return next(choices, None) is not None
