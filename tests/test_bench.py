"""The benchmark's machinery: rows run, agree, are written down; whatever ends badly is said.

Numbers are not judged here. What needs a memory cgroup is skipped, loudly, where none may be made.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny import write_tiny

from moe_gguf.runtime import system
from moe_gguf.runtime.bench import cgroup, plot, process, report, results
from moe_gguf.runtime.bench import rounds as benches
from moe_gguf.runtime.bench.cgroup import Limits
from moe_gguf.runtime.bench.process import Run, run_process
from moe_gguf.runtime.bench.report import table
from moe_gguf.runtime.bench.request import Request
from moe_gguf.runtime.bench.rounds import bench
from moe_gguf.runtime.bench.spec import Spec
from moe_gguf.runtime.errors import UserError

CAP = 400_000_000
REQUEST = Request(
    Path(),
    "400MB",
    rows="stock-mmap,lru",
    repeat=1,
    n_predict=8,
    prompt_tokens=24,
    n_ctx=256,
    n_threads=1,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("qwen3moe", tmp_path_factory.mktemp("models") / "tiny.gguf")


def ignore(_: str) -> None: ...


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# --- the whole command --------------------------------------------------------------------------


def test_command(model: Path, tmp_path: Path) -> None:
    command = "bench --memory 400MB --rows stock-mmap,lru --repeat 1 -n 8 --prompt-tokens 24"
    files = ["--json", "result.json", "--plot", "result.png"]
    done = subprocess.run(
        [sys.executable, "-m", "moe_gguf", *command.split(), "--ctx", "256", *files, str(model)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "round 1 of 1, row 2 of 2: lru: " in done.stderr
    document = json.loads((tmp_path / "result.json").read_text())
    for key in ("date", "machine", "model", "memory_bytes", "commit", "llama_cpp_python"):
        assert key in document  # house rule: every result carries these
    assert document["schema"] == benches.SCHEMA
    assert document["model"]["expert_types"] == ["Q4_0"]
    assert (document["cgroup"] is None) == (document["cgroup_refusal"] is not None)
    assert "dropped" in document["page_cache"]
    assert len(document["tokens"]["stock-mmap"]) == 9  # one from the prompt, eight decoded
    stock, lru = document["rows"]
    assert [stock["failure"], lru["failure"]] == [None, None]
    assert stock["identical"] is True
    assert lru["identical"] is True
    assert lru["within_cap"] is True
    (run,) = lru["runs"]
    assert (run["warm_up_tokens"], run["decode_tokens"]) == (2, 6)
    demands = 6 * document["model"]["moe_layers"] * document["model"]["experts_used"]
    assert run["hits"] + run["misses"] == demands  # of the counted tokens only
    assert run["budget_bytes"] == CAP
    assert lru["x_stock_mmap"] == lru["median"]["decode_tps"] / stock["median"]["decode_tps"]
    assert lru["of_stock_resident"] is None  # was not a row
    assert table(document) == done.stdout.rstrip("\n")
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.usefixtures("known_disk")
def test_interrupt_keeps_finished_runs(model: Path) -> None:
    def interrupt_after_first(line: str) -> None:
        raise KeyboardInterrupt

    outcome = bench(
        replace(REQUEST, model=model, rows="lru,stock-mmap"), note=interrupt_after_first
    )
    assert outcome.interrupted
    lru, stock = outcome.document["rows"]
    assert len(lru["runs"]) == 1
    assert stock["runs"] == []
    assert "interrupted" in table(outcome.document)


@pytest.mark.usefixtures("known_disk")
def test_a_sweep_runs_uncapped_rows_once(model: Path, tmp_path: Path) -> None:
    files = {key: str(tmp_path / key) for key in ("json_file", "plot_file", "layers_file")}
    change = {"caps": "300MB,400MB", "rows": "resident,lru", **files}
    lines: list[str] = []
    outcome = bench(replace(REQUEST, model=model, **change), note=lines.append)
    assert not outcome.errors
    assert [line.split(": ")[1] for line in lines] == [
        "resident",
        "lru in 300.0 MB",
        "lru in 400.0 MB",
    ]
    document = outcome.document
    assert json.loads((tmp_path / "json_file").read_text()) == document
    assert "rows" not in document
    assert [point["memory_bytes"] for point in document["sweep"]] == [300_000_000, CAP]
    first, second = (point["rows"] for point in document["sweep"])
    assert first[0]["runs"] == second[0]["runs"]
    assert [rows[1]["runs"][0]["budget_bytes"] for rows in (first, second)] == [300_000_000, CAP]
    text = table(document)
    assert text.count("\nmemory 300.0 MB\n") == text.count("\nmemory 400.0 MB\n") == 1
    for name in ("plot_file", "layers_file"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.usefixtures("known_disk")
def test_a_timeline_of_a_named_row(model: Path, tmp_path: Path) -> None:
    change = {"rows": "lru,lfu", "timeline_file": str(tmp_path / "t.json"), "timeline_row": "lru"}
    outcome = bench(replace(REQUEST, model=model, **change), note=ignore)
    other = json.loads((tmp_path / "t.json").read_text())["otherData"]
    assert (other["policy"], other["tokens"]) == ("lru", 1)
    lru, lfu = outcome.document["rows"]
    assert lru["runs"][0]["timeline"] in table(outcome.document)
    assert "timeline" not in lfu["runs"][0]


def test_reads_are_throttled_or_refused_in_words(model: Path, tmp_path: Path) -> None:
    """The disk under the model allows it or not; either way no run goes at another speed."""
    change = {"disk_bw": "50MB/s", "rows": "lru"}
    try:
        limits = Limits(disk=cgroup.DiskLimit(cgroup.disks_of([model]), 50_000_000))
        reason = cgroup.refusal(limits)
    except OSError as error:
        reason = str(error)
    if reason is not None:
        with pytest.raises(UserError, match=r"disk_bw cannot be kept to .*leave it out"):
            bench(replace(REQUEST, model=model, **change), note=pytest.fail)
        return
    document = bench(replace(REQUEST, model=model, **change), note=ignore).document
    assert document["disk_limit"]["bytes_per_s"] == 50_000_000
    big = tmp_path / "big"  # the model is so small that all of it passes as a burst
    with big.open("wb") as file:
        file.write(bytes(30_000_000))
        os.fsync(file.fileno())
    with cgroup.limited(limits) as group:
        start = time.monotonic()
        read = ["dd", f"if={big}", "of=/dev/null", "bs=1M", "iflag=direct"]
        subprocess.run(group.command(read), check=True, capture_output=True)
        assert time.monotonic() - start > 0.4
    assert "reads throttled to 50.0 MB/s by a cgroup" in table(document)


# --- refused before the first run ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"caps": "30MB"}, "30.0 MB of memory is too little .* smallest budget that works is"),
        ({"caps": "auto"}, "fixed cap: give caps a size"),
        ({"rows": "lru,lur"}, "there is no row 'lur': choose from stock-mmap"),
        ({"rows": ", "}, "no rows are named"),
        ({"repeat": 0}, "repeat, n_predict and prompt_tokens must be"),
        ({"n_predict": 300}, "do not fit a context of 256: raise n_ctx"),
        ({"json_file": "/nonexistent/r.json"}, "its folder does not exist"),
        ({"caps": " , "}, "fixed cap: give caps a size"),
        ({"caps": "400MB,30MB"}, "30.0 MB of memory is too little"),
        ({"disk_bw": "fast"}, "'fast' is not a size"),
        ({"disk_bw": "3KB"}, "a disk speed of 3KB is too small"),
        ({"timeline_file": "t.json", "timeline_row": "lfu"}, "name a row of ours that runs"),
        ({"timeline_file": "t.json", "rows": "stock-mmap"}, "add a row of it to rows"),
    ],
)
def test_refused(model: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        bench(replace(REQUEST, model=model, **change), note=pytest.fail)


def test_plot_without_matplotlib(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'moe-gguf\[plot\]'"):
        bench(replace(REQUEST, model=model, plot_file="plot.png"), note=pytest.fail)


def test_a_refusal_of_the_engine_keeps_its_options_unspelled(model: Path) -> None:
    """It comes from a process of its own; the reader of this one's sentences spells them."""
    with pytest.raises(UserError) as caught:
        bench(replace(REQUEST, model=model, caps="30MB"), note=pytest.fail)
    assert str(caught.value).endswith("a smaller n_ctx also helps")
    assert caught.value.spelled(lambda name, value: f"<{name}>").endswith(
        "a smaller <n_ctx> also helps"
    )


