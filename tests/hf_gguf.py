"""One ordinary GGUF of a `Source`: experts stacked as stock llama.cpp wants them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quant_shape_to_byte_shape

from moe_gguf.converters.source import Bytes, Source

CHUNK_ROWS = 7  # rows of a read: a number that makes slices start inside heads and groups


def write_gguf(source: Source, path: Path) -> Path:
    """Matrices stored as F32 become F16, the rest is written as the source has it."""
    writer = GGUFWriter(path, arch=source.metadata["general.architecture"].value)
    for key, pair in source.metadata.items():
        if key != "general.architecture":
            writer.add_key_value(key, pair.value, pair.kind, pair.item)
    for tensor in source.trunk:
        rows = math.prod(tensor.ne[1:])
        slices = [
            tensor.read(first, min(CHUNK_ROWS, rows - first))
            for first in range(0, rows, CHUNK_ROWS)
        ]
        _add(writer, tensor.name, tensor.ne, tensor.ggml_type, np.concatenate(slices))
    for stack in source.experts:
        data = np.concatenate(
            [stack.read(expert, 0, stack.ne[1]) for expert in range(source.n_experts)]
        )
        _add(writer, stack.name, (*stack.ne, source.n_experts), stack.ggml_type, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, name: str, ne: tuple[int, ...], ggml_type: int, data: Bytes) -> None:
    kind, shape = GGMLQuantizationType(ggml_type), ne[::-1]
    vector = len(ne) == 1 or name.endswith(".bias") or "ffn_gate_inp" in name
    if kind is GGMLQuantizationType.F32:
        values = data.view(np.float32).reshape(shape)
        writer.add_tensor(name, values if vector else values.astype(np.float16))
    else:
        writer.add_tensor(
            name, data.reshape(quant_shape_to_byte_shape(shape, kind)), raw_dtype=kind
        )
