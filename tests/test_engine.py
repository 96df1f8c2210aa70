"""``moe_gguf.Engine`` as its callers meet it, from threads and asyncio, when things go wrong too.

That what it computes is right is the business of test_engine_identity.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import TinyFile
from harness import fix_slots, random_tokens
from tape import Tape

from moe_gguf import Engine, ExpertReadError, UserError
from moe_gguf.runtime import logs
from moe_gguf.runtime.chat.templates import CHILDREN_BYTES
from moe_gguf.runtime.engine.generation import Generation
from moe_gguf.runtime.engine.request import (
    GBNF,
    Cancelled,
    EngineClosed,
    Finished,
    Progress,
    PromptScored,
    Schema,
    Token,
)
from moe_gguf.runtime.engine.schedule import Schedule
from moe_gguf.runtime.errors import RequestError
from moe_gguf.runtime.sizes import MB

OPERATIONS = int(os.environ.get("ENGINE_OPERATIONS", "200"))
SETTINGS: dict[str, Any] = {
    "memory": "1GB",
    "reads": "buffered",
    "lanes": 2,
    "policy": "lru",
    "n_ctx": 256,
    "n_threads": 1,
    "parallel": 4,
}
GREEDY: dict[str, Any] = {"temp": 0.0, "ignore_eos": True}
FOR_EVER: dict[str, Any] = {**GREEDY, "max_tokens": None}


def opened(path: Path, **settings: Any) -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        fix_slots(patch, 14)
        return Engine(path, **(SETTINGS | settings))


@pytest.fixture(scope="module")
def path(tiny_file: TinyFile) -> Path:
    return tiny_file("qwen3moe")


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[Engine]:
    """One for all tests that leave it as it was; it has the time of long requests."""
    engine = opened(path)
    yield engine
    assert engine._loop.scheduler.running == []
    check(engine)
    engine.close()


def check(engine: Engine) -> None:
    """Nothing of any request is left in the memory but what is kept to go on from."""
    engine._loop.scheduler.check_integrity()
    states = engine._loop.states
    states.check_integrity()
    states.evict_all()
    assert states.ledger.used == 0
    for slot in range(engine._loop.scheduler.limits.slots):
        assert engine._model.memory.first(slot) == engine._model.memory.last(slot) == -1
    assert not engine._loop._alive


@contextlib.contextmanager
def held(engine: Engine) -> Iterator[None]:
    """What is submitted meanwhile arrives together: no step is computed."""
    go = threading.Event()
    engine._loop.post(go.wait)
    try:
        yield
    finally:
        go.set()


# --- what is asked --------------------------------------------------------------------------------


def test_a_prompt_is_text_tokens_or_messages(engine: Engine) -> None:
    text, messages = "Hello world", [{"role": "user", "content": "Hello"}]
    answers = [
        engine.submit(prompt, max_tokens=5, **GREEDY).result()
        for prompt in (text, engine.encode(text), np.asarray(engine.encode(text)), messages)
    ]
    assert answers[0].tokens == answers[1].tokens == answers[2].tokens
    assert answers[3].finished.prompt_tokens > answers[0].finished.prompt_tokens
    assert engine.detokenize(engine.tokenize(text, add_bos=False)) == text


def test_events_come_in_order_and_make_up_the_result(engine: Engine) -> None:
    events = list(engine.submit("Hello", max_tokens=6, top_logprobs=2, **GREEDY))
    assert [type(event) for event in events] == [PromptScored, *[Token] * 6, Finished]
    result = engine.submit("Hello", max_tokens=6, top_logprobs=2, **GREEDY).result()
    assert result.tokens == [event.token for event in events if isinstance(event, Token)]
    assert all(len(logprob.top) == 2 for logprob in result.logprobs)
    assert [logprob.token for logprob in result.logprobs] == result.tokens
    finished = result.finished
    assert (finished.reason, finished.completion_tokens) == ("length", 6)
    queued, first, total = finished.timings
    assert 0 <= queued < first < total < 60


def test_how_far_a_prompt_is(path: Path) -> None:
    prompt = [3 + i for i in range(50)]
    settings: dict[str, Any] = {"max_tokens": 2, "progress": True, **GREEDY}
    with opened(path, schedule=Schedule(2, 0, 16)) as engine:
        first, again = (list(engine.submit(prompt, **settings)) for _ in range(2))
    told = [[event for event in run if isinstance(event, Progress)] for run in (first, again)]
    assert [event.n_tokens for event in told[0]] == [0, 16, 32, 48, 50]
    assert [event.n_tokens for event in told[1]] == [49, 50]
    assert {event.cached_tokens for event in told[1]} == {49}
    assert told[0] == first[:5]
    assert 0 <= told[0][0].seconds < told[0][4].seconds < 60


def test_an_answer_stops_at_a_text(engine: Engine) -> None:
    whole = engine.submit("Hello", max_tokens=30, **GREEDY).result().text
    stop = whole[10:13]
    result = engine.submit("Hello", max_tokens=30, stop=stop, **GREEDY).result()
    assert result.text == whole[: whole.index(stop)]
    assert (result.finished.reason, result.finished.stop_text) == ("stop", stop)


def test_a_grammar_and_a_schema_hold(engine: Engine) -> None:
    grammar = GBNF(text='root ::= "yes" | "no"')
    assert engine.submit("Is it?", constraint=grammar, seed=1).result().text in ("yes", "no")
    schema = Schema(schema={"type": "array", "items": {"type": "boolean"}, "maxItems": 2})
    text = engine.submit("List:", constraint=schema, seed=1, max_tokens=60).result().text
    assert text.startswith("[")


def test_a_prompt_is_scored_as_its_logits_say(path: Path) -> None:
    """In pieces of 8 rows, and nothing is generated."""
    tape = Tape()
    engine = opened(path, score_rows=8, observer=tape)
    tokens = random_tokens(30)
    result = engine.submit(tokens, max_tokens=0, prompt_logprobs=3).result()
    engine.close()
    assert (result.tokens, result.finished.reason) == ([], "length")
    assert [logprob.token for logprob in result.prompt_logprobs] == tokens[1:]
    assert max(sum(step.columns[3]) for step in tape.steps) == 8
    logits = np.concatenate([step.logits for step in tape.steps]).astype(float)[:-1]
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for row, logprob in zip(expected, result.prompt_logprobs, strict=True):
        assert logprob.logprob == pytest.approx(row[logprob.token], abs=1e-4)
        assert [token for token, _ in logprob.top] == np.argsort(-row)[:3].tolist()


def test_a_sequence_that_fills_its_context_ends(engine: Engine) -> None:
    result = engine.submit(random_tokens(250), **FOR_EVER).result()
    assert result.finished.reason == "context"
    assert result.finished.completion_tokens == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [1] * 257}, "the prompt has 257 tokens but the context holds 256"),
        ({"prompt": [1] * 256}, "the prompt has 256 tokens but the context holds 256"),
        ({"prompt": [100_000]}, "token 100000 is not in this model's vocabulary"),
        ({"max_tokens": -1}, "max_tokens -1 makes no sense"),
        ({"top_logprobs": -1}, "top_logprobs -1 makes no sense"),
        ({"logit_bias": {-5: 1.0}}, "token -5 is not in this model's vocabulary"),
        ({"temp": float("nan")}, "temp must be a finite number"),
        ({"constraint": GBNF(text="root ::= (")}, "grammar"),
    ],
    ids=str,
)
def test_what_cannot_be_computed_is_refused_at_once(
    engine: Engine, settings: dict[str, Any], message: str
) -> None:
    prompt = settings.pop("prompt", "Hello")
    with pytest.raises(RequestError, match=message):
        engine.submit(prompt, **settings)


def test_names_that_are_none(engine: Engine, path: Path) -> None:
    with pytest.raises(TypeError, match="no setting tempp"):
        engine.submit("Hello", tempp=0.5)
    with pytest.raises(TypeError, match="no argument memmory"):
        Engine(path, memmory="1GB")
    with pytest.raises(UserError, match="parallel=1000 is out of range"):
        Engine(path, parallel=1000)


def test_a_failed_opening_leaves_nothing(path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(UserError, match="smallest budget that works"):
        Engine(path, **(SETTINGS | {"memory": "40MB"}))
    assert threading.active_count() == before


# --- conversations --------------------------------------------------------------------------------

HI = [{"role": "user", "content": "Hello"}]


def test_a_conversation_is_written_and_ended_as_its_template_says(engine: Engine) -> None:
    written = engine.templates.apply(HI)
    assert engine.encode(HI) == list(written.tokens)
    plain = engine.submit(HI, max_tokens=12, **GREEDY).result()
    again = engine.submit(written, max_tokens=12, **GREEDY).result()
    assert again.tokens == plain.tokens
    end = next(letter for letter in plain.text if letter.isalpha())
    ended = replace(written, stops=(end,))
    cut = engine.submit(ended, max_tokens=12, stop="not in it", **GREEDY).result()
    assert (cut.finished.reason, cut.finished.stop_text) == ("stop", end)
    control = engine.submit([engine.vocabulary.eos], max_tokens=0).result()
    assert control.text == ""
    bias = {engine.vocabulary.bos: 1000.0}
    shown = replace(written, preserved=frozenset(bias))
    for prompt, text in ((written, ""), (shown, engine.detokenize(list(bias), special=True) * 2)):
        assert engine.submit(prompt, max_tokens=2, logit_bias=bias, **GREEDY).result().text == text


def test_children_have_their_room_in_the_budget(path: Path) -> None:
    process = psutil.Process()
    before = set(process.children())
    with opened(path) as engine:
        assert engine.arena.budget.needs.beside == CHILDREN_BYTES
        assert set(process.children()) == before  # none before the first conversation
        prompt = engine.templates.apply([{"role": "user", "content": "Hello " * 20_000}])
        engine.templates.parser(prompt).finish("Hello")
        children = set(process.children()) - before
        assert len(children) == 2
        assert sum(child.memory_info().rss for child in children) <= CHILDREN_BYTES
    assert set(process.children()) == before
    with opened(path, chat=False) as engine:
        assert engine.arena.budget.needs.beside == 0
        assert engine.submit("Hello", max_tokens=1).result().tokens
        with pytest.raises(RequestError, match="no room for conversations: open it with chat"):
            engine.submit(HI)


# --- several callers ------------------------------------------------------------------------------


def test_requests_from_many_threads(engine: Engine) -> None:
    def ask(i: int) -> list[int]:
        return list(engine.submit(random_tokens(5, seed=i), max_tokens=8, **GREEDY).result().tokens)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(24)))
    assert all(len(answer) == 8 for answer in answers)
    assert engine.stats()["requests"]["running"] == 0


def test_requests_from_asyncio(engine: Engine) -> None:
    async def ask(i: int) -> int:
        generation = engine.submit(random_tokens(5, seed=i), max_tokens=8, **GREEDY)
        if i % 2:
            return len((await generation.wait()).tokens)
        return len([event async for event in generation if isinstance(event, Token)])

    async def ask_all() -> list[int]:
        return await asyncio.gather(*map(ask, range(8)))

    assert asyncio.run(ask_all()) == [8] * 8


def test_a_wait_in_asyncio_that_is_given_up(engine: Engine) -> None:
    """Neither the loop that closes nor the future that is cancelled disturbs who computes."""

    async def impatient() -> Generation:
        generation = engine.submit("Hello", **FOR_EVER)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(generation.wait(), 0.01)
        left_behind.append(asyncio.ensure_future(generation.wait()))  # when the loop closes
        await asyncio.sleep(0)
        return generation

    left_behind: list[Any] = []
    generation = asyncio.run(impatient())
    generation.cancel()
    with pytest.raises(Cancelled):
        generation.result()
    assert len(engine.submit("Hello", max_tokens=3, **GREEDY).result().tokens) == 3


def test_a_request_of_higher_priority_goes_first(path: Path) -> None:
    with opened(path, parallel=1) as engine:
        with held(engine):
            requests = [engine.submit("Hello", max_tokens=20, priority=i, **GREEDY) for i in (0, 1)]
        ends = [request.result().finished.timings.total_s for request in requests]
        assert ends[1] < ends[0]


# --- cancelling and closing -----------------------------------------------------------------------


def test_cancelling_frees_a_sequence_within_a_step(path: Path) -> None:
    cancelled_at: list[int] = []
    tape = Tape()

    def cancel(step: int) -> None:
        if step == 5:
            generation.cancel()
            cancelled_at.append(step)

    with opened(path, observer=tape) as engine:
        with held(engine):
            generation = engine.submit("Hello", **FOR_EVER)
            waiting = engine.submit("Hello", **FOR_EVER, priority=-1)
            tape.on_step = cancel
        with pytest.raises(Cancelled):
            generation.result()
        assert len(list(itertools.islice(waiting, 3))) == 3
        waiting.cancel()
        with pytest.raises(Cancelled):
            waiting.result()
        assert len([s for s in tape.steps if 0 in s.columns[2]]) == 5
        idle(engine)
        check(engine)
        assert engine.stats()["requests"]["cancelled"] == 2


def idle(engine: Engine) -> None:
    """Wait until everything posted so far is done."""
    engine._loop.post(lambda: None).result(10)


def test_leaving_the_with_statement_cancels(engine: Engine) -> None:
    with engine.submit("Hello", **FOR_EVER) as generation:
        next(generation)
    with pytest.raises(Cancelled):
        generation.result()
    finished = engine.submit("Hello", max_tokens=1, **GREEDY)
    finished.result()
    finished.cancel()  # too late, and no harm
    assert len(finished.result().tokens) == 1


def test_closing_ends_every_wait(path: Path) -> None:
    engine = opened(path, parallel=2)
    requests = [engine.submit("Hello", **FOR_EVER) for _ in range(5)]
    next(requests[0])
    errors: list[BaseException] = []

    def wait(request: Generation) -> None:
        try:
            request.result()
        except EngineClosed as error:
            errors.append(error)

    threads = [threading.Thread(target=wait, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    engine.close()
    engine.close()
    for thread in threads:
        thread.join(10)
    assert len(errors) == 5
    for use in (engine.submit, engine.tokenize, engine.encode, lambda _: engine.stats()):
        with pytest.raises(EngineClosed, match="the engine is closed"):
            use("Hello")


def test_an_engine_nobody_refers_to_is_closed(path: Path) -> None:
    before = threading.active_count()
    engine = opened(path)
    kept = engine.submit("Hello", max_tokens=20, **GREEDY)
    del engine
    gc.collect()
    assert len(kept.result().tokens) == 20, "it lives as long as someone reads"
    del kept
    opened(path).submit("Hello", max_tokens=20, **GREEDY)  # nobody reads: it ends by itself
    gc.collect()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


EXIT = """
import sys, moe_gguf
engine = moe_gguf.Engine(sys.argv[1], memory="1GB", n_ctx=256, n_threads=1, parallel=4)
requests = [engine.submit("Hello", max_tokens=None, ignore_eos=True) for _ in range(6)]
print(next(requests[0]) is not None, flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["", "sys.exit(3)"])
def test_the_interpreter_ends_while_it_computes(end: str, path: Path) -> None:
    code = EXIT.format(end=end)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "True\n"
    assert done.returncode == (3 if end else 0)
    assert done.stderr == ""


