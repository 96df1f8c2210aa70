"""Benchmark rows, turn about: stock llama.cpp against our policies under one memory cap.

Owns the rounds and the result document. Each run is a fresh process (``bench_row``) behind a
dropped page cache, capped rows in a memory cgroup of their own, each where permitted; the
document says what was. Knows neither the terminal nor how results are shown (``bench_report``).
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from moe_gguf.policies.presets import POLICIES
from moe_gguf.runtime import bench_report, cgroup
from moe_gguf.runtime.bench_row import DECODE_LIMIT_S, N_BATCH, Spec
from moe_gguf.runtime.budget import MARGIN_BYTES, auto_size, format_size, parse_size
from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.gguf_header import GGML_TYPES
from moe_gguf.runtime.layout import PAGE, ModelLayout, read_layout, slot_layout

SCHEMA = 1
# A run that takes longer hangs, or thrashes beyond what is worth measuring.
RUN_LIMIT_S = 1800.0
LEFT_OUT = "left out"  # how the failure of a row that was never tried begins
# Of a process beside its weights; only decides whether an uncapped row may be tried at all.
_PROCESS_BYTES = 2 * 10**9


class Row(NamedTuple):
    """What a name on ``--rows`` means."""

    policy: str | None  # None: stock llama.cpp
    mmap: bool
    capped: bool


ROWS = {
    "stock-mmap": Row(None, mmap=True, capped=True),
    "stock-resident": Row(None, mmap=False, capped=False),
    "resident": Row("lru", mmap=False, capped=False),
    **{name: Row(name, mmap=False, capped=True) for name in POLICIES},
}


@dataclass(frozen=True)
class Outcome:
    """The result document, and what it means for the exit code."""

    document: dict[str, Any]
    errors: list[str]
    interrupted: bool


class Run(NamedTuple):
    """What came of one process: its result, or why there is none."""

    result: dict[str, Any]
    failure: str | None


def bench(
    path: Path,
    *,
    memory: str,
    rows: str,
    repeat: int,
    n_predict: int,
    prompt_tokens: int,
    n_ctx: int,
    threads: int | None,
    reads: str,
    lanes: int | None,
    json_file: str | None,
    plot_file: str | None,
    note: Callable[[str], None],
) -> Outcome:
    """Run every row ``repeat`` times, in turn, and write the files asked for.

    ``note`` receives progress, a line at a time. Whatever cannot work is a UserError before the
    first run: names, sizes, a cap too small for our engine, files that cannot be written. Ctrl-C
    keeps the runs that finished; before the first it is raised.
    """
    names = _row_names(rows)
    cap = _cap(memory)
    if repeat < 1 or n_predict < 1 or prompt_tokens < 1:
        raise UserError("--repeat, -n and --prompt-tokens must be at least 1")
    for file in (json_file, plot_file):
        if file is not None and not Path(file).absolute().parent.is_dir():
            raise UserError(f"cannot write {file}: its folder does not exist")
    if plot_file is not None:
        bench_report.require_plot()
    layout = read_layout(path)
    n_ctx = n_ctx or layout.n_ctx_train
    if prompt_tokens + n_predict > n_ctx:
        raise UserError(
            f"{prompt_tokens} prompt tokens and {n_predict} decoded ones do not fit a context of "
            f"{n_ctx}: raise --ctx"
        )

    def spec(name: str) -> Spec:
        row = ROWS[name]
        return Spec(
            model=str(path.absolute()),
            policy=row.policy,
            mmap=row.mmap,
            memory=cap if row.capped else _memory_for_all(layout),
            n_predict=n_predict,
            prompt_tokens=prompt_tokens,
            n_ctx=n_ctx,
            threads=threads,
            reads=reads,
            lanes=lanes,
            fill=not row.capped,
        )

    specs = {name: spec(name) for name in names}
    no_cgroup = cgroup.refusal()
    page_cache = drop_page_cache(layout.files)
    _check_opens(names, specs)
    document = {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **_versions(),
        "machine": _machine(),
        "model": _model(layout),
        "memory_bytes": cap,
        "cgroup": f"v{cgroup.places()[0]}" if no_cgroup is None else None,
        "cgroup_refusal": no_cgroup,
        "page_cache": page_cache,
        "stock": "use_extra_bufts=False (weight repacking off, as ours)",
        "settings": {
            "repeat": repeat,
            "n_predict": n_predict,
            "prompt_tokens": prompt_tokens,
            "n_ctx": n_ctx,
            "n_batch": N_BATCH,
            "reads": reads,
            "lanes": lanes,
            "decode_limit_s": DECODE_LIMIT_S,
        },
    }
    runs: dict[str, list[Run]] = {name: [] for name in names}
    interrupted = False
    try:
        for turn in range(repeat):
            for i, name in enumerate(names):
                if any(run.failure for run in runs[name]):
                    continue  # it would fail again
                drop_page_cache(layout.files)
                group_bytes = cap if ROWS[name].capped and no_cgroup is None else None
                run = _run_row(name, specs[name], group_bytes, layout)
                runs[name].append(run)
                said = run.failure or f"{run.result['decode_tps']:.2f} tok/s"
                note(f"round {turn + 1} of {repeat}, row {i + 1} of {len(names)}: {name}: {said}")
    except KeyboardInterrupt:
        if not any(runs.values()):
            raise
        interrupted = True
    document["interrupted"] = interrupted
    document.update(_results(runs, cap))
    outcome = Outcome(document, _errors(document), interrupted)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(document, indent=1) + "\n")
    if plot_file is not None:
        bench_report.plot(document, Path(plot_file))
    return outcome


# --- before the first run -----------------------------------------------------------------------


def _row_names(rows: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in rows.split(",") if name.strip()))
    unknown = [name for name in names if name not in ROWS]
    if unknown or not names:
        what = f"there is no row {unknown[0]!r}" if unknown else "no rows are named"
        raise UserError(f"{what}: choose from {', '.join(ROWS)}")
    return names


def _cap(memory: str) -> int:
    if memory.strip() == "auto":
        raise UserError("bench compares under one fixed cap: give --memory a size like 2.4GB")
    return parse_size(memory)


def _memory_for_all(layout: ModelLayout) -> int:
    """A budget in which every expert has a slot."""
    n_all = len(layout.layers) * layout.n_experts
    slots = n_all * slot_layout(layout, PAGE).slot_bytes
    return layout.trunk_bytes + slots + _PROCESS_BYTES + MARGIN_BYTES


def _check_opens(names: Sequence[str], specs: dict[str, Spec]) -> None:
    """Raise what our engine says to the cap, before hours are spent on the other rows."""
    name = next((n for n in names if ROWS[n].capped and ROWS[n].policy is not None), None)
    if name is None:
        return
    spec = Spec(**{**asdict(specs[name]), "open_only": True})
    run = run_process(_command(spec), None)
    if "error" in run.result:
        raise UserError(run.result["error"])


def drop_page_cache(files: Sequence[Path]) -> str:
    """Make the next read of ``files`` come from disk as far as permitted; says how it was done."""
    with contextlib.suppress(OSError):  # pages not written yet cannot be dropped
        _each(files, os.fsync)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
        return "dropped before each run (drop_caches)"
    except OSError:
        pass
    if not hasattr(os, "posix_fadvise"):
        return "not dropped (this system offers no way)"
    try:
        _each(files, lambda fd: os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED))
    except OSError as error:
        return f"not dropped ({error.strerror})"
    return "dropped for the model's files before each run (posix_fadvise)"


def _each(files: Sequence[Path], action: Callable[[int], object]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            action(descriptor)
        finally:
            os.close(descriptor)


# --- one run ------------------------------------------------------------------------------------


def _command(spec: Spec) -> list[str]:
    return [sys.executable, "-m", "moe_gguf.runtime.bench_row", json.dumps(asdict(spec))]


def _run_row(name: str, spec: Spec, group_bytes: int | None, layout: ModelLayout) -> Run:
    if not ROWS[name].capped:
        needed = layout.file_bytes
        free = auto_size()
        if needed > free:
            return Run({}, f"{LEFT_OUT}: needs {format_size(needed)}, {format_size(free)} is free")
    if group_bytes is None:
        return run_process(_command(spec), None)
    try:
        with cgroup.memory_cgroup(group_bytes) as group:
            run = run_process(_command(spec), group)
            if run.failure is None:
                run.result["cgroup_peak_bytes"] = group.peak_bytes()
            return run
    except OSError as error:
        return Run({}, f"failed: {error}")


def run_process(
    command: Sequence[str], group: cgroup.MemoryCgroup | None, limit_s: float = RUN_LIMIT_S
) -> Run:
    """Run ``command``; its last line of stdout is the result. Any end but a good one is a failure
    in words: the caller's other rows go on."""
    inside = list(command) if group is None else group.command(command)
    # Not the user's folder: with -m it leads sys.path, and may be a source tree of this package.
    with subprocess.Popen(
        inside, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace", cwd=sys.prefix,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            return Run({}, f"stopped after {limit_s:.0f} s")
        except BaseException:
            process.kill()
            raise
    code = process.returncode
    if code < 0 or code > 128:  # by itself, or as the shell reports it
        number = -code if code < 0 else code - 128
        kills = group.oom_kills() if group is not None else None
        if number == signal.SIGKILL and kills != 0:
            surely = "" if kills else "probably "  # without a cgroup nobody counts
            return Run({}, f"killed ({surely}out of memory)")
        return Run({}, f"killed ({_signal_name(number)})")
    try:
        result = json.loads(out.splitlines()[-1])
        assert isinstance(result, dict)
    except (IndexError, ValueError, AssertionError):
        said = err.strip().splitlines()
        return Run({}, f"failed: {said[-1] if said else f'exit code {code}'}")
    if "error" in result:
        return Run(result, f"failed: {result['error']}")
    return Run(result, None)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# --- the document -------------------------------------------------------------------------------


def _results(runs: dict[str, list[Run]], cap: int) -> dict[str, Any]:
    """The part of the document that follows from the runs."""
    tokens = {
        name: [run.result["tokens"] for run in done if run.failure is None]
        for name, done in runs.items()
    }
    told = [name for name in tokens if tokens[name]]
    reference = "stock-resident" if "stock-resident" in told else next(iter(told), None)
    rows = []
    for name, done in runs.items():
        good = [run.result for run in done if run.failure is None]
        row: dict[str, Any] = {
            "row": name,
            "policy": ROWS[name].policy,
            "capped": ROWS[name].capped,
            "failure": next((run.failure for run in done if run.failure), None),
            "identical": None,
            "median": _medians(good),
            "runs": [{k: v for k, v in result.items() if k != "tokens"} for result in good],
        }
        if reference is not None and good:
            row["identical"] = all(same_start(t, tokens[reference][0]) for t in tokens[name])
        if ROWS[name].capped and good:
            row["within_cap"] = max(result["rss_peak_bytes"] for result in good) <= cap
        rows.append(row)
    speed = {row["row"]: row["median"].get("decode_tps") for row in rows if not row["failure"]}
    for row in rows:
        for other, key in (("stock-mmap", "x_stock_mmap"), ("stock-resident", "of_stock_resident")):
            mine, base = speed.get(row["row"]), speed.get(other)
            row[key] = mine / base if mine and base else None
    threads = next((r["threads"] for row in rows for r in row["runs"]), None)
    return {
        "threads": threads,
        "reference": reference,
        "reference_tokens": tokens[reference][0] if reference is not None else [],
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


def _errors(document: dict[str, Any]) -> list[str]:
    """Broken promises: same tokens, hard budget, our rows run. What stock suffers is a result."""
    errors = []
    for row in document["rows"]:
        name, failure, ours = row["row"], row["failure"], row["policy"] is not None
        if row["identical"] is False:
            errors.append(f"{name} generated other tokens than {document['reference']}")
        if ours and row.get("within_cap") is False:
            peak = format_size(row["median"]["rss_peak_bytes"])
            errors.append(f"{name} peaked at {peak}, over the cap")
        if ours and failure and not failure.startswith(LEFT_OUT):
            errors.append(f"{name}: {failure}")
    return errors


def _versions() -> dict[str, Any]:
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


def _machine() -> dict[str, Any]:
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


def _model(layout: ModelLayout) -> dict[str, Any]:
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