@pytest.mark.parametrize("name", ["2026-11-25-main", "2026-11-25-sweep"])
def test_old_results_are_still_shown_and_drawn(tmp_path: Path, name: str) -> None:
    file = Path(__file__).parents[1] / "benchmarks" / "results" / f"{name}.json"
    document = json.loads(file.read_text())
    assert document["schema"] == benches.SCHEMA
    assert document["model"]["name"] in table(document)
    plot.speed(document, tmp_path / "speed.png")
    plot.layers(document, tmp_path / "layers.png")


# --- runs that end badly ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("import os; os.kill(os.getpid(), 9)", "killed (probably out of memory)"),
        ("import os; os.kill(os.getpid(), 11)", "killed (SIGSEGV)"),
        ("raise RuntimeError('no such luck')", "failed: RuntimeError: no such luck"),
        ("print('not JSON')", "failed: exit code 0"),
        ('print(\'{"error": "too small"}\'); exit(2)', "failed: too small"),
        ("import time; time.sleep(60)", "stopped after 1 s"),
    ],
)
def test_bad_end_is_a_failure_in_words(code: str, failure: str) -> None:
    assert run_process(python(code), None, limit_s=1.0).failure == failure


def test_last_line_is_the_result() -> None:
    run = run_process(python("print('chatter'); print('{\"a\": 1}')"), None)
    assert run == Run({"a": 1}, None)


