"""What follows from the runs: medians, ratios, bounds, broken promises; and the facts beside them.

Knows nothing of how runs are made, nor how a document is shown.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from ..formats.ggml_types import GGML_TYPES
from ..formats.layout import ModelLayout
from ..sizes import format_size
from . import cgroup
from .cases import row_of
from .process import LEFT_OUT, Run
from .report import HELD, speed_of


@dataclass
class RowResult:
    """What a row came to under one cap; the fields are those of the document."""

    row: str
    policy: str | None
    capped: bool
    failure: str | None
    kernels: str | None  # plain or repacked, which sum in another order; None: it never ran
    reference: str | None  # the row whose tokens these should be; of a lossy row there is none
    identical: bool | None
    median: dict[str, float]
    runs: list[dict[str, Any]]
    within_cap: bool | None = None
    x_stock_mmap: float | None = None  # decode speed over that row's
    of_stock_resident: float | None = None
    bound_row: str | None = None  # whose time per token is that of computing; None: the disk's only
    bound_tps: float | None = None
    of_bound: float | None = None
    of_disk_bound: float | None = None  # of the speed at which the disk alone delivers its reads
    # Of several sequences: the whole job's speed over stock's in memory, and the share of the
    # answers that comes before the first token that differs from stock's, which too says something
    # else in another batch.
    job_of_stock_resident: float | None = None
    agreement: float | None = None

    @property
    def tps(self) -> float | None:
        """Decode speed, of a row that decodes nothing that of prompts; None: it says nothing."""
        return speed_of(self.median) if self.median and not self.failure else None

    def document(self) -> dict[str, Any]:
        fields = dict(vars(self))
        if self.within_cap is None:  # the document has the key only where it is known
            del fields["within_cap"]
        return fields


@dataclass
class Point:
    """The rows under one cap."""

    memory_bytes: int
    threads: int | None
    disk_best_bytes_per_s: float | None
    tokens: dict[str, list[int]]  # of every row that is some row's reference
    rows: list[RowResult]

    def document(self) -> dict[str, Any]:
        return {**vars(self), "rows": [row.document() for row in self.rows]}


def point_of(
    runs: dict[str, list[Run]],
    cap: int,
    disk_bytes_per_s: float | None = None,
    throttled: bool = False,
) -> Point:
    """What follows from the runs under one cap.

    Rows are compared with rows on the same kernels: plain ones, or those that want weights
    repacked, which sum in another order. Lossy rows are compared with none.

    ``bound_tps`` of a row is the decode speed that neither processor nor disk lets it pass,
    1 / max(compute, bytes_per_token / disk), and ``of_bound`` how much of it the row reached.
    Compute is the time per token of a row with every expert in memory; without one the disk alone
    bounds. The disk is taken to be as fast as in the probe, or as any row found it while it read.
    """
    peers = _Peers.of(runs)
    rows = [_row(name, done, peers, cap) for name, done in runs.items()]
    speed = {row.row: row.tps for row in rows}
    job = {row.row: row.median.get("job_tps") for row in rows if not row.failure}
    for row in rows:
        rival = row_of(row.row).rival
        row.x_stock_mmap = _ratio(row.tps, speed.get("stock-mmap" + rival))
        row.of_stock_resident = _ratio(row.tps, speed.get("stock-resident" + rival))
        row.job_of_stock_resident = _ratio(job.get(row.row), job.get("stock-resident" + rival))
    best = disk_bytes_per_s
    if best and not throttled:
        reads = [run for row in rows for run in row.runs if run.get("disk_s")]
        best = max([best, *(run["bytes_read"] / run["disk_s"] for run in reads)])
    for row in rows:
        if best and row.tps:
            _bound(row, peers, speed, best)
    return Point(
        memory_bytes=cap,
        threads=next((run["threads"] for row in rows for run in row.runs), None),
        disk_best_bytes_per_s=best,
        tokens={row.reference: peers.tokens[row.reference][0] for row in rows if row.reference},
        rows=rows,
    )


@dataclass
class _Peers:
    """The rows that ran, and which of them may be compared."""

    tokens: dict[str, list[list[int]]] = field(default_factory=dict)  # of every good run
    answers: dict[str, list[list[int]]] = field(default_factory=dict)  # of groups, in the first one
    kernels: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, runs: dict[str, list[Run]]) -> _Peers:
        peers = cls()
        for name, done in runs.items():
            if good := [run.result for run in done if run.failure is None]:
                peers.kernels[name] = good[0].get("kernels", "plain")
                if row_of(name).sequences:
                    peers.answers[name] = good[0].get("answers", [])
                else:
                    peers.tokens[name] = [result["tokens"] for result in good]
        return peers

    def reference(self, name: str) -> str | None:
        """The row whose tokens ``name`` should generate: stock if there is one."""
        stock = [n for n in self.tokens if row_of(n).policy is None and not row_of(n).capped]
        return self._first([*stock, *(n for n in self.tokens if not row_of(n).low)], name)

    def whole(self, name: str) -> str | None:
        """A row with every expert in memory: ours if there is one."""
        rival = row_of(name).rival
        free = [n for n in self.kernels if not row_of(n).capped and not row_of(n).server]
        whole = [n for n in free if row_of(n).rival == rival]
        ours = [n for n in whole if row_of(n).policy is not None]
        return self._first([*ours, *whole], name)

    def _first(self, candidates: Iterable[str], alike: str) -> str | None:
        """The first of these rows that ran on the same kernels."""
        kernels = self.kernels[alike]
        return next((name for name in candidates if self.kernels[name] == kernels), None)


def _row(name: str, done: Sequence[Run], peers: _Peers, cap: int) -> RowResult:
    """What one row's own runs say, and whether its tokens are the reference's."""
    good = [run.result for run in done if run.failure is None]
    alone = not row_of(name).sequences  # in a group, what is said depends on who else is there
    reference = peers.reference(name) if good and alone and not row_of(name).low else None
    row = RowResult(
        row=name,
        policy=row_of(name).policy,
        capped=row_of(name).capped,
        failure=next((run.failure for run in done if run.failure), None),
        kernels=peers.kernels.get(name),
        reference=reference,
        identical=None,
        median=_medians(good),
        runs=[
            {k: v for k, v in result.items() if k not in ("tokens", "answers")} for result in good
        ],
    )
    if reference is not None:
        expected = peers.tokens[reference][0]
        row.identical = all(same_start(tokens, expected) for tokens in peers.tokens[name])
    if not alone and good:
        row.agreement = _agreement(name, peers)
    if row.capped and good:
        row.within_cap = max(result["rss_peak_bytes"] for result in good) <= cap
    return row


def _agreement(name: str, peers: _Peers) -> float | None:
    """Of this row's answers and those of stock on the same kernels in a group of the same size."""
    stock = "stock-repacked" if peers.kernels[name] == "repacked" else "stock-resident"
    stock += row_of(name).rival
    mine, its = peers.answers[name], peers.answers.get(stock)
    if name == stock or not mine or not its:
        return None
    pairs = list(zip(mine, its, strict=True))
    return sum(_same(a, b) for a, b in pairs) / max(1, sum(min(map(len, p)) for p in pairs))


