"""How a result document of ``bench`` is drawn: decode speed, and prediction by layer, as PNGs."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError
from ..sizes import GB, format_size
from .cases import row_of
from .report import is_capped, is_group, points, speed_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS, _STOCK, _INK, _GRID = "#2f6fb0", "#9aa0a6", "#333333", "#e3e5e8"
# Told apart by people who see colours differently, and by their markers.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31")
_MARKERS = "osD^vPX*"


def require() -> None:
    """UserError unless matplotlib is there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UserError(
            "plots need matplotlib: install it with pip install 'moe-gguf[plot]'"
        ) from None


def speed(document: dict[str, Any], path: Path) -> None:
    """Decode speed: bars for one cap, lines over the caps of a sweep; of several numbers of
    sequences speed and waiting over these."""
    if len({row_of(row["row"]).sequences for row in points(document)[0]["rows"]} - {0}) > 1:
        _groups(document, path)
    elif "sweep" in document:
        _lines(document, path)
    else:
        _bars(document, path)


def _bars(document: dict[str, Any], path: Path) -> None:
    """Decode speed as bars with the range of the runs."""
    from matplotlib.figure import Figure

    rows = document["rows"]
    figure = Figure(figsize=(8.0, 1.9 + 0.48 * len(rows)), dpi=150, layout="constrained")
    axes = figure.subplots()
    top = max((speed_of(run) for row in rows for run in row["runs"]), default=1.0)
    for at, row in enumerate(rows):
        if row["failure"]:
            axes.text(0.01 * top, at, row["failure"], va="center", color=_INK, fontsize=9)
            continue
        if not row["runs"]:
            continue
        speeds = [speed_of(run) for run in row["runs"]]
        median = speed_of(row["median"])
        axes.barh(at, median, height=0.62, color=_STOCK if row["policy"] is None else _OURS)
        if len(speeds) > 1:
            low, high = median - min(speeds), max(speeds) - median
            axes.errorbar(median, at, xerr=[[low], [high]], color=_INK, capsize=3, linewidth=1)
        axes.text(
            max(speeds) + 0.012 * top, at, f"{median:.2f}", va="center", color=_INK, fontsize=9
        )
    labels = [row["row"] if is_capped(document, row) else f"{row['row']}\n(no cap)" for row in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.12 * top)
    axes.set_xlabel(f"decode, tokens per second ({_how_many_runs(document)})")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    _title(axes, document, f"in {format_size(document['memory_bytes'])} of memory")
    figure.savefig(path, format="png")