@pytest.fixture
def small_cgroup() -> Any:
    limits = Limits(memory=64 * 2**20)
    if reason := cgroup.refusal(limits):
        pytest.skip(f"needs a memory cgroup: {reason}")
    with cgroup.limited(limits) as group:
        yield group
    assert not any(folder.exists() for folder in group.folders)


def test_out_of_memory_in_a_cgroup(small_cgroup: cgroup.Group) -> None:
    run = run_process(python("x = b'x' * (256 << 20)"), small_cgroup)
    assert run.failure == "killed (out of memory)"
    assert small_cgroup.oom_kills() == 1
    peak = small_cgroup.peak_bytes()
    assert peak is None or peak <= 64 * 2**20


def test_other_kills_in_a_cgroup_are_not_blamed_on_memory(
    small_cgroup: cgroup.Group,
) -> None:
    run = run_process(python("import os; os.kill(os.getpid(), 9)"), small_cgroup)
    assert run.failure == "killed (SIGKILL)"


@pytest.mark.usefixtures("known_disk")
def test_killed_row_is_shown_and_not_run_again(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Run] = process.run_row
    asked = []

    def scripted(spec: Spec, *rest: Any) -> Run:
        asked.append("stock-mmap" if spec.stock else spec.options.policy)
        return Run({}, "killed (out of memory)") if spec.stock else real(spec, *rest)

    monkeypatch.setattr(benches, "run_row", scripted)
    outcome = bench(replace(REQUEST, model=model, repeat=2), note=ignore)
    assert asked == ["stock-mmap", "lru", "lru"]
    assert not outcome.errors
    lines = table(outcome.document).splitlines()
    assert "stock-mmap  killed (out of memory)" in lines


# --- what is concluded --------------------------------------------------------------------------


def result(tokens: list[int], tps: float = 1.0, rss: int = 1) -> Run:
    numbers = {"decode_tps": tps, "rss_peak_bytes": rss, "threads": 1}
    return Run({"tokens": tokens, **numbers}, None)


def test_other_tokens_are_an_error() -> None:
    runs = {
        "stock-mmap": [result([1, 2])],  # cut short: the common prefix counts
        "stock-resident": [result([1, 2, 3])],
        "lru": [result([1, 2, 3]), result([1, 2, 4])],
    }
    point = results.point_of(runs, CAP)
    assert {row.reference for row in point.rows} == {"stock-resident"}
    assert [row.identical for row in point.rows] == [True, True, False]
    assert results.errors_of([point]) == ["lru generated other tokens than stock-resident"]


def test_a_peak_over_the_cap_is_an_error_of_ours_only() -> None:
    runs = {
        "stock-mmap": [result([1], rss=CAP + 1)],  # where no cgroup holds it
        "lru": [result([1], rss=CAP), result([1], rss=CAP + 1)],
        "resident": [result([1], rss=2 * CAP)],
    }
    errors = results.errors_of([results.point_of(runs, CAP)])
    assert errors == ["lru peaked at 400.0 MB, over the cap"]


def test_a_row_of_ours_that_ends_badly_is_an_error() -> None:
    runs = {
        "stock-mmap": [Run({}, "killed (out of memory)")],  # this is what the cap does to it
        "lru": [result([1]), Run({}, "killed (out of memory)")],
        "resident": [Run({}, f"{process.LEFT_OUT}: needs 3.92 GB, 2.00 GB is free")],
    }
    errors = results.errors_of([results.point_of(runs, CAP)])
    assert errors == ["lru: killed (out of memory)"]


