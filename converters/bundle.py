"""Writes a planned bundle so that nothing half-written is ever taken for one, and verifies bundles.

Bytes come in the plan's order: blob by blob, then the trunk. Files carry temporary names until all
of them are whole; `trunk.gguf` gets its own name last. A journal records the checksums of what is
known to be on disk, so that an interrupted conversion goes on behind it. Knows nothing of sources.

    convert.journal   line 1: what is being made; then one line per blob or trunk tensor
    *.partial         the files, each written in place: a byte once written is at its final offset
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import xxhash

from moe_gguf.converters.plan import Plan
from moe_gguf.converters.source import Bytes
from moe_gguf.runtime.bundle import BLOB_ALIGNMENT, TRUNK, BlobSet, BundleTable
from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.gguf_header import DEFAULT_ALIGNMENT, pad_up, read_header
from moe_gguf.runtime.progress import Report

JOURNAL = "convert.journal"
PARTIAL = ".partial"

# How much may be on its way to the disk between two entries in the journal: what a power cut
# costs, against a wait for the disk for each.
CHECKPOINT_BYTES = 128 << 20
_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class _Extent:
    """Where one part of a step lies: a blob or a trunk tensor, padded behind."""

    file: str
    offset: int
    n_bytes: int
    alignment: int


class BundleWriter:
    """One conversion into one folder, from where an earlier run of the same plan left off.

    A step is one blob in every set, or one trunk tensor; ``done`` of ``n_steps`` are complete.
    """

    def __init__(self, folder: Path, plan: Plan, identity: str, note: Callable[[str], None]):
        self._folder = folder
        self._plan = plan
        self._extents = list(_extents(plan))
        self.total_bytes = sum(e.n_bytes for step in self._extents for e in step)
        self._sums: list[list[int]] = []
        self._fds: dict[str, int] = {}
        self._parts: list[_Part] = []
        _check_folder(folder, plan)
        with _explained(folder):
            self._journal = _Journal(folder / JOURNAL, identity)
        try:
            with _explained(folder):
                self._resume(note)
        except BaseException:
            self.close()
            raise
        self._done_bytes = sum(e.n_bytes for step in self._extents[: self.done] for e in step)
        self._checkpoints = _Checkpoints(self._journal)

    def __enter__(self) -> BundleWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with contextlib.suppress(OSError):  # what is lost here is written again
                self._checkpoints.close()
        finally:
            self.close()

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        self._journal.close()

    @property
    def n_steps(self) -> int:
        return len(self._extents)

    @property
    def done(self) -> int:
        return len(self._sums)

    @property
    def done_bytes(self) -> int:
        """Of ``total_bytes``, and of the step in hand."""
        return self._done_bytes + sum(part.at for part in self._parts)

    # --- writing ---

    def put(self, data: Bytes, which: int = 0, offset: int | None = None) -> None:
        """The next bytes of this step's blob in a set, or of its trunk tensor.

        ``offset`` counts from the step's beginning; a gap before it is filled.
        """
        if not self._parts:
            self._parts = [_Part(extent, xxhash.xxh3_64()) for extent in self._extents[self.done]]
        part = self._parts[which]
        gap = 0 if offset is None else offset - part.at
        assert gap >= 0
        end = part.at + gap + len(data)
        extent = part.extent
        assert end <= extent.n_bytes
        part.hash.update(bytes(gap))
        part.hash.update(data.data)
        rest = pad_up(end, extent.alignment) - end if end == extent.n_bytes else 0
        with _explained(self._folder):
            _write(
                self._fds[extent.file],
                [bytes(gap), data.data, bytes(rest)],
                extent.offset + part.at,
            )
        part.at = end

    def end_step(self) -> None:
        """All parts of this step have been put."""
        assert all(part.at == part.extent.n_bytes for part in self._parts)
        sums = [part.hash.intdigest() for part in self._parts]
        fds = {self._fds[part.extent.file] for part in self._parts}
        with _explained(self._folder):
            self._checkpoints.add(sums, fds, sum(part.at for part in self._parts))
        self._done_bytes = self.done_bytes
        self._sums.append(sums)
        self._parts = []

    def finish(self) -> None:
        """Give the files their names; from the last rename on the folder is a bundle."""
        assert self.done == self.n_steps
        plan, n_blobs = self._plan, self._plan.n_blobs
        checksums = [[sums[i] for sums in self._sums[:n_blobs]] for i in range(len(plan.sets))]
        header = plan.trunk_header(checksums, [sums[0] for sums in self._sums[n_blobs:]])
        with _explained(self._folder):
            self._checkpoints.close()
            _write(self._fds[TRUNK], [header], 0)
            for fd in self._fds.values():
                os.fsync(fd)
            for name in self._fds:  # the trunk is the last
                if name == TRUNK:
                    _sync_folder(self._folder)
                _partial(self._folder, name).rename(self._folder / name)
            _sync_folder(self._folder)
            (self._folder / JOURNAL).unlink()
            _sync_folder(self._folder)

    # --- going on ---

    def _resume(self, note: Callable[[str], None]) -> None:
        """Find out what is complete, and open every file for the rest."""
        files = dict(_files(self._plan))
        sums = self._journal.sums
        if self._journal.is_other:
            if (self._folder / TRUNK).exists():
                raise _taken(self._folder)
            note("an unfinished conversion of another source or with other options is discarded")
        elif sums is not None:
            for name in files:  # killed among the last renames
                if not (partial := _partial(self._folder, name)).exists():
                    with contextlib.suppress(FileNotFoundError):
                        (self._folder / name).rename(partial)
            if not self._are_there(sums, files):
                note("the unfinished conversion found here is damaged: starting again")
                sums = None
        if not sums:
            for path in self._folder.iterdir():
                if path.name != JOURNAL and _is_ours(path.name):
                    path.unlink()
        for name, header in files.items():
            path = _partial(self._folder, name)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            fd = self._fds[name] = os.open(path, flags, 0o666)
            if header:
                _write(fd, [header], 0)
                os.fsync(fd)
        _sync_folder(self._folder)
        self._sums = sums or []
        if not sums:
            self._journal.start()
        elif self.done:
            note(f"going on behind {self.done} of {self.n_steps} parts written before")

    def _are_there(self, sums: list[list[int]], files: dict[str, bytes]) -> bool:
        """Whether the journal speaks of this plan's files; the last step is read again."""
        if len(sums) > self.n_steps:
            return False
        if any(len(s) != len(e) for s, e in zip(sums, self._extents, strict=False)):
            return False
        if not sums:
            return True
        for extent, expected in zip(self._extents[len(sums) - 1], sums[-1], strict=True):
            path = _partial(self._folder, extent.file)
            try:
                with path.open("rb", buffering=0) as file:
                    found = _checksum(file.fileno(), extent.offset, extent.n_bytes)
            except FileNotFoundError:
                return False
            if found != expected:
                return False
        needed = {e.file for step in self._extents[: len(sums)] for e in step}
        return all(_partial(self._folder, name).exists() for name in needed)


class _Part:
    """One extent while it is written."""

    def __init__(self, extent: _Extent, hash: xxhash.xxh3_64) -> None:
        self.extent = extent
        self.hash = hash
        self.at = 0


class _Journal:
    """The file that says what is complete, locked against a second conversion into its folder.

    ``sums`` holds what an earlier run of the same identity recorded, or None; ``is_other`` says
    that there was one of another.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._head = json.dumps({"moe_gguf": 1, "plan": identity}) + "\n"
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise UserError(
                f"another conversion into {path.parent} is running; wait for it or stop it"
            ) from None
        head, *lines = os.pread(self._fd, os.fstat(self._fd).st_size, 0).split(b"\n")
        self.is_other = bool(lines) and head != self._head.rstrip().encode()
        self.sums: list[list[int]] | None = None
        if lines and not self.is_other:
            self.sums = _parse_sums(lines[:-1])  # behind the last line end: half an entry
            at = len(self._head) + sum(len(_format_sums(sums)) for sums in self.sums)
            os.ftruncate(self._fd, at)
            os.lseek(self._fd, at, os.SEEK_SET)

    def start(self) -> None:
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        os.write(self._fd, self._head.encode())
        os.fsync(self._fd)

    def append(self, entries: Sequence[Sequence[int]]) -> None:
        data = b"".join(map(_format_sums, entries))
        while data:
            data = data[os.write(self._fd, data) :]
        os.fdatasync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _format_sums(sums: Sequence[int]) -> bytes:
    return (" ".join(f"{n:016x}" for n in sums) + "\n").encode()


def _parse_sums(lines: Sequence[bytes]) -> list[list[int]]:
    """Entries up to the first that is no entry."""
    out: list[list[int]] = []
    for line in lines:
        try:
            sums = [int(word, 16) for word in line.split(b" ")]
        except ValueError:
            break
        if _format_sums(sums) != line + b"\n":
            break
        out.append(sums)
    return out


class _Checkpoints:
    """A thread that waits for the disk, so that the writer need not: data first, then the journal.

    What fails in it is raised by the next ``add`` or by ``close``.
    """

    def __init__(self, journal: _Journal) -> None:
        self._journal = journal
        self._changed = threading.Condition()
        self._entries: list[Sequence[int]] = []
        self._fds: set[int] = set()
        self._bytes = 0
        self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    def add(self, sums: Sequence[int], fds: set[int], n_bytes: int) -> None:
        with self._changed:
            if self._error is not None:
                raise self._error
            self._entries.append(sums)
            self._fds |= fds
            self._bytes += n_bytes
            if self._bytes >= CHECKPOINT_BYTES:
                self._changed.notify()

    def close(self) -> None:
        """Record everything added so far."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while self._take():
                pass
        except BaseException as error:
            self._error = error

    def _take(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._bytes >= CHECKPOINT_BYTES)
            entries, fds = self._entries, self._fds
            self._entries, self._fds, self._bytes = [], set(), 0
            closing = self._closing
        for fd in fds:
            os.fdatasync(fd)
        if entries:
            self._journal.append(entries)
        return not closing


