"""Limits of containers and shells: each is obeyed, or named in a sentence.

Control groups are folders of text here; what a shell limits is limited for real, in a child.
"""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TinyFile
from test_budget import put, tree

from moe_gguf.converters import convert
from moe_gguf.converters.choose import ConvertOptions
from moe_gguf.converters.convert import open_source
from moe_gguf.runtime import kernels, system
from moe_gguf.runtime.formats.bundle import is_bundle
from moe_gguf.runtime.sizes import MB

RUN = ("--memory", "400MB", "--threads", "1", "--ctx", "256", "-n", "4", "-p", "a")


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> int:
    """A machine of 16 cores, all of them this process's."""
    monkeypatch.setattr(system.psutil, "cpu_count", lambda logical=True: 32 if logical else 16)
    monkeypatch.setattr(system.os, "sched_getaffinity", lambda _: set(range(32)), raising=False)
    return 16


@pytest.fixture
def rss(monkeypatch: pytest.MonkeyPatch) -> int:
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=100 * MB))
    monkeypatch.setattr(system.psutil, "Process", lambda: process)
    return 100 * MB


# --- processors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quota", "threads"),
    [
        ("200000 100000", 2),
        ("150000 100000", 1),
        ("50000 100000", 1),
        ("max 100000", 16),
        ("x", 16),
    ],
)
def test_v2_quota_of_processors(quota: str, threads: int, cores: int, tmp_path: Path) -> None:
    tree(tmp_path, "0::/job\n")
    put(tmp_path, "job", cpu_max=quota)
    assert system.physical_cores(tmp_path) == threads


def test_v2_quota_of_a_parent(cores: int, tmp_path: Path) -> None:
    tree(tmp_path, "0::/pod/job\n")
    put(tmp_path, "pod/job", cpu_max="max 100000")
    put(tmp_path, "pod", cpu_max="300000 100000")
    assert system.physical_cores(tmp_path) == 3


@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
def test_v1_quota_of_processors(mount: str, cores: int, tmp_path: Path) -> None:
    tree(tmp_path, "4:memory:/x\n2:cpu,cpuacct:/job\n0::/\n")
    put(tmp_path, f"{mount}/job", cpu_cfs_quota_us=250000, cpu_cfs_period_us=100000)
    assert system.physical_cores(tmp_path) == 2
    put(tmp_path, f"{mount}/job", cpu_cfs_quota_us=-1)
    assert system.physical_cores(tmp_path) == 16


def test_no_quota_no_limit(cores: int, tmp_path: Path) -> None:
    assert system.physical_cores(tmp_path) == 16
    assert system.physical_cores() >= 1


