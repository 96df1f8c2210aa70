"""The writing twin of gguf_header: the bytes of a GGUF header, known before any data is.

Owns how pairs and tensor infos become bytes. The gguf package's writer would have to own the whole
file; here headers are planned, compared and written again while the data goes its own way.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any

from .ggml_types import pad_up
from .gguf_header import MAGIC, VALUE_CODES, TensorInfo, ValueType


def encode_pair(key: str, kind: ValueType, value: Any, item: ValueType | None = None) -> bytes:
    """One metadata pair. A string may be given as bytes, an array as any sequence, and one of
    numbers as the bytes of its items."""
    head = _string(key) + struct.pack("<I", kind)
    if kind is not ValueType.ARRAY:
        return head + _value(kind, value)
    assert item is not None
    if isinstance(value, bytes):
        return (
            head
            + struct.pack("<IQ", item, len(value) // struct.calcsize(VALUE_CODES[item]))
            + value
        )
    head += struct.pack("<IQ", item, len(value))
    if item is ValueType.STRING:
        return head + b"".join(map(_string, value))
    return head + struct.pack(f"<{len(value)}{VALUE_CODES[item]}", *value)


def encode_header(pairs: Sequence[bytes], tensors: Iterable[TensorInfo], alignment: int) -> bytes:
    """A GGUF v3 header, padded to where its data starts; ``alignment`` is not written as a key."""
    infos = [encode_info(info) for info in tensors]
    out = b"".join((MAGIC, struct.pack("<IQQ", 3, len(infos), len(pairs)), *pairs, *infos))
    return out + bytes(pad_up(len(out), alignment) - len(out))


def encode_info(info: TensorInfo) -> bytes:
    return _string(info.name) + struct.pack(
        f"<I{len(info.ne)}QIQ", len(info.ne), *info.ne, info.ggml_type, info.offset
    )


def _value(kind: ValueType, value: Any) -> bytes:
    if kind is ValueType.STRING:
        return _string(value)
    return struct.pack("<" + VALUE_CODES[kind], value)


def _string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw
