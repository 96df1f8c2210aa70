"""Importance matrices as llama.cpp's `imatrix` tool writes them: its GGUF form and the older .dat.

Both come out as the mean square of every input column, per tensor: `n` matrices stacked in one
tensor have `n` times its row length.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.gguf_header import GGML_TYPES, MAGIC, GgufHeader, read_header

Floats = NDArray[np.float32]
Imatrix = dict[str, Floats]  # by the tensor's name in a stock GGUF

_SUMS, _COUNTS = ".in_sum2", ".counts"


def read_imatrix(path: Path) -> Imatrix:
    """UserError for anything that is not a whole importance matrix of finite numbers."""
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == MAGIC
        entries = dict(_gguf_entries(read_header(path)) if is_gguf else _dat_entries(path))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"cannot read the importance matrix {path} ({reason})") from error
    if not entries:
        raise _bad(path, "it has no entries")
    for name, values in entries.items():
        if not np.isfinite(values).all():
            raise _bad(path, f"{name} is not finite")
    return entries


def _gguf_entries(header: GgufHeader) -> Iterator[tuple[str, Floats]]:
    """Sums of squares over the tokens that reached each matrix, and how many did."""
    arrays: Imatrix = {}
    for info in header.tensors:
        if GGML_TYPES[info.ggml_type].name != "F32":
            raise _bad(header.path, f"{info.name} is not F32")
        at = header.data_start + info.offset
        arrays[info.name] = np.fromfile(header.path, np.float32, info.n_items, offset=at)
    for name, sums in arrays.items():
        if not name.endswith(_SUMS):
            continue
        name = name.removesuffix(_SUMS)
        counts = arrays.get(name + _COUNTS)
        if counts is None or sums.size % counts.size:
            raise _bad(header.path, f"{name} has sums and counts that do not match")
        counts = np.rint(counts)[:, None]
        sums = sums.reshape(counts.size, -1)
        # What no token reached is quantized as if every column mattered alike.
        means = np.divide(sums, counts, out=np.ones_like(sums), where=counts > 0)
        yield name, means.ravel()


def _dat_entries(path: Path) -> Iterator[tuple[str, Floats]]:
    """Means that were multiplied by the number of calls, for all matrices of a tensor alike."""
    data = path.read_bytes()
    at = 0

    def take(n_bytes: int) -> bytes:
        nonlocal at
        if not 0 <= n_bytes <= len(data) - at:
            raise _bad(path, "it is no importance matrix, or cut short")
        at += n_bytes
        return data[at - n_bytes : at]

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    for _ in range(number()):
        name = take(number()).decode("utf-8", "replace")
        calls = number()
        values = np.frombuffer(take(4 * number()), np.float32)
        yield name, values / np.float32(calls) if calls > 0 else values


def _bad(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} cannot be used as an importance matrix ({what}); make it again with llama-imatrix"
    )
