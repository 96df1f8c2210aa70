"""One run of a bench row of several sequences: a job of distinct prompts, all there at once.

Ours go through ``Engine``, as callers use it; stock through a loop over llama_decode in a context
of the same kind: prompts in chunks, then a token of each sequence in every step. One clock stands
behind both, at the end of each llama_decode. Knows nothing of cgroups, other rows or repetition.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ...policies.base import Phase
from ..engine.observer import Observer
from ..errors import UserError
from ..system import Stolen
from . import opponent
from .prose import passages
from .spec import PLANNED, Spec

if TYPE_CHECKING:
    from ..arena import Arena
    from ..engine.context import Context
    from ..engine.engine import Engine
    from ..engine.generation import Generation
    from ..vocab import Vocabulary

TURN = 16  # tokens
# Before the clock starts: prompt tokens of all, sequences at most, answer tokens of each.
_WARM_PROMPTS, _WARM_SEQUENCES, _WARM_ANSWER = 128, 16, 8
_SHORTEST = 8  # prompt
# A loop of stock's is cut off here: one that thrashes makes its point with few tokens.
DECODE_LIMIT_S = 180.0

Tokens = list[int]


# --- the clock ----------------------------------------------------------------------------------


@dataclass
class Sums:
    """Over steps of one kind; a step's time runs from the end of the one before, so that choosing
    tokens is in it."""

    steps: int = 0
    rows: int = 0
    seconds: float = 0.0
    read_bytes: int = 0
    stall_s: float = 0.0
    disk_s: float = 0.0
    controller_s: float = 0.0
    hits: int = 0
    demands: int = 0  # experts of a layer, each once


class _Marks(NamedTuple):
    """Where the engine's own counters stand; they only grow."""

    read_bytes: int
    stall_ns: int
    disk_ns: int
    controller_ns: int
    hits: int
    misses: int

    @classmethod
    def of(cls, arena: Arena | None) -> _Marks:
        if arena is None:
            return cls(*[0] * 6)
        native, demands = arena.plugin.stats(), arena.demands()
        controller = native.route_ns + native.guess_ns
        hits, misses = sum(demands.hits.values()), sum(demands.misses.values())
        return cls(native.read_bytes, native.stall_ns, native.disk_ns, controller, hits, misses)


@dataclass
class Clock(Observer):
    """Adds up steps: those with prompts in them, and those without."""

    prompts: Sums = field(default_factory=Sums)
    answers: Sums = field(default_factory=Sums)
    _last: float = 0.0
    _marks: _Marks = field(default_factory=lambda: _Marks.of(None))

    def start(self, arena: Arena | None) -> None:
        self.prompts, self.answers = Sums(), Sums()
        self._marks, self._last = _Marks.of(arena), time.perf_counter()

    def decoded(self, context: Context, phase: Phase, code: int) -> None:
        now, marks = time.perf_counter(), _Marks.of(context.arena)
        sums = self.answers if phase is Phase.DECODE else self.prompts
        grown = _Marks(*(new - old for new, old in zip(marks, self._marks, strict=True)))
        sums.steps += 1
        sums.rows += context.batch.n
        sums.seconds += now - self._last
        sums.read_bytes += grown.read_bytes
        sums.stall_s += grown.stall_ns / 1e9
        sums.disk_s += grown.disk_ns / 1e9
        sums.controller_s += grown.controller_ns / 1e9
        sums.hits += grown.hits
        sums.demands += grown.hits + grown.misses
        self._last, self._marks = now, marks


@dataclass
class Told:
    """What one sequence's caller saw: its tokens, and when; ``logprobs`` of its prompt if it was
    only scored, which is done at the time of ``scored``."""

    tokens: Tokens = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    scored: float | None = None

    def take(self, token: int) -> None:
        self.times.append(time.perf_counter())
        self.tokens.append(token)


# --- what is asked ------------------------------------------------------------------------------


class _Asked(NamedTuple):
    """The prompts of the job, and of what comes before it."""

    prompts: list[Tokens]
    warm_up: list[Tokens]


def _asked(spec: Spec, vocabulary: Vocabulary) -> _Asked:
    texts = _texts(spec)
    return _cut(spec, [vocabulary.tokenize(t.encode(), vocabulary.adds_bos) for t in texts])


def _texts(spec: Spec) -> list[str]:
    return passages(spec.sequences + min(spec.sequences, _WARM_SEQUENCES))


