"""Kernel-ready layouts: the order of bytes ggml-cpu's repacked kernels want on this machine.

ggml gives these layouts no public name and no way back, so both are derived from what it does:
repacking only interleaves a few rows block by block and moves (or flips) bits inside such a
group. A handful of probe matrices therefore shows the whole rule; its checksum is the layout's
name, and the rule is stored in a bundle, so that a machine with other kernels can undo it.
"""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

import numpy as np

from .formats.bundle import PLAIN
from .formats.ggml_types import GGML_TYPES, type_bytes
from .formats.gguf_header import GgufHeader
from .formats.interleaving import MOST_ROWS, Bytes, Interleaving, stored_interleaving, unpack
from .formats.layout import OUTPUT, ModelLayout, untied
from .plugin.library import load


def interleaving(ggml_type: int, ne: tuple[int, int]) -> Interleaving | None:
    """The layout this machine's kernels want such a matrix in; None where they want it plain."""
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
    # Three groups either way, and divisible by no more than asked.
    n_blocks, n_rows = 3, 3 * divisor
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
                return rule
        rows *= 2
    return None


class Transforms:
    """The rules a model needs on this machine, numbered for the plugin.

    ``plain``: this processor's own layout is none to compute on either, but to be undone.
    ``repack``: what is stored plain gets that layout after each read.
    """

    def __init__(self, header: GgufHeader, plain: bool = False, repack: bool = False) -> None:
        self._plain, self._repack = plain, repack
        self._header = header
        self.rules: dict[str, Interleaving] = {}

    def code(self, layout: str, ggml_type: int, ne: tuple[int, int]) -> tuple[int, int]:
        """(moe_layout, index of the transform) of a matrix stored in this layout."""
        if layout == PLAIN:
            repacks = self._repack and load().moe_repack_supported(ggml_type, *ne)
            return LAYOUT_REPACK if repacks else LAYOUT_PLAIN, 0
        own = None if self._plain else interleaving(ggml_type, ne)
        if own is not None and layout == own.name:
            return LAYOUT_REPACKED, 0
        if layout not in self.rules:
            self.rules[layout] = stored_interleaving(self._header, layout, ggml_type)
        return LAYOUT_FOREIGN, list(self.rules).index(layout)


LAYOUT_PLAIN, LAYOUT_REPACKED, LAYOUT_FOREIGN, LAYOUT_REPACK = range(4)  # enum moe_layout


# Matrices that llama.cpp multiplies with and, where it may, keeps repacked. Of a name that is
# not here the plain kernel runs: as exact, slower.
_REPACKABLE = re.compile(r"(output|blk\.\d+\.(attn|ffn|ssm)_\w+)\.weight")


class Kernels(NamedTuple):
    """Which kernels a model gets on this machine.

    ``transforms`` undo layouts of other machines, whose names are ``foreign``; ``trunk`` names the
    tensors that are repacked while they are loaded.
    """

    is_repacked: bool  # this machine's fastest, which want experts in a layout of their own
    trunk: tuple[str, ...]
    transforms: Transforms
    at_reads: bool = False  # experts are stored plain, and get that layout after each read

    @property
    def foreign(self) -> tuple[str, ...]:
        return tuple(self.transforms.rules)


def kernels_of(
    layout: ModelLayout, on_device: bool = False, repack: bool = False
) -> tuple[ModelLayout, Kernels]:
    """The model as it will be held, and the kernels that compute with it.

    ``on_device``: those of a device, which want weights plain, and an output matrix in its memory.
    ``repack``: what is stored plain is repacked as it is read.
    """
    transforms = Transforms(layout.metadata, plain=on_device, repack=repack and not on_device)
    codes = {
        transforms.code(name, kind, tensor.ne[:2])[0]
        for layer in layout.layers
        for copy in layer.copies
        for tensor, name, kind in zip(layer.tensors, copy.layouts, copy.types, strict=True)
    }
    if on_device:
        return untied(layout), Kernels(False, (), transforms)
    at_reads = LAYOUT_REPACK in codes
    if LAYOUT_REPACKED not in codes and not at_reads:
        return layout, Kernels(False, (), transforms)
    layout = repacked_layout(layout)
    return layout, Kernels(True, tuple(repacked_trunk(layout)), transforms, at_reads)


def repacked_layout(layout: ModelLayout) -> ModelLayout:
    """The model as stock llama.cpp holds it when it repacks.

    A tied output matrix is then a repacked copy of the token embedding. Buffer types are chosen by
    name, so the copy needs its own.
    """
    whole = untied(layout)
    return whole if OUTPUT in repacked_trunk(whole) else layout


def repacked_trunk(layout: ModelLayout) -> list[str]:
    """Trunk tensors that stock llama.cpp would hold repacked, where we know it."""
    return [
        t.name
        for t in layout.trunk
        if len(t.ne) == 2
        and _REPACKABLE.fullmatch(t.name)
        and interleaving(t.ggml_type, (t.ne[0], t.ne[1]))
    ]
