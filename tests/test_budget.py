"""The budget's arithmetic, what the system says is free, and the numbers llama.cpp only prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import llama_cpp
import psutil
import pytest
import tiny

from moe_gguf.runtime import budget, logs, system
from moe_gguf.runtime.budget import Needs, fit
from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.opening import find
from moe_gguf.runtime.options import Options
from moe_gguf.runtime.sizes import GB, MB, format_size, parse_size

# --- sizes as text ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("2.4GB", 2_400_000_000),
        ("2.4 gb", 2_400_000_000),
        ("4GiB", 4 * 2**30),
        ("512m", 512 * MB),
        ("512MiB", 512 * 2**20),
        (" 1.5G ", 1_500_000_000),
        ("1T", 10**12),
        (".5TiB", 2**39),
        ("3.GB", 3 * GB),
        ("2000000", 2_000_000),
        ("2000000B", 2_000_000),
        ("1024k", 1_024_000),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize(
    "text",
    ["", "GB", "four GB", "-1GB", "1,5GB", "1.2.3GB", "4XB", "nan", "inf", "1e9", "4GB!", "٣"],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a size: write it like"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0", "0GB", "1", "2.4", "999KB", "0.0001GB"])
def test_a_size_without_its_unit_is_noticed(text: str) -> None:
    with pytest.raises(UserError, match="too small for any model"):
        parse_size(text)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KB"),
        (65_536, "65.5 KB"),
        (57_100_000, "57.1 MB"),
        (2_400_000_000, "2.40 GB"),
        (12_345_000_000_000, "12345.00 GB"),
    ],
)
def test_sizes_are_written_in_decimal_units(n_bytes: int, text: str) -> None:
    assert format_size(n_bytes) == text


# --- dividing a budget --------------------------------------------------------------------------

NEEDS = Needs(trunk=200 * MB, kv=50 * MB, compute=30 * MB, process=20 * MB)  # 300 MB


def test_slots_get_what_is_left() -> None:
    divided = fit(1000 * MB, NEEDS, slot_bytes=3 * MB, n_all=400, working_set=100)
    assert divided.n_slots == 233  # 700 / 3
    assert divided.experts == 699 * MB
    assert divided.resident_share == 233 / 400
    assert divided.warning() is None
    assert divided.rows()[-1] == ("total", 999 * MB, "of 1.00 GB")


def test_no_more_slots_than_experts() -> None:
    assert fit(10 * GB, NEEDS, 3 * MB, n_all=400, working_set=100).n_slots == 400


def test_the_smallest_budget_that_is_named_works() -> None:
    with pytest.raises(
        UserError, match=r"smallest budget that works is 313MB .* 4 slots of 3.0 MB"
    ):
        fit(100 * MB, NEEDS, 3 * MB, n_all=400, working_set=100)
    # One MB more than needed: a process does not measure the same twice.
    assert fit(312 * MB, NEEDS, 3 * MB, n_all=400, working_set=100).n_slots == budget.MIN_SLOTS
    with pytest.raises(UserError, match="313MB"):
        fit(312 * MB - 1, NEEDS, 3 * MB, n_all=400, working_set=100)


def test_the_smallest_budget_is_rounded_up() -> None:
    with pytest.raises(UserError, match="works is 302MB"):
        fit(0, NEEDS, 1, n_all=400, working_set=100)


def test_a_model_of_fewer_experts_than_the_least_slots_needs_just_those() -> None:
    assert fit(302 * MB, NEEDS, MB, n_all=2, working_set=2).n_slots == 2


def test_below_one_token_s_working_set_there_is_a_warning_with_the_mend() -> None:
    assert fit(600 * MB, NEEDS, 3 * MB, n_all=400, working_set=100).warning() is None
    warning = fit(599 * MB, NEEDS, 3 * MB, n_all=400, working_set=100).warning()
    assert warning is not None
    assert "99 slots are fewer than the 100 experts" in warning
    assert "600.0 MB would hold all" in warning


# --- what the system allows ---------------------------------------------------------------------


def tree(root: Path, cgroup: str) -> None:
    """A root folder where this process is in these cgroups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)


