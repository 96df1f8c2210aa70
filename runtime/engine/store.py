"""Sequences' states on disk: a bounded folder of files, each checked before it is used.

A state belongs to one model, one llama.cpp and one way to compute (``identity``), and to one owner;
both are hashed into its name, and its name into its checksum. A file appears whole or not at all.
What is damaged or no file of ours is removed with a note; files of other identities lie in folders
of their own and count towards the bound. Does not know what the bytes mean.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

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


@dataclass(eq=False)
class Entry:
    """A state that lies in the folder."""

    path: Path
    tokens: list[int]


class Store:
    """The states of one ``identity`` below ``folder``, which holds ``limit`` bytes at most.

    ``note`` is told what went wrong; nothing here fails a request. UserError for a folder that
    cannot be used.
    """

    def __init__(self, folder: Path, identity: bytes, limit: int, note: Note) -> None:
        self._root = folder
        self._identity = identity
        self._folder = folder / hashlib.sha256(identity).hexdigest()[:32]
        self._limit = limit
        self._note = note
        self._owners: dict[str, list[Entry]] = {}
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(self._folder, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError("no permission to write there")
        except OSError as error:
            raise UserError(
                f"{folder} cannot hold states ({reason(error)}): give another "
                f"{option('cache_dir')}, or none"
            ) from None

    def entries(self, owner: str) -> list[Entry]:
        """What there is of an owner."""
        if owner not in self._owners:
            entries = (self._entry(path) for path in self._folder.glob(self._name(owner, "*")))
            self._owners[owner] = [entry for entry in entries if entry is not None]
        return self._owners[owner]

    def verified(self, owner: str, entry: Entry) -> Path | None:
        """The file to restore it from; None where it is not what was written, and it is gone."""
        try:
            with entry.path.open("rb") as file:
                n_bytes = os.fstat(file.fileno()).st_size - 16
                good = _checksum(entry.path.name, file, n_bytes) == file.read()
        except OSError as error:
            self._lose(owner, entry, reason(error))
            return None
        if not good:
            self._lose(owner, entry, "it is damaged")
            return None
        with contextlib.suppress(OSError):
            os.utime(entry.path)  # used: not the next to go
        return entry.path

    def write(self, owner: str, tokens: list[int], size: int, save: Callable[[Path], None]) -> None:
        """Keep what ``save`` writes to a file, about ``size`` bytes, if there is room for it and
        the disk takes it."""
        body = np.array(tokens, "<i4").tobytes()
        name = self._name(owner, xxhash.xxh3_128_hexdigest(body))
        path = self._folder / name
        size += _HEAD.size + len(body) + _TAIL_BYTES
        if size > self._limit or path.exists():
            return
        entries = self.entries(owner)
        try:
            self._make_room(size)
            with replacing(path) as partial:
                save(_private(partial))
                with partial.open("rb+") as file:
                    file.seek(0, os.SEEK_END)
                    file.write(_MAGIC)
                    n_bytes = file.tell()
                    file.seek(0)
                    file.write(_checksum(name, file, n_bytes))
        except OSError as error:
            self._note(f"a state was not kept in {self._root}: {reason(error)}")
            return
        entries.append(Entry(path, list(tokens)))

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

    def _lose(self, owner: str, entry: Entry, why: str) -> None:
        self._owners[owner].remove(entry)
        self._discard(entry.path, why)

    def _discard(self, path: Path, why: str) -> None:
        self._note(f"{path} is no state to go on from ({why}): removed")
        with contextlib.suppress(OSError):
            path.unlink()

    def _make_room(self, size: int) -> None:
        """Remove the files that were unused for the longest, of whatever model."""
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
            for entries in self._owners.values():
                entries[:] = [entry for entry in entries if entry.path != path]


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
