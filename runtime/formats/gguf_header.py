"""One GGUF file's header: metadata, tensor infos, and where the data begins.

This file owns the byte format of GGUF 2 and 3. It refuses whatever llama.cpp refuses, so that a
file read here can be handed on. It knows no architecture, no split sets and no experts, and it
uses no tensor data.

A header is read once and its bytes are kept: a pair to be copied or a vocabulary to be decoded is
a slice of them. Big arrays are stepped over, and decoded only when asked for.

It is read by hand because the gguf package's reader makes numpy arrays of every field: a header
with a vocabulary of 152,000 tokens took it 15.4 s and 493 MB, and takes 70 ms and 6 MB here.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO, TypeVar

from ..errors import UserError, reason
from .ggml_types import GGML_TYPES, pad_up, type_bytes

Scalar = bool | int | float | str
Value = Scalar | tuple[Scalar, ...]

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_NAME_BYTES = 63  # GGML_MAX_NAME less its terminator
MAX_STRING_BYTES = 1 << 30  # llama.cpp's own limit, also for the items of an array
SMALL_ARRAY = 1024  # arrays up to this many items are decoded at once
MAX_HEADER_BYTES = 1 << 28  # several times the longest known; what a damaged length may cost
_CHUNK_BYTES = 4 << 20
_LENGTH = struct.Struct("<Q")


class ValueType(IntEnum):
    """Types of metadata values, as numbered in the file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


VALUE_CODES: dict[ValueType, str] = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class KeyValue:
    """One metadata pair; [start, end) is its raw span in the file, key and type included.

    value is None for an array of more than SMALL_ARRAY items: GgufHeader.get decodes it.
    """

    key: str
    kind: ValueType
    item: ValueType | None  # of an array
    count: int  # items of an array, else 1
    start: int
    payload: int  # file offset of the value itself
    end: int
    value: Value | None


@dataclass(frozen=True)
class TensorInfo:
    """One tensor; ne is as stored (1 to 4 dimensions, fastest first), offset is in the data."""

    name: str
    ne: tuple[int, ...]
    ggml_type: int
    offset: int

    @property
    def n_items(self) -> int:
        n = 1
        for d in self.ne:
            n *= d
        return n

    @property
    def n_bytes(self) -> int:
        return type_bytes(self.ggml_type, self.n_items)


@dataclass(frozen=True)
class GgufHeader:
    """What a file says about itself. Tensors lie in file order, each padded, without gaps."""

    path: Path
    version: int
    pairs: Mapping[str, KeyValue]  # in file order
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data_start: int
    file_bytes: int
    content: bytes = field(repr=False)  # the file up to data_start

    def get(self, key: str) -> Value | None:
        """The value of a key, whatever its size; None if there is none."""
        pair = self.pairs.get(key)
        if pair is None or pair.value is not None:
            return None if pair is None else pair.value
        assert pair.item is not None
        return _items(self.content, pair.payload, pair.item, pair.count)

    def strings(self, key: str) -> list[bytes]:
        """Every item of an array of strings, as bytes; [] if there is none."""
        pair = self.pairs.get(key)
        if pair is None or pair.item is not ValueType.STRING:
            return []
        return _strings(self.content, pair.payload, pair.count)

    def payload(self, key: str) -> memoryview:
        """The bytes of one value, without a copy: of an array, its items."""
        pair = self.pairs[key]
        return memoryview(self.content)[pair.payload : pair.end]

    def raw(self, key: str) -> bytes:
        """The bytes of one pair as they stand in the file, ready to be written to another."""
        pair = self.pairs[key]
        return self.content[pair.start : pair.end]


def read_header(path: Path) -> GgufHeader:
    """Read and check the header of one file; a UserError names what is wrong with it.

    The file is opened once, and no byte of it is read twice.
    """
    with _open(path) as file:
        file_bytes = file.seek(0, 2)
        file.seek(0)
        return _Reader(path, file, file_bytes).header()


def _open(path: Path) -> BinaryIO:
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return path.open("rb", buffering=0)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise UserError(
            f"cannot open {path} ({reason(error)}); check the name and its rights"
        ) from error
    kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
    raise UserError(f"{path} is {kind}; name a GGUF file")


# --- values, once their bytes are known to be there ---------------------------------------------

Content = TypeVar("Content", bytes, bytearray)


