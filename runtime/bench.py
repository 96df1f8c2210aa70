"""Benchmark rows, turn about: stock llama.cpp against our policies under memory caps.

Owns the rounds and the result document. Each run is a fresh process (``bench_row``) behind a
dropped page cache, capped rows in a memory cgroup of their own, each where permitted, all at the
disk speed asked for; the document says what was. Knows neither the terminal nor how results are
shown (``bench_report``, ``bench_plot``).
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from moe_gguf.policies.presets import POLICIES
from moe_gguf.runtime import bench_plot, bench_report, cgroup
from moe_gguf.runtime.bench_report import HELD
from moe_gguf.runtime.bench_row import DECODE_LIMIT_S, N_BATCH, Spec
from moe_gguf.runtime.budget import MARGIN_BYTES, auto_size, format_size, parse_size
from moe_gguf.runtime.cgroup import Limits
from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.gguf_header import GGML_TYPES
from moe_gguf.runtime.layout import PAGE, ModelLayout, read_layout, slot_layout
from moe_gguf.runtime.routing import routing_path

SCHEMA = 2
# A run that takes longer hangs, or thrashes beyond what is worth measuring.
RUN_LIMIT_S = 1800.0
LEFT_OUT = "left out"  # how the failure of a row that was never tried begins
# Of a process beside its weights; only decides whether an uncapped row may be tried at all.
_PROCESS_BYTES = 2 * 10**9
_CGROUP_PROBE_BYTES = 64 * 2**20


class Row(NamedTuple):
    """What a name on ``--rows`` means."""

    policy: str | None  # None: stock llama.cpp
    mmap: bool
    capped: bool
    repack: bool = False  # stock only; ours follow the model
    low: bool = False  # with the lossy options given


ROWS = {
    "stock-mmap": Row(None, mmap=True, capped=True),
    "stock-resident": Row(None, mmap=False, capped=False),
    "stock-repacked": Row(None, mmap=False, capped=False, repack=True),
    "resident": Row("lru", mmap=False, capped=False),
    **{name: Row(name, mmap=False, capped=True) for name in POLICIES},
    **{f"{name}+low": Row(name, mmap=False, capped=True, low=True) for name in POLICIES},
}


def row_of(name: str) -> Row:
    """What a name on ``--rows`` means; behind an @ it names another form of the model."""
    return ROWS[name.partition("@")[0]]


@dataclass(frozen=True)
class Outcome:
    """The result document, and what it means for the exit code."""

    document: dict[str, Any]
    errors: list[str]
    interrupted: bool


class Case(NamedTuple):
    """One row under one cap; None for the rows that have none and run once for all caps."""

    name: str
    cap: int | None


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
    warm: bool = False,
    disk_bw: str | None = None,
    json_file: str | None = None,
    plot_file: str | None = None,
    layers_file: str | None = None,
    timeline_file: str | None = None,
    timeline_row: str | None = None,
    low_share: float = 0.0,
    low_on_miss: bool = False,
    note: Callable[[str], None],
) -> Outcome:
    """Run every row ``repeat`` times under every cap, in turn, and write the files asked for.

    With one cap the document holds its results (see ``_results``); with several they are the items
    of ``sweep``, and each of them merged into the document is what one cap alone would give.

    With ``warm`` our rows start from the statistics beside the model, which must exist.
    ``note`` receives progress, a line at a time. Whatever cannot work is a UserError before the
    first run: names, sizes, a cap too small for our engine, files that cannot be written. Ctrl-C
    keeps the runs that finished; before the first it is raised.
    """
    forms = {name: Path(form or path).absolute() for name, form in _row_names(rows).items()}
    names = list(forms)
    caps = _caps(memory)
    if any(row_of(name).low for name in names) != (low_share > 0 or low_on_miss):
        raise UserError(
            "--low-share and --low-on-miss are for rows that end in +low, like lru+low: give both "
            "such a row and one of the options, or neither"
        )
    if repeat < 1 or n_predict < 1 or prompt_tokens < 1:
        raise UserError("--repeat, -n and --prompt-tokens must be at least 1")
    for file in (json_file, plot_file, layers_file, timeline_file):
        if file is not None and not Path(file).absolute().parent.is_dir():
            raise UserError(f"cannot write {file}: its folder does not exist")
    if plot_file is not None or layers_file is not None:
        bench_plot.require()
    timeline_of = None if timeline_file is None else _timeline_row(timeline_row, names)
    layout = read_layout(path)
    layouts = {form: read_layout(form) for form in forms.values()}
    for name, form in forms.items():
        if row_of(name).policy is None and form.is_dir():
            raise UserError(
                f"{name}: stock llama.cpp does not open bundles; name a GGUF behind an @"
            )
    files = [file for form in layouts.values() for file in form.files]
    if warm and not (statistics_file := routing_path(path)).exists():
        raise UserError(
            f"{statistics_file} does not exist: moe-gguf trace --save-routing makes it for --warm"
        )
    n_ctx = n_ctx or layout.n_ctx_train
    if prompt_tokens + n_predict > n_ctx:
        raise UserError(
            f"{prompt_tokens} prompt tokens and {n_predict} decoded ones do not fit a context of "
            f"{n_ctx}: raise --ctx"
        )

    def spec(case: Case) -> Spec:
        row, form = row_of(case.name), forms[case.name]
        drawn = case.name == timeline_of and case.cap in (caps[0], None)
        return Spec(
            model=str(form),
            policy=row.policy,
            mmap=row.mmap,
            repack=row.repack,
            memory=case.cap or _memory_for_all(layouts[form]),
            n_predict=n_predict,
            prompt_tokens=prompt_tokens,
            n_ctx=n_ctx,
            threads=threads,
            reads=reads,
            lanes=lanes,
            warm=warm,
            fill=not row.capped,
            timeline=str(Path(timeline_file).absolute()) if drawn and timeline_file else None,
            low_share=low_share if row.low else 0.0,
            low_on_miss=low_on_miss and row.low,
        )

    specs = {case: spec(case) for case in _cases(names, caps)}
    no_cgroup = cgroup.refusal(Limits(memory=_CGROUP_PROBE_BYTES))
    disk_limit = _disk_limit(disk_bw, files)
    page_cache = drop_page_cache(files)
    _check_opens(specs)
    document = {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **_versions(),
        "machine": _machine(),
        "model": _model(layout),
        "cgroup": f"v{cgroup.places()[0]}" if no_cgroup is None else None,
        "cgroup_refusal": no_cgroup,
        "disk_limit": None
        if disk_limit is None
        else {**disk_limit._asdict(), "cgroup": f"v{cgroup.places('disk')[0]}"},
        "page_cache": page_cache,
        "stock": "use_extra_bufts=False (weight repacking off) but in stock-repacked",
        "settings": {
            "repeat": repeat,
            "n_predict": n_predict,
            "prompt_tokens": prompt_tokens,
            "n_ctx": n_ctx,
            "n_batch": N_BATCH,
            "reads": reads,
            "lanes": lanes,
            "warm": warm,
            "low_share": low_share,
            "low_on_miss": low_on_miss,
            "decode_limit_s": DECODE_LIMIT_S,
        },
    }
    runs: dict[Case, list[Run]] = {case: [] for case in specs}
    probes: list[Run] = []
    interrupted = False
    try:
        for turn in range(repeat):
            drop_page_cache(files)
            probes.append(_probe_disk(specs, probes, disk_limit))
            for i, case in enumerate(specs):
                if any(run.failure for run in runs[case]):
                    continue  # it would fail again
                drop_page_cache(files)
                limits = Limits(case.cap if no_cgroup is None else None, disk_limit)
                run = _run_row(specs[case], limits, layouts[forms[case.name]])
                runs[case].append(run)
                said = run.failure or f"{run.result['decode_tps']:.2f} tok/s"
                at = f" in {format_size(case.cap)}" if len(caps) > 1 and case.cap else ""
                where = f"round {turn + 1} of {repeat}, row {i + 1} of {len(specs)}"
                note(f"{where}: {case.name}{at}: {said}")
    except KeyboardInterrupt:
        if not any(runs.values()):
            raise
        interrupted = True
    document["interrupted"] = interrupted
    document |= _probed(probes, disk_limit)
    points = []
    for cap in caps:
        of_cap = {name: runs[Case(name, cap if row_of(name).capped else None)] for name in names}
        points.append(_results(of_cap, cap, document["disk_bytes_per_s"], disk_limit is not None))
    document |= {"sweep": points} if len(points) > 1 else points[0]
    if json_file is not None:
        Path(json_file).write_text(json.dumps(document, indent=1) + "\n")
    if plot_file is not None:
        bench_plot.speed(document, Path(plot_file))
    if layers_file is not None:
        bench_plot.layers(document, Path(layers_file))
    return Outcome(document, _errors(document), interrupted)


# --- before the first run -----------------------------------------------------------------------


def _row_names(rows: str) -> dict[str, str]:
    """The rows' names, and behind an @ the other form of the model each runs; "" for MODEL itself.

    A row is called after the last part of a form's path.
    """
    names: dict[str, str] = {}
    for text in (text.strip() for text in rows.split(",")):
        name, _, form = text.partition("@")
        if text and name not in ROWS:
            raise UserError(f"there is no row {name!r}: choose from {', '.join(ROWS)}")
        if text:
            names[f"{name}@{Path(form).name}" if form else name] = form
    if not names:
        raise UserError(f"no rows are named: choose from {', '.join(ROWS)}")
    return names


def _caps(memory: str) -> list[int]:
    texts = [text.strip() for text in memory.split(",") if text.strip()]
    if not texts or "auto" in texts:
        raise UserError("bench compares under a fixed cap: give --memory a size like 2.4GB")
    return list(dict.fromkeys(parse_size(text) for text in texts))


def _cases(names: Sequence[str], caps: Sequence[int]) -> list[Case]:
    """In the order of a round; rows without a cap come up with the first one."""
    return list(
        dict.fromkeys(
            Case(name, cap if row_of(name).capped else None) for cap in caps for name in names
        )
    )


def _timeline_row(asked: str | None, names: Sequence[str]) -> str:
    """The row to draw: the last of ours unless one is named."""
    ours = [name for name in names if row_of(name).policy is not None]
    if asked is not None and asked not in ours:
        raise UserError(f"--timeline-row {asked}: name a row of ours that runs ({', '.join(ours)})")
    if not ours:
        raise UserError("--timeline shows our engine: add a row of it to --rows")
    return asked or ours[-1]


def _disk_limit(disk_bw: str | None, files: Sequence[Path]) -> cgroup.DiskLimit | None:
    """The limit asked for, tried out: a run at another speed than the table says is worthless."""
    if disk_bw is None:
        return None
    speed = parse_size(disk_bw.removesuffix("/s"), "a disk speed")
    try:
        limit = cgroup.DiskLimit(cgroup.disks_of(files), speed)
    except OSError as error:
        raise UserError(f"--disk-bw cannot be kept to ({error}): leave it out") from None
    if reason := cgroup.refusal(Limits(disk=limit)):
        raise UserError(
            f"--disk-bw cannot be kept to (no disk cgroup can be made: {reason}): run as root, or "
            "leave it out"
        )
    return limit


def _memory_for_all(layout: ModelLayout) -> int:
    """A budget in which every expert has a slot."""
    n_all = len(layout.layers) * layout.n_experts
    slots = n_all * slot_layout(layout, PAGE).slot_bytes
    return layout.trunk_bytes + slots + _PROCESS_BYTES + MARGIN_BYTES


def _check_opens(specs: Mapping[Case, Spec]) -> None:
    """Raise what our engine says to the smallest cap, before hours are spent on other rows."""
    ours = [spec for case, spec in specs.items() if case.cap and spec.policy is not None]
    if not ours:
        return
    smallest = min(ours, key=lambda spec: spec.memory)
    run = run_process(_command(replace(smallest, open_only=True)), None)
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


def _probe_disk(
    specs: Mapping[Case, Spec], before: Sequence[Run], limit: cgroup.DiskLimit | None
) -> Run:
    """What the disk gives now, with the lanes of the first probe; see ``disk.ceiling``."""
    lanes = next((run.result["lanes"] for run in before if run.failure is None), None)
    spec = next(iter(specs.values()))
    spec = replace(spec, probe_only=True, lanes=lanes or spec.lanes)
    return _run_limited(_command(spec), Limits(disk=limit))


def _run_row(spec: Spec, limits: Limits, layout: ModelLayout) -> Run:
    if spec.fill:  # all of the model will be in memory
        needed = layout.file_bytes
        free = auto_size()
        if needed > free:
            return Run({}, f"{LEFT_OUT}: needs {format_size(needed)}, {format_size(free)} is free")
    return _run_limited(_command(spec), limits)


def _run_limited(command: Sequence[str], limits: Limits) -> Run:
    if limits == Limits():
        return run_process(command, None)
    try:
        with cgroup.limited(limits) as group:
            run = run_process(command, group)
            if run.failure is None and limits.memory is not None:
                run.result["cgroup_peak_bytes"] = group.peak_bytes()
            return run
    except OSError as error:
        return Run({}, f"failed: {error}")


def run_process(
    command: Sequence[str], group: cgroup.Group | None, limit_s: float = RUN_LIMIT_S
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


def _probed(probes: Sequence[Run], limit: cgroup.DiskLimit | None) -> dict[str, Any]:
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


def _results(
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


def _errors(document: dict[str, Any]) -> list[str]:
    """Broken promises: same tokens, hard budget, our rows run. What stock suffers is a result."""
    errors = []
    for point in bench_report.points(document):
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
