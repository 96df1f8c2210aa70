"""How a result document of ``bench`` is shown: an aligned table, a plot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_gguf.runtime.budget import format_size
from moe_gguf.runtime.errors import UserError

Cell = Callable[[dict[str, Any]], str]  # of a row of the document


def _median(key: str, form: Callable[[float], str]) -> Cell:
    def cell(row: dict[str, Any]) -> str:
        value = row["median"].get(key)
        return "-" if value is None else form(value)

    return cell


def _ratio(key: str, form: str) -> Cell:
    return lambda row: "-" if row[key] is None else form.format(row[key])


COLUMNS: tuple[tuple[str, Cell], ...] = (
    ("decode tok/s", _median("decode_tps", "{:.2f}".format)),
    ("x stock-mmap", _ratio("x_stock_mmap", "{:.1f}")),
    ("of resident", _ratio("of_stock_resident", "{:.0%}")),
    ("prefill tok/s", _median("prefill_tps", "{:.1f}".format)),
    ("start-up s", _median("startup_s", "{:.2f}".format)),
    ("hits", _median("hit_rate", "{:.1%}".format)),
    ("read/token", _median("bytes_per_token", format_size)),
    ("stalled", _median("stall_share", "{:.1%}".format)),
    ("controller", _median("controller_share", "{:.1%}".format)),
    ("peak RSS", _median("rss_peak_bytes", format_size)),
)


def table(document: dict[str, Any]) -> str:
    """What was measured, under which conditions, and the rows."""
    rows = document["rows"]
    cells = [[row["row"], *(cell(row) for _, cell in COLUMNS)] for row in rows]
    heads = ["row", *(head for head, _ in COLUMNS)]
    widths = [max(len(line[i]) for line in [heads, *cells]) for i in range(len(heads))]

    def line(parts: list[str]) -> str:
        first, *others = (
            part.ljust(width) if i == 0 else part.rjust(width)
            for i, (part, width) in enumerate(zip(parts, widths, strict=True))
        )
        return "  ".join([first, *others])

    lines = [*conditions(document), "", line(heads)]
    for row, parts in zip(rows, cells, strict=True):
        failure = row["failure"]
        lines.append(f"{parts[0].ljust(widths[0])}  {failure}" if failure else line(parts))
    return "\n".join([*lines, "", *remarks(document)])


def conditions(document: dict[str, Any]) -> list[str]:
    """Model, cap, machine and versions: a number without these means nothing."""
    model, machine, settings = document["model"], document["machine"], document["settings"]
    commit = document["commit"] or "unknown"
    repeat = settings["repeat"]
    runs = f"median of {repeat} runs" if repeat > 1 else "one run of each row"
    return [
        f"{model['name']}: {model['architecture']}, {model['moe_layers']} MoE layers x "
        f"{model['experts']} experts, top-{model['experts_used']}, experts "
        f"{'+'.join(model['expert_types'])}, {format_size(model['file_bytes'])}",
        f"memory {format_size(document['memory_bytes'])}; {_enforced(document)}; "
        f"page cache {document['page_cache']}",
        f"{machine['cpu']}, {machine['cores']} cores, {format_size(machine['ram_bytes'])} RAM, "
        f"{machine['system']}; {document['threads']} threads, context {settings['n_ctx']}",
        f"moe-gguf {document['moe_gguf']}, commit {commit}; llama-cpp-python "
        f"{document['llama_cpp_python']}, weight repacking off",
        f"{runs}, rows in turn; prefill of {settings['prompt_tokens']} tokens, cold in capped "
        f"rows, every weight touched before in the others; decode warm (the last three quarters of "
        f"{settings['n_predict']} tokens)",
    ]


def _enforced(document: dict[str, Any]) -> str:
    if document["cgroup"] is None:
        return f"NOT enforced: no memory cgroup ({document['cgroup_refusal']})"
    return f"enforced by a memory cgroup ({document['cgroup']})"


def _is_capped(document: dict[str, Any], row: dict[str, Any]) -> bool:
    """Ours keep to a budget by themselves, stock only inside a cgroup."""
    return bool(row["capped"] and (document["cgroup"] or row["policy"]))


def remarks(document: dict[str, Any]) -> list[str]:
    """What the table does not say by itself."""
    rows = document["rows"]
    lines = []
    free = [row["row"] for row in rows if row["runs"] and not _is_capped(document, row)]
    if free:
        lines.append(f"without the cap: {', '.join(free)}")
    planned = document["settings"]["n_predict"]
    for row in rows:
        short = [
            run for run in row["runs"] if run["warm_up_tokens"] + run["decode_tokens"] < planned
        ]
        if short:
            counted = ", ".join(str(run["decode_tokens"]) for run in short)
            limit = document["settings"]["decode_limit_s"]
            lines.append(
                f"{row['row']}: decoding cut off after {limit:.0f} s, {counted} tokens counted"
            )
    reference = document["reference"]
    checked = [row["row"] for row in rows if row["identical"] and row["row"] != reference]
    if checked:
        lines.append(f"same greedy tokens as {reference}: {', '.join(checked)}")
    if document["interrupted"]:
        lines.append("interrupted: rows have fewer runs than planned")
    return lines


def require_plot() -> None:
    """UserError unless matplotlib is there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UserError(
            "--plot needs matplotlib: install it with pip install 'moe-gguf[plot]'"
        ) from None


