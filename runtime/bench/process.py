"""One run of a row in a process of its own, and the page cache it starts behind.

Owns starting the process, its limits and its end, which it puts into words. Knows nothing of
rounds, nor of what a result means.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from .. import cache, child
from ..errors import spell
from ..formats.layout import ModelLayout
from ..sizes import format_size
from ..system import auto_size
from . import cgroup
from .cases import Case
from .cgroup import Limits
from .spec import Spec

# A run that takes longer hangs, or thrashes beyond what is worth measuring.
RUN_LIMIT_S = 1800.0
LEFT_OUT = "left out"  # prefix of the failure of a row that was skipped


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


def row_command(spec: Spec) -> list[str]:
    """The command line of a run; see ``row``."""
    folder = cache.chosen()
    named = [] if folder is None else [str(folder)]
    return child.command("moe_gguf.runtime.bench.row", spec.to_json(), *named)


def probe_disk(
    specs: Mapping[Case, Spec], before: Sequence[Run], limit: cgroup.DiskLimit | None
) -> Run:
    """What the disk gives now, with the lanes of the first probe; see ``disk.ceiling``."""
    lanes = next((run.result["lanes"] for run in before if run.failure is None), None)
    spec = next(iter(specs.values()))
    if lanes is not None:
        spec = replace(spec, options=replace(spec.options, lanes=lanes))
    return _run_limited(row_command(replace(spec, probe_only=True)), Limits(disk=limit))


def run_row(spec: Spec, limits: Limits, layout: ModelLayout) -> Run:
    """A measured run; a model that cannot be held whole is not tried."""
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
    with subprocess.Popen(
        inside, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace", cwd=child.FOLDER,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            return Run({}, f"stopped after {limit_s:.0f} s")
        except BaseException:
            process.kill()
            raise
    return _judge(process.returncode, out, err, group.oom_kills() if group else None)


def _judge(code: int, out: str, err: str, oom_kills: int | None) -> Run:
    """What an ended process came to; ``oom_kills`` is None where nobody counts them."""
    if code < 0 or code > 128:  # by itself, or as the shell reports it
        number = -code if code < 0 else code - 128
        if number == signal.SIGKILL and oom_kills != 0:
            surely = "" if oom_kills else "probably "
            return Run({}, f"killed ({surely}out of memory)")
        return Run({}, f"killed ({_signal_name(number)})")
    try:
        result = json.loads(out.splitlines()[-1])
        assert isinstance(result, dict)
    except (IndexError, ValueError, AssertionError):
        lines = err.strip().splitlines()
        return Run({}, f"failed: {lines[-1] if lines else f'exit code {code}'}")
    if "error" in result:
        return Run(result, f"failed: {spell(result['error'])}")
    if "left_out" in result:
        return Run({}, f"{LEFT_OUT}: {spell(result['left_out'])}")
    return Run(result, None)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