def test_a_forked_child_is_told_and_ends(path: Path) -> None:
    with opened(path) as engine:
        running = engine.submit("Hello", **FOR_EVER)
        next(running)
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)
            refused = 0
            for use in (lambda: engine.submit("Hello"), running.result):
                try:
                    use()
                except UserError as error:
                    refused += "does not survive a fork" in str(error)
            engine.close()
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
        running.cancel()
        assert len(engine.submit("Hello", max_tokens=3, **GREEDY).result().tokens) == 3


# --- failures -------------------------------------------------------------------------------------


def test_a_failed_read_fails_the_sequences_of_its_step(path: Path) -> None:
    with opened(path, schedule=Schedule(2), policy="load-on-demand") as engine:
        with held(engine):
            requests = [engine.submit("Hello", max_tokens=6, **GREEDY) for _ in range(3)]
            engine.arena.plugin.inject(3, errno.EIO)
        for request in requests[:2]:  # the third waits for its turn
            with pytest.raises(ExpertReadError, match=path.name):
                request.result()
        answer = requests[2].result()
        assert len(answer.tokens) == 6
        idle(engine)
        check(engine)
        assert engine.submit("Hello", max_tokens=6, **GREEDY).result().tokens == answer.tokens
        assert engine.stats()["requests"]["failed"] == 2


