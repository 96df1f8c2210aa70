"""The stream: one GGUF that stands for all of a model's files, which llama.cpp is shown.

This file writes that GGUF's header and knows how long the whole would be. Nobody reads tensor data
through it, so it does not care where the data really lies.
"""

from __future__ import annotations

from typing import NamedTuple

from .bundle import PREFIX
from .ggml_types import pad_up
from .gguf_header import TensorInfo, ValueType
from .gguf_writer import encode_header, encode_pair
from .layout import ModelLayout

MAP_ALIGNMENT = 32  # ggml's TENSOR_ALIGNMENT, which llama.cpp asks of a file it maps
_ALIGNMENT = "general.alignment"
_OF_FILES = ("split.", PREFIX)  # keys that speak of files, not of the model


class Stream(NamedTuple):
    """As long as the model's own header: to be handed on, not to be kept."""

    header: bytes
    n_bytes: int  # of the GGUF the header describes


def stream_of(layout: ModelLayout) -> Stream:
    """All tensors of the layout in its order, under the first file's keys, byte for byte."""
    first = layout.metadata
    alignment = max(first.alignment, MAP_ALIGNMENT)
    pairs = [
        first.raw(key) for key in first.pairs if not key.startswith(_OF_FILES) and key != _ALIGNMENT
    ]
    pairs.append(encode_pair(_ALIGNMENT, ValueType.UINT32, alignment))
    offset, infos = 0, []
    for tensor in layout.tensors:
        infos.append(TensorInfo(tensor.name, tensor.ne, tensor.ggml_type, offset))
        offset += pad_up(tensor.n_bytes, alignment)
    header = encode_header(pairs, infos, alignment)
    return Stream(header, len(header) + offset)
