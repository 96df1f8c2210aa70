"""The output file: what is in it is done, and what is written to it stays.

Each line says in its ``id`` which line of the input it answers and that line's digest, so the file
alone says what is left to do, and whether it belongs to an input. A line is written at once, by one
call: a process that is killed leaves at most half a line, at the end, and the next run removes it.
``sync`` brings what was written to the disk; only then it counts as done, ``n_synced``.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, reason
from ..files import sync_folder
from ..system import check_writable
from .lines import MOST_BYTES, Line, Raw, raw_lines

_BEGINNING = b'{"id": "batch_req_'
_HEAD = re.compile(rb'\s*\{\s*"id"\s*:\s*"batch_req_([1-9][0-9]{0,14})_([0-9a-f]{16})"\s*,')
# What file systems without locks say, some network and overlay ones among them.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


class Output:
    """The output file of a batch, created or taken up again; UserError for one that is none.

    While it is open no other process has it, where the file system has locks.
    """

    def __init__(self, path: Path, source: Path, n_lines: int) -> None:
        """``n_lines`` are those of ``source``, empty ones too."""
        self._path, self._source = path, source
        _check(path, source)
        self._done = np.zeros(n_lines + 1, np.uint64)  # by number: its digest; 0: not done
        self.n_before = 0  # lines of earlier runs
        self.n_written = 0
        self.n_synced = 0
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UserError(f"cannot write {path} ({reason(error)})") from None
        try:
            self._lock()
            self._take_up()
            sync_folder(path.absolute().parent)
        except BaseException:
            os.close(self._fd)
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing {self._path}: wait for it, or give another file"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise

    # -- earlier runs

    def _take_up(self) -> None:
        last: Raw | None = None
        with open(self._fd, "rb", closefd=False) as file:
            for number, raw in enumerate(raw_lines(file), 1):
                last = raw
                if raw.is_ended and raw.data.strip() and not self._take(raw.data):
                    raise self._foreign(number)
        self._size = os.fstat(self._fd).st_size
        if last is not None and not last.is_ended:
            self._mend(last, number)

    def _take(self, data: bytes) -> bool:
        """Note a line as done; False for one that is no answer of a batch."""
        head = _HEAD.match(data)
        if head is None:
            return False
        number, digest = int(head[1]), int(head[2], 16)
        if number >= len(self._done):
            raise UserError(
                f"{self._path} belongs to another input: it answers a line {number}, and "
                f"{self._source} has {len(self._done) - 1}; give another output file"
            )
        self.n_before += int(self._done[number] == 0)
        self._done[number] = max(digest, 1)
        return True

    def _mend(self, last: Raw, number: int) -> None:
        """The last line was cut short, by a kill or a power cut, or only its end is missing."""
        if _is_json(last) and self._take(last.data):
            self._append(b"\n")
            return
        data = last.data.rstrip(b"\0")  # of blocks that a power cut kept from the disk
        if not (data.startswith(_BEGINNING) or _BEGINNING.startswith(data)):
            raise self._foreign(number)
        os.ftruncate(self._fd, last.start)
        self._size = last.start

    def _foreign(self, number: int) -> UserError:
        return UserError(
            f"line {number} of {self._path} is no answer of a batch: give a file that does not "
            "exist yet, or one of an earlier run"
        )

    def has(self, line: Line) -> bool:
        """Whether a line of the input is answered. UserError if the answer is another line's."""
        digest = int(self._done[line.number]) if line.number < len(self._done) else 0
        if not digest:
            return False
        if digest != max(line.digest, 1):
            raise UserError(
                f"{self._path} belongs to another input: its answer to line {line.number} is not "
                f"to what {self._source} has there; give another output file, or remove that "
                "answer to have the line answered again"
            )
        return True

    # -- this run

    def write(self, line: Line, custom_id: str | None, rest: Mapping[str, Any]) -> None:
        """Add the answer to a line. What cannot be written whole is not there at all; OSError."""
        document = {"id": line.id, "custom_id": custom_id, **rest}
        self._append(json.dumps(document, allow_nan=False).encode() + b"\n")
        self.n_written += 1

    def _append(self, data: bytes) -> None:
        written = 0
        try:
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except BaseException:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += written

    def sync(self) -> None:
        """Bring to the disk what was written before; any thread."""
        n = self.n_written
        if n > self.n_synced:
            os.fsync(self._fd)
            self.n_synced = n

    def close(self) -> None:
        self.sync()
        os.close(self._fd)


def _check(path: Path, source: Path) -> None:
    check_writable(path)
    if not path.exists():
        return
    if not stat.S_ISREG(path.stat().st_mode):
        raise UserError(f"cannot write {path}: only a file can be taken up again")
    if path.samefile(source):
        raise UserError(f"{path} is the input: give another output file")


def _is_json(raw: Raw) -> bool:
    if raw.n_bytes > MOST_BYTES:
        return False
    try:
        return isinstance(json.loads(raw.data), dict)
    except (ValueError, RecursionError):
        return False