def put(root: Path, folder: str, **files: object) -> None:
    """Files of one cgroup; ``memory_max=5`` is the file memory.max."""
    path = root / "sys/fs/cgroup" / folder
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / name.replace("_", ".", 1)).write_text(f"{content}\n")


@pytest.fixture
def rss(monkeypatch: pytest.MonkeyPatch) -> int:
    """A process of 100 MB, as psutil sees it."""

    rss_bytes = 100 * MB

    class Process:
        def memory_info(self) -> SimpleNamespace:
            return SimpleNamespace(rss=rss_bytes)

    monkeypatch.setattr(system.psutil, "Process", Process)
    return rss_bytes


def test_no_cgroups_no_limit(tmp_path: Path) -> None:
    assert system.cgroup_limit(tmp_path) is None


def test_v2_limit_less_what_others_use(tmp_path: Path, rss: int) -> None:
    tree(tmp_path, "0::/work\n")
    put(tmp_path, "work", memory_max=1000 * MB, memory_stat=f"anon {300 * MB}\nfile {600 * MB}")
    # 300 MB are in use, 100 of them ours; 600 MB of page cache give way.
    assert system.cgroup_limit(tmp_path) == 1000 * MB - 300 * MB + rss


def test_v2_max_is_no_limit(tmp_path: Path, rss: int) -> None:
    tree(tmp_path, "0::/work\n")
    put(tmp_path, "work", memory_max="max", memory_stat="anon 5")
    assert system.cgroup_limit(tmp_path) is None


def test_v2_the_tightest_of_the_parents_counts(tmp_path: Path, rss: int) -> None:
    tree(tmp_path, "0::/a/b/c\n")
    put(tmp_path, "a/b/c", memory_max="max", memory_stat=f"anon {rss}")
    put(tmp_path, "a/b", memory_max=900 * MB, memory_stat=f"anon {600 * MB}")
    put(tmp_path, "a", memory_max=950 * MB, memory_stat=f"anon {rss}")
    assert system.cgroup_limit(tmp_path) == 900 * MB - 600 * MB + rss


def test_v2_inside_a_container_only_the_mount_exists(tmp_path: Path, rss: int) -> None:
    tree(tmp_path, "0::/../../docker/abc\n")
    put(tmp_path, "", memory_max=700 * MB, memory_stat=f"anon {rss}")
    assert system.cgroup_limit(tmp_path) == 700 * MB


def test_v1_limit(tmp_path: Path, rss: int) -> None:
    tree(tmp_path, "9:cpu,cpuacct:/x\n4:memory:/job\n0::/\n")
    put(
        tmp_path,
        "memory/job",
        memory_limit_in_bytes=800 * MB,
        memory_stat=f"cache {400 * MB}\ntotal_rss {250 * MB}",
    )
    put(tmp_path, "memory", memory_limit_in_bytes=2**63 - 4096, memory_stat="total_rss 0")
    assert system.cgroup_limit(tmp_path) == 800 * MB - 250 * MB + rss


def test_a_full_cgroup_leaves_nothing(tmp_path: Path, rss: int) -> None:
    tree(tmp_path, "0::/work\n")
    put(tmp_path, "work", memory_max=300 * MB, memory_stat=f"anon {500 * MB}")
    assert system.cgroup_limit(tmp_path) == 0


def test_auto_stays_below_the_cgroup_s_limit(tmp_path: Path, rss: int) -> None:
    tree(tmp_path, "0::/work\n")
    put(tmp_path, "work", memory_max=400 * MB, memory_stat=f"anon {rss}")
    assert system.auto_size(tmp_path) == int(400 * MB * (1 - system.AUTO_HEADROOM))


def test_auto_stays_below_what_is_free(tmp_path: Path) -> None:
    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    assert 0 < system.auto_size(tmp_path) <= free


def test_the_peak_is_at_least_what_is_resident() -> None:
    assert system.rss_peak() >= psutil.Process().memory_info().rss * 0.9


