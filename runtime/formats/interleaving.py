"""The rule of one kernel layout, and the way back to plain bytes: nothing of this machine."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .bundle import MEND, PREFIX, U32, BundlePair
from .ggml_types import GGML_TYPES
from .gguf_header import GgufHeader, ValueType
from .keys import Keys

Bytes = NDArray[np.uint8]

MOST_ROWS = 16  # the greatest interleaving ggml knows
_KEY = PREFIX + "layout."


@dataclass(frozen=True, eq=False)
class Interleaving:
    """The rule of one layout, in the direction back to plain; see moe_transform in moe.h."""

    ggml_type: int
    rows: int
    source: NDArray[np.int32]  # [8 * rows * block_bytes]: plain bit i is packed bit source[i] ...
    flip: Bytes  # [rows * block_bytes] ... flipped where these plain bits are set

    @cached_property
    def name(self) -> str:
        """It tells rules apart, and means the same on every machine."""
        rule = zlib.crc32(self.source.tobytes() + self.flip.tobytes())
        return f"{GGML_TYPES[self.ggml_type].name.lower()}-{self.rows}-{rule:08x}"

    def pairs(self) -> list[BundlePair]:
        at = f"{_KEY}{self.name}."
        return [
            (at + "rows", U32, None, self.rows),
            (at + "source", ValueType.ARRAY, U32, self.source.tolist()),
            (at + "flip", ValueType.ARRAY, ValueType.UINT8, self.flip.tolist()),
        ]


def unpack(rule: Interleaving, ne: tuple[int, int], packed: Bytes) -> Bytes:
    """The plain matrix: the slow, boring twin of what the plugin does after a read."""
    kind = GGML_TYPES[rule.ggml_type]
    n_blocks = ne[0] // kind.block
    groups = packed.reshape(-1, rule.rows * kind.block_bytes)
    bits = np.unpackbits(groups, axis=1, bitorder="little")[:, rule.source]
    plain = np.packbits(bits, axis=1, bitorder="little") ^ rule.flip
    blocks = plain.reshape(-1, n_blocks, rule.rows, kind.block_bytes)
    return np.ascontiguousarray(blocks.transpose(0, 2, 1, 3)).reshape(-1)


def stored_interleaving(header: GgufHeader, name: str, ggml_type: int) -> Interleaving:
    """The rule of a layout as a bundle's trunk.gguf tells it; UserError if it does not."""
    keys = Keys(header.path, header.get, MEND)
    rows = keys.integer(f"{_KEY}{name}.rows", 1, MOST_ROWS)
    size = rows * GGML_TYPES[ggml_type].block_bytes
    source = np.array(keys.integers(f"{_KEY}{name}.source", 0, 8 * size - 1, 8 * size), np.int64)
    flip = np.array(keys.integers(f"{_KEY}{name}.flip", 0, 255, size), np.int64)
    if not np.array_equal(np.sort(source), np.arange(8 * size)):
        raise keys.damaged(f"its kernel layout {name} is no permutation")
    return Interleaving(ggml_type, rows, source.astype(np.int32), flip.astype(np.uint8))
