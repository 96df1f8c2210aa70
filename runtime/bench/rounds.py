"""Benchmark rows, turn about: stock llama.cpp against our policies under memory caps.

Owns the rounds and the result document. Each run is a fresh process (``bench_row``) behind a
dropped page cache, capped rows in a memory cgroup of their own, each where permitted, all at the
disk speed asked for; the document says what was. Knows neither the terminal nor how results are
shown (``bench_report``, ``bench_plot``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..formats.open import read_layout
from ..history import routing_path
from ..sizes import format_size, parse_size
from . import cgroup, plot
from .cases import Case, cases_of, memory_for_all, parse_caps, row_names, row_of, timeline_row_of
from .cgroup import Limits
from .process import Run, drop_page_cache, probe_disk, row_command, run_process, run_row
from .results import errors_of, machine_facts, model_facts, probed_disk, results_of, versions
from .row import DECODE_LIMIT_S, N_BATCH, Spec

SCHEMA = 2
_CGROUP_PROBE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Outcome:
    """The result document, and what it means for the exit code."""

    document: dict[str, Any]
    errors: list[str]
    interrupted: bool


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

    With one cap the document holds its results (see ``results_of``); with several they are the
    items of ``sweep``, and each of them merged into the document is what one cap alone would give.

    With ``warm`` our rows start from the statistics beside the model, which must exist.
    ``note`` receives progress, a line at a time. Whatever cannot work is a UserError before the
    first run: names, sizes, a cap too small for our engine, files that cannot be written. Ctrl-C
    keeps the runs that finished; before the first it is raised.
    """
    forms = {name: Path(form or path).absolute() for name, form in row_names(rows).items()}
    names = list(forms)
    caps = parse_caps(memory)
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
        plot.require()
    timeline_of = None if timeline_file is None else timeline_row_of(timeline_row, names)
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
            memory=case.cap or memory_for_all(layouts[form]),
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

    specs = {case: spec(case) for case in cases_of(names, caps)}
    no_cgroup = cgroup.refusal(Limits(memory=_CGROUP_PROBE_BYTES))
    disk_limit = _disk_limit(disk_bw, files)
    page_cache = drop_page_cache(files)
    _check_opens(specs)
    document = {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **versions(),
        "machine": machine_facts(),
        "model": model_facts(layout),
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
            probes.append(probe_disk(specs, probes, disk_limit))
            for i, case in enumerate(specs):
                if any(run.failure for run in runs[case]):
                    continue  # it would fail again
                drop_page_cache(files)
                limits = Limits(case.cap if no_cgroup is None else None, disk_limit)
                run = run_row(specs[case], limits, layouts[forms[case.name]])
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
    document |= probed_disk(probes, disk_limit)
    points = []
    for cap in caps:
        of_cap = {name: runs[Case(name, cap if row_of(name).capped else None)] for name in names}
        points.append(results_of(of_cap, cap, document["disk_bytes_per_s"], disk_limit is not None))
    document |= {"sweep": points} if len(points) > 1 else points[0]
    if json_file is not None:
        Path(json_file).write_text(json.dumps(document, indent=1) + "\n")
    if plot_file is not None:
        plot.speed(document, Path(plot_file))
    if layers_file is not None:
        plot.layers(document, Path(layers_file))
    return Outcome(document, errors_of(document), interrupted)


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


def _check_opens(specs: Mapping[Case, Spec]) -> None:
    """Raise what our engine says to the smallest cap, before hours are spent on other rows."""
    ours = [spec for case, spec in specs.items() if case.cap and spec.policy is not None]
    if not ours:
        return
    smallest = min(ours, key=lambda spec: spec.memory)
    run = run_process(row_command(replace(smallest, open_only=True)), None)
    if "error" in run.result:
        raise UserError(run.result["error"])