def test_what_others_had_of_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    times = psutil.cpu_times()
    fields = times._fields
    monkeypatch.setattr(psutil, "cpu_times", lambda: times)
    stolen = system.Stolen()
    assert stolen.share == 0
    grown = {"user": 3.0, "idle": 4.0, "guest": 2.0, "steal": 1.0}
    times = times._replace(**{k: getattr(times, k) + v for k, v in grown.items() if k in fields})
    assert stolen.share == pytest.approx(1 / 8 if "steal" in fields else 0)


def test_medians_and_ratios() -> None:
    runs = {
        "stock-mmap": [result([1], tps) for tps in (1.0, 3.0, 2.0)],
        "stock-resident": [result([1], 8.0)],
        "lru": [result([1], tps) for tps in (4.0, 6.0, 100.0)],
        "lfu": [Run({}, "killed (out of memory)")],
    }
    rows = {row.row: row for row in results.point_of(runs, CAP).rows}
    assert rows["lru"].median["decode_tps"] == 6.0
    assert rows["lru"].x_stock_mmap == 3.0
    assert rows["lru"].of_stock_resident == 0.75
    assert rows["lfu"].x_stock_mmap is None
    assert rows["lfu"].identical is None


def test_bound_is_the_slower_of_processor_and_disk() -> None:
    def ours(tps: float, read: float) -> Run:
        run = result([1], tps)
        return Run({**run.result, "bytes_per_token": read}, None)

    runs = {
        "stock-resident": [result([1], 16.0)],
        "resident": [ours(10.0, 0.0)],  # a tenth of a second per token, and this one counts
        "lru": [ours(4.0, 20e6)],  # a fifth of a second on a disk of 100 MB/s
        "lfu": [ours(8.0, 5e6)],  # a twentieth: the processor is slower
    }
    point = results.point_of(runs, CAP, 100e6)
    rows = {row.row: row for row in point.rows}
    assert rows["lru"].bound_row == "resident"
    assert rows["stock-resident"].bound_tps is None  # nobody counts its reads
    assert rows["lru"].bound_tps == pytest.approx(5.0)
    assert rows["lru"].of_bound == pytest.approx(0.8)
    assert rows["lfu"].bound_tps == pytest.approx(10.0)
    assert rows["lfu"].of_bound == pytest.approx(0.8)
    alone = results.point_of({"lru": runs["lru"], "lfu": runs["lfu"]}, CAP, 100e6)
    assert alone.rows[1].bound_row is None
    assert alone.rows[1].bound_tps == pytest.approx(20.0)


def test_rows_are_compared_on_the_same_kernels() -> None:
    def repacked(tokens: list[int], tps: float, read: float | None = None) -> Run:
        more = {"kernels": "repacked", "bytes_per_token": read, "bytes_read": 300e6, "disk_s": 2.0}
        return Run({**result(tokens, tps).result, **more}, None)

    runs = {
        "stock-resident": [result([1, 2], 16.0)],
        "stock-repacked": [repacked([1, 3], 20.0)],
        "lru": [result([1, 2], 4.0)],
        "lru@bundle": [repacked([1, 3], 5.0, 20e6)],
    }
    point = results.point_of(runs, CAP, 100e6)
    rows = {row.row: row for row in point.rows}
    assert rows["lru"].reference == "stock-resident"
    assert rows["lru@bundle"].reference == "stock-repacked"
    assert all(row.identical for row in rows.values())
    assert rows["lru@bundle"].bound_row == "stock-repacked"
    # The row found the disk faster than the probe did: 150 MB/s.
    assert point.disk_best_bytes_per_s == 150e6
    assert rows["lru@bundle"].bound_tps == pytest.approx(7.5)
    held = results.point_of(runs, CAP, 100e6, throttled=True)
    assert held.disk_best_bytes_per_s == 100e6


def test_a_burst_through_the_throttle_is_not_the_ceiling() -> None:
    def probes(*speeds: float) -> list[Run]:
        return [Run({"bytes_per_s": s, "lanes": 2}, None) for s in speeds]

    limit = cgroup.DiskLimit(("8:0",), 100)
    assert results.disk_facts(probes(90, 80, 110), limit)["disk_bytes_per_s"] == 90
    assert results.disk_facts(probes(110), limit)["disk_bytes_per_s"] == 100
    assert results.disk_facts(probes(300), limit)["disk_bytes_per_s"] == 300  # it did not hold
    assert results.disk_facts(probes(300), None)["disk_bytes_per_s"] == 300
    nothing = results.disk_facts([Run({}, "failed: no")], None)
    assert nothing == {"disk_bytes_per_s": None, "disk_probe": None}


