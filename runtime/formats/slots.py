"""Where the pieces of an expert go inside a slot, so that direct reads land in place.

Pure arithmetic over a layout: this file knows no arena, no budget and no disk but its alignment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .ggml_types import pad_up
from .layout import ModelLayout, MoeLayer

PAGE = 4096


@dataclass(frozen=True)
class SlotLayout:
    """Places in a slot; slots are slot_bytes apart and start at multiples of PAGE and of align."""

    slot_bytes: int
    align: int
    offsets: Mapping[tuple[int, int], tuple[int, ...]]  # by (layer, copy): of each piece

    def matrix(self, layer: MoeLayer, copy: int, tensor: int) -> int:
        """Where one matrix of an expert lies in its slot."""
        offsets = self.offsets[layer.layer, copy]
        for piece, at in zip(layer.copies[copy].pieces, offsets, strict=True):
            for index, place in piece.matrices:
                if index == tensor:
                    return at + place
        raise AssertionError("a layer's pieces hold all of its matrices")


def slot_layout(layout: ModelLayout, align: int) -> SlotLayout:
    """Place the pieces of every layer's experts in a slot for direct reads of this alignment.

    A direct read starts and ends at multiples of align, so it writes up to align - 1 bytes on
    either side of what was asked for: each piece keeps at least align bytes clear before and
    behind it. A piece has its file offset's remainder (expert 0's: others share it where
    their distance is a multiple of align), so that bytes land where they are used.
    """
    assert align >= 1
    assert align & (align - 1) == 0
    offsets: dict[tuple[int, int], tuple[int, ...]] = {}
    need = 0
    for layer in layout.layers:
        for i, copy in enumerate(layer.copies):
            at, places = align, []
            for piece in copy.pieces:
                at += (int(piece.offset[0]) - at) % align
                places.append(at)
                at += piece.n_bytes + align
            offsets[layer.layer, i] = tuple(places)
            need = max(need, at)
    return SlotLayout(pad_up(need, max(align, PAGE)), align, offsets)
