"""When a CUDA device computes and when it is copied to; torch brings CUDA's own tracing."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Spans = list[tuple[float, float]]


def traced(step: Callable[[], object], n: int) -> tuple[dict[str, float], dict[str, Spans]]:
    """Of so many steps the seconds they took, in which the device computed, was copied to, and
    both; and when it did either, in microseconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        began = time.perf_counter()
        for _ in range(n):
            step()
        wall_s = time.perf_counter() - began
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        trace.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    lanes = {
        "computing": spans_of(events, "kernel", ""),
        "copying": spans_of(events, "gpu_memcpy", "HtoD"),
    }
    figures = {"traced_s": wall_s}
    figures |= {f"{name}_s": length(lane) / 1e6 for name, lane in lanes.items()}
    figures["both_s"] = length(overlap(*lanes.values())) / 1e6
    return figures, lanes


def spans_of(events: Sequence[dict[str, Any]], kind: str, name: str) -> Spans:
    """When any event of that kind ran."""
    spans: Spans = []
    for begin, end in sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == kind and name in event["name"]
    ):
        if spans and begin <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(end, spans[-1][1])
        else:
            spans.append((begin, end))
    return spans


def length(spans: Spans) -> float:
    return sum(end - begin for begin, end in spans)


def overlap(a: Spans, b: Spans) -> Spans:
    """When both were at work."""
    both, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        begin, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if begin < end:
            both.append((begin, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return both
