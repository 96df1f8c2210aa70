"""Where the time of one token went, as a file in Chrome's trace format (Perfetto opens it).

Owns turning the plugin's events into slices; the plugin records them, a ``Meter`` says when the
last step began and ended. One track shows the model: the trunk between the layers, and inside each
layer the callbacks, the expert graphs and the stalls. One track per lane shows its reads, and one
per thread the experts that it computed by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .arena import Arena
from .errors import UserError
from .plugin import abi
from .stats import Step

# About ten times the events of one token of a large model; 2 MB, which the budget's margin covers.
CAPACITY = 1 << 16
_PIECE = 1024  # events taken at once: as Python objects they are four times as large
_MODEL_TRACK, _FIRST_LANE_TRACK, _FIRST_THREAD_TRACK = 0, 1, 1000
_NAMES = {
    abi.EVENT_ROUTE: "route",
    abi.EVENT_PREDICT: "predict",
    abi.EVENT_COMPUTE: "compute",
    abi.EVENT_STALL: "stall",
    abi.EVENT_DEMAND: "demand",
    abi.EVENT_GUESS: "guess",
}


def record(arena: Arena) -> None:
    """Record from now on; only the newest events are kept."""
    arena.plugin.timeline(CAPACITY)


def write(arena: Arena, step: Step | None, path: Path) -> str:
    """Write the last step to ``path``, stop recording, and say in one line where its time went."""
    if step is None:
        raise UserError("there is no token to draw a timeline of: generate at least one")
    layout = arena.found.layout
    document = trace(_events_of(arena, step), step, layout.n_experts, layout.layers[-1].layer + 1)
    document["otherData"]["model"] = layout.name
    document["otherData"]["policy"] = arena.found.options.policy
    arena.plugin.timeline(0)
    path.write_text(json.dumps(document) + "\n")
    other = document["otherData"]
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in other["ms"].items())
    return f"{other['tokens']} token(s) in {other['step_ms']:.1f} ms ({parts} ms)"


def _events_of(arena: Arena, step: Step) -> Iterator[abi.Event]:
    while events := arena.plugin.timeline_read(_PIECE):
        yield from (e for e in events if e.end_ns > step.start_ns and e.start_ns < step.end_ns)


def trace(events: Iterable[abi.Event], step: Step, n_experts: int, n_layers: int) -> dict[str, Any]:
    """The trace document of one step; times in it are microseconds from the step's start.

    A read that a guess began before the step has a negative start. ``otherData`` has the sums, in
    milliseconds: trunk is what lies between layers, other what a layer took beside the rest; of
    threads that compute side by side the mean.
    """
    slices: list[dict[str, Any]] = []

    def put(name: str, kind: str, track: int, start_ns: int, end_ns: int, **args: int) -> None:
        slices.append(
            {
                "name": name,
                "cat": kind,
                "ph": "X",
                "ts": (start_ns - step.start_ns) / 1e3,
                "dur": (end_ns - start_ns) / 1e3,
                "pid": 1,
                "tid": track,
                "args": args,
            }
        )

    sums = dict.fromkeys(("trunk", "route", "predict", "compute", "stall"), 0)
    lanes, threads = set(), set[int]()
    side_by_side = dict.fromkeys((abi.EVENT_COMPUTE, abi.EVENT_STALL), 0)
    at, layers_ns = step.start_ns, 0
    for event in sorted(events, key=lambda e: (e.start_ns, -e.end_ns)):
        span = event.start_ns, event.end_ns
        if event.kind == abi.EVENT_LAYER:
            put(f"trunk before layer {event.key}", "trunk", _MODEL_TRACK, at, event.start_ns)
            put(f"layer {event.key}", "layer", _MODEL_TRACK, *span, layer=event.key)
            sums["trunk"] += event.start_ns - at
            layers_ns += event.end_ns - event.start_ns
            at = event.end_ns
        elif event.kind in (abi.EVENT_DEMAND, abi.EVENT_GUESS):
            row, expert = divmod(event.key, n_experts)
            copy, layer = divmod(row, n_layers)
            kind = _NAMES[event.kind]
            lanes.add(event.lane)
            track = _FIRST_LANE_TRACK + event.lane
            name = f"{kind} layer {layer} expert {expert}" + (f" copy {copy}" if copy else "")
            put(name, kind, track, *span, layer=layer, expert=expert, copy=copy)
        elif event.lane >= 0:
            name = _NAMES[event.kind]
            threads.add(event.lane)
            put(name, name, _FIRST_THREAD_TRACK + event.lane, *span, layer=event.key)
            side_by_side[event.kind] += event.end_ns - event.start_ns
        else:
            name = _NAMES[event.kind]
            put(name, name, _MODEL_TRACK, *span, layer=event.key)
            sums[name] += event.end_ns - event.start_ns
    for which, ns in side_by_side.items():
        sums[_NAMES[which]] += ns // max(1, len(threads))
    put("trunk to the output", "trunk", _MODEL_TRACK, at, step.end_ns)
    sums["trunk"] += step.end_ns - at
    sums["other"] = layers_ns - sum(ns for name, ns in sums.items() if name != "trunk")
    tracks = {_MODEL_TRACK: "model"} | {_FIRST_LANE_TRACK + n: f"lane {n}" for n in sorted(lanes)}
    tracks |= {_FIRST_THREAD_TRACK + n: f"thread {n}" for n in sorted(threads)}
    names = [_label("process_name", 0, "moe-gguf")]
    names += [_label("thread_name", track, name) for track, name in tracks.items()]
    return {
        "traceEvents": names + slices,
        "displayTimeUnit": "ms",
        "otherData": {
            "tokens": step.n_tokens,
            "step_ms": (step.end_ns - step.start_ns) / 1e6,
            "ms": {name: ns / 1e6 for name, ns in sums.items()},
        },
    }


def _label(what: str, track: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 1, "tid": track, "args": {"name": name}}