# --- the folder ---------------------------------------------------------------------------------


# Names that an unfinished conversion may have left; beside a journal they are ours to remove.
_OURS = re.compile(
    rf"{re.escape(JOURNAL)}|(trunk|experts(-low)?-\d{{5}}-of-\d{{5}})\.gguf({re.escape(PARTIAL)})?"
)


def _is_ours(name: str) -> bool:
    return _OURS.fullmatch(name) is not None


def _taken(folder: Path) -> UserError:
    return UserError(f"{folder} holds a bundle already; remove it or name another folder")


def _partial(folder: Path, name: str) -> Path:
    return folder / (name + PARTIAL)


def _files(plan: Plan) -> Iterator[tuple[str, bytes]]:
    """Every file of the bundle with its header, the trunk last and without: it has checksums."""
    for s in plan.sets:
        yield from zip(s.blobs.files, s.headers, strict=True)
    yield TRUNK, b""


def _extents(plan: Plan) -> Iterator[list[_Extent]]:
    for blob in range(plan.n_blobs):
        yield [_blob_extent(s.blobs, blob) for s in plan.sets]
    start = len(plan.blank_header())
    for info in plan.trunk_infos:
        yield [_Extent(TRUNK, start + info.offset, info.n_bytes, DEFAULT_ALIGNMENT)]


def _blob_extent(blobs: BlobSet, blob: int) -> _Extent:
    file = blobs.files[blobs.blob_file[blob]]
    return _Extent(file, blobs.blob_offset[blob], blobs.blob_bytes[blob], BLOB_ALIGNMENT)


