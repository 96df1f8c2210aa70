"""Runs one row in a process of its own, behind a dropped page cache."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..formats.layout import ModelLayout
from ..sizes import format_size
from ..system import auto_size
from . import cgroup
from .cases import Case
from .cgroup import Limits
from .row import Spec

# A run that takes longer hangs, or thrashes beyond what is worth measuring.
RUN_LIMIT_S = 1800.0
LEFT_OUT = "left out"  # how the failure of a row that was never tried begins


class Run(NamedTuple):
    """What came of one process: its result, or why there is none."""

    result: dict[str, Any]
    failure: str | None


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


def row_command(spec: Spec) -> list[str]:
    return [sys.executable, "-m", "moe_gguf.runtime.bench.row", json.dumps(asdict(spec))]


def probe_disk(
    specs: Mapping[Case, Spec], before: Sequence[Run], limit: cgroup.DiskLimit | None
) -> Run:
    """What the disk gives now, with the lanes of the first probe; see ``disk.ceiling``."""
    lanes = next((run.result["lanes"] for run in before if run.failure is None), None)
    spec = next(iter(specs.values()))
    spec = replace(spec, probe_only=True, lanes=lanes or spec.lanes)
    return _run_limited(row_command(spec), Limits(disk=limit))


def run_row(spec: Spec, limits: Limits, layout: ModelLayout) -> Run:
    if spec.fill:  # all of the model will be in memory
        needed = layout.file_bytes
        free = auto_size()
        if needed > free:
            return Run({}, f"{LEFT_OUT}: needs {format_size(needed)}, {format_size(free)} is free")
    return _run_limited(row_command(spec), limits)


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
