"""Kernel-ready layouts: the order of bytes ggml-cpu's repacked kernels want on this machine.

ggml gives these layouts no public name and no way back, so both are derived from what it does:
repacking only interleaves a few rows block by block and moves (or flips) bits inside such a
group. A handful of probe matrices therefore shows the whole rule; its checksum is the layout's
name, and the rule is stored in a bundle, so that a machine with other kernels can undo it.
"""

from __future__ import annotations

import functools
import math
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_gguf.runtime.bundle import PLAIN, PREFIX, U32, BundlePair
from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.gguf_header import GGML_TYPES, GgufHeader, ValueType, type_bytes
from moe_gguf.runtime.plugin import load

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

    @property
    def name(self) -> str:
        rule = zlib.crc32(self.source.tobytes() + self.flip.tobytes())
        return f"{GGML_TYPES[self.ggml_type].name.lower()}-{self.rows}-{rule:08x}"

    def pairs(self) -> list[BundlePair]:
        at = f"{_KEY}{self.name}."
        return [
            (at + "rows", U32, None, self.rows),
            (at + "source", ValueType.ARRAY, U32, self.source.tolist()),
            (at + "flip", ValueType.ARRAY, ValueType.UINT8, self.flip.tolist()),
        ]


def layout_name(ggml_type: int, ne: tuple[int, int]) -> str | None:
    """The layout this machine's kernels want such a matrix in; None where they want it plain."""
    rule = interleaving(ggml_type, ne)
    return None if rule is None else rule.name


def interleaving(ggml_type: int, ne: tuple[int, int]) -> Interleaving | None:
    """The rule behind ``layout_name``."""
    if not load().moe_repack_supported(ggml_type, ne[0], ne[1]):
        return None
    return _learn(ggml_type, math.gcd(ne[1], MOST_ROWS))


def repack(ggml_type: int, ne: tuple[int, int], plain: Bytes) -> Bytes:
    """Rows of a matrix in this machine's layout for it, which must exist; as many bytes.

    All rows, or those that make up whole groups of interleaved ones.
    """
    n_rows, rest = divmod(plain.nbytes, type_bytes(ggml_type, ne[0]))
    assert rest == 0
    plain = np.ascontiguousarray(plain)
    packed = np.empty(plain.nbytes, np.uint8)
    load().moe_repack(ggml_type, *ne, n_rows, plain.ctypes.data, packed.ctypes.data)
    return packed


@functools.cache
def _learn(ggml_type: int, divisor: int) -> Interleaving | None:
    """What ggml does to matrices whose number of rows has this divisor; None: no such rule."""
    kind = GGML_TYPES[ggml_type]
    n_blocks, n_rows = (
        3,
        3 * divisor,
    )  # three groups either way, and divisible by no more than asked
    ne = (n_blocks * kind.block, n_rows)
    random = np.random.default_rng(0)
    plain = random.integers(0, 256, (n_rows, n_blocks, kind.block_bytes), np.uint8)
    packed = repack(ggml_type, ne, plain.reshape(-1))
    rows = 1
    while rows <= divisor:
        size = rows * kind.block_bytes

        def image(group: Bytes, rows: int = rows, size: int = size) -> Bytes:
            """The bits of what becomes of one group of blocks."""
            blocks = group.reshape(rows, 1, kind.block_bytes)
            filled = np.tile(blocks, (n_rows // rows, n_blocks, 1)).reshape(-1)
            return np.unpackbits(repack(ggml_type, ne, filled)[:size], bitorder="little")

        flipped = image(np.zeros(size, np.uint8))
        index = np.arange(8 * size)
        plain_bit = np.zeros(8 * size, np.int64)  # of each packed bit
        for k in range((8 * size - 1).bit_length()):
            probe = np.packbits(((index >> k) & 1).astype(np.uint8), bitorder="little")
            plain_bit |= (image(probe) ^ flipped).astype(np.int64) << k
        if np.array_equal(np.sort(plain_bit), index):
            source = np.argsort(plain_bit).astype(np.int32)
            flip = np.packbits(flipped[source], bitorder="little")
            rule = Interleaving(ggml_type, rows, source, flip)
            if np.array_equal(unpack(rule, ne, packed), plain.reshape(-1)):
                _known[rule.name] = rule
                return rule
        rows *= 2
    return None


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
    rows = header.get(f"{_KEY}{name}.rows")
    source = np.array(header.array(f"{_KEY}{name}.source"), np.int64)
    flip = np.array(header.array(f"{_KEY}{name}.flip"), np.int64)
    size = rows * GGML_TYPES[ggml_type].block_bytes if type(rows) is int else -1
    sound = (
        len(flip) == size
        and len(source) == 8 * size
        and np.array_equal(np.sort(source), np.arange(8 * size))
        and ((flip >= 0) & (flip < 256)).all()
    )
    if not sound or type(rows) is not int:
        raise UserError(
            f"{header.path} does not describe its kernel layout {name}; convert the model again"
        )
    return Interleaving(ggml_type, rows, source.astype(np.int32), flip.astype(np.uint8))


class Transforms:
    """The rules a model needs on this machine, numbered for the plugin."""

    def __init__(self, header: GgufHeader) -> None:
        self._header = header
        self.rules: dict[str, Interleaving] = {}

    def code(self, layout: str, ggml_type: int, ne: tuple[int, int]) -> tuple[int, int]:
        """(moe_layout, index of the transform) of a matrix stored in this layout."""
        if layout == PLAIN:
            return LAYOUT_PLAIN, 0
        if layout == layout_name(ggml_type, ne):
            return LAYOUT_REPACKED, 0
        if layout not in self.rules:
            self.rules[layout] = stored_interleaving(self._header, layout, ggml_type)
        return LAYOUT_FOREIGN, list(self.rules).index(layout)


LAYOUT_PLAIN, LAYOUT_REPACKED, LAYOUT_FOREIGN = 0, 1, 2  # enum moe_layout


def describe(name: str) -> list[BundlePair]:
    """The keys that let another machine undo a layout that ``layout_name`` has named here."""
    return _known[name].pairs()


_known: dict[str, Interleaving] = {}
