"""Bundles as `convert` writes them. Gates, and what a pass proves:

1. *Same experts.* For every layout, single, split and mixed, each expert's bytes in the bundle are
   the source's (after undoing a kernel layout), and so are the trunk's and the metadata.
2. *Same bytes.* The same source and options give the same files, known by their hashes.
3. *Nothing half-written.* However a conversion ends, there is no bundle before all of it is on
   disk, and the next run goes on from there to the same files.
4. *Little memory.* Much less than the model.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import xxhash
from conftest import TinyFile
from gguf import GGMLQuantizationType as Quant

from moe_gguf.converters import convert
from moe_gguf.converters.bundle_writer import JOURNAL
from moe_gguf.converters.choose import ConvertOptions
from moe_gguf.converters.convert import Summary, open_source
from moe_gguf.converters.source import Bytes
from moe_gguf.converters.verify import verify
from moe_gguf.runtime import kernels
from moe_gguf.runtime import progress as runtime_progress
from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.formats import interleaving
from moe_gguf.runtime.formats.bundle import BLOB_ALIGNMENT, PLAIN, TRUNK, BundleTable
from moe_gguf.runtime.formats.ggml_types import GGML_TYPES
from moe_gguf.runtime.formats.gguf_header import read_header
from moe_gguf.runtime.progress import Report

PLAINLY = ConvertOptions(layout="plain")


def make(
    source: Path,
    folder: Path,
    options: ConvertOptions = PLAINLY,
    progress: Report = lambda done, total: None,
) -> list[str]:
    """Convert, and return what was said about it."""
    said: list[str] = []
    opened = open_source(source)
    try:
        convert.convert(opened, folder, options, kernels, progress, said.append)
    finally:
        opened.close()
    return said


def summary(source: Path, folder: Path, options: ConvertOptions) -> Summary:
    opened = open_source(source)
    try:
        return convert.convert(opened, folder, options, kernels, lambda *_: None, lambda _: None)
    finally:
        opened.close()


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: xxhash.xxh3_64_hexdigest(path.read_bytes()) for path in sorted(folder.iterdir())
    }


def table(folder: Path) -> BundleTable:
    return BundleTable.parse(read_header(folder / TRUNK))


def flip(path: Path, at: int) -> None:
    """One bit."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def is_complete(folder: Path) -> bool:
    return (folder / TRUNK).exists()


@pytest.fixture
def source(tiny_file: TinyFile) -> Path:
    return tiny_file("qwen3moe")


@pytest.fixture
def expected(source: Path, tmp_path: Path) -> dict[str, str]:
    """The files of an undisturbed conversion of `source`."""
    make(source, tmp_path / "expected")
    return hashes(tmp_path / "expected")


# --- gate 1: same experts -----------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["plain", "auto"])
@pytest.mark.parametrize("flags", [{}, {"split": True}, {"mixed": True, "scales": True}], ids=str)
@pytest.mark.parametrize("name", tiny.LAYOUTS)
def test_experts_trunk_and_metadata_are_the_sources(
    name: str, flags: dict[str, bool], layout: str, tiny_file: TinyFile, tmp_path: Path
) -> None:
    path = tiny_file(name, **flags)
    folder = tmp_path / "bundle"
    make(path, folder, ConvertOptions(layout=layout))
    assert verify(folder, lambda *_: None) == []

    opened = open_source(path)
    said = table(folder)
    header = read_header(folder / TRUNK)
    blobs = said.experts
    assert [t.name for t in blobs.tensors] == [stack.name for stack in opened.experts]
    assert all(offset % BLOB_ALIGNMENT == 0 for offset in blobs.blob_offset)
    files = [np.fromfile(folder / file, np.uint8) for file in blobs.files]
    assert tuple(map(len, files)) == blobs.file_bytes
    for stack, tensor in zip(opened.experts, blobs.tensors, strict=True):
        assert tensor.offset % BLOB_ALIGNMENT == 0
        for expert in range(opened.n_experts):
            blob = said.layers.index(stack.layer) * opened.n_experts + expert
            at = blobs.blob_offset[blob] + tensor.offset
            found = files[blobs.blob_file[blob]][at : at + tensor.n_bytes]
            if tensor.layout != PLAIN:
                wanted = kernels.interleaving(tensor.ggml_type, tensor.ne)
                assert wanted is not None
                assert tensor.layout == wanted.name
                rule = interleaving.stored_interleaving(header, tensor.layout, tensor.ggml_type)
                found = interleaving.unpack(rule, tensor.ne, found)
            assert np.array_equal(found, stack.read(expert, 0, stack.ne[1]))
    if layout == "plain":
        assert {t.layout for t in blobs.tensors} == {PLAIN}

    trunk = np.fromfile(folder / TRUNK, np.uint8, offset=header.data_start)
    assert [info.name for info in header.tensors] == [t.name for t in opened.trunk]
    for info, tensor_ in zip(header.tensors, opened.trunk, strict=True):
        rows = int(np.prod(info.ne[1:]))
        assert (info.ggml_type, info.ne) == (tensor_.ggml_type, tensor_.ne)
        found = trunk[info.offset : info.offset + info.n_bytes]
        assert np.array_equal(found, tensor_.read(0, rows))
    first = read_header(path)
    kept = [key for key in first.pairs if not key.startswith(("split.", "general.alignment"))]
    assert kept == [key for key in header.pairs if not key.startswith("moe_gguf.")]
    assert all(first.raw(key) == header.raw(key) for key in kept)
    opened.close()