def _same(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens come before the first difference."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _ratio(mine: float | None, base: float | None) -> float | None:
    return mine / base if mine and base else None


def _bound(row: RowResult, peers: _Peers, speed: dict[str, float | None], disk: float) -> None:
    """Set what bounds a row whose reads are counted."""
    read = row.median.get("bytes_per_token")
    if read is None:
        return
    assert row.tps is not None
    row.bound_row = peers.whole(row.row)
    whole_tps = speed[row.bound_row] if row.bound_row else None
    if read:
        row.of_disk_bound = row.tps * read / disk
    token_s = max(1 / whole_tps if whole_tps else 0.0, read / disk)
    row.bound_tps = 1 / token_s if token_s else None
    row.of_bound = row.tps * token_s if token_s else None


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


def errors_of(points: Sequence[Point]) -> list[str]:
    """Broken promises: same tokens, hard budget, our rows run. What stock suffers is a result."""
    errors = []
    for point in points:
        at = f" in {format_size(point.memory_bytes)}" if len(points) > 1 else ""
        for row in point.rows:
            name = row.row + at if row.capped else row.row
            if row.identical is False:
                errors.append(f"{name} generated other tokens than {row.reference}")
            if row.policy is None:
                continue
            if row.within_cap is False:
                peak = format_size(row.median["rss_peak_bytes"])
                errors.append(f"{name} peaked at {peak}, over the cap")
            if row.failure and not row.failure.startswith(LEFT_OUT):
                errors.append(f"{name}: {row.failure}")
    return list(dict.fromkeys(errors))  # rows without a cap stand under each


def disk_facts(probes: Sequence[Run], limit: cgroup.DiskLimit | None) -> dict[str, Any]:
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
