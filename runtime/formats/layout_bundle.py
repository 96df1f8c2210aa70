"""The layout of a bundle, once everything its table claims is possible.

The table's keys and their kinds are bundle.py's; this file checks what they say about each other
and about the files beside them, none of which it opens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError, reason
from .bundle import BLOB_ALIGNMENT, MEND, TRUNK, BlobSet, BundleTable, is_bundle
from .drafts import first_draft
from .ggml_types import GGML_TYPES
from .gguf_header import MAX_NAME_BYTES, read_header
from .keys import Keys
from .layout import (
    EXPERT_NAME,
    NOWHERE,
    Copy,
    ExpertTensor,
    ModelLayout,
    MoeLayer,
    Piece,
    PlacedTensor,
    architecture_of,
    expert_tensor,
    tensors_of,
)

_MOST_EXPERTS = 1 << 16  # of a layer; validate.py knows llama.cpp's own limit


def read_bundle(path: Path) -> ModelLayout:
    """The layout a bundle's table gives, once everything it claims is possible."""
    if not is_bundle(path):
        raise UserError(
            f"{path} is a folder without {TRUNK}: give a GGUF file or a finished bundle, or run "
            "moe-gguf convert again, which resumes"
        )
    trunk = read_header(path / TRUNK)
    table = BundleTable.parse(trunk)
    architecture = architecture_of(trunk)
    keys = Keys(trunk.path, trunk.get, MEND, architecture)
    n_experts = keys.integer(".expert_count", 1, _MOST_EXPERTS)
    sets = [table.experts, *([table.low] if table.low else [])]
    files = _check_files(path, keys, sets)
    _check_tensors(keys, sets)
    first_file = [1, 1 + len(table.experts.files)]
    copies = [
        _copies(keys, blobs, table.layers, n_experts, at)
        for blobs, at in zip(sets, first_file, strict=False)
    ]
    layers = tuple(
        MoeLayer(number, copies[0][i][0], tuple(each[i][1] for each in copies))
        for i, number in enumerate(table.layers)
    )
    for blobs in copies[1:]:
        for layer, (tensors, _) in zip(layers, blobs, strict=True):
            if [(t.name, t.ne) for t in tensors] != [(t.name, t.ne) for t in layer.tensors]:
                raise keys.damaged(f"the copies of layer {layer.layer} differ in shape")
    drafts_from = first_draft(trunk, architecture, (info.name for info in trunk.tensors))
    if drafts_from is not None:  # bundles of 0.1.0 keep experts of drafts among the others
        layers = tuple(layer for layer in layers if layer.layer < drafts_from)
    stacked = (
        PlacedTensor(t.name, (*t.ne, n_experts), t.ggml_type, NOWHERE, 0, n_experts * t.n_bytes)
        for t in table.experts.tensors
    )
    return ModelLayout(
        path=path,
        files=(trunk.path, *files),
        headers=(trunk,),
        architecture=architecture,
        n_experts=n_experts,
        layers=layers,
        tensors=(*tensors_of([trunk]), *stacked),
        table=table,
    )


def _check_files(folder: Path, keys: Keys, sets: Sequence[BlobSet]) -> list[Path]:
    """The expert files of all sets, which lie in the folder and have the promised sizes."""
    files = []
    for blobs in sets:
        for name, n_bytes in zip(blobs.files, blobs.file_bytes, strict=True):
            if Path(name).name != name:
                raise keys.damaged(f"it names the file {name!r:.60} outside the bundle")
            _check_size(folder / name, n_bytes)
            files.append(folder / name)
    return files


def _check_tensors(keys: Keys, sets: Sequence[BlobSet]) -> None:
    for tensor in (tensor for blobs in sets for tensor in blobs.tensors):
        kind = GGML_TYPES.get(tensor.ggml_type)
        named = EXPERT_NAME.fullmatch(tensor.name) and len(tensor.name) <= MAX_NAME_BYTES
        if not named or kind is None or min(tensor.ne) < 1 or tensor.ne[0] % kind.block:
            raise keys.damaged(f"{tensor.name!r:.60} has an impossible name, type or shape")


def _check_size(file: Path, n_bytes: int) -> None:
    try:
        found = file.stat().st_size
    except OSError as error:
        raise UserError(f"cannot open {file} ({reason(error)}); convert the model again") from None
    if found != n_bytes:
        raise UserError(
            f"{file} has {found} bytes instead of {n_bytes}: the bundle is damaged; convert the "
            "model again"
        )


def _copies(
    keys: Keys, blobs: BlobSet, layers: Sequence[int], n_experts: int, first_file: int
) -> list[tuple[tuple[ExpertTensor, ...], Copy]]:
    """Per layer its tensors and the copy that this set of blobs is."""
    file = np.array(blobs.blob_file, np.int64)
    offset = np.array(blobs.blob_offset, np.uint64)
    n_bytes = np.array(blobs.blob_bytes, np.uint64)
    sizes = np.array(blobs.file_bytes, np.uint64)
    if len(file) != len(layers) * n_experts:
        raise keys.damaged(f"{len(file)} blobs for {len(layers)} layers of {n_experts} experts")
    room = sizes[file]
    if ((offset > room) | (n_bytes > room - np.minimum(offset, room))).any():
        raise keys.damaged("a blob lies behind the end of its file")
    if (offset % np.uint64(BLOB_ALIGNMENT)).any():
        raise keys.damaged("a blob is not aligned")
    names = [t.name for t in blobs.tensors]
    if len(set(names)) != len(names):
        raise keys.damaged("a tensor is listed twice")
    by_layer: dict[int, list[int]] = {}
    for i, tensor in enumerate(blobs.tensors):
        match = EXPERT_NAME.fullmatch(tensor.name)
        assert match is not None
        by_layer.setdefault(int(match[1]), []).append(i)
    if list(by_layer) != list(layers) or sorted(set(layers)) != list(layers):
        raise keys.damaged("its layers and its tensors do not agree")
    copies = []
    for at, number in enumerate(layers):
        mine = slice(at * n_experts, (at + 1) * n_experts)
        placed = [blobs.tensors[i] for i in by_layer[number]]
        end = 0
        for tensor in placed:
            if tensor.offset < end or tensor.offset % BLOB_ALIGNMENT:
                raise keys.damaged(f"tensor {tensor.name} has no place in its blob")
            end = tensor.offset + tensor.n_bytes
        if (n_bytes[mine] != end).any():
            raise keys.damaged(f"a blob of layer {number} has not {end} bytes")
        tensors = tuple(expert_tensor(t.name, (*t.ne, n_experts), t.ggml_type) for t in placed)
        piece = Piece(
            (file[mine] + first_file).astype(np.int32),
            offset[mine].astype(np.int64),
            end,
            tuple((i, tensor.offset) for i, tensor in enumerate(placed)),
        )
        copy = Copy(tuple(t.ggml_type for t in placed), tuple(t.layout for t in placed), (piece,))
        copies.append((tensors, copy))
    return copies
