"""Tables: matrices of which a step only looks up a few rows, so that they need not be in memory.

Owns which tensors these are. Knows nothing of budgets, nor of how rows are read.
"""

from __future__ import annotations

from .ggml_types import GGML_TYPES, type_bytes
from .layout import EMBEDDING, OUTPUT, ModelLayout, PlacedTensor

PER_LAYER = "per_layer_token_embd.weight"

# Of the tensors that llama.cpp's own list (llm_tensor_info) gives to GET_ROWS, those with a row per
# token or per n-gram of tokens: they are what grows beyond memory. The others it lists are of a few
# KB, of integers, or of draft models. By name, because only a name says how a tensor is used:
# anything else stays in memory.
_NAMES = (EMBEDDING, PER_LAYER)
# What ggml's GET_ROWS turns into floats.
_NO_ROWS = ("I8", "I16", "I32", "I64", "F64", "Q8_K")


def tables_of(layout: ModelLayout) -> tuple[PlacedTensor, ...]:
    """The model's tables.

    A tied token embedding is none: as the output matrix, all of it is multiplied with.
    """
    names = {t.name for t in layout.tensors}
    return tuple(
        t
        for t in layout.trunk
        if t.name in _NAMES
        and (t.name != EMBEDDING or OUTPUT in names)
        and len(t.ne) == 2
        and GGML_TYPES[t.ggml_type].name not in _NO_ROWS
    )


def row_bytes(table: PlacedTensor) -> int:
    return type_bytes(table.ggml_type, table.ne[0])
