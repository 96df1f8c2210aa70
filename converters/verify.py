"""Reads what a bundle holds and compares it with the checksums it was written with."""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

from ..runtime.errors import reason
from ..runtime.formats.bundle import TRUNK, BundleTable
from ..runtime.formats.gguf_header import read_header
from ..runtime.progress import Report

_READ_BYTES = 8 << 20


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
        found = checksum(fd, offset, n_bytes)
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
                findings.append(f"{path} cannot be read ({reason(error)})")
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


def checksum(fd: int, offset: int, n_bytes: int) -> int | None:
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