def _check_folder(folder: Path, plan: Plan) -> None:
    """A folder of ours to write to, with room for the bundle."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {entry.name: entry for entry in os.scandir(folder)}
        if TRUNK in names and JOURNAL not in names:
            raise _taken(folder)
        for name in sorted(names):
            if not _is_ours(name) or JOURNAL not in names:
                raise UserError(
                    f"{folder} holds something else ({name}); name a new or an empty folder"
                )
        there = sum(entry.stat().st_blocks * 512 for entry in names.values())
        disk = os.statvfs(folder)
    except FileExistsError:
        raise UserError(f"{folder} is a file; name a new or an empty folder") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"cannot write to {folder} ({reason}); name another folder") from error
    free = disk.f_bavail * disk.f_frsize + there
    need = sum(plan.expert_bytes) + plan.trunk_bytes
    if need > free:
        from moe_gguf.runtime.budget import format_size

        raise UserError(
            f"{folder} needs {format_size(need)} but its disk has {format_size(free)} free;"
            " make room or name another folder"
        )


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """A failing disk in a sentence; the run failed, and may be repeated."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OSError(
            f"cannot write to {folder} ({reason}); once that is mended the same command goes on"
            " where this one stopped"
        ) from error


def _write(fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
    left = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
    while left:
        n = os.pwritev(fd, left, offset)
        offset += n
        while left and n >= len(left[0]):
            n -= len(left.pop(0))
        if n:
            left[0] = left[0][n:]


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- verifying ----------------------------------------------------------------------------------


def verify(folder: Path, progress: Report) -> list[str]:
    """Read a bundle whole and compare: one sentence for each part that is not what was written."""
    header = read_header(folder / TRUNK)
    table = BundleTable.parse(header)
    sets = [s for s in (table.experts, table.low) if s is not None]
    total = sum(sum(s.blob_bytes) for s in sets) + sum(info.n_bytes for info in header.tensors)
    done = 0
    findings: list[str] = []

    def check(fd: int, what: str, offset: int, n_bytes: int, expected: int) -> None:
        nonlocal done
        found = _checksum(fd, offset, n_bytes)
        if found is None:
            findings.append(f"{what} is cut short")
        elif found != expected:
            findings.append(f"{what} has changed")
        progress(done := done + n_bytes, total)

    for s in sets:
        for i, name in enumerate(s.files):
            path = folder / name
            try:
                file = path.open("rb", buffering=0)
            except OSError as error:
                findings.append(f"{path} cannot be read ({(error.strerror or '').lower()})")
                continue
            with file:
                if (size := os.fstat(file.fileno()).st_size) != s.file_bytes[i]:
                    findings.append(f"{path} has {size} bytes instead of {s.file_bytes[i]}")
                for blob, expected in enumerate(s.blob_checksum):
                    if s.blob_file[blob] == i:
                        layer, expert = divmod(blob, len(s.blob_file) // len(table.layers))
                        what = f"{path}: expert {expert} of layer {table.layers[layer]}"
                        offset, n_bytes = s.blob_offset[blob], s.blob_bytes[blob]
                        check(file.fileno(), what, offset, n_bytes, expected)
    with header.path.open("rb", buffering=0) as file:
        for info, expected in zip(header.tensors, table.trunk_checksum, strict=True):
            offset = header.data_start + info.offset
            check(file.fileno(), f"{header.path}: {info.name}", offset, info.n_bytes, expected)
    return findings


def _checksum(fd: int, offset: int, n_bytes: int) -> int | None:
    """Of these bytes of a file; None if it ends before them."""
    digest = xxhash.xxh3_64()
    buffer = memoryview(bytearray(min(_READ_BYTES, max(n_bytes, 1))))
    while n_bytes:
        n = os.preadv(fd, [buffer[: min(n_bytes, len(buffer))]], offset)
        if n == 0:
            return None
        digest.update(buffer[:n])
        offset, n_bytes = offset + n, n_bytes - n
    return digest.intdigest()