_OURS, _STOCK, _INK = "#2f6fb0", "#9aa0a6", "#333333"


def plot(document: dict[str, Any], path: Path) -> None:
    """Decode speed as bars with the range of the runs, as a PNG."""
    from matplotlib.figure import Figure

    rows = document["rows"]
    model, machine = document["model"], document["machine"]
    figure = Figure(figsize=(8.0, 1.9 + 0.48 * len(rows)), dpi=150, layout="constrained")
    axes = figure.subplots()
    top = max((run["decode_tps"] for row in rows for run in row["runs"]), default=1.0)
    for at, row in enumerate(rows):
        if row["failure"]:
            axes.text(0.01 * top, at, row["failure"], va="center", color=_INK, fontsize=9)
            continue
        if not row["runs"]:
            continue
        speeds = [run["decode_tps"] for run in row["runs"]]
        median = row["median"]["decode_tps"]
        axes.barh(at, median, height=0.62, color=_STOCK if row["policy"] is None else _OURS)
        if len(speeds) > 1:
            low, high = median - min(speeds), max(speeds) - median
            axes.errorbar(median, at, xerr=[[low], [high]], color=_INK, capsize=3, linewidth=1)
        axes.text(
            max(speeds) + 0.012 * top, at, f"{median:.2f}", va="center", color=_INK, fontsize=9
        )
    labels = [
        row["row"] if _is_capped(document, row) else f"{row['row']}\n(no cap)" for row in rows
    ]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.12 * top)
    repeat = document["settings"]["repeat"]
    what = f"median of {repeat} runs; whiskers: slowest and fastest" if repeat > 1 else "one run"
    axes.set_xlabel(f"decode, tokens per second ({what})")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(
        f"{model['name']}, {format_size(model['file_bytes'])}, "
        f"in {format_size(document['memory_bytes'])} of memory",
        loc="left",
        fontsize=12,
        fontweight="bold",
        pad=22,
    )
    axes.text(
        0,
        1.0,
        f"{machine['cpu']}, {document['threads']} threads; experts "
        f"{'+'.join(model['expert_types'])}; moe-gguf {document['moe_gguf']}, commit "
        f"{(document['commit'] or 'unknown')[:12]}",
        transform=axes.transAxes,
        va="bottom",
        color=_INK,
        fontsize=9,
    )
    figure.savefig(path, format="png")
