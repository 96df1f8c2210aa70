"""Importance matrices as llama.cpp's `imatrix` tool writes them: its GGUF form and the older .dat.

Both come out as the mean square of every input column, per tensor: `n` matrices stacked in one
tensor have `n` times its row length. Of a large model that is a gigabyte, so it stays on disk.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import UserError, reason
from ..runtime.formats.ggml_types import GGML_TYPES
from ..runtime.formats.gguf_header import MAGIC, GgufHeader, read_header

Floats = NDArray[np.float32]

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True, eq=False)
class Weights:
    """Of one tensor: the file's sums, each to be divided by the count of its matrix."""

    path: Path
    offset: int
    n_values: int
    counts: Floats

    def read(self, first: int, n: int) -> Floats:
        """Values [first, first + n)."""
        sums = np.fromfile(self.path, np.float32, n, offset=self.offset + 4 * first)
        matrix = np.arange(first, first + n) // (self.n_values // self.counts.size)
        counts = self.counts[matrix]
        # What no token reached is quantized as if every column mattered alike.
        return np.divide(sums, counts, out=np.ones_like(sums), where=counts > 0)


Imatrix = dict[str, Weights]  # by the tensor's name in a stock GGUF


def read_imatrix(path: Path) -> Imatrix:
    """UserError for anything that is not a whole importance matrix of finite numbers."""
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == MAGIC
            file.seek(0)
            found = _gguf_entries(read_header(path)) if is_gguf else _dat_entries(path, file)
            entries = dict(found)
        if not entries:
            raise _bad(path, "it has no entries")
        for name, weights in entries.items():
            if not np.isfinite(weights.read(0, weights.n_values)).all():
                raise _bad(path, f"{name} is not finite")
    except OSError as error:
        raise UserError(f"cannot read the importance matrix {path} ({reason(error)})") from error
    return entries


def _gguf_entries(header: GgufHeader) -> Iterator[tuple[str, Weights]]:
    """Sums of squares over the tokens that reached each matrix, and how many did."""
    infos = {info.name: info for info in header.tensors}
    for info in header.tensors:
        if GGML_TYPES[info.ggml_type].name != "F32":
            raise _bad(header.path, f"{info.name} is not F32")
    for name, sums in infos.items():
        if not name.endswith(_SUMS):
            continue
        name = name.removesuffix(_SUMS)
        of = infos.get(name + _COUNTS)
        if of is None or sums.n_items % of.n_items:
            raise _bad(header.path, f"{name} has sums and counts that do not match")
        at = header.data_start + of.offset
        counts = np.rint(np.fromfile(header.path, np.float32, of.n_items, offset=at))
        yield name, Weights(header.path, header.data_start + sums.offset, sums.n_items, counts)


def _dat_entries(path: Path, file: BinaryIO) -> Iterator[tuple[str, Weights]]:
    """Means that were multiplied by the number of calls, for all matrices of a tensor alike."""
    size = os.fstat(file.fileno()).st_size

    def skip(n_bytes: int) -> int:
        """Where the next so many bytes begin."""
        at = file.tell()
        if not 0 <= n_bytes <= size - at:
            raise _bad(path, "it is no importance matrix, or cut short")
        file.seek(n_bytes, os.SEEK_CUR)
        return at

    def take(n_bytes: int) -> bytes:
        file.seek(skip(n_bytes))
        return file.read(n_bytes)

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    for _ in range(number()):
        name = take(number()).decode("utf-8", "replace")
        calls = number()
        n_values = number()
        counts = np.array([max(calls, 1)], np.float32)
        yield name, Weights(path, skip(4 * n_values), n_values, counts)


def _bad(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} cannot be used as an importance matrix ({what}); make it again with llama-imatrix"
    )
