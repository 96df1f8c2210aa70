"""Sizes in words: what people write and read for numbers of bytes."""

from __future__ import annotations

import re

from .errors import UserError

KB, MB, GB = 10**3, 10**6, 10**9
_UNITS = {
    "": 1,
    "B": 1,
    "K": KB,
    "KB": KB,
    "M": MB,
    "MB": MB,
    "G": GB,
    "GB": GB,
    "T": 10**12,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_size(text: str, what: str = "a memory budget") -> int:
    """Bytes of ``2.4GB``, ``4GiB``, ``512m`` or a plain number of bytes."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise UserError(f"{text!r} is not a size: write it like 2.4GB, 4GiB or auto")
    size = int(float(match[1]) * unit)
    if size < MB:
        raise UserError(f"{what} of {text} is too small for any model: give it in MB or GB")
    return size


def format_size(n_bytes: float) -> str:
    """Decimal units, as people name disks and memory: ``2.40 GB``, ``57.1 MB``."""
    for unit, scale in (("GB", GB), ("MB", MB), ("KB", KB)):
        if n_bytes >= scale:
            return (
                f"{n_bytes / scale:.2f} {unit}" if unit == "GB" else f"{n_bytes / scale:.1f} {unit}"
            )
    return f"{int(n_bytes)} B"
