"""Writes a planned bundle so that nothing half-written is ever taken for one.

Bytes come in the blueprint's order: blob by blob, then the trunk. Files carry temporary names until
all of them are whole; `trunk.gguf` gets its own name last. A journal records the checksums of what
is known to be on disk, so that an interrupted conversion goes on behind it. Knows nothing of
sources.

    convert.journal   what is being made, and a line per blob or trunk tensor: see journal.py
    *.partial         the files, each byte at its final offset from the start
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ..runtime.errors import UserError, reason
from ..runtime.files import sync_folder
from ..runtime.formats.bundle import BLOB_ALIGNMENT, TRUNK, BlobSet, BundleTable, is_bundle
from ..runtime.formats.ggml_types import pad_up
from ..runtime.formats.gguf_header import DEFAULT_ALIGNMENT, read_header
from ..runtime.sizes import format_size
from .blueprint import Blueprint
from .journal import Checkpoints, Journal
from .source import Bytes
from .verify import checksum

JOURNAL = "convert.journal"
PARTIAL = ".partial"


@dataclass(frozen=True)
class _Extent:
    """Where one part of a step lies: a blob or a trunk tensor, padded behind."""

    file: str
    offset: int
    n_bytes: int
    alignment: int


class BundleWriter:
    """One conversion into one folder, from where an earlier run of the same blueprint left off.

    A step is one blob in every set, or one trunk tensor; ``done`` of ``n_steps`` are complete.
    """

    def __init__(self, folder: Path, blueprint: Blueprint, note: Callable[[str], None]):
        self._folder = folder
        self._blueprint = blueprint
        self._extents = list(_extents(blueprint))
        self.total_bytes = sum(e.n_bytes for step in self._extents for e in step)
        self._sums: list[list[int]] = []
        self._fds: dict[str, int] = {}
        self._parts: list[_Part] = []
        _check_folder(folder, blueprint)
        with _explained(folder):
            self._journal = Journal(folder / JOURNAL, blueprint.identity)
        if not self._journal.is_locked:
            note(f"{folder} is on a file system without locks: start no other conversion into it")
        try:
            with _explained(folder):
                self._resume(note)
        except BaseException:
            self.close()
            raise
        self._done_bytes = sum(e.n_bytes for step in self._extents[: self.done] for e in step)
        self._checkpoints = Checkpoints(self._journal)

    def __enter__(self) -> BundleWriter:
        return self

    def __exit__(self, *_: object) -> None:
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
        blueprint, n_blobs = self._blueprint, self._blueprint.n_blobs
        checksums = [[sums[i] for sums in self._sums[:n_blobs]] for i in range(len(blueprint.sets))]
        header = blueprint.trunk_header(checksums, [sums[0] for sums in self._sums[n_blobs:]])
        with _explained(self._folder):
            self._checkpoints.close()
            _write(self._fds[TRUNK], [header], 0)
            for fd in self._fds.values():
                os.fsync(fd)
            for name in self._fds:  # the trunk is the last
                if name == TRUNK:
                    sync_folder(self._folder)
                _partial(self._folder, name).rename(self._folder / name)
            sync_folder(self._folder)
            (self._folder / JOURNAL).unlink()
            sync_folder(self._folder)

    # --- going on ---

    def _resume(self, note: Callable[[str], None]) -> None:
        """Find out what is complete, and open every file for the rest."""
        files = dict(_files(self._blueprint))
        sums = self._journal.sums
        if sums is None and (self._folder / TRUNK).exists():
            raise _taken(self._folder)
        if self._journal.is_other:
            note("an unfinished conversion of another source or with other options is discarded")
        elif sums is not None:
            for name in files:  # killed among the last renames
                if not (partial := _partial(self._folder, name)).exists():
                    with contextlib.suppress(FileNotFoundError):
                        (self._folder / name).rename(partial)
            if not self._are_there(sums):
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
        sync_folder(self._folder)
        self._sums = sums or []
        if not sums:
            self._journal.start()
        elif self.done:
            note(f"going on behind {self.done} of {self.n_steps} parts written before")

    def _are_there(self, sums: list[list[int]]) -> bool:
        """Whether the journal speaks of this blueprint's files; the last step is read again."""
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
                    found = checksum(file.fileno(), extent.offset, extent.n_bytes)
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


def is_complete(folder: Path, blueprint: Blueprint) -> bool:
    """Whether this very bundle lies there: its headers and sizes are compared, not its weights."""
    if (folder / JOURNAL).exists() or not is_bundle(folder):
        return False
    try:
        table = BundleTable.parse(read_header(folder / TRUNK))
        sums = [s.blob_checksum for s in (table.experts, table.low) if s is not None]
        if [len(s) for s in sums] != [blueprint.n_blobs] * len(blueprint.sets):
            return False
        if len(table.trunk_checksum) != len(blueprint.trunk):
            return False
        trunk = blueprint.trunk_header(sums, table.trunk_checksum)
        sizes = {
            file: n_bytes
            for s in blueprint.sets
            for file, n_bytes in zip(s.blobs.files, s.blobs.file_bytes, strict=True)
        }
        sizes[TRUNK] = blueprint.trunk_bytes
        for name, header in (*_files(blueprint), (TRUNK, trunk)):
            with (folder / name).open("rb") as file:
                if (
                    file.read(len(header)) != header
                    or os.fstat(file.fileno()).st_size != sizes[name]
                ):
                    return False
    except (UserError, OSError):
        return False
    return True


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


def _files(blueprint: Blueprint) -> Iterator[tuple[str, bytes]]:
    """Every file of the bundle with its header, the trunk last and without: it has checksums."""
    for s in blueprint.sets:
        yield from zip(s.blobs.files, s.headers, strict=True)
    yield TRUNK, b""


def _extents(blueprint: Blueprint) -> Iterator[list[_Extent]]:
    for blob in range(blueprint.n_blobs):
        yield [_blob_extent(s.blobs, blob) for s in blueprint.sets]
    start = len(blueprint.blank_header())
    for info in blueprint.trunk_infos:
        yield [_Extent(TRUNK, start + info.offset, info.n_bytes, DEFAULT_ALIGNMENT)]


def _blob_extent(blobs: BlobSet, blob: int) -> _Extent:
    file = blobs.files[blobs.blob_file[blob]]
    return _Extent(file, blobs.blob_offset[blob], blobs.blob_bytes[blob], BLOB_ALIGNMENT)


def _check_folder(folder: Path, blueprint: Blueprint) -> None:
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
        raise UserError(
            f"cannot write to {folder} ({reason(error)}); name another folder"
        ) from error
    free = disk.f_bavail * disk.f_frsize + there
    need = sum(blueprint.expert_bytes) + blueprint.trunk_bytes
    if need > free:
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
        raise OSError(
            f"cannot write to {folder} ({reason(error)}); once that is mended the same command"
            " goes on where this one stopped"
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