def _lines(document: dict[str, Any], path: Path) -> None:
    """Decode speed against the cap; a row without one is a dashed line across."""
    from matplotlib.figure import Figure

    every = points(document)
    caps = [point["memory_bytes"] / GB for point in every]
    figure = Figure(figsize=(8.0, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    labels: list[_Label] = []
    failed: dict[str, list[str]] = {}
    ours = 0
    for i, row in enumerate(every[0]["rows"]):
        rows = [point["rows"][i] for point in every]
        for cap, r in zip(caps, rows, strict=True):
            if r["failure"]:
                failed.setdefault(f"{r['row']}: {r['failure']}", []).append(f"{cap:g}")
        stock = row["policy"] is None
        colour = _STOCK if stock else _COLOURS[ours % len(_COLOURS)]
        marker = "o" if stock else _MARKERS[ours % len(_MARKERS)]
        ours += not stock
        good = [
            (cap, r) for cap, r in zip(caps, rows, strict=True) if r["runs"] and not r["failure"]
        ]
        if good and is_capped(document, row):
            labels.append(_line(axes, good, colour, marker))
        elif good:
            median = speed_of(good[0][1]["median"])
            axes.axhline(median, color=colour, linestyle=(0, (5, 3)), linewidth=1.4)
            labels.append(_Label(median, f"{row['row']} (no cap)", colour))
    _scale([speed_of(run) for point in every for r in point["rows"] for run in r["runs"]], axes)
    axes.set_xticks(caps, [f"{cap:g}" for cap in caps])
    heights = _spread([label.y for label in labels], axes)
    for label, height in zip(labels, heights, strict=True):
        axes.annotate(
            label.text, (1.0, height), xytext=(6, 0), xycoords="axes fraction",
            textcoords="offset points", va="center", color=label.colour, fontsize=9,
        )  # fmt: skip
    what = _how_many_runs(document).replace("whiskers", "bands")
    axes.set_xlabel("memory cap of the whole process, GB")
    axes.set_ylabel(f"decode, tokens per second\n({what})")
    _clear(axes)
    _title(axes, document, "by memory")
    if failed:
        text = "\n".join(f"{what} (at {', '.join(at)} GB)" for what, at in failed.items())
        figure.supxlabel(text, fontsize=8, color=_INK)
    figure.savefig(path, format="png")


def _groups(document: dict[str, Any], path: Path) -> None:
    """Above, tokens per second of all sequences together over how many there are; below, the time
    between two tokens of one of them: medians, and bands up to the 95th percentile. One column per
    cap."""
    from matplotlib.figure import Figure

    every = points(document)
    figure = Figure(figsize=(3.2 + 4.6 * len(every), 7.2), dpi=150, layout="constrained")
    grid = figure.subplots(2, len(every), sharex=True, sharey="row", squeeze=False)
    names = list(dict.fromkeys(_curve_of(row) for row in every[0]["rows"] if is_group(row)))
    for point, (above, below) in zip(every, grid.T, strict=True):
        for i, name in enumerate(names):
            rows = [
                r for r in point["rows"] if _curve_of(r) == name and "decode_tps" in r["median"]
            ]
            _curve(above, below, name, i, [row for row in rows if not row["failure"]])
        above.set_title(f"memory {format_size(point['memory_bytes'])}", fontsize=10, loc="left")
        below.set_xlabel("sequences at once")
        for axes in (above, below):
            _clear(axes)
    sizes = sorted({row_of(row["row"]).sequences for row in every[0]["rows"]} - {0})
    grid[0, 0].set_xscale("log", base=2)
    grid[0, 0].set_xticks(sizes, [str(n) for n in sizes])
    grid[0, 0].minorticks_off()
    grid[0, 0].set_ylabel("decode, tokens per second of all")
    grid[0, 0].set_ylim(bottom=0)
    grid[1, 0].set_ylabel("between two tokens, seconds")
    grid[1, 0].set_yscale("log")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    model, machine = document["model"], document["machine"]
    figure.suptitle(
        f"{model['name']}, {format_size(model['file_bytes'])}, by sequences "
        f"({_median_of(document)})\n{machine['cpu']}, {every[0]['threads']} threads; "
        f"commit {(document['commit'] or 'unknown')[:12]}",
        x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
    figure.savefig(path, format="png")


def _curve_of(row: dict[str, Any]) -> str:
    """The row's name without its number of sequences."""
    name, _, form = str(row["row"]).partition("@")
    base, _, group = name.partition(":")
    way = group.partition(":")[2]
    return base + (f" {way}" if way else "") + (f"@{form}" if form else "")


def _curve(above: Axes, below: Axes, name: str, i: int, rows: Sequence[dict[str, Any]]) -> None:
    rows = sorted(rows, key=lambda row: row_of(row["row"]).sequences)
    x = [row_of(row["row"]).sequences for row in rows]
    style: dict[str, Any] = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % 8]}
    if rows[0]["policy"] is None:
        style |= {"linestyle": "--", "markerfacecolor": "white"}
    style |= {"markersize": 5, "linewidth": 1.6}
    above.plot(x, [row["median"]["decode_tps"] for row in rows], label=name, **style)
    waits = [[row["median"].get(f"between_tokens_{p}_s") for p in ("p50", "p95")] for row in rows]
    if all(None not in wait for wait in waits):
        p50, p95 = zip(*waits, strict=True)
        below.plot(x, p50, **style)
        below.fill_between(x, p50, p95, color=style["color"], alpha=0.12, linewidth=0)


class _Label(NamedTuple):
    """A line's name, to stand at its right end."""

    y: float
    text: str
    colour: str


def _line(
    axes: Axes, good: Sequence[tuple[float, dict[str, Any]]], colour: str, marker: str
) -> _Label:
    """One row's medians over the caps, and a band from its slowest to its fastest runs."""
    x = [cap for cap, _ in good]
    medians = [speed_of(row["median"]) for _, row in good]
    speeds = [[speed_of(run) for run in row["runs"]] for _, row in good]
    axes.plot(x, medians, color=colour, marker=marker, markersize=5, linewidth=1.8)
    if max(map(len, speeds)) > 1:
        axes.fill_between(
            x, [min(s) for s in speeds], [max(s) for s in speeds],
            color=colour, alpha=0.13, linewidth=0,
        )  # fmt: skip
    return _Label(medians[-1], good[0][1]["row"], colour)


def _scale(speeds: Sequence[float], axes: Axes) -> None:
    """A logarithmic scale where the slow rows would be one line without."""
    from matplotlib.ticker import LogLocator, NullLocator

    if not speeds or max(speeds) <= 10 * min(speeds):
        axes.set_ylim(bottom=0)
        return
    axes.set_yscale("log")
    axes.set_ylim(0.8 * min(speeds), 1.25 * max(speeds))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


def layers(document: dict[str, Any], path: Path) -> None:
    """Hit rate and recall by layer, medians of the runs; of a sweep, one column per cap.

    Rows whose policy does not tell are left out; where none does, a sentence stands instead.
    """
    from matplotlib.figure import Figure

    every = points(document)
    figure = Figure(figsize=(4.0 + 3.6 * len(every), 6.0), dpi=150, layout="constrained")
    grid = figure.subplots(2, len(every), sharex=True, sharey="row", squeeze=False)
    kinds = (("hit_rate", "hits"), ("recall", "recall"))
    for column, point in enumerate(every):
        ours = [row for row in point["rows"] if row["policy"] is not None]
        for (key, what), axes in zip(kinds, grid[:, column], strict=True):
            drawn = False
            for n, row in enumerate(ours):
                curve = _by_layer(row, key) if row["capped"] else {}
                if curve:
                    drawn = True
                    axes.plot(
                        list(curve), list(curve.values()), label=row["row"],
                        color=_COLOURS[n % len(_COLOURS)], marker=_MARKERS[n % len(_MARKERS)],
                        markersize=4, linewidth=1.5,
                    )  # fmt: skip
            if not drawn:
                axes.text(
                    0.5, 0.5, f"no row tells its {what} by layer", transform=axes.transAxes,
                    ha="center", color=_INK, fontsize=9,
                )  # fmt: skip
            axes.set_ylim(0, 1)
            axes.yaxis.set_major_formatter("{x:.0%}")
            axes.xaxis.get_major_locator().set_params(integer=True)
            _clear(axes)
            if column == 0:
                axes.set_ylabel(what)
        grid[1, column].set_xlabel("layer")
        if len(every) > 1:
            grid[0, column].set_title(format_size(point["memory_bytes"]), fontsize=10)
    handles, names = grid[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=9
        )
    where = "by memory" if len(every) > 1 else f"in {format_size(every[0]['memory_bytes'])}"
    figure.suptitle(
        f"{document['model']['name']}, hits and recall by layer {where} ({_median_of(document)})",
        x=0.01, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    figure.savefig(path, format="png")


def _by_layer(row: dict[str, Any], key: str) -> dict[int, float]:
    """The median over the runs, by layer; empty if the row does not tell."""
    values: dict[int, list[float]] = {}
    for run in row["runs"]:
        for layer in run.get("layers") or []:
            if layer.get(key) is not None:
                values.setdefault(layer["layer"], []).append(layer[key])
    return {layer: statistics.median(values[layer]) for layer in sorted(values)}


def _spread(wanted: Sequence[float], axes: Axes) -> list[float]:
    """Heights for labels, as shares of the axes, as near to ``wanted`` as lines of text allow."""
    to_axes = axes.transScale + axes.transLimits  # 0 at the bottom, 1 at the top
    heights = [float(to_axes.transform((1.0, y))[1]) for y in wanted]
    for below, i in itertools.pairwise(sorted(range(len(heights)), key=heights.__getitem__)):
        heights[i] = max(heights[i], heights[below] + 0.048)
    return heights


def _median_of(document: dict[str, Any]) -> str:
    repeat = document["settings"]["repeat"]
    return f"median of {repeat} runs" if repeat > 1 else "one run"


def _how_many_runs(document: dict[str, Any]) -> str:
    several = document["settings"]["repeat"] > 1
    return _median_of(document) + ("; whiskers: slowest and fastest" if several else "")


def _clear(axes: Axes) -> None:
    """Lines of the grid instead of a frame."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _title(axes: Axes, document: dict[str, Any], where: str) -> None:
    model, machine = document["model"], document["machine"]
    limit = document["disk_limit"]
    throttled = (
        "" if limit is None else f", disk throttled to {format_size(limit['bytes_per_s'])}/s"
    )
    axes.set_title(
        f"{model['name']}, {format_size(model['file_bytes'])}, {where}",
        loc="left",
        fontsize=12,
        fontweight="bold",
        pad=22,
    )
    axes.text(
        0,
        1.0,
        f"{machine['cpu']}, {points(document)[0]['threads']} threads{throttled}; experts "
        f"{'+'.join(model['expert_types'])}; moe-gguf {document['moe_gguf']}, commit "
        f"{(document['commit'] or 'unknown')[:12]}",
        transform=axes.transAxes,
        va="bottom",
        color=_INK,
        fontsize=9,
    )
