"""The timeline: what the plugin records, and what becomes of it in a trace file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyFile
from harness import fix_slots, ours, rows

from moe_gguf.policies.base import Phase
from moe_gguf.runtime import timeline
from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.llama import Llama
from moe_gguf.runtime.plugin import abi
from moe_gguf.runtime.plugin.abi import Event
from moe_gguf.runtime.stats import Step
from moe_gguf.runtime.timeline import trace


def test_nothing_is_recorded_unless_asked(tiny_file: TinyFile) -> None:
    with ours(tiny_file("qwen3moe")) as model:
        model.context().decode(rows([1, 2, 3]))
        assert model.arena.plugin.timeline_read(100) == []


def test_the_ring_keeps_the_newest(tiny_file: TinyFile) -> None:
    with ours(tiny_file("qwen3moe"), 8) as model:
        recorded = model.arena.plugin
        context = model.context()
        recorded.timeline(5)
        context.decode(rows([1]))
        context.decode(rows([2], pos=1))
        kept = recorded.timeline_read(100)
        assert len(kept) == 5
        last_layer = model.found.layout.layers[-1].layer
        assert (kept[-1].kind, kept[-1].key) == (abi.EVENT_LAYER, last_layer)
        assert recorded.timeline_read(100) == []
        recorded.timeline(0)
        context.decode(rows([3], pos=2))
        assert recorded.timeline_read(100) == []


def test_events_agree_with_the_counters(tiny_file: TinyFile) -> None:
    with ours(tiny_file("qwen3moe"), 8) as model:
        context = model.context()
        context.decode(rows([1, 2, 3]))
        model.reset_stats()
        model.arena.plugin.timeline(10_000)
        context.decode(rows([4], pos=3))
        events = model.arena.plugin.timeline_read(10_000)
        stats = model.stats()
        count = {kind: sum(e.kind == kind for e in events) for kind in range(7)}
        assert count[abi.EVENT_LAYER] == count[abi.EVENT_ROUTE] == stats.events
        assert count[abi.EVENT_DEMAND] == stats.reads > 0
        assert count[abi.EVENT_GUESS] == 0
        for kind, total in (
            (abi.EVENT_ROUTE, stats.route_ns),
            (abi.EVENT_STALL, stats.stall_ns),
            (abi.EVENT_COMPUTE, stats.compute_ns),
        ):
            seen = sum(e.end_ns - e.start_ns for e in events if e.kind == kind)
            assert total <= seen <= total + 50_000 * max(1, count[kind])
        assert {e.lane for e in events if e.kind == abi.EVENT_DEMAND} <= {0, 1}
        assert all(e.start_ns <= e.end_ns for e in events)


def event(kind: int, start: int, end: int, key: int = 0, lane: int = -1) -> Event:
    return Event(kind, lane, key, 0, start * 1000, end * 1000)


def test_trace_by_hand() -> None:
    """Two layers of a step from 100 to 200 µs, and a guess that began before it."""
    events = [
        event(abi.EVENT_ROUTE, 111, 113, 0),
        event(abi.EVENT_DEMAND, 113, 130, 7, lane=1),
        event(abi.EVENT_STALL, 115, 130, 0),
        event(abi.EVENT_COMPUTE, 130, 138, 0),
        event(abi.EVENT_LAYER, 110, 140, 0),
        event(abi.EVENT_GUESS, 90, 112, 33, lane=0),
        event(abi.EVENT_LAYER, 150, 190, 1),
        event(abi.EVENT_COMPUTE, 152, 162, 1, lane=0),
        event(abi.EVENT_COMPUTE, 152, 160, 1, lane=1),
        event(abi.EVENT_STALL, 160, 162, 1, lane=1),
    ]
    document = trace(events, Step(100_000, 200_000, 1, Phase.DECODE, 1), n_experts=10, n_layers=2)
    slices = [e for e in document["traceEvents"] if "ts" in e]
    found = {e["name"]: (e["tid"], e["ts"], e["dur"]) for e in slices if e["tid"] < 1000}
    assert found == {
        "trunk before layer 0": (0, 0, 10),
        "layer 0": (0, 10, 30),
        "route": (0, 11, 2),
        "stall": (0, 15, 15),
        "compute": (0, 30, 8),
        "trunk before layer 1": (0, 40, 10),
        "layer 1": (0, 50, 40),
        "trunk to the output": (0, 90, 10),
        "demand layer 0 expert 7": (2, 13, 17),
        "guess layer 1 expert 3 copy 1": (1, -10, 22),
    }
    threads = [(e["name"], e["tid"], e["ts"], e["dur"]) for e in slices if e["tid"] >= 1000]
    assert threads == [
        ("compute", 1000, 52, 10),
        ("compute", 1001, 52, 8),
        ("stall", 1001, 60, 2),
    ]
    sums = {"trunk": 30, "route": 2, "predict": 0, "compute": 17, "stall": 16, "other": 35}
    assert document["otherData"]["ms"] == {name: us / 1000 for name, us in sums.items()}
    assert sum(sums.values()) == 100
    names = [e["args"]["name"] for e in document["traceEvents"] if e["ph"] == "M"]
    assert names == ["moe-gguf", "model", "lane 0", "lane 1", "thread 0", "thread 1"]


def test_the_file_holds_the_last_token(
    tiny_file: TinyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix_slots(monkeypatch, 8)
    llama = Llama(tiny_file("qwen3moe"), n_ctx=256, n_threads=1, reads="buffered")
    try:
        with pytest.raises(UserError, match="no token to draw"):
            timeline.write(llama.arena, llama.last_step, tmp_path / "t.json")
        timeline.record(llama.arena)
        llama.eval([1, 2, 3])
        llama.eval([4])
        line = timeline.write(llama.arena, llama.last_step, tmp_path / "t.json")
    finally:
        llama.close()
    document: dict[str, Any] = json.loads((tmp_path / "t.json").read_text())
    other = document["otherData"]
    assert line.startswith(f"1 token(s) in {other['step_ms']:.1f} ms (trunk ")
    assert sum(other["ms"].values()) == pytest.approx(other["step_ms"])
    slices = [e for e in document["traceEvents"] if e["ph"] == "X"]
    n_layers = len(llama.found.layout.layers)
    assert sum(e["cat"] == "layer" for e in slices) == n_layers
    assert sum(e["cat"] == "trunk" for e in slices) == n_layers + 1
    assert any(e["cat"] == "demand" for e in slices)
    assert all(e["ts"] >= -1 and e["ts"] + e["dur"] <= other["step_ms"] * 1e3 + 1 for e in slices)