def _cut(spec: Spec, found: Sequence[Tokens]) -> _Asked:
    """Prompts of the texts' tokens."""
    n, n_warm = spec.sequences, len(found) - spec.sequences
    if min(map(len, found)) < spec.prompt_tokens:
        raise UserError(
            f"this model's tokenizer makes only {min(map(len, found))} tokens of a text"
        )
    prompts = [tokens[: spec.prompt_tokens] for tokens in found[:n]]
    length = min(spec.prompt_tokens, max(_SHORTEST, _WARM_PROMPTS // n_warm))
    warm_up = [tokens[:length] for tokens in found[n:]]
    return _Asked(prompts[:1] * n if spec.way == "same" else prompts, warm_up)


def _answer(spec: Spec) -> int:
    return 0 if spec.way == "score" else spec.n_predict


def _cells(spec: Spec) -> int:
    return spec.sequences * (spec.prompt_tokens + _answer(spec))


# --- one run ------------------------------------------------------------------------------------


def measure(spec: Spec) -> dict[str, Any]:
    """Times, rates and answers of one job; what does not fit the cap is left out, in words."""
    if spec.server is not None:
        return _server(spec)
    return _stock(spec) if spec.stock else _ours(spec)


def _ours(spec: Spec) -> dict[str, Any]:
    clock, start = Clock(), time.perf_counter()
    try:
        engine = _open(spec, clock)
    except UserError as error:
        return {"left_out": error.args[0]}
    with engine:
        startup_s = time.perf_counter() - start
        if spec.open_only:
            return {"startup_s": startup_s}
        asked = _asked(spec, engine.vocabulary)
        asyncio.run(_job(engine, asked.warm_up, min(_WARM_ANSWER, _answer(spec)), spec))
        if spec.fill:
            n_experts, layers = engine.found.layout.n_experts, engine.found.layout.layers
            keys = [e.layer * n_experts + i for e in layers for i in range(n_experts)]
            engine.arena.fill(keys)  # nothing is computed now
        clock.start(engine.arena)
        begin, stolen = time.perf_counter(), Stolen()
        told = asyncio.run(_job(engine, asked.prompts, _answer(spec), spec))
        stats = engine.stats()
        return {
            **_result(spec, clock, told, begin, stolen),
            **_counters(clock, len(engine.found.layout.layers)),
            "startup_s": startup_s,
            "threads": spec.n_threads or _physical_cores(),
            "kernels": "repacked" if engine.found.kernels.is_repacked else "plain",
            "plan": _plan(engine),
            "mode_line": engine.mode_line,
            **{name: stats[name] for name in ("slots", "reads", "budget_bytes", "requests")},
            "low_share": stats["low_share"],
        }


def _open(spec: Spec, clock: Clock) -> Engine:
    from ..engine.engine import Engine
    from ..engine.planner import Workload
    from ..engine.schedule import Schedule

    n, answer = spec.sequences, _answer(spec)
    how: dict[str, Any] = {"n_ctx": spec.prompt_tokens + answer, "n_threads": spec.n_threads}
    how["chat"] = False
    if spec.way in PLANNED:
        workload = Workload(spec.prompt_tokens, answer, n, scored=spec.way == "score")
        how |= {"goal": "throughput", "workload": workload}
    else:
        schedule = Schedule(1, TURN) if spec.way == "turns" else Schedule(n)
        how |= {"parallel": n, "cells": _cells(spec), "schedule": schedule, "score_rows": 1}
    return Engine(
        spec.model, make_policy=spec.make_policy, observer=clock, **how, **spec.options.arguments()
    )


async def _job(engine: Engine, prompts: Sequence[Tokens], answer: int, spec: Spec) -> list[Told]:
    """Have all of it computed; what each caller sees, and when."""
    told = [Told() for _ in prompts]
    # What one job has computed is of no use to another.
    settings: dict[str, Any] = {"temp": 0.0, "ignore_eos": True, "owner": str(id(prompts))}
    if spec.way == "score":
        settings["prompt_logprobs"] = 0
    all_there = threading.Event()
    engine._loop.post(all_there.wait)  # or the first step would hold the first prompt alone
    try:
        running = [engine.submit(prompt, max_tokens=answer, **settings) for prompt in prompts]
    finally:
        all_there.set()
    await asyncio.gather(*map(_follow, running, told))
    return told


async def _follow(generation: Generation, told: Told) -> None:
    from ..engine.request import PromptScored, Token

    async for event in generation:
        if isinstance(event, Token):
            told.take(event.token)
        elif isinstance(event, PromptScored) and event.logprobs:
            told.scored = time.perf_counter()
            told.logprobs = [scored.logprob for scored in event.logprobs]


def _plan(engine: Engine) -> dict[str, Any] | None:
    """What the planner chose and foretold, where it was asked."""
    from ..engine import planning

    plan = engine.plan
    return None if plan is None else planning.document(plan)


def _counters(clock: Clock, n_layers: int) -> dict[str, Any]:
    """What our engine counted while the job ran: of steps without prompts if there were any."""
    sums = clock.answers if clock.answers.steps else clock.prompts
    both = clock.prompts.read_bytes + clock.answers.read_bytes
    return {
        "bytes_read": sums.read_bytes,
        "disk_s": sums.disk_s,
        "bytes_per_token": sums.read_bytes / sums.rows,
        "bytes_per_row": both / (clock.prompts.rows + clock.answers.rows),
        "distinct_experts": sums.demands / sums.steps / n_layers,
        "hit_rate": sums.hits / max(1, sums.demands),
        "stall_share": sums.stall_s / sums.seconds,
        "disk_share": sums.disk_s / sums.seconds,
        "controller_share": sums.controller_s / sums.seconds,
        "prefill_stall_share": clock.prompts.stall_s / max(1e-9, clock.prompts.seconds),
    }


def _result(
    spec: Spec, clock: Clock, told: Sequence[Told], begin: float, stolen: Stolen
) -> dict[str, Any]:
    """What can be said of any engine once its job is done; rates are of all sequences together."""
    from ..system import rss_peak

    ends = [each.times[-1] if each.times else each.scored for each in told]
    job_s = max(end for end in ends if end is not None) - begin
    n_prompt = spec.sequences * spec.prompt_tokens
    n_answer = sum(len(each.tokens) for each in told)
    prompts, answers = clock.prompts, clock.answers
    result: dict[str, Any] = {
        "sequences": spec.sequences,
        "prompt_tokens": n_prompt,
        "answer_tokens": n_answer,
        "job_s": job_s,
        "job_tps": (n_prompt + n_answer) / job_s,
        "prefill_s": prompts.seconds,
        "prefill_tps": n_prompt / prompts.seconds,
        "steps": {"prompts": asdict(prompts), "answers": asdict(answers)},
        "stolen_share": stolen.share,
        "rss_peak_bytes": rss_peak(),
    }
    if spec.way == "score":
        logprobs = [value for each in told for value in each.logprobs]
        return {**result, "logprob_mean": sum(logprobs) / len(logprobs)}
    if answers.seconds:
        result["decode_s"] = answers.seconds
        result["decode_tps"] = answers.rows / answers.seconds
    first = [each.times[0] - begin for each in told if each.times]
    gaps = [b - a for each in told for a, b in zip(each.times, each.times[1:], strict=False)]
    return {
        **result,
        **_percentiles("first_token", first),
        **_percentiles("between_tokens", gaps),
        "answers": [each.tokens for each in told],
    }


def _percentiles(what: str, times: Sequence[float]) -> dict[str, float]:
    import numpy as np

    if not times:
        return {}
    p50, p95 = np.percentile(times, (50, 95))
    return {f"{what}_p50_s": float(p50), f"{what}_p95_s": float(p95)}


def _physical_cores() -> int:
    from ..system import physical_cores

    return physical_cores()


# --- the other engine ---------------------------------------------------------------------------


def _server(spec: Spec) -> dict[str, Any]:
    """What its clients see: prompts are taken to last until every answer has begun."""
    found, ends = opponent.tokens_of(spec.model, _texts(spec))
    asked, n_threads = _cut(spec, found), spec.n_threads or _physical_cores()
    start = time.perf_counter()
    with opponent.served(spec, _cells(spec), n_threads) as server:
        startup_s = time.perf_counter() - start
        opponent.ask(server.port, asked.warm_up, min(_WARM_ANSWER, spec.n_predict), ends)
        begin, stolen = time.perf_counter(), Stolen()
        times = opponent.ask(server.port, asked.prompts, spec.n_predict, ends)
        told = [Told([0] * len(each), each) for each in times]
        begun = max(each[0] for each in times)
        later = sum(at > begun for each in times for at in each)
        clock = Clock(
            prompts=Sums(seconds=begun - begin),
            answers=Sums(rows=later, seconds=max(each[-1] for each in times) - begun),
        )
        result = _result(spec, clock, told, begin, stolen)
        return {
            **{k: v for k, v in result.items() if k != "answers"},
            "rss_peak_bytes": server.peak_bytes,
            "startup_s": startup_s,
            "threads": n_threads,
            "kernels": "repacked" if spec.repack else "plain",
        }


# --- stock --------------------------------------------------------------------------------------


def _stock(spec: Spec) -> dict[str, Any]:
    from ..vocab import Vocabulary

    clock, start = Clock(), time.perf_counter()
    with _stock_context(spec, clock) as (context, vocab):
        startup_s = time.perf_counter() - start
        asked, answer = _asked(spec, Vocabulary(vocab)), _answer(spec)
        loop = _score if spec.way == "score" else _generate
        loop(context, asked.warm_up, min(_WARM_ANSWER, answer))
        clock.start(None)
        begin, stolen = time.perf_counter(), Stolen()
        told = loop(context, asked.prompts, answer)
        return {
            **_result(spec, clock, told, begin, stolen),
            "startup_s": startup_s,
            "threads": spec.n_threads or _physical_cores(),
            "kernels": "repacked" if spec.repack else "plain",
        }


@contextmanager
def _stock_context(spec: Spec, clock: Clock) -> Iterator[tuple[Context, Any]]:
    """llama.cpp alone: a context as our engine makes it, and the vocabulary."""
    import llama_cpp
    import llama_cpp._logger

    from ..engine.context import Context
    from ..engine.model import context_shape
    from ..params import DEFAULT_BATCH

    llama_cpp._logger.set_verbose(False)
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = spec.repack
    params.load_mode = (
        llama_cpp.LLAMA_LOAD_MODE_MMAP if spec.mmap else llama_cpp.LLAMA_LOAD_MODE_NONE
    )
    model = llama_cpp.llama_model_load_from_file(spec.model.encode(), params)
    if not model:
        raise UserError(f"llama.cpp cannot load {spec.model}")
    scoring = spec.way == "score"
    shape = context_shape(
        spec.prompt_tokens + _answer(spec),
        1 if scoring else spec.sequences,
        cells=max(DEFAULT_BATCH, spec.prompt_tokens if scoring else _cells(spec)),
        score_rows=DEFAULT_BATCH if scoring else 1,
        n_threads=spec.n_threads,
    )
    try:
        with closing(Context(model, shape.params(), observer=clock)) as context:
            yield context, llama_cpp.llama_model_get_vocab(model)
    finally:
        llama_cpp.llama_model_free(model)


def _generate(context: Context, prompts: Sequence[Tokens], answer: int) -> list[Told]:
    """Greedy answers: all prompts in chunks, then a token of each in every step."""
    from ..engine.memory import Memory
    from ..params import DEFAULT_BATCH

    Memory(context.ctx).clear()
    told = [Told() for _ in prompts]
    waiting = [(i, place) for i, prompt in enumerate(prompts) for place in range(len(prompt))]
    for at in range(0, len(waiting), DEFAULT_BATCH):
        context.batch.clear()
        ends = []
        for i, place in waiting[at : at + DEFAULT_BATCH]:
            is_last = place == len(prompts[i]) - 1
            row = context.batch.add((prompts[i][place],), place, i, int(is_last))
            ends += [(i, row)] if is_last else []
        context.step(Phase.PREFILL)
        _choose(context, ends, told)
    limit = time.perf_counter() + DECODE_LIMIT_S
    for done in range(1, answer):
        context.batch.clear()
        rows = [
            (i, context.batch.add(told[i].tokens[-1:], len(prompt) + done - 1, i, 1))
            for i, prompt in enumerate(prompts)
        ]
        context.step(Phase.DECODE)
        _choose(context, rows, told)
        if time.perf_counter() > limit:
            break
    return told


def _choose(context: Context, rows: Sequence[tuple[int, int]], told: Sequence[Told]) -> None:
    for i, row in rows:
        told[i].take(int(context.logits(row).argmax()))


def _score(context: Context, prompts: Sequence[Tokens], _: int) -> list[Told]:
    """Every prompt by itself, in chunks, every row's logits wanted."""
    from ..engine.memory import Memory
    from ..engine.sampler import logprob
    from ..params import DEFAULT_BATCH

    all_told = []
    for prompt in prompts:
        Memory(context.ctx).clear()
        told = Told()
        for at in range(0, len(prompt), DEFAULT_BATCH):
            chunk = prompt[at : at + DEFAULT_BATCH]
            context.batch.clear()
            context.batch.add(chunk, at, 0, len(chunk))
            context.step(Phase.PREFILL)
            for row, token in enumerate(prompt[at + 1 : at + 1 + len(chunk)]):
                told.logprobs.append(logprob(context.logits(row), token, 0).logprob)
        told.scored = time.perf_counter()
        all_told.append(told)
    return all_told
