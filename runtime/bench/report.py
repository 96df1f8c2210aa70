"""How a result document of ``bench`` is shown as text: conditions, an aligned table, remarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..columns import columns
from ..sizes import format_size

Cell = Callable[[dict[str, Any]], str]  # of a row of the document


def _median(key: str, form: Callable[[float], str]) -> Cell:
    def cell(row: dict[str, Any]) -> str:
        value = row["median"].get(key)
        return "-" if value is None else form(value)

    return cell


def _ratio(key: str, form: str) -> Cell:
    # Documents of earlier versions lack some.
    return lambda row: "-" if row.get(key) is None else form.format(row[key])


def _guesses(row: dict[str, Any]) -> str:
    """Guesses made, those used, and of these the ones that were still being read when needed."""
    numbers = [row["median"].get(key) for key in ("guesses", "guesses_used", "guesses_late")]
    if not numbers[0]:
        return "-"
    return "/".join("-" if n is None else f"{n:.0f}" for n in numbers)


def _low(row: dict[str, Any]) -> str:
    """Of the expert applications of prefill and of decode, how many were computed low."""
    shares = [row["median"].get(key) or 0.0 for key in ("prefill_low_share", "low_share")]
    return "/".join(f"{share:.1%}" for share in shares) if any(shares) else "-"


def _seconds(p50: str) -> Cell:
    """Median and 95th percentile of a time."""

    def cell(row: dict[str, Any]) -> str:
        found = [row["median"].get(f"{p50}_{p}_s") for p in ("p50", "p95")]
        return "-" if None in found else "/".join(f"{time:.3g}" for time in found)

    return cell


def _at_once(row: dict[str, Any]) -> str:
    """What the planner chose of how many there were."""
    plans = [run["plan"] for run in row["runs"] if run.get("plan")]
    if not plans:
        return "-"
    schedule, parallel = plans[-1]["schedule"], plans[-1]["parallel"]
    if schedule["quantum"]:
        return f"{parallel}, {schedule['group']} in turns of {schedule['quantum']}"
    return str(parallel)


COLUMNS: tuple[tuple[str, Cell], ...] = (
    ("decode tok/s", _median("decode_tps", "{:.2f}".format)),
    ("x stock-mmap", _ratio("x_stock_mmap", "{:.1f}")),
    ("of resident", _ratio("of_stock_resident", "{:.0%}")),
    ("of bound", _ratio("of_bound", "{:.0%}")),
    ("of disk bound", _ratio("of_disk_bound", "{:.0%}")),
    ("prefill tok/s", _median("prefill_tps", "{:.1f}".format)),
    ("job tok/s", _median("job_tps", "{:.1f}".format)),
    ("job s", _median("job_s", "{:.1f}".format)),
    ("job of resident", _ratio("job_of_stock_resident", "{:.0%}")),
    ("first token s p50/p95", _seconds("first_token")),
    ("between tokens s p50/p95", _seconds("between_tokens")),
    ("planned at once", _at_once),
    ("experts per layer", _median("distinct_experts", "{:.1f}".format)),
    ("start-up s", _median("startup_s", "{:.2f}".format)),
    ("hits", _median("hit_rate", "{:.1%}".format)),
    ("LOSSY: low in prefill/decode", _low),
    ("guesses made/used/late", _guesses),
    ("recall", _median("recall", "{:.1%}".format)),
    ("read/token", _median("bytes_per_token", format_size)),
    ("disk busy", _median("disk_share", "{:.0%}".format)),
    ("stalled", _median("stall_share", "{:.1%}".format)),
    ("stolen", _median("stolen_share", "{:.0%}".format)),
    ("controller", _median("controller_share", "{:.1%}".format)),
    ("peak RSS", _median("rss_peak_bytes", format_size)),
    ("log p", _median("logprob_mean", "{:.4f}".format)),
    ("answers as stock", _ratio("agreement", "{:.0%}")),
)


# A throttle was kept to if a probe of a second saw no more than this multiple of it.
HELD = 1.25


def points(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One document per cap."""
    return (
        [{**document, **point} for point in document["sweep"]]
        if "sweep" in document
        else [document]
    )


def table(document: dict[str, Any]) -> str:
    """What was measured, under which conditions, and the rows, cap by cap."""
    parts = ["\n".join(conditions(document))]
    for point in points(document):
        if "sweep" in document:
            parts.append(f"memory {format_size(point['memory_bytes'])}")
        kinds = ([r for r in point["rows"] if is_group(r) == kind] for kind in (False, True))
        parts += [*(_rows(rows) for rows in kinds if rows), "\n".join(remarks(point))]
    return "\n\n".join(part for part in parts if part)


def _rows(rows: Sequence[dict[str, Any]]) -> str:
    """The rows, aligned; a column in which no row has anything is left out."""
    shown = [(head, cell) for head, cell in COLUMNS if any(cell(row) != "-" for row in rows)]
    lines = [["row", *(head for head, _ in shown)]]
    for row in rows:
        failure = row["failure"]
        cells = [failure] if failure else [cell(row) for _, cell in shown]
        lines.append([row["row"], *cells])
    return "\n".join(columns(lines, "<>"))