# --- llama.cpp's lines --------------------------------------------------------------------------

N_CTX = 256


def context_log(path: Path, no_alloc: bool, n_ubatch: int = 64) -> logs.Log:
    """What llama.cpp says while the model is opened through our stream and a context is made."""
    binding = find(path, Options(memory=GB)).bind()
    model_params = binding.model_params(llama_cpp.llama_model_default_params(), (), no_alloc)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads = N_CTX, N_CTX, n_ubatch, 1
    with logs.capture() as log, binding.plugin.stream() as stream:
        model = llama_cpp.llama_model_load_from_file_ptr(stream, model_params)
        assert model
        context = llama_cpp.llama_init_from_model(model, params)
        assert context
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
    binding.close()
    return log


@pytest.mark.parametrize("layout", ["qwen3moe", "gemma4", "deepseek2", "updown"])
def test_a_simulated_load_announces_what_a_real_one_takes(layout: str, tmp_path: Path) -> None:
    path = tiny.write_tiny(layout, tmp_path / "m.gguf")
    simulated = logs.context_sizes(context_log(path, no_alloc=True))
    real = logs.context_sizes(context_log(path, no_alloc=False))
    assert simulated == real
    assert simulated.kv > 0
    assert simulated.compute > 0


def test_the_kv_cache_is_as_large_as_computed_by_hand(tmp_path: Path) -> None:
    path = tiny.write_tiny("qwen3moe", tmp_path / "m.gguf")
    kv = logs.context_sizes(context_log(path, no_alloc=True)).kv
    layers, key_and_value, f16 = 3, 2, 2
    by_hand = N_CTX * layers * tiny.N_HEAD_KV * tiny.HEAD_DIM * key_and_value * f16
    assert kv == pytest.approx(by_hand, abs=0.01 * 2**20)  # llama.cpp prints 0.38 MiB


def test_graph_buffers_grow_with_the_batch(tmp_path: Path) -> None:
    """A gate on the regular expression: it sees the buffers that depend on the batch."""
    path = tiny.write_tiny("qwen3moe", tmp_path / "m.gguf")
    small, large = (
        logs.context_sizes(context_log(path, no_alloc=True, n_ubatch=n)).compute for n in (16, 128)
    )
    assert large > 2 * small


def test_a_buffer_two_backends_compute_in_counts_once() -> None:
    log = logs.Log()
    for line in (
        "llama_context:        CPU  output buffer size =     0.50 MiB\n",
        "llama_kv_cache:        CPU KV buffer size =     0.00 MiB\n",
        "llama_kv_cache: size =   11.25 MiB (   512 cells,  30 layers), K (f16): 5.62 MiB\n",
        "sched_reserve:        CPU compute buffer size =   101.00 MiB\n",
        "sched_reserve:        CPU compute buffer size =   101.00 MiB\n",
        "sched_reserve:      CUDA0 compute buffer size =    10.00 MiB\n",
    ):
        log.add(2, line)
    assert logs.context_sizes(log) == (int(11.25 * 2**20), int(111.5 * 2**20), 0)
    on_device = logs.context_sizes(log, "CUDA0")
    assert on_device[1:] == (int(101.5 * 2**20), 10 * 2**20)


def test_what_is_freed_goes_back() -> None:
    """Pieces of many sizes that come and go in a thread leave nothing in its heap."""
    script = """
import random, threading, psutil
from moe_gguf.runtime.plugin.library import load

load()
process, most, rng = psutil.Process(), 0, random.Random(1)
before = process.memory_info().rss

def come_and_go():
    global most
    kept, n = [], 0
    for _ in range(200):
        size = rng.randrange(1 << 20, 17 << 20)
        while n + size > 40 << 20:
            n -= len(kept.pop(0))
        kept.append(bytearray(size))
        n += size
        most = max(most, process.memory_info().rss - before)

thread = threading.Thread(target=come_and_go)
thread.start()
thread.join()
print(most >> 20)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) <= 48
