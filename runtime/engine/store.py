"""Sequences' states on disk: a bounded folder of files, each checked before it is used.

A state belongs to one model, one llama.cpp and one way to compute (``identity``), and to one owner;
both are hashed into its name, and its name into its checksum. A file appears whole or not at all.
What is damaged or no file of ours is removed with a note; files of other identities lie in folders
of their own and count towards the bound. Hashing and waiting for the disk is left to two workers,
one that reads and one that writes, since whoever owns the states has sequences to compute. Does not
know what the bytes mean.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import xxhash

from ..errors import UserError, option, reason
from ..files import replacing

# A file is one of llama.cpp's sequence files, which it writes and reads without taking memory for
# it: this head, the tokens, the state. After that comes our tail: a magic, the checksum of the
# file's name and of all before.
_HEAD = struct.Struct("<III")  # magic, version, tokens
_GGSQ, _VERSION = 0x67677371, 3
_MAGIC = b"moe-gguf state 1"
_TAIL_BYTES = len(_MAGIC) + 16
_CHUNK_BYTES = 1 << 20
_SUFFIX = ".state"

Note = Callable[[str], None]


class _Mark(NamedTuple):
    """Of a file: another if it was changed."""

    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: IO[bytes]) -> _Mark:
        stat = os.fstat(file.fileno())
        return cls(stat.st_ino, stat.st_size, stat.st_mtime_ns)


@dataclass(eq=False)
class Entry:
    """A state that lies in the folder."""

    path: Path
    tokens: list[int]
    checked: _Mark | None = None  # the file, since it was found good, until it is used


class _Writing(NamedTuple):
    """A file on its way to its name."""

    owner: str
    tokens: list[int]
    path: Path
    size: int


class Store:
    """The states of one ``identity`` below ``folder``, which holds ``limit`` bytes at most.

    ``note`` is told what went wrong; nothing here fails a request. UserError for a folder that
    cannot be used. One thread may use it beside its workers.
    """

    def __init__(self, folder: Path, identity: bytes, limit: int, note: Note) -> None:
        self._root = folder
        self._identity = identity
        self._folder = folder / hashlib.sha256(identity).hexdigest()[:32]
        self._limit = limit
        self._note = note
        self._owners: dict[str, list[Entry]] = {}  # lists are replaced, never changed
        self._writing: dict[Future[None], _Writing] = {}
        self._lock = threading.RLock()  # of both tables
        self._reader = ThreadPoolExecutor(1, "moe-gguf states read")
        self._writer = ThreadPoolExecutor(1, "moe-gguf states written")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(self._folder, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError("no permission to write there")
        except OSError as error:
            raise UserError(
                f"{folder} cannot hold states ({reason(error)}): give another "
                f"{option('cache_dir')}, or none"
            ) from None

    # -- what there is

    def is_listed(self, owner: str) -> bool:
        """Whether ``entries`` says it without looking at files."""
        return owner in self._owners

    def look_up(self, owner: str) -> None:
        """Find out what ``entries`` says of an owner."""
        with self._lock:
            found = (self._entry(path) for path in self._folder.glob(self._name(owner, "*")))
            self._owners[owner] = [entry for entry in found if entry is not None]

    def entries(self, owner: str) -> Sequence[Entry]:
        """What there is of an owner."""
        if owner not in self._owners:
            self.look_up(owner)
        return self._owners[owner]

    def coming(self, owner: str) -> list[tuple[list[int], Future[None]]]:
        """What is being written of an owner: its tokens, and when it is done."""
        with self._lock:
            return [(w.tokens, done) for done, w in self._writing.items() if w.owner == owner]

    def reading(self, work: Callable[[], None]) -> Future[None]:
        """Have ``look_up`` or ``check`` done by a worker."""
        return _submitted(self._reader, work)

    def check(self, owner: str, entry: Entry) -> None:
        """Read all of a state, so that ``verified`` need not; it is gone if it is damaged."""
        try:
            with entry.path.open("rb") as file:
                mark = _Mark.of(file)
                good = _checksum(entry.path.name, file, mark.size - 16) == file.read()
        except OSError as error:
            self._lose(owner, entry, reason(error))
            return
        if good:
            entry.checked = mark
        else:
            self._lose(owner, entry, "it is damaged")

    def verified(self, owner: str, entry: Entry) -> Path | None:
        """The file to restore it from; None where it is not what was written, and it is gone."""
        if not self._is_as_checked(entry):
            self.check(owner, entry)
        if entry.checked is None:
            return None
        entry.checked = None
        with contextlib.suppress(OSError):
            os.utime(entry.path)  # used: not the next to go
        return entry.path

    # -- what is kept

    def write(
        self, owner: str, tokens: list[int], size: int, save: Callable[[Path], None], here: bool
    ) -> Future[None]:
        """Keep what ``save`` writes to a file, about ``size`` bytes, if there is room for it and
        the disk takes it. ``here``: ``save`` is called now, and only the rest is a worker's."""
        body = np.array(tokens, "<i4").tobytes()
        path = self._folder / self._name(owner, xxhash.xxh3_128_hexdigest(body))
        size += _HEAD.size + len(body) + _TAIL_BYTES
        writing = _Writing(owner, list(tokens), path, size)
        if size > self._limit or path.exists():
            return _submitted(self._writer, lambda: None)
        if here:
            begun = self._begin(writing, save)
            return self._later(writing, lambda: self._end(writing, begun))
        return self._later(writing, lambda: self._end(writing, self._begin(writing, save)))

    def _begin(
        self, writing: _Writing, save: Callable[[Path], None]
    ) -> tuple[ExitStack, Path] | None:
        """A partial file that ``save`` has filled, and what gives it its name; None: there is no
        room."""
        try:
            with ExitStack() as stack:
                self._make_room(writing)
                partial = stack.enter_context(replacing(writing.path))
                save(_private(partial))
                return stack.pop_all(), partial
        except OSError as error:
            self._not_kept(reason(error))
        return None

    def _end(self, writing: _Writing, begun: tuple[ExitStack, Path] | None) -> None:
        if begun is None:
            return
        naming, partial = begun
        try:
            with naming, partial.open("rb+") as file:
                file.seek(0, os.SEEK_END)
                file.write(_MAGIC)
                n_bytes = file.tell()
                file.seek(0)
                file.write(_checksum(writing.path.name, file, n_bytes))
        except OSError as error:
            self._not_kept(reason(error))
            return
        with self._lock:
            if (found := self._owners.get(writing.owner)) is not None:
                others = [entry for entry in found if entry.path != writing.path]
                self._owners[writing.owner] = [*others, Entry(writing.path, writing.tokens)]

    def _not_kept(self, why: str) -> None:
        self._note(f"a state was not kept in {self._root}: {why}")

    def _later(self, writing: _Writing, work: Callable[[], None]) -> Future[None]:
        with self._lock:
            future = _submitted(self._writer, work)
            self._writing[future] = writing
        future.add_done_callback(self._written)
        return future

    def _written(self, future: Future[None]) -> None:
        with self._lock:
            del self._writing[future]
        if not future.cancelled() and (error := future.exception()) is not None:
            self._not_kept(str(error))

    def close(self) -> None:
        """Wait for what is being written."""
        self._reader.shutdown()
        self._writer.shutdown()

    # -- the folder

    def _name(self, owner: str, rest: str) -> str:
        # Not a fast hash: nobody may find an owner that shares a name with another.
        whose = hashlib.sha256(self._identity + b"\0" + owner.encode("utf-8", "surrogatepass"))
        return f"{whose.hexdigest()[:32]}-{rest}{_SUFFIX}"

    def _entry(self, path: Path) -> Entry | None:
        try:
            with path.open("rb") as file:
                magic, version, n = _HEAD.unpack(file.read(_HEAD.size))
                tokens = np.frombuffer(file.read(4 * n), "<i4").tolist()
                file.seek(-_TAIL_BYTES, os.SEEK_END)
                ours = magic == _GGSQ and version == _VERSION and len(tokens) == n
                if not ours or file.read(len(_MAGIC)) != _MAGIC:
                    raise ValueError("it is damaged")
        except FileNotFoundError:  # another process has removed it
            return None
        except (OSError, ValueError, struct.error) as error:
            why = "it is damaged" if isinstance(error, struct.error) else reason(error)
            self._discard(path, why)
            return None
        return Entry(path, tokens)

    def _is_as_checked(self, entry: Entry) -> bool:
        try:
            with entry.path.open("rb") as file:
                return entry.checked == _Mark.of(file)
        except OSError:
            return False

    def _lose(self, owner: str, entry: Entry, why: str) -> None:
        entry.checked = None
        self._forget(entry.path, owner)
        self._discard(entry.path, why)

    def _forget(self, path: Path, *owners: str) -> None:
        with self._lock:
            for owner in owners or self._owners:
                found = self._owners[owner]
                self._owners[owner] = [entry for entry in found if entry.path != path]

    def _discard(self, path: Path, why: str) -> None:
        self._note(f"{path} is no state to go on from ({why}): removed")
        with contextlib.suppress(OSError):
            path.unlink()

    def _make_room(self, writing: _Writing) -> None:
        """Remove the files that were unused for the longest, of whatever model."""
        with self._lock:
            size = writing.size + sum(w.size for w in self._writing.values() if w is not writing)
        found = []
        for path in self._root.glob(f"*/*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, path))
        total = size + sum(n for _, n, _ in found)
        for _, n, path in sorted(found):
            if total <= self._limit:
                return
            path.unlink(missing_ok=True)
            total -= n
            self._forget(path)


def _submitted(worker: ThreadPoolExecutor, work: Callable[[], None]) -> Future[None]:
    try:
        return worker.submit(work)
    except RuntimeError:  # the interpreter is about to end, and no pool takes anything
        work()
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _private(path: Path) -> Path:
    """The file, made so that only its user may read what was talked about."""
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600))
    return path


def written(tokens: list[int], state: bytes | bytearray) -> Callable[[Path], None]:
    """What writes a state that llama.cpp gave as bytes as llama.cpp's file of it: these begin with
    a magic and the sequence's number, which the file does not have."""

    def save(path: Path) -> None:
        with path.open("wb") as file:
            file.write(_HEAD.pack(_GGSQ, _VERSION, len(tokens)))
            file.write(np.array(tokens, "<i4").tobytes())
            file.write(memoryview(state)[8:])

    return save


def _checksum(name: str, file: IO[bytes], n_bytes: int) -> bytes:
    """Of a name and of the next ``n_bytes`` of a file."""
    hashed = xxhash.xxh3_128(name.encode())
    while n_bytes > 0 and (chunk := file.read(min(n_bytes, _CHUNK_BYTES))):
        hashed.update(chunk)
        n_bytes -= len(chunk)
    return hashed.digest()
