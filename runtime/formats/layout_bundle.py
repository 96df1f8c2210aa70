"""The layout of a bundle, once everything its table claims is possible."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError, reason
from .bundle import BLOB_ALIGNMENT, TRUNK, BlobSet, BundleTable, is_bundle
from .ggml_types import GGML_TYPES
from .gguf_header import MAX_NAME_BYTES, GgufHeader, TensorInfo, read_header
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
    check_types,
    expert_tensor,
    stream_header,
    tensors_of,
)

# --- bundles ------------------------------------------------------------------------------------


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
    n_experts = trunk.get(f"{architecture}.expert_count")
    if type(n_experts) is not int or n_experts < 1:
        raise _damaged(trunk, f"{architecture}.expert_count is {n_experts}")
    sets = [table.experts, *([table.low] if table.low else [])]
    first_file = [1, 1 + len(table.experts.files)]
    files = (trunk.path, *(path / name for blobs in sets for name in blobs.files))
    for name in (name for blobs in sets for name in blobs.files):
        if Path(name).name != name:
            raise _damaged(trunk, f"it names the file {name!r:.60} outside the bundle")
    for file, n_bytes in zip(
        files[1:], (n for blobs in sets for n in blobs.file_bytes), strict=True
    ):
        _check_size(file, n_bytes)
    for tensor in (tensor for blobs in sets for tensor in blobs.tensors):
        kind = GGML_TYPES.get(tensor.ggml_type)
        named = EXPERT_NAME.fullmatch(tensor.name) and len(tensor.name) <= MAX_NAME_BYTES
        if not named or kind is None or min(tensor.ne) < 1 or tensor.ne[0] % kind.block:
            raise _damaged(trunk, f"{tensor.name!r:.60} has an impossible name, type or shape")
    infos = [TensorInfo(t.name, (*t.ne, n_experts), t.ggml_type, 0) for t in table.experts.tensors]
    check_types(trunk.path, [*trunk.tensors, *infos])
    copies = [
        _copies(trunk, blobs, table.layers, n_experts, at)
        for blobs, at in zip(sets, first_file, strict=False)
    ]
    layers = tuple(
        MoeLayer(number, copies[0][i][0], tuple(each[i][1] for each in copies))
        for i, number in enumerate(table.layers)
    )
    for blobs in copies[1:]:
        for layer, (tensors, _) in zip(layers, blobs, strict=True):
            if [(t.name, t.ne) for t in tensors] != [(t.name, t.ne) for t in layer.tensors]:
                raise _damaged(trunk, f"the copies of layer {layer.layer} differ in shape")
    header, stream_bytes = stream_header(trunk, [*trunk.tensors, *infos])
    stacked = (PlacedTensor(i.name, i.ne, i.ggml_type, NOWHERE, 0, i.n_bytes) for i in infos)
    return ModelLayout(
        path=path,
        files=files,
        headers=(trunk,),
        metadata=trunk,
        architecture=architecture,
        n_experts=n_experts,
        layers=layers,
        tensors=(*tensors_of([trunk]), *stacked),
        header=header,
        stream_bytes=stream_bytes,
        table=table,
    )


def _damaged(header: GgufHeader, what: str) -> UserError:
    return UserError(f"{header.path} is damaged ({what}); convert the model again")


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
    trunk: GgufHeader, blobs: BlobSet, layers: Sequence[int], n_experts: int, first_file: int
) -> list[tuple[tuple[ExpertTensor, ...], Copy]]:
    """Per layer its tensors and the copy that this set of blobs is."""
    file = np.array(blobs.blob_file, np.int64)
    offset = np.array(blobs.blob_offset, np.uint64)
    n_bytes = np.array(blobs.blob_bytes, np.uint64)
    sizes = np.array(blobs.file_bytes, np.uint64)
    if len(file) != len(layers) * n_experts:
        raise _damaged(trunk, f"{len(file)} blobs for {len(layers)} layers of {n_experts} experts")
    if (file >= len(blobs.files)).any():
        raise _damaged(trunk, "a blob lies in a file that is not listed")
    room = sizes[file]
    if ((offset > room) | (n_bytes > room - np.minimum(offset, room))).any():
        raise _damaged(trunk, "a blob lies behind the end of its file")
    if (offset % np.uint64(BLOB_ALIGNMENT)).any():
        raise _damaged(trunk, "a blob is not aligned")
    names = [t.name for t in blobs.tensors]
    if len(set(names)) != len(names):
        raise _damaged(trunk, "a tensor is listed twice")
    by_layer: dict[int, list[int]] = {}
    for i, tensor in enumerate(blobs.tensors):
        match = EXPERT_NAME.fullmatch(tensor.name)
        assert match is not None
        by_layer.setdefault(int(match[1]), []).append(i)
    if list(by_layer) != list(layers) or sorted(set(layers)) != list(layers):
        raise _damaged(trunk, "its layers and its tensors do not agree")
    copies = []
    for at, number in enumerate(layers):
        mine = slice(at * n_experts, (at + 1) * n_experts)
        placed = [blobs.tensors[i] for i in by_layer[number]]
        end = 0
        for tensor in placed:
            if tensor.offset < end or tensor.offset % BLOB_ALIGNMENT:
                raise _damaged(trunk, f"tensor {tensor.name} has no place in its blob")
            end = tensor.offset + tensor.n_bytes
        if (n_bytes[mine] != end).any():
            raise _damaged(trunk, f"a blob of layer {number} has not {end} bytes")
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
