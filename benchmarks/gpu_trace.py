"""When a CUDA device computes and when it is copied to; torch brings CUDA's own tracing.

    python benchmarks/gpu_trace.py trace.json trace.png --begin 20 --ms 2

draws what ``gpu.py rows --traces trace.json`` has left: so many milliseconds from there on.
"""

from __future__ import annotations

import argparse
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


def draw(lanes: dict[str, Spans], path: Path, begin_ms: float, ms: float) -> None:
    """A lane each for computing and copying, and what they do at once."""
    from matplotlib.figure import Figure

    first = min(spans[0][0] for spans in lanes.values() if spans)
    shown = {name: within(spans, first + 1e3 * begin_ms, 1e3 * ms) for name, spans in lanes.items()}
    both = overlap(*shown.values())
    figure = Figure(figsize=(10.0, 2.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    for at, (name, spans) in enumerate({**shown, "both": both}.items()):
        bars = [(begin / 1e3, (end - begin) / 1e3) for begin, end in spans]
        axes.broken_barh(bars, (-at - 0.35, 0.7), facecolors=("#2f6fb0", "#d55e00", "#333333")[at])
        share = f"{name}\n{length(spans) / (1e3 * ms):.0%}"
        axes.text(-0.005 * ms, -at, share, ha="right", va="center", fontsize=9)
    axes.set_yticks([])
    axes.set_xlim(0, ms)
    axes.set_xlabel("ms")
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)


def within(spans: Spans, begin: float, n: float) -> Spans:
    """What of them lies in so much time, from its begin on."""
    cut = [(max(a - begin, 0.0), min(b - begin, n)) for a, b in spans]
    return [(a, b) for a, b in cut if a < b]


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a trace.")
    parser.add_argument("trace", type=Path)
    parser.add_argument("png", type=Path)
    parser.add_argument("--begin", type=float, default=0.0, help="milliseconds after its begin")
    parser.add_argument("--ms", type=float, default=2.0)
    args = parser.parse_args()
    draw(json.loads(args.trace.read_text()), args.png, args.begin, args.ms)


if __name__ == "__main__":
    main()
