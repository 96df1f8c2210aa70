"""The gate of the Engine: what it decodes, stock llama.cpp decodes alike, to the last bit.

Output in a batch is not output alone, in stock llama.cpp neither: other kernels compute other
numbers of rows. So the batches that an engine decodes are recorded, with what it does to the memory
between them, and repeated on stock with the same context parameters and threads. A pass proves
equal logits in every step,

 1  for any arrivals, lengths, priorities, cancels, failed reads, groups, quanta, chunks, pools and
    slots, under every policy, for each kind of memory, with starts that are shared, kept, copied
    out and restored
 2  that the machinery ran: mixed steps, turns, preemption, scoring in pieces, one graph per step
 3  that a request alone gets what ``moe_gguf.Llama`` gives it with the same parameters
 4  alone against in a batch: as often equal as with stock
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import TinyFile, ZooFile
from harness import Logits, Stock, fix_slots, random_tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tape import Decoded, Tape, check, replay

import moe_gguf
from moe_gguf import Engine
from moe_gguf.policies import POLICIES
from moe_gguf.policies.base import Phase
from moe_gguf.runtime.engine.generation import Generation
from moe_gguf.runtime.engine.model import context_shape
from moe_gguf.runtime.engine.request import Cancelled
from moe_gguf.runtime.engine.schedule import Schedule

EXAMPLES = int(os.environ.get("ENGINE_EXAMPLES", "4"))
# One architecture for each kind of memory.
KINDS = {
    "plain": "qwen3moe",
    "window": "gpt-oss",
    "latent": "deepseek2",
    "hybrid": "qwen3next",
    "mamba": "granitehybrid",
    "compressed": "deepseek4",
}
N_CTX = 256

Models = Callable[..., tuple[Path, Stock]]


@pytest.fixture(scope="module")
def models(tiny_file: TinyFile, zoo_file: ZooFile) -> Iterator[Models]:
    """The file of a kind's model, and stock's model of it, its weights repacked or not; opened
    once."""
    opened: dict[tuple[str, bool], tuple[Path, Stock]] = {}

    def get(kind: str, repack: bool = False) -> tuple[Path, Stock]:
        if (kind, repack) not in opened:
            name = KINDS[kind]
            path = (tiny_file if kind in ("plain", "window", "latent") else zoo_file)(name)
            opened[kind, repack] = path, Stock(path, repack=repack)
        return opened[kind, repack]

    yield get
    for _, stock in opened.values():
        stock.close()


@dataclass
class Asked:
    """A request and when things happen to it, counted in steps."""

    n_prompt: int
    max_tokens: int
    arrives: int = 0
    cancelled: int | None = None
    priority: int = 0
    scored: bool = False
    temp: float = 0.0
    shared: int = 0  # tokens that it begins with as others do
    owner: str = ""
    generation: Generation | None = None


@dataclass
class Play:
    """An engine's settings and what is asked of it."""

    requests: list[Asked]
    parallel: int = 4
    group: int = 4
    quantum: int = 0
    chunk: int = 64
    cells: int | None = None
    n_slots: int = 14
    policy: str = "lru"
    score_rows: int = 8
    repack: bool = False
    kept: int = 1 << 20  # bytes of past sequences outside the context
    fails: int | None = None  # the step whose next read fails
    tape: Tape = field(default_factory=Tape)

    @property
    def schedule(self) -> Schedule:
        return Schedule(min(self.group, self.parallel), self.quantum, self.chunk)

    def params(self) -> Any:
        shape = context_shape(
            N_CTX,
            self.parallel,
            cells=self.cells,
            chunk=self.chunk,
            score_rows=self.score_rows,
            n_threads=1,
        )
        return shape.params()


@contextmanager
def engine_of(path: Path, play: Play) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        fix_slots(patch, play.n_slots)
        engine = Engine(
            path,
            memory="1GB",
            reads="buffered",
            lanes=2,
            policy=play.policy,
            repack="on" if play.repack else "off",
            n_ctx=N_CTX,
            parallel=play.parallel,
            cells=play.cells,
            schedule=play.schedule,
            score_rows=play.score_rows,
            n_threads=1,
            kept=play.kept,
            observer=play.tape,
        )
    try:
        yield engine
    finally:
        engine.close()