class Inverted:
    """Kernels of no machine: they want every bit of a matrix flipped."""

    def interleaving(self, ggml_type: int, ne: tuple[int, int]) -> interleaving.Interleaving:
        size = GGML_TYPES[ggml_type].block_bytes
        source = np.arange(8 * size, dtype=np.int32)
        return interleaving.Interleaving(ggml_type, 1, source, np.full(size, 0xFF, np.uint8))

    def repack(self, ggml_type: int, ne: tuple[int, int], plain: Bytes) -> Bytes:
        return ~plain


def test_a_bundle_for_kernels_of_another_machine(source: Path, tmp_path: Path) -> None:
    opened = open_source(source)
    options = ConvertOptions(layout="repacked")
    convert.convert(opened, tmp_path, options, Inverted(), lambda *_: None, lambda _: None)
    header, said = read_header(tmp_path / TRUNK), table(tmp_path)
    blobs = said.experts
    for i, (stack, tensor) in enumerate(zip(opened.experts, blobs.tensors, strict=True)):
        blob = said.layers.index(stack.layer) * opened.n_experts
        file = tmp_path / blobs.files[blobs.blob_file[blob]]
        at = blobs.blob_offset[blob] + tensor.offset
        found = np.fromfile(file, np.uint8, tensor.n_bytes, offset=at)
        plain = stack.read(0, 0, stack.ne[1])
        assert np.array_equal(found, ~plain), i
        rule = interleaving.stored_interleaving(header, tensor.layout, tensor.ggml_type)
        assert np.array_equal(interleaving.unpack(rule, tensor.ne, found), plain)
    opened.close()


