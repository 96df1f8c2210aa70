"""Benchmark rows, turn about: stock llama.cpp against our policies under memory caps.

Owns the order of runs and the result document. Each run is a fresh process (``row``) behind a
dropped page cache, capped rows in a memory cgroup of their own, each where permitted, all at the
disk speed asked for; the document says what was. Knows neither the terminal nor how results are
shown (``report``, ``plot``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..sizes import format_size
from . import cgroup, group, plot
from .cases import Case
from .cgroup import Limits
from .process import Run, drop_page_cache, probe_disk, row_command, run_process, run_row
from .report import speed_of
from .request import NO_OPTIONS, Job, Request, check
from .results import Point, disk_facts, errors_of, machine_facts, model_facts, point_of, versions
from .row import DECODE_LIMIT_S, N_BATCH
from .spec import PLANNED

SCHEMA = 2
_CGROUP_PROBE_BYTES = 64 * 2**20

Note = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """The result document, and what it means for the exit code."""

    document: dict[str, Any]
    errors: list[str]
    interrupted: bool


@dataclass
class Rounds:
    """What has been run so far."""

    runs: dict[Case, list[Run]]
    probes: list[Run] = field(default_factory=list)
    interrupted: bool = False


def bench(request: Request, note: Note) -> Outcome:
    """Run every row ``repeat`` times under every cap, in turn, and write the files asked for.

    With one cap the document holds its results (see ``results.point_of``); with several they are
    the items of ``sweep``, and each of them merged into the document is what one cap alone would
    give.

    With the option ``warm`` our rows start from the statistics beside the model, which must exist.
    ``note`` receives progress, a line at a time. Whatever cannot work is a UserError before the
    first run: names, sizes, a cap too small for our engine, files that cannot be written. Ctrl-C
    keeps the runs that finished; before the first it is raised.
    """
    job = check(request)
    no_cgroup = cgroup.refusal(Limits(memory=_CGROUP_PROBE_BYTES))
    document = _conditions(job, no_cgroup)
    _check_opens(job)
    _measure(job, no_cgroup is None, note)
    rounds = _run(job, no_cgroup is None, note)
    points = _points(job, rounds, document)
    _write(document, request)
    return Outcome(document, errors_of(points), rounds.interrupted)


def _check_opens(job: Job) -> None:
    """Raise what our engine says to the smallest cap, before hours are spent on other rows."""
    # A group too large for a cap is a result.
    ours = [c for c, spec in job.specs.items() if c.cap and not spec.stock and not spec.sequences]
    if not ours:
        return
    smallest = min(ours, key=lambda case: case.cap or 0)
    run = run_process(row_command(replace(job.specs[smallest], open_only=True)), None)
    if "error" in run.result:
        raise UserError(run.result["error"])


def _measure(job: Job, with_cgroup: bool, note: Note) -> None:
    """Open what is planned, as it will run: a model that was never measured here is, and the
    planner's figures are remembered."""
    seen = set()
    for case, spec in job.specs.items():
        what = (spec.model, case.cap, spec.options.policy)
        if spec.stock or spec.way not in PLANNED or what in seen:
            continue
        seen.add(what)
        note(f"planning for {case.name}")
        limits = Limits(case.cap if with_cgroup else None, job.disk_limit)
        run_row(replace(spec, open_only=True), limits, job.forms[case.name])


def _run(job: Job, with_cgroup: bool, note: Note) -> Rounds:
    """All rounds, or as many as Ctrl-C leaves."""
    rounds = Rounds({case: [] for case in job.specs})
    try:
        for turn in range(job.request.repeat):
            drop_page_cache(job.files)
            rounds.probes.append(probe_disk(job.specs, rounds.probes, job.disk_limit))
            for i, (case, spec) in enumerate(job.specs.items()):
                if any(run.failure for run in rounds.runs[case]):
                    continue  # it would fail again
                drop_page_cache(job.files)
                limits = Limits(case.cap if with_cgroup else None, job.disk_limit)
                run = run_row(spec, limits, job.forms[case.name])
                rounds.runs[case].append(run)
                speed = run.failure or f"{speed_of(run.result):.2f} tok/s"
                at = f" in {format_size(case.cap)}" if len(job.caps) > 1 and case.cap else ""
                where = f"round {turn + 1} of {job.request.repeat}, row {i + 1} of {len(job.specs)}"
                note(f"{where}: {case.name}{at}: {speed}")
    except KeyboardInterrupt:
        if not any(rounds.runs.values()):
            raise
        rounds.interrupted = True
    return rounds


def _conditions(job: Job, no_cgroup: str | None) -> dict[str, Any]:
    """The document's first part: everything the numbers depend on."""
    request, options = job.request, job.request.options.arguments()
    limit = job.disk_limit
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **versions(),
        "machine": machine_facts(),
        "model": model_facts(job.layout),
        "cgroup": f"v{cgroup.places()[0]}" if no_cgroup is None else None,
        "cgroup_refusal": no_cgroup,
        "disk_limit": limit and {**limit._asdict(), "cgroup": f"v{cgroup.places('disk')[0]}"},
        "page_cache": drop_page_cache(job.files),
        "stock": "use_extra_bufts=False (weight repacking off) but in stock-repacked",
        "settings": {
            "repeat": request.repeat,
            "n_predict": request.n_predict,
            "prompt_tokens": request.prompt_tokens,
            "n_ctx": request.n_ctx,
            "n_batch": N_BATCH,
            **{name: value for name, value in options.items() if name not in NO_OPTIONS},
            "decode_limit_s": DECODE_LIMIT_S,
            "group_decode_limit_s": group.DECODE_LIMIT_S,
        },
    }


def _points(job: Job, rounds: Rounds, document: dict[str, Any]) -> list[Point]:
    """What follows from the runs, one point per cap; added to the document."""
    document["interrupted"] = rounds.interrupted
    document |= disk_facts(rounds.probes, job.disk_limit)
    points = []
    for cap in job.caps:
        runs = {name: rounds.runs[Case.of(name, cap)] for name in job.forms}
        throttled = job.disk_limit is not None
        points.append(point_of(runs, cap, document["disk_bytes_per_s"], throttled))
    if len(points) > 1:
        document["sweep"] = [point.document() for point in points]
    else:
        document |= points[0].document()
    return points


def _write(document: dict[str, Any], request: Request) -> None:
    if request.json_file is not None:
        Path(request.json_file).write_text(json.dumps(document, indent=1) + "\n")
    if request.plot_file is not None:
        plot.speed(document, Path(request.plot_file))
    if request.layers_file is not None:
        plot.layers(document, Path(request.layers_file))