def perform(path: Path, play: Play) -> dict[str, Any]:
    """Have an engine do all this; the statistics it ends with."""
    with engine_of(path, play) as engine:

        def act(step: int) -> None:
            """In the engine's thread, between two steps."""
            for i, asked in enumerate(play.requests):
                if asked.arrives <= step and asked.generation is None:
                    asked.generation = submit(engine, asked, i)
                if asked.cancelled == step and asked.generation is not None:
                    asked.generation.cancel()
            if play.fails == step:
                engine.arena.plugin.inject(0, errno.EIO)

        play.tape.on_step = act
        while pending := [a for a in play.requests if a.generation is None]:
            step = min(a.arrives for a in pending)  # what should come after the last step comes now
            engine._loop.post(lambda step=step: act(step)).result()
            for asked in play.requests:
                wait(asked)
        for asked in play.requests:  # and those that came while others were waited for
            wait(asked)
        stats = engine.stats() | {"events": engine.arena.plugin.stats().events}
        engine._loop.scheduler.check_integrity()
        engine._loop.states.check_integrity()
        assert not engine._loop.scheduler.running
        return stats


def submit(engine: Engine, asked: Asked, i: int) -> Generation:
    return engine.submit(
        random_tokens(asked.shared, seed=99) + random_tokens(asked.n_prompt, seed=i + 1),
        owner=asked.owner,
        max_tokens=asked.max_tokens,
        priority=asked.priority,
        prompt_logprobs=1 if asked.scored else None,
        temp=asked.temp,
        seed=i,
        ignore_eos=True,
    )


def wait(asked: Asked) -> None:
    with contextlib.suppress(Cancelled, moe_gguf.ExpertReadError):
        if asked.generation is not None:
            asked.generation.result()


# --- 1: anything --------------------------------------------------------------------------------