def test_converting_needs_no_plugin_of_its_own(source: Path, tmp_path: Path) -> None:
    """What a machine's kernels want is handed in: regrouping must not wait for llama.cpp."""
    script = (
        "import sys; from pathlib import Path;"
        "from moe_gguf.converters import convert, choose, verify;"
        "import moe_gguf.converters.hf.source;"
        "source = convert.open_source(Path(sys.argv[1]));"
        "options = choose.ConvertOptions(layout='plain');"
        "convert.convert(source, Path(sys.argv[2]), options, None, print, print);"
        "sys.exit(repr({'llama_cpp', 'moe_gguf.runtime.plugin'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", script, source, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr.strip() == "set()"
    assert (tmp_path / TRUNK).exists()


def test_split_and_single_sources_make_the_same_blobs(tiny_file: TinyFile, tmp_path: Path) -> None:
    make(tiny_file("mixtral"), tmp_path / "single")
    make(tiny_file("mixtral", split=True), tmp_path / "split")
    single, split = hashes(tmp_path / "single"), hashes(tmp_path / "split")
    name = "experts-00001-of-00001.gguf"
    assert single[name] == split[name]


def test_any_reader_of_gguf_finds_every_expert(source: Path, tmp_path: Path) -> None:
    make(
        source,
        tmp_path / "b",
        ConvertOptions(quant="q8_0", low_quant="q4_0", shard_bytes=2_000_000),
    )
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert {"experts-00001-of-00003.gguf", "experts-low-00001-of-00002.gguf"} <= names
    found = []
    for path in sorted((tmp_path / "b").glob("experts-0*")):
        assert path.stat().st_size <= 2_000_000
        reader = gguf.GGUFReader(path)
        field = reader.fields["moe_gguf.shard"]
        assert f"{field.contents() + 1:05}-of" in path.name
        found += [tensor.name for tensor in reader.tensors]
        assert all(tensor.data_offset % BLOB_ALIGNMENT == 0 for tensor in reader.tensors)
    assert found == [
        f"blk.{layer}.exp.{expert}.{role}.weight"
        for layer in range(3)
        for expert in range(16)
        for role in ("gate", "up", "down")
    ]
    low = [t for p in (tmp_path / "b").glob("experts-low*") for t in gguf.GGUFReader(p).tensors]
    assert {t.tensor_type for t in low} == {Quant.Q4_0}
    assert {t.name for t in low} == set(found)
    assert "moe_gguf.low.blobs.checksum" in gguf.GGUFReader(tmp_path / "b" / TRUNK).fields
    assert verify(tmp_path / "b", lambda *_: None) == []


def test_one_read_brings_one_expert(source: Path, tmp_path: Path) -> None:
    make(source, tmp_path / "b")
    blobs = table(tmp_path / "b").experts
    end = 0
    for offset, n_bytes in zip(blobs.blob_offset, blobs.blob_bytes, strict=True):
        assert offset >= end
        assert not end or offset - end < BLOB_ALIGNMENT  # nothing between but padding
        end = offset + n_bytes
    assert blobs.file_bytes[0] % BLOB_ALIGNMENT == 0  # room to round the last read up


def test_quantizing_relabels_the_file(source: Path, tmp_path: Path) -> None:
    make(source, tmp_path / "b", ConvertOptions(quant="q5_k"))
    header = read_header(tmp_path / "b" / TRUNK)
    assert header.get("general.file_type") == 17
    assert header.get("moe_gguf.quant") == "q5_k"


def test_summary_counts_bits_and_names_types(source: Path, tmp_path: Path) -> None:
    numbers = summary(source, tmp_path / "b", ConvertOptions(quant="q8_0", low_quant="q4_0"))
    sizes = {name: (tmp_path / "b" / name).stat().st_size for name in os.listdir(tmp_path / "b")}
    assert numbers.expert_bytes + numbers.low_bytes + numbers.trunk_bytes == sum(sizes.values())
    assert numbers.n_expert_weights == 3 * 16 * 3 * 256 * 96
    assert numbers.expert_types == ("q8_0",)
    experts, low, _, total = numbers.lines()
    assert "bits per weight" in experts and "q8_0" in experts
    assert low.startswith("low copy")
    assert total.startswith("total")


# --- gate 2: same bytes -------------------------------------------------------------------------

# Of tiny qwen3moe, seed 0. They change only with the format: raise VERSION then.
GOLDEN = {
    "experts-00001-of-00001.gguf": "7fdf537607ff73f9",
    "trunk.gguf": "de4de7a723648ba8",
}


def test_golden_bytes(tmp_path: Path) -> None:
    path = tiny.write_tiny("qwen3moe", tmp_path / "golden.gguf")
    make(path, tmp_path / "b")
    assert hashes(tmp_path / "b") == GOLDEN


def test_same_source_and_options_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    options = ConvertOptions(quant="q4_k", low_quant="q2_k", threads=3)
    make(source, tmp_path / "one", options)
    make(source, tmp_path / "two", ConvertOptions(quant="Q4_K", low_quant="q2_k", threads=1))
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


@pytest.mark.parametrize(
    "options",
    [
        PLAINLY,
        ConvertOptions(layout="auto"),
        ConvertOptions(quant="q4_0", low_quant="q2_k", shard_bytes=10**6),
    ],
    ids=str,
)
def test_large_matrices_are_converted_a_few_rows_at_a_time(
    options: ConvertOptions, tiny_file: TinyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_file("qwen3moe", mixed=True)
    make(path, tmp_path / "whole", options)
    monkeypatch.setattr(convert, "MATRIX_BYTES", 40 * 256)  # 16 rows, or some more
    make(path, tmp_path / "rows", options)
    assert hashes(tmp_path / "rows") == hashes(tmp_path / "whole")


def test_a_linked_source_is_its_target(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / source.name
    link.symlink_to(source)
    make(link, tmp_path / "b")
    assert hashes(tmp_path / "b") == expected


# --- gate 3: nothing half-written ---------------------------------------------------------------

KILLER = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
from moe_gguf.converters import convert, journal, quantize
from moe_gguf.runtime import kernels
quantize.requires_imatrix(0)  # loads llama.cpp here and now, not in each child
source, folder, seed, rounds = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
journal.CHECKPOINT_BYTES = 1  # every blob in the journal as soon as the disk has it
rng = random.Random(seed)

def run(seconds):
    said, tell = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        opened = convert.open_source(source)
        options = convert.ConvertOptions(quant="q4_0", layout="plain", threads=2)
        note = lambda text: os.write(tell, text.encode())
        convert.convert(opened, folder, options, kernels, lambda *_: None, note)
        os._exit(0)
    os.close(tell)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    text = os.read(said, 1000).decode()
    os.close(said)
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    return {"status": status, "said": text, "names": names, "s": time.monotonic() - start}

seconds = run(None)["s"]
shutil.rmtree(folder)
seconds = min(seconds, run(None)["s"])
results = []
for _ in range(rounds):
    shutil.rmtree(folder)
    killed = [run(rng.uniform(0, seconds))]
    if rng.random() < 0.3:
        killed.append(run(rng.uniform(0, seconds)))
    done = "trunk.gguf" in killed[-1]["names"] and "convert.journal" not in killed[-1]["names"]
    resumed = None if done else run(None)
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    results.append({"killed": killed, "resumed": resumed})
    first = files if not results[1:] else first
    assert files == first, sorted(files)
print(json.dumps(results))
"""


def test_killed_at_any_point_it_goes_on_to_the_same_files(tmp_path: Path) -> None:
    path = tiny.write_tiny("mixtral", tmp_path / "m.gguf", experts=Quant.F16)
    folder = tmp_path / "b"
    command = [sys.executable, "-c", KILLER, str(path), str(folder), "0", "20"]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert child.returncode == 0, child.stderr
    results = json.loads(child.stdout)
    assert len(results) == 20
    make(path, tmp_path / "undisturbed", ConvertOptions(quant="q4_0", layout="plain", threads=1))
    assert hashes(folder) == hashes(tmp_path / "undisturbed")
    killed = [run for result in results for run in result["killed"] if run["status"] == 9]
    assert len(killed) >= 12  # it was hit while it worked,
    assert sum(TRUNK not in run["names"] for run in killed) >= 12
    resumed = [result["resumed"] for result in results if result["resumed"]]
    assert all(run["status"] == 0 for run in resumed)
    assert sum("going on behind" in run["said"] for run in resumed) >= 5  # and had got somewhere


def interrupt_after(share: float) -> Report:
    def progress(done: float, total: float) -> None:
        if done >= share * total:
            raise KeyboardInterrupt

    return progress


def half_way(
    source: Path, folder: Path, options: ConvertOptions = PLAINLY, share: float = 0.5
) -> None:
    """Leave behind what an interrupt there leaves."""
    with pytest.raises(KeyboardInterrupt):
        make(source, folder, options, interrupt_after(share))
    assert not is_complete(folder)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 1.0])
def test_interrupted_it_goes_on(
    share: float, source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    half_way(source, tmp_path / "b", share=share)
    (said,) = make(source, tmp_path / "b")
    assert said.startswith("going on behind")
    assert hashes(tmp_path / "b") == expected


@pytest.mark.parametrize("nth", [0, 1, 2])
def test_killed_among_the_last_renames_it_goes_on(
    nth: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ConvertOptions(quant="q8_0", low_quant="q4_0", layout="plain")
    make(source, tmp_path / "expected", options)
    rename, count = Path.rename, iter(range(100))

    def dies(self: Path, target: Path) -> Path:
        if next(count) == nth:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dies)
        with pytest.raises(KeyboardInterrupt):
            make(source, tmp_path / "b", options)
    assert not is_complete(tmp_path / "b")
    make(source, tmp_path / "b", options)
    assert hashes(tmp_path / "b") == hashes(tmp_path / "expected")


def test_killed_before_the_journal_is_gone_it_finishes(
    source: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(self: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dies)
        with pytest.raises(KeyboardInterrupt):
            make(source, tmp_path / "b")
    assert is_complete(tmp_path / "b")  # and it is one
    with pytest.raises(UserError, match="holds a bundle already"):
        make(source, tmp_path / "b", ConvertOptions(quant="q8_0"))
    make(source, tmp_path / "b")
    assert hashes(tmp_path / "b") == expected


def test_other_options_start_again(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    half_way(
        source, tmp_path / "b", ConvertOptions(quant="q8_0", low_quant="q4_0", shard_bytes=10**6)
    )
    (said,) = make(source, tmp_path / "b")
    assert "with other options is discarded" in said
    assert hashes(tmp_path / "b") == expected


def test_another_source_starts_again(
    source: Path, tiny_file: TinyFile, expected: dict[str, str], tmp_path: Path
) -> None:
    half_way(tiny_file("gpt-oss"), tmp_path / "b")
    (said,) = make(source, tmp_path / "b")
    assert "of another source" in said
    assert hashes(tmp_path / "b") == expected


def write_imatrix(path: Path, value: float) -> Path:
    """For a matrix that no model has."""
    data = np.full(256, value, np.float32).tobytes()
    path.write_bytes(b"\x01\0\0\0" + b"\x01\0\0\0x" + b"\x01\0\0\0" + b"\0\x01\0\0" + data)
    return path


def test_another_imatrix_starts_again(source: Path, tmp_path: Path) -> None:
    one, two = (write_imatrix(tmp_path / str(value), value) for value in (1.0, 2.0))
    half_way(source, tmp_path / "c", ConvertOptions(quant="q8_0", imatrix=one))
    (said,) = make(source, tmp_path / "c", ConvertOptions(quant="q8_0", imatrix=two))
    assert "discarded" in said


def test_damage_to_the_last_blob_starts_again(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """In what the journal says is there."""
    half_way(source, tmp_path / "b", share=0.3)
    n = len((tmp_path / "b" / JOURNAL).read_bytes().splitlines()) - 1
    blobs = table(tmp_path / "expected").experts
    flip(tmp_path / "b" / (blobs.files[0] + ".partial"), blobs.blob_offset[n - 1] + 5)
    (said,) = make(source, tmp_path / "b")
    assert "damaged: starting again" in said
    assert hashes(tmp_path / "b") == expected


def test_half_an_entry_in_the_journal_is_none(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    half_way(source, tmp_path / "b")
    journal = tmp_path / "b" / JOURNAL
    n = len(journal.read_bytes().splitlines()) - 1
    journal.write_bytes(journal.read_bytes()[:-7])
    (said,) = make(source, tmp_path / "b")
    assert f"behind {n - 1} of" in said
    assert hashes(tmp_path / "b") == expected


@pytest.mark.parametrize("text", [b"", b"\n", b"nonsense", b"\xff\xfe\n\n12\n"])
def test_a_journal_that_is_none(
    text: bytes, source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / JOURNAL).write_bytes(text)
    make(source, tmp_path / "b")
    assert hashes(tmp_path / "b") == expected


def test_a_full_disk_fails_in_one_sentence_and_can_be_mended(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """Files larger than a limit fail like those on a full disk, without a disk to fill."""
    before = source.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write to \S+ \(file too large\); once") as error:
            make(source, tmp_path / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert not is_complete(tmp_path / "b")
    assert source.read_bytes() == before
    (said,) = make(source, tmp_path / "b")
    assert "going on" in said
    assert hashes(tmp_path / "b") == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root; the limit above needs none")
def test_a_disk_that_fills_up_while_it_is_written(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting is not permitted; the limit above needs no mount")
    try:
        ballast = disk / "ballast"

        def fill(done: float, total: float) -> None:
            if not ballast.exists():
                with suppress(OSError):
                    ballast.write_bytes(bytes(3 << 20))

        with pytest.raises(OSError, match="no space left on device"):
            make(source, disk / "b", progress=fill)
        assert not is_complete(disk / "b")
        ballast.unlink()
        make(source, disk / "b")
        assert hashes(disk / "b") == expected
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_too_small_is_refused_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)

    class Small:
        f_bavail, f_frsize = 100, real.f_frsize

    monkeypatch.setattr(os, "statvfs", lambda path: Small)
    with pytest.raises(UserError, match=r"needs 3\.9 MB but its disk has 409\.6 KB free; make"):
        make(source, tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []


def test_a_source_that_shrinks_while_it_is_read(tiny_file: TinyFile, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_file("qwen3moe").read_bytes())
    opened = open_source(path)
    os.truncate(path, 2_000_000)
    with pytest.raises(UserError, match="became shorter while it was read"):
        convert.convert(opened, tmp_path / "b", PLAINLY, kernels, lambda *_: None, lambda _: None)
    opened.close()
    assert not is_complete(tmp_path / "b")


def test_a_source_cut_short_is_refused(tiny_file: TinyFile, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_file("qwen3moe").read_bytes()[:-5000])
    with pytest.raises(UserError, match="cut short"):
        make(path, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_nan_in_a_source(tiny_file: TinyFile, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_file("qwen3moe", experts=Quant.F16).read_bytes())
    header = read_header(path)
    info = next(i for i in header.tensors if i.name == "blk.1.ffn_up_exps.weight")
    with path.open("r+b") as file:
        file.seek(header.data_start + info.offset + 5 * 256 * 96 * 2)
        file.write(np.float16(np.nan).tobytes())
    with pytest.raises(UserError, match=r"expert 5 of blk\.1\.ffn_up_exps\.weight holds NaN"):
        make(path, tmp_path / "b", ConvertOptions(quant="q4_0"))
    assert not is_complete(tmp_path / "b")
    make(path, tmp_path / "copy")  # what is not computed with is not judged
    assert is_complete(tmp_path / "copy")


def test_folders_that_cannot_be_written_to(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UserError, match="is a file; name a new or an empty folder"):
        make(source, tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot write to .* \(not a directory\)"):
        make(source, tmp_path / "file" / "b")
    with pytest.raises(UserError, match="cannot write to /proc/bundle"):
        make(source, Path("/proc/bundle"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letters.txt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds something else \(letters\.txt\)"):
        make(source, tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["letters.txt"]


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder nobody can write to; root has to mount it so."""
    if os.geteuid() != 0:
        folder.chmod(0o555)
        yield
        folder.chmod(0o755)
        return
    again = [["mount", "--bind", folder, folder], ["mount", "-o", "remount,bind,ro", folder]]
    if any(subprocess.run(args, capture_output=True, check=False).returncode for args in again):
        pytest.skip("mounting is not permitted; another user than root needs no mount")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_target_that_cannot_be_written_to_is_named_in_a_sentence(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """A new folder in one that is read-only, that folder itself, a conversion begun there."""
    target = tmp_path / "target"
    target.mkdir()
    half_way(source, tmp_path / "begun")
    with read_only(target):
        with pytest.raises(UserError, match=r"cannot write to \S+ \(.*\); name another folder$"):
            make(source, target / "new")
        with pytest.raises(OSError, match=r"cannot write to \S+ \(.*\); once that is mended"):
            make(source, target)
    assert list(target.iterdir()) == []
    before = hashes(tmp_path / "begun")
    (tmp_path / "begun" / JOURNAL).chmod(0o444)
    with (
        read_only(tmp_path / "begun"),
        pytest.raises(OSError, match=r"cannot write to \S+ \(.*\); once that is mended"),
    ):
        make(source, tmp_path / "begun")
    assert hashes(tmp_path / "begun") == before
    (tmp_path / "begun" / JOURNAL).chmod(0o644)
    make(source, tmp_path / "begun")
    assert hashes(tmp_path / "begun") == expected


def test_a_source_that_cannot_be_written_to_is_read(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    shutil.copy2(source, folder)
    with read_only(folder):
        make(folder / source.name, tmp_path / "b")
    assert hashes(tmp_path / "b") == expected
    assert [path.name for path in folder.iterdir()] == [source.name]


def test_a_bundle_is_never_written_over(source: Path, tmp_path: Path) -> None:
    make(source, tmp_path / "b")
    before = hashes(tmp_path / "b")
    with pytest.raises(UserError, match="holds a bundle already; remove it or name another"):
        make(source, tmp_path / "b", ConvertOptions(quant="q8_0"))
    assert hashes(tmp_path / "b") == before
    with pytest.raises(UserError, match="is a bundle already"):
        open_source(tmp_path / "b")


def no_entry(*_: object) -> None:
    raise AssertionError("a complete bundle was written again")


def test_a_complete_bundle_is_not_made_again(source: Path, tmp_path: Path) -> None:
    options = ConvertOptions(quant="q4_0", low_quant="q4_0", layout="plain", shard_bytes=100_000)
    assert summary(source, tmp_path / "b", options).is_new
    before = hashes(tmp_path / "b")
    (tmp_path / "b" / "routing.gguf").write_bytes(b"what a trace added")
    again = dataclasses.replace(options, threads=1)
    assert not summary(source, tmp_path / "b", again).is_new
    assert make(source, tmp_path / "b", options, no_entry) == []
    assert hashes(tmp_path / "b").items() >= before.items()


@pytest.mark.parametrize(
    "change",
    [
        {"quant": "q5_0"},
        {"low_quant": None},
        {"low_quant": "q5_0"},
        {"shard_bytes": None},
        {"imatrix": "imatrix.dat"},
    ],
    ids=str,
)
def test_a_complete_bundle_of_other_options_is_refused(
    change: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    options = ConvertOptions(quant="q4_0", low_quant="q4_0", layout="plain", shard_bytes=100_000)
    make(source, tmp_path / "b", options)
    if "imatrix" in change:
        change = {"imatrix": write_imatrix(tmp_path / "imatrix.dat", 1.0)}
    with pytest.raises(UserError, match="holds a bundle already"):
        make(source, tmp_path / "b", dataclasses.replace(options, **change))


def test_a_complete_bundle_with_an_imatrix(source: Path, tmp_path: Path) -> None:
    """Of another one it is another bundle, though all sizes and the source are the same."""
    one, two = (write_imatrix(tmp_path / str(value), value) for value in (1.0, 2.0))
    options = ConvertOptions(quant="q4_0", layout="plain", imatrix=one)
    make(source, tmp_path / "bundle", options)
    assert not summary(source, tmp_path / "bundle", options).is_new
    with pytest.raises(UserError, match="holds a bundle already"):
        make(source, tmp_path / "bundle", dataclasses.replace(options, imatrix=two))


@pytest.mark.parametrize("harm", ["cut short", "missing", "another header"])
def test_a_bundle_that_is_not_whole_is_not_called_complete(
    harm: str, source: Path, tmp_path: Path
) -> None:
    make(source, tmp_path / "b")
    file = tmp_path / "b" / table(tmp_path / "b").experts.files[0]
    if harm == "cut short":
        os.truncate(file, file.stat().st_size - 1)
    elif harm == "missing":
        file.unlink()
    else:
        flip(file, 100)
    with pytest.raises(UserError, match="holds a bundle already"):
        make(source, tmp_path / "b")


def test_two_conversions_into_one_folder(source: Path, tmp_path: Path) -> None:
    half_way(source, tmp_path / "b")
    with (tmp_path / "b" / JOURNAL).open("r+b") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another conversion into .* is running"):
            make(source, tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (ConvertOptions(quant="q4"), "'q4' is no type to quantize to: choose one of f32, "),
        (ConvertOptions(quant="q8_k"), "'q8_k' is no type"),
        (ConvertOptions(low_quant="int2"), "'int2' is no type"),
        (
            ConvertOptions(layout="tiled"),
            "'tiled' is no layout: choose one of auto, plain, repacked",
        ),
        (
            ConvertOptions(imatrix=Path("x")),
            "imatrix weighs a quantization: give quant or low_quant",
        ),
        (
            ConvertOptions(quant="q4_0", imatrix=Path("/no/x")),
            "cannot read the importance matrix /no/x",
        ),
        (ConvertOptions(quant="f32", layout="repacked"), "take f32 as it is; give layout=plain"),
    ],
    ids=str,
)
def test_wrong_options(
    options: ConvertOptions, sentence: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        make(source, tmp_path / "b", options)
    assert sentence in str(error.value)
    assert not (tmp_path / "b").exists()


# --- verifying, memory, the command -------------------------------------------------------------


def test_verify_names_what_has_changed(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "b"
    make(source, folder)
    blobs = table(folder).experts
    header = read_header(folder / TRUNK)

    flip(folder / blobs.files[0], blobs.blob_offset[20] + blobs.blob_bytes[20] - 1)
    flip(folder / TRUNK, header.data_start + header.tensors[2].offset)
    assert verify(folder, lambda *_: None) == [
        f"{folder / blobs.files[0]}: expert 4 of layer 1 has changed",
        f"{folder / TRUNK}: {header.tensors[2].name} has changed",
    ]
    os.truncate(folder / blobs.files[0], blobs.blob_offset[47])
    assert f"{folder / blobs.files[0]}: expert 15 of layer 2 is cut short" in verify(
        folder, lambda *_: None
    )
    (folder / blobs.files[0]).unlink()
    assert any("no such file" in finding for finding in verify(folder, lambda *_: None))


# Not ru_maxrss: that begins with what the forking process had.
WEIGH = """
import contextlib
from pathlib import Path
from moe_gguf.runtime.cli.main import main
with contextlib.suppress(SystemExit):
    main()
status = Path("/proc/self/status").read_text()
print(status.split("VmHWM:")[1].split()[0])
"""


def peak_bytes(*args: object) -> int:
    """The most memory a command of ours has."""
    argv = [sys.executable, "-c", WEIGH, *map(str, args)]
    child = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    return int(child.stdout) * 1024


def test_memory_is_a_few_experts(tmp_path: Path) -> None:
    path = tiny.write_big(tmp_path / "big.gguf")
    regrouped = peak_bytes("convert", path, tmp_path / "copy", "--layout", "plain")
    quantized = peak_bytes("convert", path, tmp_path / "q4_0", "--quant", "q4_0")
    assert path.stat().st_size > 300e6
    assert is_complete(tmp_path / "copy") and is_complete(tmp_path / "q4_0")
    assert regrouped < 200e6  # of which half is Python and llama.cpp's libraries
    assert quantized < 230e6


def test_memory_has_a_bound_whatever_the_size_of_a_matrix(tmp_path: Path) -> None:
    path = tiny.write_huge(tmp_path / "huge.gguf")
    folder = tmp_path / "b"
    peak = peak_bytes("convert", path, folder, "--quant", "q8_0", "--low-quant", "q4_0")
    assert path.stat().st_size > 3 * 205e6
    assert is_complete(folder)
    assert peak < 330e6  # with a window of 100 MB


def test_what_has_passed_is_given_back_to_the_system(
    source: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: set[Path] = set()

    def advise(fd: int, offset: int, n_bytes: int, advice: int) -> None:
        assert (offset, n_bytes, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        given.add(Path(f"/proc/self/fd/{fd}").readlink())

    monkeypatch.setattr(convert, "FORGET_BYTES", 1 << 20)
    monkeypatch.setattr(os, "posix_fadvise", advise)
    make(source, tmp_path / "b")
    assert hashes(tmp_path / "b") == expected
    written = {tmp_path / "b" / f"{name}.partial" for name in expected}
    assert given == {source, *written}


def command(*args: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "moe_gguf", *map(str, args)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_says_what_it_made_on_stderr(source: Path, tmp_path: Path) -> None:
    options: list[Any] = ["--quant", "q4_k", "--low-quant", "q4_0", "--verify"]
    done = command("convert", source, tmp_path / "b", *options)
    assert (done.returncode, done.stdout) == (0, "")
    lines = done.stderr.splitlines()
    assert lines[0] == "moe-gguf: rows of 96 do not fit q4_k: 3 tensors become q5_0"
    assert lines[1] == f"moe-gguf: wrote {tmp_path / 'b'}"
    assert [line.split()[0] for line in lines[2:6]] == ["experts", "low", "trunk", "total"]
    assert lines[6].endswith("every byte is as it was written")

    again = command("convert", source, tmp_path / "b")
    assert again.returncode == 2
    assert again.stderr.startswith("moe-gguf: error: ")

    blobs = table(tmp_path / "b").experts
    with (tmp_path / "b" / blobs.files[0]).open("r+b") as file:
        file.seek(blobs.blob_offset[0])
        file.write(b"????")
    found = command("inspect", tmp_path / "b", "--verify", "--json")
    assert found.returncode == 1
    assert "expert 0 of layer 0 has changed; convert the model again" in found.stderr
    assert len(json.loads(found.stdout)["damage"]) == 1


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    path = tiny.write_tiny("mixtral", tmp_path / "m.gguf", experts=Quant.F16)
    argv = [sys.executable, "-m", "moe_gguf", "convert", path, tmp_path / "b", "--quant", "iq4_xs"]
    child = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "b" / TRUNK).with_suffix(".gguf.partial").exists():
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert said.splitlines()[-1] == (
        "moe-gguf: interrupted; the same command goes on where this one stopped"
    )
    assert not is_complete(tmp_path / "b")


def test_progress_says_speed_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runtime_progress, "_LINE_SECONDS", 0.0)
    clock = iter([0.0, 0.1, 10.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with runtime_progress.bar("converting", in_bytes=True) as report:
        report(20e6, 200e6)  # done by an earlier run
        report(120e6, 200e6)
    assert capfd.readouterr().err.splitlines()[-1] == "converting: 60%, 10 MB/s, 8 s left"


def test_only_bundles_can_be_verified(source: Path) -> None:
    done = command("inspect", source, "--verify")
    assert done.returncode == 2
    assert "has no checksums to verify: only bundles do" in done.stderr