def test_affinity_and_quota_the_lower_counts(
    cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path, "0::/job\n")
    put(tmp_path, "job", cpu_max="400000 100000")
    monkeypatch.setattr(system.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert system.physical_cores(tmp_path) == 3


# --- memory -------------------------------------------------------------------------------------


def test_v2_high_is_a_limit_too(tmp_path: Path, rss: int) -> None:
    """Above it a process is not killed but stopped to a crawl."""
    tree(tmp_path, "0::/job\n")
    put(tmp_path, "job", memory_max=900 * MB, memory_high=600 * MB, memory_stat=f"anon {rss}")
    assert system.cgroup_limit(tmp_path) == 600 * MB
    put(tmp_path, "job", memory_max="max", memory_high=700 * MB)
    assert system.cgroup_limit(tmp_path) == 700 * MB
    put(tmp_path, "job", memory_high="max")
    assert system.cgroup_limit(tmp_path) is None


def test_v2_a_model_in_tmpfs_is_in_use(tmp_path: Path, rss: int) -> None:
    tree(tmp_path, "0::/job\n")
    stat = f"anon {rss}\nfile {500 * MB}\nshmem {300 * MB}\nsock {MB}\n"
    put(tmp_path, "job", memory_max=1000 * MB, memory_stat=stat)
    assert system.cgroup_limit(tmp_path) == 699 * MB


@pytest.mark.parametrize(
    "kernel",
    [
        f"kernel {60 * MB}\nkernel_stack {5 * MB}\nslab_reclaimable {20 * MB}",
        f"kernel_stack {10 * MB}\npagetables {25 * MB}\nslab {25 * MB}\nslab_reclaimable {20 * MB}",
    ],
)
def test_v2_the_kernel_s_share_is_in_use(kernel: str, tmp_path: Path, rss: int) -> None:
    tree(tmp_path, "0::/job\n")
    put(tmp_path, "job", memory_max=1000 * MB, memory_stat=f"anon {rss}\n{kernel}")
    assert system.cgroup_limit(tmp_path) == 960 * MB


def test_v1_tmpfs_and_the_kernel_s_share_are_in_use(tmp_path: Path, rss: int) -> None:
    tree(tmp_path, "4:memory:/job\n")
    stat = f"cache {400 * MB}\ntotal_rss {rss}\ntotal_shmem {200 * MB}"
    put(tmp_path, "memory/job", memory_limit_in_bytes=800 * MB, memory_stat=stat)
    put(tmp_path, "memory/job", memory_kmem_usage_in_bytes=50 * MB)
    (tmp_path / "sys/fs/cgroup/memory/job/memory.kmem.usage_in_bytes").write_text(f"{50 * MB}\n")
    assert system.cgroup_limit(tmp_path) == 550 * MB


def limited(flag: str, n_bytes: int, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """A command in a shell with one limit."""
    script = f'ulimit {flag} {n_bytes // 1024}; exec "$@"'
    command = ["/bin/bash", "-c", script, "sh", sys.executable, "-m", "moe_gguf", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(("flag", "n_bytes"), [("-v", 300 * MB), ("-d", 150 * MB)])
def test_a_shell_s_limit_is_named(flag: str, n_bytes: int, tiny_file: TinyFile) -> None:
    done = limited(flag, n_bytes, "run", tiny_file("qwen3moe"), *RUN)
    assert done.returncode == 2
    assert f"ulimit {flag} unlimited" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("flag", "n_bytes"), [("-v", 2000 * MB), ("-d", 600 * MB)])
def test_a_shell_s_limit_is_obeyed(flag: str, n_bytes: int, tiny_file: TinyFile) -> None:
    done = limited(flag, n_bytes, "run", tiny_file("qwen3moe"), "--memory", "auto", *RUN[2:])
    assert done.returncode == 0, done.stderr
    assert "of 1.6" not in done.stderr


def test_auto_follows_a_shell_s_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    free = system.auto_size()
    monkeypatch.setattr(system, "_shell_limits", lambda: iter([("-v", 900 * MB, 500 * MB)]))
    rss = system.psutil.Process().memory_info().rss
    room = (900 - 500 - 256) * MB + rss
    assert system.shell_room() == pytest.approx(room, abs=MB)
    assert system.auto_size() == pytest.approx(min(free, room * 0.9), abs=MB)
    assert system.auto_size(reserved=10**12) == 0


# --- streams and locks --------------------------------------------------------------------------


def closed(streams: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    script = f'exec "$@" {streams}'
    command = ["/bin/sh", "-c", script, "sh", sys.executable, "-m", "moe_gguf", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("streams", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(streams: str, tiny_file: TinyFile, tmp_path: Path) -> None:
    """A model opened then must not get a stream's number: what is printed would go into a file."""
    done = closed(streams, "run", tiny_file("qwen3moe"), *RUN)
    assert done.returncode == 0, done.stderr
    assert bool(done.stdout.strip()) == (">&-" not in streams.replace("2>&-", ""))
    done = closed(streams, "convert", tiny_file("qwen3moe"), tmp_path / "b")
    assert done.returncode == 0
    assert convert_again(tiny_file("qwen3moe"), tmp_path / "b") == []


def convert_again(source: Path, folder: Path) -> list[str]:
    """What is said; nothing over a complete bundle."""
    said: list[str] = []
    opened = open_source(source)
    try:
        convert.convert(opened, folder, ConvertOptions(), kernels, lambda *_: None, said.append)
    finally:
        opened.close()
    return said


def test_closed_streams_and_a_mistake(tmp_path: Path) -> None:
    assert closed("<&- >&- 2>&-", "run", tmp_path / "absent.gguf", *RUN).returncode == 2
    assert closed("<&-", "run", tmp_path / "absent.gguf").returncode == 2


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(
    code: int, tiny_file: TinyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refused)
    said = convert_again(tiny_file("qwen3moe"), tmp_path / "b")
    assert any("without locks" in sentence for sentence in said)
    assert is_bundle(tmp_path / "b")


def test_a_lock_that_fails_otherwise(
    tiny_file: TinyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", failing)
    with pytest.raises(OSError, match="once that is mended"):
        convert_again(tiny_file("qwen3moe"), tmp_path / "b")
