"""A model on disk bound to the plugin, and to llama.cpp's parameters for loading it.

Owns the native model and the memory that llama.cpp points into while it loads. Turns values of
``formats`` into the structs of ``plugin``; knows no budget and no policy.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from . import disk
from .formats.layout import ModelLayout, MoeLayer, PlacedTensor
from .formats.slots import SlotLayout
from .formats.stream import stream_of
from .formats.tables import row_bytes
from .kernels import Kernels, Transforms
from .placement import Placement
from .plugin.abi import ABI, COPIES, Config, Part, Table, Tensor, Transform, TrunkTensor
from .plugin.model import PluginModel

_PART = np.dtype(Part)  # tens of thousands of them are filled at once


class BuftOverride(ctypes.Structure):
    """llama_model_tensor_buft_override."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p)]


class Binding:
    """The native model of one layout.

    Closed after every llama_model and context that used it.
    """

    def __init__(
        self,
        layout: ModelLayout,
        slots: SlotLayout,
        mode: disk.ReadMode,
        kernels: Kernels,
        placement: Placement | None = None,
    ) -> None:
        config = config_of(layout, slots, mode, kernels.transforms, kernels.trunk)
        if placement is not None:
            config.device = placement.device.name.encode()
        self.plugin = PluginModel(config)
        on_device = [] if placement is None else placement.layers(layout)
        self._experts = _names(layer for layer in layout.layers if layer not in on_device)
        self._device_experts = _names(on_device)
        self._trunk = [t.name for t in layout.trunk]
        self._placement = placement
        self._repacked = kernels.trunk
        self._n_layers = layout.n_layers
        self._devices: list[Any] = []  # likewise
        self._overrides: list[ctypes.Array[BuftOverride]] = []  # llama.cpp points into them

    def hold_tables(self, tables: Sequence[PlacedTensor], cache_bytes: int) -> None:
        """Leave these on disk, with so much memory for rows of them; once, before loading."""
        mirrors = [Table(t.name.encode(), t.offset, row_bytes(t), t.ne[1], t.file) for t in tables]
        if tables:
            self.plugin.hold_tables(mirrors, cache_bytes)

    def model_params(
        self,
        params: llama_cpp.llama_model_params,
        tables: Sequence[PlacedTensor],
        no_alloc: bool = False,
    ) -> llama_cpp.llama_model_params:
        """A copy of the caller's parameters with what the plugin needs, these tables on disk.

        ``no_alloc``: for a load that only tells what it would take.
        """
        params = llama_cpp.llama_model_params.from_buffer_copy(params)
        plugin = self.plugin
        types = [
            *((pattern, plugin.expert_buffer_type()) for pattern in patterns(self._experts)),
            *(
                (pattern, plugin.table_buffer_type())
                for pattern in patterns(t.name for t in tables)
            ),
        ]
        # Repacked tensors take as much as plain ones, and buffers without memory cannot pose as
        # ggml-cpu's own.
        if not no_alloc:
            types += [(p, plugin.repack_buffer_type()) for p in patterns(self._repacked)]
        placement = self._placement
        if placement is not None:
            experts, trunk = plugin.device_expert_buffer_type(), plugin.device_buffer_type()
            on_device = [name for name in self._trunk if placement.has_tensor(name)]
            types += [(p, experts) for p in patterns(self._device_experts)]
            types += [(p, trunk) for p in patterns(on_device)]
        overrides = _overrides([*types, (".*", plugin.trunk_buffer_type())])
        self._overrides.append(overrides)
        params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p).value
        params.no_alloc = no_alloc
        # Nothing is mapped (see native/stream.h): the trunk is anonymous memory.
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
        # Left to itself llama.cpp maps tables above 4 GiB, whatever the overrides say, and there is
        # nothing in our stream to map.
        params.lazy_mode = llama_cpp.LLAMA_LAZY_MODE_OFF
        # What is to be repacked, the overrides say; left to itself llama.cpp would try AMX too.
        params.use_extra_bufts = False
        params.n_gpu_layers = 0
        if placement is not None:
            devices = (ctypes.c_void_p * 2)(plugin.device(), None)
            self._devices.append(devices)
            params.devices = ctypes.cast(devices, ctypes.c_void_p).value
            params.n_gpu_layers = max(0, self._n_layers + 1 - placement.first)
            params.main_gpu, params.split_mode = 0, llama_cpp.LLAMA_SPLIT_MODE_LAYER
        return params

    def close(self) -> None:
        self.plugin.close()


def _names(layers: Iterable[MoeLayer]) -> list[str]:
    return [t.name for layer in layers for t in layer.tensors]


def _overrides(types: Sequence[tuple[str, int]]) -> ctypes.Array[BuftOverride]:
    return (BuftOverride * (len(types) + 1))(
        *(BuftOverride(pattern.encode(), buft) for pattern, buft in types),
        BuftOverride(None, None),
    )


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
    stream = stream_of(layout)
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
        header_bytes=len(stream.header),
        stream_bytes=stream.n_bytes,
        paths=(ctypes.c_char_p * len(layout.files))(*map(os.fsencode, layout.files)),
        trunk_tensors=(TrunkTensor * len(trunk))(
            *(
                TrunkTensor(t.name.encode(), t.offset, t.n_bytes, t.file, t.name in repacked)
                for t in trunk
            )
        ),
        tensors=(Tensor * len(tensors))(*tensors),
        parts=parts.ctypes.data,
        transforms=(Transform * len(rules))(*rules),
        header=stream.header,
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
            table = np.zeros((n_experts, len(pieces)), _PART)
            first = (c * n_layers + layer.layer) * n_experts
            table["key"] = (first + np.arange(n_experts))[:, None]
            for i, piece in enumerate(pieces):
                table["file"][:, i] = piece.file
                table["offset"][:, i] = piece.offset
                table["n_bytes"][:, i] = piece.n_bytes
                table["slot_offset"][:, i] = slots.offsets[layer.layer, c][i]
            tables.append(table.reshape(-1))
    return np.concatenate(tables)