def test_llama_cpp_may_remark_on_a_step_while_another_thread_captures(path: Path) -> None:
    """A capture's callback was once freed while llama.cpp was in it, which ended the process."""
    with opened(path, policy="load-on-demand") as engine:
        captured: list[str] = []
        for _ in range(20):
            engine.arena.plugin.inject(0, errno.EIO)
            failing = engine.submit("Hello", max_tokens=4, **GREEDY)
            while not failing.done:
                with logs.capture() as log:
                    pass
                captured += [text for _, text in log.lines]
            with pytest.raises(ExpertReadError):
                failing.result()
        assert captured == [], "and what it says belongs to its own thread"


def test_an_exception_in_a_policy_fails_its_step_only(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(path) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine.arena.controller.residency, "plan", lambda event: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.submit("Hello", **GREEDY).result()
        assert len(engine.submit("Hello", max_tokens=3, **GREEDY).result().tokens) == 3


def test_a_defect_of_the_engine_s_own_leaves_nobody_waiting(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(path)
    monkeypatch.setattr(engine._loop.scheduler, "next", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.submit("Hello").result()
    with pytest.raises(ZeroDivisionError):
        engine.submit("Hello")
    engine.close()


def test_who_gives_way_does_not_notice(path: Path) -> None:
    """In a pool for two and a half of four, every answer is complete and nobody hears of it."""
    with opened(path, cells=256) as engine:
        with held(engine):
            requests = [
                engine.submit(random_tokens(40, seed=i), max_tokens=60, prompt_logprobs=0, **GREEDY)
                for i in range(4)
            ]
        for request in requests:
            events = list(request)
            assert [type(e) for e in events] == [PromptScored, *[Token] * 60, Finished]
            assert len(events[0].logprobs) == 39
        assert engine.stats()["requests"]["preempted"] > 0


def test_left_to_itself_sequences_take_turns_in_the_memory_of_one(path: Path) -> None:
    with opened(path, parallel="auto") as engine:
        assert engine.stats()["requests"]["cells"] == 256
        requests = [engine.submit("Hello", max_tokens=20, **GREEDY) for _ in range(6)]
        assert {len(request.result().tokens) for request in requests} == {20}
        decode = engine.stats()["phases"]["decode"]
        assert decode["sequences"] == decode["steps"] > 0


# --- anything, for long ---------------------------------------------------------------------------


def test_random_operations_leak_nothing(path: Path) -> None:
    rng = random.Random(7)
    threads, sizes = threading.active_count(), []
    engine = opened(path, cells=512)
    requests: list[Generation] = []
    for i in range(OPERATIONS):
        operation = rng.random()
        if operation < 0.45:
            requests.append(submit_any(engine, rng))
        elif operation < 0.65 and requests:
            rng.choice(requests).cancel()
        elif operation < 0.70:
            engine.arena.plugin.inject(rng.randrange(20), rng.choice([errno.EIO, 0]))
        elif operation < 0.71 and i > 10:
            engine.close()
            engine = opened(path, cells=512)
        elif requests:
            wait(requests.pop(rng.randrange(len(requests))))
        while len(requests) > 20 or (requests and i in (OPERATIONS // 2, OPERATIONS - 1)):
            wait(requests.pop(0))
        if i in (OPERATIONS // 2, OPERATIONS - 1):
            gc.collect()
            sizes.append(psutil.Process().memory_info().rss)
    for request in requests:
        wait(request)
    idle(engine)
    check(engine)
    residency = engine.arena.controller.residency
    residency.check_integrity()
    assert len(residency.free) + len(residency.slot_of) == residency.n_slots
    assert engine._model.meter.sequences == {}
    engine.close()
    assert threading.active_count() == threads
    assert sizes[1] - sizes[0] < 20 * MB


def submit_any(engine: Engine, rng: random.Random) -> Generation:
    return engine.submit(
        random_tokens(rng.randrange(1, 120), seed=rng.randrange(1000)),
        max_tokens=rng.choice([0, 1, 5, 20, None]),
        prompt_logprobs=rng.choice([None, None, 0, 2]),
        top_logprobs=rng.choice([None, 1]),
        priority=rng.randrange(3),
        temp=rng.choice([0.0, 1.0]),
        seed=1,
        stop=rng.choice([(), ("e",)]),
        constraint=rng.choice([None, None, GBNF(text='root ::= "a"* "b"')]),
    )


def wait(request: Generation) -> None:
    with contextlib.suppress(Cancelled, ExpertReadError, EngineClosed):
        request.result()