@st.composite
def plays(draw: st.DrawFn) -> Play:
    requests = draw(
        st.lists(
            st.builds(
                Asked,
                n_prompt=st.integers(1, 100),
                max_tokens=st.integers(0, 12),
                arrives=st.integers(0, 12),
                cancelled=st.none() | st.integers(0, 25),
                priority=st.integers(0, 1),
                scored=st.booleans(),
                temp=st.sampled_from([0.0, 1.0]),
                shared=st.sampled_from([0, 40, 90]),
                owner=st.sampled_from(["", "", "another"]),
            ),
            min_size=1,
            max_size=7,
        )
    )
    parallel = draw(st.integers(1, 5))
    return Play(
        requests,
        parallel=parallel,
        group=draw(st.integers(1, parallel)),
        quantum=draw(st.sampled_from([0, 0, 1, 3])),
        chunk=draw(st.sampled_from([1, 7, 32, 64, 200])),
        cells=draw(st.sampled_from([None, None, 256])),
        n_slots=draw(st.sampled_from([4, 14, 40])),
        policy=draw(st.sampled_from(sorted(POLICIES))),
        repack=draw(st.booleans()),
        score_rows=draw(st.sampled_from([1, 8])),
        kept=draw(st.sampled_from([0, 60_000, 1 << 20])),
        fails=draw(st.none() | st.integers(1, 15)),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_1_whatever_is_asked_stock_computes_alike(kind: str, models: Models) -> None:
    path, _ = models(kind)

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(plays())
    def gate(play: Play) -> None:
        perform(path, play)
        check(play.tape, models(kind, play.repack)[1].model, play.params())

    gate()


# --- 2: that it is about something ----------------------------------------------------------------


def busy(**settings: Any) -> Play:
    """Long and short requests, some scored, that come one after another."""
    requests = [
        Asked(n_prompt=20 + 9 * i, max_tokens=40, arrives=2 * i, scored=i % 3 == 0)
        for i in range(7)
    ]
    return Play(requests, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_2_what_the_gate_is_about_happens(kind: str, models: Models) -> None:
    path, stock = models(kind)
    play = busy(group=2, quantum=3, chunk=32, cells=256)
    stats = perform(path, play)
    check(play.tape, stock.model, play.params())
    phases = Counter(step.phase for step in play.tape.steps)
    assert phases[Phase.DECODE] and phases[Phase.PREFILL]
    equal = kind in ("hybrid", "mamba", "compressed")
    assert (phases[Phase.MIXED] == 0) == equal
    decoding = [set(s.columns[2]) for s in play.tape.steps if s.phase == Phase.DECODE]
    assert max(map(len, decoding)) == 2
    assert len(set.union(*decoding)) > 2, "nobody but the first two had a turn"
    assert stats["requests"]["preempted"] > 0
    assert any(8 > sum(s.columns[3]) > 2 for s in play.tape.steps), "no prompt was scored in pieces"
    assert stats["misses"] > play.n_slots
    n_layers = len(stats["layers"])
    computed = [s for s in play.tape.steps if s.code == 0]
    most = n_layers * len(computed)
    silent = sum(not any(s.columns[3]) for s in computed)  # the last layer may compute nothing
    # A compressed memory takes sequences together only where their numbers follow on each other.
    assert most - silent <= stats["events"] <= most or kind == "compressed", "more than one graph"


# --- 3: alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_3_alone_it_gets_what_llama_gives(
    kind: str, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = models(kind)
    prompt, n = random_tokens(70), 16
    play = Play([], parallel=1, group=1, chunk=64)
    with engine_of(path, play) as engine:
        ours = engine.submit(prompt, max_tokens=n, temp=0.0).result()
    fix_slots(monkeypatch, play.n_slots)
    llama = moe_gguf.Llama(
        path,
        memory="1GB",
        repack="off",
        n_ctx=N_CTX,
        n_batch=64,
        flash_attn=True,
        swa_full=False,
        n_threads=1,
    )
    tokens = list(itertools.islice(llama.generate(prompt, temp=0.0), n))
    ends = [i for i, token in enumerate(tokens) if llama._vocabulary.ends(token)]
    llama.close()
    assert ours.tokens == tokens[: min(ends, default=n)]


# --- 4: alone and in a batch ----------------------------------------------------------------------


def test_4_alone_and_in_a_batch_agree_as_often_as_in_stock(models: Models) -> None:
    path, stock = models("plain")
    requests = [(random_tokens(10 + 7 * i, seed=i), 12) for i in range(4)]
    alone, together = Play([], n_slots=40), Play([], n_slots=40)
    with engine_of(path, alone) as engine:
        for tokens, n in requests:
            engine.submit(tokens, max_tokens=n, temp=0.0, ignore_eos=True).result()
    with engine_of(path, together) as engine:

        def begin() -> list[Generation]:
            return [
                engine.submit(tokens, max_tokens=n, temp=0.0, ignore_eos=True)
                for tokens, n in requests
            ]

        for generation in engine._loop.post(begin).result():
            generation.result()
    ours = agreement(alone.tape.steps, together.tape.steps, [len(t) for t, _ in requests])
    replayed = [replay(play.tape, stock.model, play.params()) for play in (alone, together)]
    assert ours == agreement(*replayed, [len(t) for t, _ in requests])
    print(f"alone against together: {ours.bits:.0%} of the logits, {ours.tokens:.0%} of the tokens")
    assert ours.tokens > 0


class Agreement(NamedTuple):
    """Shares of tokens: chosen from the same logits to the last bit, and chosen alike."""

    bits: float
    tokens: float


def agreement(alone: list[Decoded], together: list[Decoded], prompts: list[int]) -> Agreement:
    """Token by token, by place. Alone, one request came after another."""
    rows = [row for slot in by_token(alone).values() for row in slot]
    others = by_token(together)
    bits, tokens = [], []
    for i, n_prompt in enumerate(prompts):
        for pos, logits in others[i]:
            its_pos, its = rows.pop(0)
            assert pos == its_pos >= n_prompt - 1
            bits.append(np.array_equal(logits, its))
            tokens.append(logits.argmax() == its.argmax())
    return Agreement(float(np.mean(bits)), float(np.mean(tokens)))


def by_token(steps: list[Decoded]) -> dict[int, list[tuple[int, Logits]]]:
    """By slot: position and logits of every row that wanted them, in order."""
    found: dict[int, list[tuple[int, Logits]]] = {}
    for step in steps:
        assert step.logits is not None
        rows = [row for row in zip(*step.columns, strict=True) if row[3]]
        for (_, pos, seq, _), logits in zip(rows, step.logits, strict=True):
            found.setdefault(seq, []).append((pos, logits))
    return found
