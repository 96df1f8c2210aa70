"""A layout as the plugin wants it described, and as llama.cpp is told which tensors go where.

Turns values of layout.py into the structs of plugin.py; decides nothing but which trunk tensors are
held repacked. Knows no budget and no policy.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_gguf.runtime import disk
from moe_gguf.runtime.layout import OUTPUT, ModelLayout, MoeLayer, SlotLayout, untied
from moe_gguf.runtime.plugin import ABI, COPIES, PART, Config, Tensor, Transform, TrunkTensor
from moe_gguf.runtime.repack import LAYOUT_REPACKED, Transforms, layout_name

# Matrices that llama.cpp multiplies with and, where it may, keeps repacked. Of a name that is
# not here the plain kernel runs: as exact, slower.
_REPACKABLE = re.compile(r"(output|blk\.\d+\.(attn|ffn|ssm)_\w+)\.weight")


def patterns(names: Iterable[str]) -> list[str]:
    """Regular expressions for exactly these tensors, few and short: llama.cpp compiles each of them
    for each tensor."""
    layers: dict[str, list[str]] = {}
    for name in names:
        match = re.fullmatch(r"blk\.(\d+)\.(.*)", name)
        layer, rest = (match[1], match[2]) if match else ("", name)
        layers.setdefault(rest, []).append(layer)
    return [
        f"^{re.escape(rest)}$"
        if numbers == [""]
        else rf"^blk\.({'|'.join(numbers)})\.{re.escape(rest)}$"
        for rest, numbers in layers.items()
    ]


def is_repacked(layout: ModelLayout, transforms: Transforms) -> bool:
    """Whether experts are stored in the layout that this machine's kernels want."""
    return any(
        transforms.code(name, kind, tensor.ne[:2])[0] == LAYOUT_REPACKED
        for layer in layout.layers
        for copy in layer.copies
        for tensor, name, kind in zip(layer.tensors, copy.layouts, copy.types, strict=True)
    )


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
        and layout_name(t.ggml_type, (t.ne[0], t.ne[1]))
    ]


def config_of(
    layout: ModelLayout,
    slots: SlotLayout,
    mode: disk.ReadMode,
    transforms: Transforms,
    repacked: Collection[str],
) -> Config:
    tensors = [
        _mirror(layer, i, slots, transforms)
        for layer in layout.layers
        for i in range(len(layer.tensors))
    ]
    trunk = layout.trunk
    parts = _parts(layout, slots)
    rules = [
        Transform(
            rule.rows,
            len(rule.flip) // rule.rows,
            rule.source.ctypes.data,
            rule.flip.ctypes.data,
        )
        for rule in transforms.rules.values()
    ]
    config = Config(
        abi=ABI,
        n_experts=layout.n_experts,
        n_files=len(layout.files),
        n_trunk_tensors=len(trunk),
        n_tensors=len(tensors),
        n_parts=len(parts),
        n_transforms=len(rules),
        lanes=mode.lanes,
        direct=mode.direct,
        offset_align=mode.offset_align,
        memory_align=mode.memory_align,
        slot_bytes=slots.slot_bytes,
        header_bytes=len(layout.header),
        stream_bytes=layout.stream_bytes,
        paths=(ctypes.c_char_p * len(layout.files))(*(str(f).encode() for f in layout.files)),
        trunk_tensors=(TrunkTensor * len(trunk))(
            *(
                TrunkTensor(t.name.encode(), t.offset, t.n_bytes, t.file, t.name in repacked)
                for t in trunk
            )
        ),
        tensors=(Tensor * len(tensors))(*tensors),
        parts=parts.ctypes.data,
        transforms=(Transform * len(rules))(*rules),
        header=layout.header,
    )
    config.keep = parts  # the struct holds its address only
    return config


def _mirror(layer: MoeLayer, i: int, slots: SlotLayout, transforms: Transforms) -> Tensor:
    tensor = layer.tensors[i]
    mirror = Tensor(name=tensor.name.encode(), layer=layer.layer, type=(-1,) * COPIES)
    mirror.ne[:] = tensor.ne[:2]
    for c, copy in enumerate(layer.copies):
        mirror.type[c] = copy.types[i]
        mirror.slot_offset[c] = slots.matrix(layer, c, i)
        mirror.layout[c], mirror.transform[c] = transforms.code(
            copy.layouts[i], copy.types[i], tensor.ne[:2]
        )
    return mirror


def _parts(layout: ModelLayout, slots: SlotLayout) -> NDArray[Any]:
    """The plugin's table of what to read for each key, in the order of keys."""
    n_experts, n_layers = layout.n_experts, layout.layers[-1].layer + 1
    tables = []
    for c in range(COPIES):
        for layer in layout.layers:
            if c >= len(layer.copies):
                continue
            pieces = layer.copies[c].pieces
            table = np.zeros((n_experts, len(pieces)), PART)
            first = (c * n_layers + layer.layer) * n_experts
            table["key"] = (first + np.arange(n_experts))[:, None]
            for i, piece in enumerate(pieces):
                table["file"][:, i] = piece.file
                table["offset"][:, i] = piece.offset
                table["n_bytes"][:, i] = piece.n_bytes
                table["slot_offset"][:, i] = slots.offsets[layer.layer, c][i]
            tables.append(table.reshape(-1))
    return np.concatenate(tables)