def _strings(content: Content, at: int, count: int) -> list[Content]:
    unpack, out = _LENGTH.unpack_from, []
    for _ in range(count):
        start = at + 8
        at = start + unpack(content, at)[0]
        out.append(content[start:at])
    return out


def _items(content: Content, at: int, item: ValueType, count: int) -> tuple[Scalar, ...]:
    if item is ValueType.STRING:
        return tuple(raw.decode("utf-8", "replace") for raw in _strings(content, at, count))
    return struct.unpack_from(f"<{count}{VALUE_CODES[item]}", content, at)


class _Reader:
    """A cursor over a header that is read, a few MiB at a time, as far as the cursor gets."""

    def __init__(self, path: Path, file: BinaryIO, file_bytes: int) -> None:
        self.path = path
        self.file = file
        self.file_bytes = file_bytes
        self.at = 0
        self.content = bytearray()

    # --- bytes ---

    def damaged(self, what: str) -> UserError:
        return UserError(f"{self.path} is damaged ({what}); download or convert it again")

    def truncated(self) -> UserError:
        return self.damaged(f"it ends inside its header, after {self.file_bytes} bytes")

    def load(self, end: int) -> None:
        """Have the file up to here."""
        if end <= len(self.content):
            return
        if end > self.file_bytes:
            raise self.truncated()
        if end > MAX_HEADER_BYTES:
            raise self.damaged(f"its header is longer than {MAX_HEADER_BYTES >> 20} MiB")
        want = min(pad_up(end, _CHUNK_BYTES), self.file_bytes) - len(self.content)
        try:
            while want > 0 and (part := self.file.read(want)):
                self.content += part
                want -= len(part)
        except OSError as error:
            raise UserError(f"cannot read {self.path} ({reason(error)}); check the disk") from error
        if len(self.content) < end:  # it shrank since it was opened
            raise self.truncated()

    def skip(self, n_bytes: int) -> int:
        """Step over bytes, which must be there; where they start."""
        start, self.at = self.at, self.at + n_bytes
        self.load(self.at)
        return start

    def take(self, n_bytes: int) -> bytearray:
        start = self.skip(n_bytes)
        return self.content[start : self.at]

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def name(self, what: str, limit: int) -> str:
        """A key or tensor name: what C and Python must read alike."""
        n_bytes = self.u64()
        if n_bytes > limit:
            raise self.damaged(f"{what} is {n_bytes} bytes long")
        try:
            name = self.take(n_bytes).decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not text") from None
        if not name or "\0" in name:
            raise self.damaged(f"{what} is empty or holds a zero byte")
        return name

    # --- values ---

    def skip_strings(self, key: str, count: int) -> None:
        """The one loop that runs per token and merge of a vocabulary."""
        unpack, content, at = _LENGTH.unpack_from, self.content, self.at
        last = len(content) - 8
        for _ in range(count):
            if at > last:
                self.load(at + 8)
                last = len(content) - 8
            n_bytes = unpack(content, at)[0]
            if n_bytes > MAX_STRING_BYTES:
                raise self.damaged(f"key {key} holds a string of {n_bytes} bytes")
            at += 8 + n_bytes
        self.skip(at - self.at)

    def value_type(self, key: str) -> ValueType:
        number = self.u32()
        try:
            return ValueType(number)
        except ValueError:
            raise self.damaged(f"key {key} has unknown type {number}") from None

    def pair(self) -> KeyValue:
        start = self.at
        key = self.name("a key", 1 << 16)
        kind = self.value_type(key)
        item, count = None, 1
        if kind is ValueType.ARRAY:
            item, count = self.value_type(key), self.u64()
            if item is ValueType.ARRAY:
                raise self.damaged(f"key {key} is an array of arrays")
        of = kind if item is None else item
        each = 8 if of is ValueType.STRING else struct.calcsize("<" + VALUE_CODES[of])
        if item is not None and count * each > self.file_bytes - self.at:
            raise self.damaged(f"key {key} claims {count} items, more than the file can hold")
        payload = self.at
        if of is ValueType.STRING:
            self.skip_strings(key, count)
        else:
            self.skip(count * each)
        value: Value | None = None
        if item is None:
            (value,) = _items(self.content, payload, kind, 1)
        elif count <= SMALL_ARRAY:
            value = _items(self.content, payload, item, count)
        return KeyValue(key, kind, item, count, start, payload, self.at, value)

    def tensor(self) -> TensorInfo:
        name = self.name("a tensor name", MAX_NAME_BYTES)
        n_dims = self.u32()
        if not 1 <= n_dims <= MAX_DIMS:
            raise self.damaged(f"tensor {name} has {n_dims} dimensions")
        ne = struct.unpack(f"<{n_dims}Q", self.take(8 * n_dims))
        ggml_type, offset = self.u32(), self.u64()
        kind = GGML_TYPES.get(ggml_type)
        if kind is None:
            raise UserError(
                f"{self.path}: tensor {name} has type {ggml_type}, which llama.cpp does not know;"
                " convert the model to a current type"
            )
        info = TensorInfo(name, ne, ggml_type, offset)
        n_items = info.n_items  # a Python int: no overflow
        if min(ne) < 1 or n_items * kind.block_bytes >= 1 << 63:
            raise self.damaged(f"tensor {name} has the impossible shape {list(ne)}")
        if ne[0] % kind.block:
            raise self.damaged(
                f"tensor {name} has rows of {ne[0]} items, no multiple of {kind.name}'s"
                f" block of {kind.block}"
            )
        return info

    # --- the whole ---

    def version(self) -> int:
        if self.file_bytes == 0:
            raise UserError(f"{self.path} is empty; download or convert it again")
        if (magic := self.take(min(4, self.file_bytes))) != MAGIC:
            raise UserError(
                f"{self.path} is not a GGUF file (it starts with {bytes(magic)!r}); give a .gguf"
                " file"
            )
        version = self.u32()
        if version & 0xFFFF == 0:
            raise UserError(f"{self.path} is a big-endian GGUF; convert it to little-endian")
        if version not in (2, 3):
            raise UserError(
                f"{self.path} is GGUF version {version}, but 2 and 3 are read; convert it again"
            )
        return version

    def header(self) -> GgufHeader:
        version = self.version()
        n_tensors, n_pairs = self.u64(), self.u64()
        # The shortest pair and tensor info: one-byte names, one dimension.
        if n_pairs * 14 + n_tensors * 33 > self.file_bytes:
            raise self.damaged(
                f"it claims {n_pairs} keys and {n_tensors} tensors in {self.file_bytes} bytes"
            )
        pairs: dict[str, KeyValue] = {}
        for _ in range(n_pairs):
            pair = self.pair()
            if pair.key in pairs:
                raise self.damaged(f"key {pair.key} appears twice")
            pairs[pair.key] = pair
        alignment = self.alignment(pairs.get("general.alignment"))
        tensors: dict[str, TensorInfo] = {}
        for _ in range(n_tensors):
            info = self.tensor()
            if info.name in tensors:
                raise self.damaged(f"tensor {info.name} appears twice")
            tensors[info.name] = info
        data_start = pad_up(self.at, alignment)
        self.check_data(tuple(tensors.values()), alignment, data_start)
        end = min(data_start, self.file_bytes)  # without tensors the padding may be missing
        self.load(end)
        return GgufHeader(
            self.path,
            version,
            pairs,
            tuple(tensors.values()),
            alignment,
            data_start,
            self.file_bytes,
            bytes(memoryview(self.content)[:end]),
        )

    def alignment(self, pair: KeyValue | None) -> int:
        if pair is None:
            return DEFAULT_ALIGNMENT
        value = pair.value
        if pair.kind is not ValueType.UINT32 or not isinstance(value, int):
            raise self.damaged("general.alignment is not a 32-bit number")
        if value < 1 or value & (value - 1):
            raise self.damaged(f"general.alignment is {value}, no power of two")
        return value

    def check_data(self, tensors: tuple[TensorInfo, ...], alignment: int, start: int) -> None:
        """Tensors follow each other in the order of their infos: aligned, no gap, no overlap."""
        expected = end = 0
        for info in tensors:
            if info.offset != expected:
                raise self.damaged(
                    f"tensor {info.name} is said to lie at {info.offset}, not at {expected}"
                )
            end = expected + info.n_bytes
            expected = pad_up(end, alignment)
        missing = start + end - self.file_bytes
        if tensors and missing > 0:
            raise UserError(
                f"{self.path} is cut short: {missing} of {start + end} bytes are missing;"
                " download it again"
            )
