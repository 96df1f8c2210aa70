"""Refuse what would reach beyond memory: counts that our tables and llama.cpp's are sized by, types
of experts, and indices stored as weights.

These must hold whatever the architecture. That a model is one llama.cpp survives is more than can
be told from here: a trial lets a child process find out. What llama.cpp reports by itself (a
missing key, a shape that does not follow from the keys) is left to it.
"""

from __future__ import annotations

import re

import numpy as np

from ..errors import UserError, reason
from .ggml_types import GGML_TYPES
from .layout import ModelLayout, PlacedTensor

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS

# Types that no matrix multiplication takes. Experts are nothing but multiplied.
_NO_MATRIX = frozenset(("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"))
# The experts of each token, where a layer routes by a table: an index out of range is an expert
# that does not exist.
_EXPERT_TABLE = re.compile(r"blk\.\d+\.ffn_gate_tid2eid\.weight")


def validate(layout: ModelLayout) -> None:
    """Raise a UserError if the model cannot be laid out safely."""
    _counts(layout)
    _types(layout)
    for tensor in layout.trunk:
        if _EXPERT_TABLE.fullmatch(tensor.name):
            _table(layout, tensor)


def _counts(layout: ModelLayout) -> None:
    keys = layout.keys
    n_layers = keys.integer(".block_count", 1, MAX_LAYERS)
    n_experts = keys.integer(".expert_count", 1, MAX_EXPERTS)
    last = layout.layers[-1].layer
    if last >= n_layers:
        raise keys.damaged(f"it has experts of layer {last} but claims {n_layers} layers")
    if not any(keys.integers(".expert_used_count", 0, n_experts)):
        raise keys.damaged(f"{keys.name('.expert_used_count')} is 0")


def _types(layout: ModelLayout) -> None:
    for layer in layout.layers:
        for copy in layer.copies:
            for tensor, kind in zip(layer.tensors, copy.types, strict=True):
                name = GGML_TYPES[kind].name
                if name in _NO_MATRIX:
                    said = f"tensor {tensor.name} is {name}, which llama.cpp cannot compute with"
                    raise layout.keys.damaged(said)


def _table(layout: ModelLayout, tensor: PlacedTensor) -> None:
    item = {"I32": "<i4", "I64": "<i8"}.get(GGML_TYPES[tensor.ggml_type].name)
    if item is None:  # a lookup in anything else is no index
        return
    path = layout.files[tensor.file]
    try:
        with path.open("rb") as file:
            file.seek(tensor.offset)
            indices = np.frombuffer(file.read(tensor.n_bytes), item)
    except OSError as error:
        raise UserError(f"cannot read {path} ({reason(error)})") from None
    if indices.min() < 0 or indices.max() >= layout.n_experts:
        raise layout.keys.damaged(f"tensor {tensor.name} names experts that do not exist")
