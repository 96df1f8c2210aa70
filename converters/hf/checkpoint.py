"""A Hugging Face folder's weights: safetensors files as named tensors, read a slice at a time.

Owns the safetensors format and the index of a sharded set. Knows no model: what a tensor is for,
which ones must be there and what shape they should have is the caller's business.

Slices are read with pread into memory of the caller's size; a mapping would count the whole
checkpoint as this process's memory. Bytes are checked as they pass: weights that are not finite
numbers would convert to a model that answers nonsense.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from ...runtime.errors import UserError, reason

Array = NDArray[Any]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Dtype:
    """A stored type: what numpy reads it as, and which bits are all ones in Inf and NaN."""

    read_as: np.dtype[Any]
    ggml: GGMLQuantizationType | None
    exponent: int = 0


# numpy has no bfloat16; its bytes travel as 16-bit integers.
DTYPES: dict[str, Dtype] = {
    "F32": Dtype(np.dtype("<u4"), GGMLQuantizationType.F32, 0x7F800000),
    "F16": Dtype(np.dtype("<u2"), GGMLQuantizationType.F16, 0x7C00),
    "BF16": Dtype(np.dtype("<u2"), GGMLQuantizationType.BF16, 0x7F80),
    "U8": Dtype(np.dtype("u1"), None),
}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file; ``shape`` as in the checkpoint, row length last."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    fd: int
    offset: int

    @property
    def kind(self) -> Dtype:
        kind = DTYPES.get(self.dtype)
        if kind is None:
            raise UserError(
                f"{self.path}: {self.name} is stored as {self.dtype}; this converter reads F32, "
                "F16 and BF16, so save the model in one of them first"
            )
        return kind

    def read(self, first: int, *shape: int) -> Array:
        """Items from ``first`` on in this shape, as unsigned integers of the stored width."""
        out = np.empty(shape, self.kind.read_as)
        view = out.reshape(-1).view(np.uint8).data
        at = self.offset + first * out.itemsize
        while view:
            try:
                n = os.preadv(self.fd, [view], at)
            except OSError as error:
                raise UserError(f"{self.path}: reading {self.name}: {reason(error)}") from error
            if n == 0:
                raise UserError(f"{self.path} ends inside {self.name}; download it again")
            view, at = view[n:], at + n
        mask = self.kind.exponent
        if mask and out.size and int((out & out.dtype.type(mask)).max()) == mask:
            raise UserError(
                f"{self.path}: {self.name} holds NaN or infinite weights; the checkpoint is "
                "damaged, so download it again"
            )
        return out

    def rows(self, first: int, n: int) -> Array:
        """[n, ...] slices along the first dimension."""
        inner = self.shape[1:]
        return self.read(first * math.prod(inner), n, *inner)


def floats(raw: Array, dtype: str) -> NDArray[np.float32]:
    """What ``Stored.read`` gave, as float32."""
    if dtype == "F32":
        return raw.view("<f4")
    if dtype == "F16":
        return raw.view("<f2").astype(np.float32)
    return (raw.astype("<u4") << 16).view("<f4")


class Checkpoint:
    """The tensors of a folder by name, with its shards held open."""

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, Stored] = {}
        self.n_bytes = 0
        self.headers = hashlib.sha256()  # of every shard's name, size and header
        self._open = contextlib.ExitStack()
        try:
            for path, names in self._shards(folder):
                self._add(path, names)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._open.close()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Stored:
        return self.tensors[name]

    def _shards(self, folder: Path) -> Iterator[tuple[Path, list[str] | None]]:
        """Each shard with the tensors the index expects in it; None where there is no index."""
        index = folder / INDEX
        if not index.exists():
            if not (folder / SINGLE).exists():
                raise UserError(
                    f"{folder} holds neither {SINGLE} nor {INDEX}; download the safetensors files "
                    "of the model, or save it again with transformers' save_pretrained"
                )
            yield folder / SINGLE, None
            return
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no weight_map; download it again")
        by_shard: dict[str, list[str]] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise UserError(f"{index}: {name} has no file name to lie in; download it again")
            by_shard.setdefault(shard, []).append(name)
        for shard, names in sorted(by_shard.items()):
            yield folder / shard, names

    def _add(self, path: Path, names: list[str] | None) -> None:
        try:
            fd = os.open(path, os.O_RDONLY)
            self._open.callback(os.close, fd)
            size = os.fstat(fd).st_size
            header = _header(path, fd, size)
        except OSError as error:
            raise UserError(f"{path}: {reason(error)}; download this shard again") from error
        self.n_bytes += size
        self.headers.update(f"{path.name}\0{size}\0".encode() + header)
        found = _entries(path, fd, size, header)
        for name in found if names is None else names:
            if name not in found:
                raise UserError(
                    f"{path.parent / INDEX} says {name} lies in {path.name}, which does not hold "
                    "it; download both again"
                )
            self.tensors[name] = found[name]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}; download it again") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; download it again")
    return value


def read_optional(path: Path, notes: list[str]) -> dict[str, Any]:
    """The same of a file that nothing depends on: nothing and a note if it is unusable."""
    if not path.exists():
        return {}
    try:
        return read_json(path)
    except UserError as error:
        notes.append(f"{error}; it is left out")
        return {}


def _header(path: Path, fd: int, size: int) -> bytes:
    """The JSON text before the data."""
    start = os.pread(fd, 8, 0)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise UserError(f"{path} is not a whole safetensors file; download it again")
    header = os.pread(fd, length, 8)
    if len(header) != length:
        raise UserError(f"{path} is cut short; download it again")
    return header


def _entries(path: Path, fd: int, size: int, header: bytes) -> dict[str, Stored]:
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        found = {name: _entry(name, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} has a damaged header; download it again") from error
    base = 8 + len(header)
    end = base + max((stop for _, _, _, stop in found.values()), default=0)
    if end > size:
        raise UserError(f"{path} is cut short: it has {size} of {end} bytes; download it again")
    return {
        name: Stored(name, path, dtype, shape, fd, base + start)
        for name, (dtype, shape, start, _) in found.items()
    }


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, byte after the last) of one header entry; ValueError if wrong."""
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    numbers = (*shape, start, stop)
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(name)
    kind = DTYPES.get(dtype)
    if stop < start or (kind and stop - start != math.prod(shape) * kind.read_as.itemsize):
        raise ValueError(name)
    return dtype, shape, start, stop
