"""What an interrupted conversion leaves behind for the next: which steps are on the disk for sure.

The first line says what is being made, each further one holds the checksums of a step. An entry is
written after the disk has confirmed the step's data, by a thread, so that the writer does not wait.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from ..runtime.errors import UserError
from .source import forget

# How much may be on its way to the disk between two entries in the journal: what a power cut
# costs, against a wait for the disk for each.
CHECKPOINT_BYTES = 128 << 20

# What file systems without locks say, some network and overlay ones among them.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


class Journal:
    """The file that says what is complete, locked against a second conversion into its folder.

    ``sums`` holds what an earlier run of the same identity recorded, or None; ``is_other`` says
    that there was one of another, ``is_locked`` whether this file system has locks.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._head = f"moe-gguf convert {identity}\n"
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.is_locked = True
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.is_locked = False
            if error.errno not in _NO_LOCKS:
                os.close(self._fd)
                if not isinstance(error, BlockingIOError):
                    raise
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


class Checkpoints:
    """A thread that waits for the disk, so that the writer need not: data first, then the journal.

    What fails in it is raised by the next ``add`` or by ``close``.
    """

    def __init__(self, journal: Journal) -> None:
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
        forget(fds)
        if entries:
            self._journal.append(entries)
        return not closing
