"""The result document: what follows from the runs."""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from ..formats.ggml_types import GGML_TYPES
from ..formats.layout import ModelLayout
from ..sizes import format_size
from . import cgroup, report
from .cases import row_of
from .process import LEFT_OUT, Run
from .report import HELD

# --- the document -------------------------------------------------------------------------------


def probed_disk(probes: Sequence[Run], limit: cgroup.DiskLimit | None) -> dict[str, Any]:
    """The disk's ceiling: the median of the rounds' probes, and how it was measured."""
    good = [run.result for run in probes if run.failure is None]
    samples = [result["bytes_per_s"] for result in good]
    ceiling = statistics.median(samples) if samples else None
    if ceiling is not None and limit is not None and ceiling <= HELD * limit.bytes_per_s:
        # A throttle lets short bursts pass, which a probe sees and a row does not live on.
        ceiling = min(ceiling, float(limit.bytes_per_s))
    return {
        "disk_bytes_per_s": ceiling,
        "disk_probe": {**good[0], "bytes_per_s": samples} if good else None,
    }


def results_of(
    runs: dict[str, list[Run]],
    cap: int,
    disk_bytes_per_s: float | None = None,
    throttled: bool = False,
) -> dict[str, Any]:
    """What follows from the runs under one cap.

    Rows are compared with rows on the same kernels: plain ones, or those that want weights
    repacked, which sum in another order. Lossy rows are compared with none.

    ``bound_tps`` of a row is the decode speed that neither processor nor disk lets it pass,
    1 / max(compute, bytes_per_token / disk), and ``of_bound`` how much of it the row reached.
    Compute is the time per token of a row with every expert in memory; without one the disk alone
    bounds. The disk is taken to be as fast as in the probe, or as any row found it while it read.
    """
    tokens = {
        name: [run.result["tokens"] for run in done if run.failure is None]
        for name, done in runs.items()
    }
    told = [name for name in tokens if tokens[name]]
    kernels = {name: runs[name][0].result.get("kernels", "plain") for name in told}

    def first(candidates: Iterable[str], alike: str) -> str | None:
        """The first of these rows that ran on the same kernels."""
        return next((n for n in candidates if n in told and kernels[n] == kernels[alike]), None)

    def reference(name: str) -> str | None:
        stock = [n for n in told if row_of(n).policy is None and not row_of(n).capped]
        return first([*stock, *(n for n in told if not row_of(n).low)], name)

    rows = []
    for name, done in runs.items():
        good = [run.result for run in done if run.failure is None]
        row: dict[str, Any] = {
            "row": name,
            "policy": row_of(name).policy,
            "capped": row_of(name).capped,
            "failure": next((run.failure for run in done if run.failure), None),
            "kernels": kernels.get(name),
            "reference": reference(name) if good and not row_of(name).low else None,
            "identical": None,
            "median": _medians(good),
            "runs": [{k: v for k, v in result.items() if k != "tokens"} for result in good],
        }
        if row["reference"] is not None:
            expected = tokens[row["reference"]][0]
            row["identical"] = all(same_start(t, expected) for t in tokens[name])
        if row_of(name).capped and good:
            row["within_cap"] = max(result["rss_peak_bytes"] for result in good) <= cap
        rows.append(row)
    speed = {row["row"]: row["median"].get("decode_tps") for row in rows if not row["failure"]}
    for row in rows:
        for other, key in (("stock-mmap", "x_stock_mmap"), ("stock-resident", "of_stock_resident")):
            mine, base = speed.get(row["row"]), speed.get(other)
            row[key] = mine / base if mine and base else None
    seen = [
        run["bytes_read"] / run["disk_s"] for r in rows for run in r["runs"] if run.get("disk_s")
    ]
    best = (
        max([disk_bytes_per_s, *seen]) if disk_bytes_per_s and not throttled else disk_bytes_per_s
    )
    for row in rows:
        read = row["median"].get("bytes_per_token")
        row["bound_row"] = row["bound_tps"] = row["of_bound"] = None
        if read is not None and best and not row["failure"]:
            whole = [n for n in told if not row_of(n).capped]
            ours = [n for n in whole if row_of(n).policy is not None]
            row["bound_row"] = first([*ours, *whole], row["row"])
            compute_s = 1 / speed[row["bound_row"]] if row["bound_row"] else 0.0
            token_s = max(compute_s, read / best)
            row["bound_tps"] = 1 / token_s if token_s else None
            row["of_bound"] = row["median"]["decode_tps"] * token_s if token_s else None
    threads = next((r["threads"] for row in rows for r in row["runs"]), None)
    return {
        "memory_bytes": cap,
        "threads": threads,
        "disk_best_bytes_per_s": best,
        "tokens": {name: tokens[name][0] for name in {r["reference"] for r in rows} if name},
        "rows": rows,
    }


def same_start(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two generations agree as far as both go: slow rows may have been cut short."""
    n = min(len(a), len(b))
    return list(a[:n]) == list(b[:n])


def _medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Of every number all runs report; of the peaks the greatest, since limits know no median."""
    if not runs:
        return {}
    numbers = {k for k, v in runs[0].items() if isinstance(v, int | float)}
    medians = {
        k: float(statistics.median(run[k] for run in runs))
        for k in sorted(numbers)
        if all(run.get(k) is not None for run in runs)
    }
    medians["rss_peak_bytes"] = float(max(run["rss_peak_bytes"] for run in runs))
    return medians


def errors_of(document: dict[str, Any]) -> list[str]:
    """Broken promises: same tokens, hard budget, our rows run. What stock suffers is a result."""
    errors = []
    for point in report.points(document):
        at = f" in {format_size(point['memory_bytes'])}" if "sweep" in document else ""
        for row in point["rows"]:
            name = row["row"] + at if row["capped"] else row["row"]
            failure, ours = row["failure"], row["policy"] is not None
            if row["identical"] is False:
                errors.append(f"{name} generated other tokens than {row['reference']}")
            if ours and row.get("within_cap") is False:
                peak = format_size(row["median"]["rss_peak_bytes"])
                errors.append(f"{name} peaked at {peak}, over the cap")
            if ours and failure and not failure.startswith(LEFT_OUT):
                errors.append(f"{name}: {failure}")
    return list(dict.fromkeys(errors))  # rows without a cap stand under each


def versions() -> dict[str, Any]:
    return {
        "moe_gguf": metadata.version("moe-gguf"),
        "llama_cpp_python": metadata.version("llama-cpp-python"),
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the source tree this runs from, marked if it was changed; None elsewhere."""
    source = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)  # not of a project we are installed into
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def machine_facts() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": cpu,
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "ram_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
    }


def model_facts(layout: ModelLayout) -> dict[str, Any]:
    types = {GGML_TYPES[t.ggml_type].name for layer in layout.layers for t in layer.tensors}
    return {
        "name": layout.name,
        "file": layout.path.name,
        "architecture": layout.architecture,
        "file_bytes": layout.file_bytes,
        "expert_bytes": layout.expert_bytes,
        "expert_types": sorted(types),
        "moe_layers": len(layout.layers),
        "experts": layout.n_experts,
        "experts_used": layout.n_experts_used,
    }
