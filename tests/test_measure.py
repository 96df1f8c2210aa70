"""What is measured of a model on this machine. What a pass proves:

1. A child measures a real model within the budget, and what it says is plausible and makes a plan.
2. It is remembered by what decides over it, and a damaged file counts as none.
3. Replayed routes need and read what counting by hand says.
4. A few simulated loads tell what a context of any size takes.
5. An engine that is given a goal opens and schedules by its plan.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TinyFile, ZooFile
from test_planner import issue_machine

from moe_gguf import Engine
from moe_gguf.runtime import cache, opening
from moe_gguf.runtime.cli.main import cli
from moe_gguf.runtime.engine import measure, planning
from moe_gguf.runtime.engine.measurements import Measurements, place, recall, remember
from moe_gguf.runtime.engine.model import context_shape
from moe_gguf.runtime.engine.planner import Workload
from moe_gguf.runtime.engine.request import Cancelled
from moe_gguf.runtime.engine.reuse import _distinct, reuse
from moe_gguf.runtime.engine.room import room, simulated
from moe_gguf.runtime.engine.schedule import Schedule
from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.opening import Found
from moe_gguf.runtime.options import Options
from moe_gguf.runtime.sizes import MB

MEMORY = 800 * MB


def found_at(path: Path, **options: Any) -> Found:
    return opening.find(path, Options(**{"memory": MEMORY, "reads": "buffered", **options}))


# --- what is remembered -------------------------------------------------------------------------


def test_what_was_measured_is_remembered_for_this_model_and_these_threads(
    tiny_file: TinyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = issue_machine()
    found = found_at(tiny_file("qwen3moe"))
    monkeypatch.setattr(cache, "_chosen", tmp_path)  # nobody else has measured here
    here = place(found, 1)
    assert here is not None
    remember(here, taken)
    assert recall(place(found, 1)) == taken == planning.known(found, 1)
    others = [
        place(found, 2),
        place(found_at(tiny_file("qwen3moe"), policy="lru"), 1),
        place(found_at(tiny_file("mixtral")), 1),
    ]
    assert [recall(other) for other in others] == [None] * 3
    assert recall(None) is None


def test_what_was_measured_on_a_busy_machine_is_believed_for_an_hour_only(
    tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, calm = found_at(tiny_file("qwen3moe")), issue_machine()
    busy = replace(calm, calm=False)
    monkeypatch.setattr(measure, "measure", lambda *_: calm)
    here = place(found, 1)
    assert here is not None
    try:
        remember(here, busy)
        assert measure.measured(found, 1) == busy
        os.utime(here, (time.time() - 4000,) * 2)
        assert measure.measured(found, 1) == calm
        os.utime(here, (0, 0))
        monkeypatch.setattr(measure, "measure", None)  # nothing is measured again
        assert measure.measured(found, 1) == calm
    finally:
        here.unlink()


def test_damaged_measurements_count_as_none(tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    good = json.loads(issue_machine().to_json())
    damaged: list[Any] = [
        {},
        [],
        {**good, "protocol": 0},
        {**good, "decode": []},
        {**good, "decode": good["decode"][::-1]},
        {**good, "decode": [[1, 2]]},
        {**good, "disk_bytes_per_s": 0.0},
        {**good, "took_s": float("nan")},
        {**good, "read_cost_s": "much"},
        {**good, "more": 1},
        {**good, "calm": 1},
        {**good, "reuse": [[2, 4], *good["reuse"][1:]]},
        {**good, "reuse": [*good["reuse"][:4], [1.0]]},
    ]
    file.write_text(json.dumps(good))
    assert recall(file) == issue_machine()
    for value in damaged:
        file.write_text(json.dumps(value))
        assert recall(file) is None, value
    file.write_text(json.dumps(good)[:-9])
    assert recall(file) is None
    file.write_bytes(b"\xff\xfe")
    assert recall(file) is None


def test_nowhere_to_remember_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    remember(tmp_path / "file" / "m.json", issue_machine())
    remember(None, issue_machine())


# --- routes -------------------------------------------------------------------------------------


def test_experts_needed_by_a_group_are_those_of_tokens_drawn_at_random() -> None:
    # Of 4 tokens two use expert 0, one expert 1, one expert 2. Two drawn at random need of expert 0
    # 1 - 1/6, of the others 1/2 each.
    routes = np.array([[[0], [0], [1], [2]]], np.int32)
    assert _distinct(routes, 4, 1) == pytest.approx(1)
    assert _distinct(routes, 4, 2) == pytest.approx(5 / 6 + 1 / 2 + 1 / 2)
    assert _distinct(routes, 4, 4) == pytest.approx(3)


def test_replayed_streams_read_less_with_more_slots_and_nothing_that_stays() -> None:
    rng = np.random.default_rng(1)
    popular = rng.permutation(16)[:6]
    routes = np.stack(
        [[rng.choice(popular, 2, replace=False) for _ in range(64)] for _ in range(3)]
    ).astype(np.int32)
    for name in ("fate", "lru"):
        told = reuse(routes, 16, name)
        assert told.groups == (1, 2, 4, 8, 16, 32)
        assert told.distinct[0] == 2
        assert max(told.distinct) <= 6
        by_share = np.array(told.reads)
        assert (by_share[:, -1] == 0).all()  # 12.8 slots per layer hold all six
        assert by_share[0, 0] == 2  # less than one slot per layer keeps nothing
        assert (np.diff(by_share[0]) <= 0).all()


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3moe", "gpt-oss"])
def test_a_context_of_any_size_takes_what_a_few_loads_foretell(
    tiny_file: TinyFile, name: str
) -> None:
    found = found_at(tiny_file(name))
    told = room(found, 1)
    for sequences, cells, chunk, outputs in ((1, 2048, 256, 1), (24, 8192, 128, 64)):
        shape = context_shape(
            cells, sequences, cells=cells, chunk=chunk, score_rows=outputs, n_threads=1
        )
        real = simulated(found, shape).needs.total
        rows = chunk + (sequences if sequences > 1 else 0)
        foretold = told.bytes(sequences, cells, rows, max(sequences, outputs))
        assert foretold == pytest.approx(real, abs=8 * MB)  # the process itself varies by some


# --- measuring ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taken(tiny_file: TinyFile) -> Measurements:
    return measure.measure(found_at(tiny_file("qwen3moe")), 1, seconds=0.5)


def test_a_child_measures_a_model(taken: Measurements) -> None:
    assert [size.rows for size in taken.decode][:3] == [1, 2, 4]
    assert all(size.expert_s > 0 and size.other_s > 0 for size in taken.decode)
    assert taken.decode[0].distinct == pytest.approx(4, abs=0.01)  # of 16, and no two alike
    assert taken.decode[-1].distinct > 8
    assert taken.reuse.distinct[0] == pytest.approx(4)
    assert 0 < taken.share <= 1
    assert Measurements.from_json(taken.to_json()) == taken


def test_measurements_of_a_real_model_make_a_plan(
    taken: Measurements, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "measure", lambda *_: taken)
    found = found_at(tiny_file("qwen3moe"))
    here = place(found, 1)
    assert here is not None
    try:
        made = planning.planned(found, "throughput", n_ctx=512, n_threads=1, parallel=4)
        assert planning.known(found, 1) == taken
    finally:
        here.unlink(missing_ok=True)
    assert made.n_seq_max == 4
    assert made.n_slots == found.n_all  # a tiny model has room for all its experts
    assert made.predicted.stall_share == 0
    assert json.loads(json.dumps(planning.document(made)))["parallel"] == 4
    assert planning.lines(made)[0].startswith("schedule for throughput: 4 at once")
    assert all(len(line) < 130 for line in planning.lines(made)[1:])


@pytest.mark.parametrize("name", ["qwen3next", "deepseek2"])
def test_models_with_other_memories_are_measured_too(zoo_file: ZooFile, name: str) -> None:
    told = measure.measure(found_at(zoo_file(name)), 1, seconds=0.2)
    assert told.decode[0].rows == 1


def test_a_budget_too_small_to_measure_in_is_told_as_one(tiny_file: TinyFile) -> None:
    with pytest.raises(UserError, match=r"too little .*\(while measuring this model, beside .*MB"):
        measure.measure(found_at(tiny_file("qwen3moe"), memory=60 * MB), 1)


def test_a_model_that_was_never_measured_gets_no_schedule(
    tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "known", lambda *_: None)
    cli.main(["plan", str(tiny_file("qwen3moe")), "--memory", "800MB"], standalone_mode=False)
    assert "schedule of several sequences: not measured" in capsys.readouterr().out


def test_plan_prints_the_schedule_of_a_measured_model(
    tiny_file: TinyFile,
    taken: Measurements,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(measure, "measured", lambda *_: taken)
    monkeypatch.setattr(planning, "known", lambda *_: taken)
    arguments = ["plan", str(tiny_file("qwen3moe")), "--memory", "800MB", "--parallel", "8"]
    cli.main(arguments, standalone_mode=False)
    assert "schedule for latency: 8 at once" in capsys.readouterr().out
    cli.main([*arguments, "--goal", "throughput", "--json"], standalone_mode=False)
    document = json.loads(capsys.readouterr().out)
    assert document["schedule"]["goal"] == "throughput"
    assert document["schedule"]["parallel"] == 8
    assert [p["sequences"] for p in document["schedule"]["curve"]] == [1, 2, 4, 8]


# --- the engine ---------------------------------------------------------------------------------


def test_an_engine_with_a_goal_is_opened_by_its_plan(
    tiny_file: TinyFile, taken: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "measured", lambda *_: taken)
    settings: dict[str, Any] = {"memory": MEMORY, "reads": "buffered", "n_threads": 1, "n_ctx": 256}
    path = tiny_file("qwen3moe")
    with Engine(path, goal="throughput", workload=Workload(16, 16, most=8), **settings) as engine:
        plan = engine.plan
        assert plan is not None
        assert 1 < plan.n_seq_max <= 8
        assert engine.stats()["requests"]["cells"] == plan.cells
        asked = [engine.submit([5, i], max_tokens=8, ignore_eos=True) for i in range(10)]
        assert [generation.result().finished.completion_tokens for generation in asked] == [8] * 10
    with Engine(path, goal="latency", parallel=1, **settings) as engine:
        assert engine.plan is None  # one sequence needs none, and pays for none


def test_the_schedule_follows_the_number_of_sequences(tiny_file: TinyFile) -> None:
    alone, together = Schedule(1, 4), Schedule(4, 0)
    with Engine(tiny_file("qwen3moe"), memory=MEMORY, n_threads=1, n_ctx=256, parallel=4) as engine:
        loop = engine._loop
        loop._plan = lambda active: together if active > 2 else alone
        asked = [engine.submit([5, i], ignore_eos=True, temp=0.0) for i in range(3)]
        next(iter(asked[2]))
        assert loop.scheduler.schedule == together
        asked[0].cancel()
        with pytest.raises(Cancelled):
            asked[0].result()
        assert loop.scheduler.schedule == alone
        assert len(asked[1].result().tokens) > 200  # to the end of its context, in turns