def conditions(document: dict[str, Any]) -> list[str]:
    """Model, cap, machine and versions: a number without these means nothing."""
    model, machine, settings = document["model"], document["machine"], document["settings"]
    every = points(document)
    caps = ", ".join(format_size(point["memory_bytes"]) for point in every)
    commit = document["commit"] or "unknown"
    repeat = settings["repeat"]
    start = "filled from routing statistics" if settings.get("warm") else "cold"
    runs = f"median of {repeat} runs" if repeat > 1 else "one run of each row"
    kinds = {is_group(row) for point in every for row in point["rows"]}
    alone = (
        f"prefill of {settings['prompt_tokens']} tokens, {start} in capped rows, every weight "
        f"touched before in the others; decode warm (the last three quarters of "
        f"{settings['n_predict']} tokens)"
    )
    group = (
        f"rows of N sequences: N prompts of {settings['prompt_tokens']} tokens and answers of "
        f"{settings['n_predict']}, all there at once, after a short job of other prompts; speeds "
        "of all together; prefill: steps with prompts in them, decode: the others"
    )
    how = [text for text, kind in ((alone, False), (group, True)) if kind in kinds] or [alone]
    return [
        f"{model['name']}: {model['architecture']}, {model['moe_layers']} MoE layers x "
        f"{model['experts']} experts, top-{model['experts_used']}, experts "
        f"{'+'.join(model['expert_types'])}, {format_size(model['file_bytes'])}",
        f"memory {caps}; {_enforcement(document)}; page cache {document['page_cache']}",
        f"disk: {_disk(document)}",
        f"{machine['cpu']}, {machine['cores']} cores, {format_size(machine['ram_bytes'])} RAM, "
        f"{machine['system']}; {every[0]['threads']} threads, context {settings['n_ctx']}",
        f"moe-gguf {document['moe_gguf']}, commit {commit}; llama-cpp-python "
        f"{document['llama_cpp_python']}, weight repacking off",
        f"{runs}, rows in turn; {how[0]}",
        *how[1:],
    ]


def _enforcement(document: dict[str, Any]) -> str:
    if document["cgroup"] is None:
        return f"NOT enforced: no memory cgroup ({document['cgroup_refusal']})"
    return f"enforced by a memory cgroup ({document['cgroup']})"


def _disk(document: dict[str, Any]) -> str:
    probe, limit = document["disk_probe"], document["disk_limit"]
    parts = []
    if limit is not None:
        speed = format_size(limit["bytes_per_s"])
        parts.append(f"reads throttled to {speed}/s by a cgroup ({limit['cgroup']})")
    if probe is not None:
        how = "direct" if probe["direct"] else "buffered, cold"
        parts.append(
            f"ceiling {format_size(document['disk_bytes_per_s'])}/s ({how} reads of "
            f"{format_size(probe['read_bytes'])} in {probe['lanes']} lanes)"
        )
    else:
        parts.append("ceiling not measured: the probe failed")
    return "; ".join(parts)


def speed_of(result: Mapping[str, float]) -> float:
    """Tokens per second that a run, or the median of several, is compared by."""
    return result["decode_tps" if "decode_tps" in result else "prefill_tps"]


def is_group(row: dict[str, Any]) -> bool:
    """Whether it is one of several sequences."""
    return ":" in str(row["row"]).partition("@")[0]


def is_capped(document: dict[str, Any], row: dict[str, Any]) -> bool:
    """Ours keep to a budget by themselves, stock only inside a cgroup."""
    return bool(row["capped"] and (document["cgroup"] or row["policy"]))


def remarks(document: dict[str, Any]) -> list[str]:
    """What the table does not say by itself."""
    rows = document["rows"]
    lines = []
    free = [row["row"] for row in rows if row["runs"] and not is_capped(document, row)]
    if free:
        lines.append(f"without the cap: {', '.join(free)}")
    planned = document["settings"]["n_predict"]
    for row in rows:
        done = [
            run["answer_tokens"] / run["sequences"]
            if is_group(row)
            else run["warm_up_tokens"] + run["decode_tokens"]
            for run in row["runs"]
            if not row["row"].partition("@")[0].endswith(":score")
        ]
        if short := [run for run, n in zip(row["runs"], done, strict=False) if n < planned]:
            name = "answer_tokens" if is_group(row) else "decode_tokens"
            counted = ", ".join(str(run[name]) for run in short)
            limit = document["settings"][f"{'group_' if is_group(row) else ''}decode_limit_s"]
            lines.append(
                f"{row['row']}: decoding cut off after {limit:.0f} s, {counted} tokens counted"
            )
    same: dict[str, list[str]] = {}
    for row in rows:
        if row["identical"] and row["row"] != row["reference"]:
            same.setdefault(row["reference"], []).append(row["row"])
    for reference, names in same.items():
        lines.append(f"same greedy tokens as {reference}: {', '.join(names)}")
    bounded = [row for row in rows if row["of_bound"] is not None]
    if bounded:
        speed = format_size(document["disk_best_bytes_per_s"])
        reads = f"the row's reads at {speed}/s, the fastest the disk was found"
        whole = dict.fromkeys(row["bound_row"] for row in bounded if row["bound_row"])
        both = f"the slower of the time per token of {' or '.join(whole)} and {reads}"
        lines.append(f"bound: {both if whole else reads}")
    limit, measured = document["disk_limit"], document["disk_bytes_per_s"]
    if limit is not None and measured is not None and measured > HELD * limit["bytes_per_s"]:
        lines.append("the throttle did NOT hold: the disk's ceiling is above it")
    drawn = next(
        (run["timeline"] for row in rows for run in row["runs"][-1:] if "timeline" in run), None
    )
    if drawn is not None:
        lines.append(f"timeline: {drawn}")
    if document["interrupted"]:
        lines.append("interrupted: rows have fewer runs than planned")
    return lines