def test_guesses_and_recall_are_shown_where_a_policy_tells() -> None:
    median = {"guesses": 120.0, "guesses_used": 80.0, "recall": 0.75}
    row = {"row": "fate", "median": median}
    cells = {head: cell(row) for head, cell in report.COLUMNS if head[0] in "gr"}
    assert cells["guesses made/used/late"] == "120/80/-"
    assert cells["recall"] == "75.0%"


# --- where cgroups are --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "folders", "expected"),
    [
        # v1, the process in a nested cgroup
        (["4:memory:/a/b", "0::/"], ["memory/a/b"], (1, ["memory/a/b", "memory/a", "memory"])),
        # v1 inside a container: the path is the host's, only the mount is visible
        (["4:memory:/docker/x"], ["memory"], (1, ["memory"])),
        (["4:cpu,memory:/a"], ["memory/a"], (1, ["memory/a", "memory"])),
        # v2
        (["0::/user/x"], ["user/x"], (2, ["user/x", "user", "."])),
    ],
)
def test_places(
    tmp_path: Path, lines: list[str], folders: list[str], expected: tuple[int, list[str]]
) -> None:
    base = tmp_path / "sys/fs/cgroup"
    for folder in folders:
        (base / folder).mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("\n".join(lines) + "\n")
    version, places = expected
    assert cgroup.places("memory", tmp_path) == (version, [base / place for place in places])


@pytest.mark.parametrize(
    ("lines", "made", "expected"),
    [
        (["4:memory:/", "7:blkio:/"], {"memory": "5", "blkio": "8:0 7"}, 2),
        (["0::/"], {"": "8:0 rbps=7"}, 1),
    ],
)
def test_one_folder_per_hierarchy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    lines: list[str], made: dict[str, str], expected: int,
) -> None:  # fmt: skip
    """Version 2 has one hierarchy, and a process is in one cgroup of it."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("\n".join(lines) + "\n")
    for name in made:
        (tmp_path / "sys/fs/cgroup" / name).mkdir(parents=True, exist_ok=True)
    written: list[tuple[str, str]] = []
    monkeypatch.setattr(
        cgroup, "_write", lambda folder, setting: written.append((setting.file, setting.value))
    )
    limits = Limits(5, cgroup.DiskLimit(("8:0",), 7))
    with cgroup.limited(limits, tmp_path) as group:
        assert len(group.folders) == expected
        procs = [f"{folder}/cgroup.procs" for folder in group.folders]
        assert group.command(["true"])[4:] == [*procs, "true"]
    disk = "blkio.throttle.read_bps_device" if expected == 2 else "io.max"
    assert (disk, list(made.values())[-1]) in written
    assert not any(folder.exists() for folder in group.folders)


def test_a_partition_stands_for_its_disk(tmp_path: Path) -> None:
    number = tmp_path.stat().st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    with pytest.raises(OSError, match="without a block device"):
        cgroup.disks_of([tmp_path], tmp_path)
    part = tmp_path / "sys/devices/sda/sda1"
    part.mkdir(parents=True)
    (part / "partition").write_text("1\n")
    (part / "dev").write_text(f"{name}\n")
    (part.parent / "dev").write_text("8:0\n")
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    (tmp_path / "sys/dev/block" / name).symlink_to(part)
    assert cgroup.disks_of([tmp_path, tmp_path], tmp_path) == ("8:0",)
    (part / "partition").unlink()  # a disk without partitions
    assert cgroup.disks_of([tmp_path], tmp_path) == (name,)


def test_no_cgroups(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("1:name=systemd:/\n")
    with pytest.raises(OSError, match="no memory cgroups"):
        cgroup.places("memory", tmp_path)


def test_a_cgroup_that_offers_no_limit_is_not_used(tmp_path: Path) -> None:
    """Version 2 folders without the memory controller accept children, and limit nothing."""
    (tmp_path / "sys/fs/cgroup/user").mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/user\n")
    with (
        pytest.raises(FileNotFoundError),
        cgroup.limited(Limits(memory=2**20), tmp_path),
    ):
        pass
    assert list((tmp_path / "sys/fs/cgroup/user").iterdir()) == []
