"""Where every byte of a bundle will lie, worked out before the first one is written.

Pure arithmetic over a source's shapes and the types chosen for them: sizes, headers and the table,
its checksums still zero. The same source and choices give the same blueprint, whose hash is
therefore what an interrupted conversion is recognised by.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from gguf import GGUFValueType

from ..runtime.formats.bundle import (
    BLOB_ALIGNMENT,
    EXPERTS,
    LOW,
    PLAIN,
    SHARD_KEY,
    VERSION,
    VERSION_KEY,
    BlobSet,
    BundlePair,
    BundleTable,
    BundleTensor,
    file_name,
    matrix_infos,
    place_matrices,
)
from ..runtime.formats.ggml_types import pad_up
from ..runtime.formats.gguf_header import DEFAULT_ALIGNMENT, TensorInfo, ValueType
from ..runtime.formats.gguf_writer import encode_header, encode_info, encode_pair
from ..runtime.formats.interleaving import Interleaving
from .source import ARCHITECTURE, ExpertStack, Pair, Source, SourceTensor


@dataclass(frozen=True)
class Matrix:
    """What becomes of a stack's matrices in one set of blobs."""

    stack: ExpertStack
    ggml_type: int
    rule: Interleaving | None  # of a kernel's layout; None: plain

    @property
    def layout(self) -> str:
        return PLAIN if self.rule is None else self.rule.name


@dataclass(frozen=True)
class SetBlueprint:
    """One set of blobs and the headers of its files."""

    blobs: BlobSet
    headers: tuple[bytes, ...]
    layers: tuple[tuple[Matrix, ...], ...]  # one blob's matrices, by layer
    offsets: tuple[tuple[int, ...], ...]  # and where in the blob they begin


@dataclass(frozen=True)
class Blueprint:
    """A whole bundle."""

    table: BundleTable
    sets: tuple[SetBlueprint, ...]  # the experts, then perhaps the low copy
    trunk: tuple[tuple[SourceTensor, int], ...]  # with the type each is written in
    metadata: Mapping[str, Pair]
    layouts: Sequence[BundlePair]  # what describes those that are not plain
    n_experts: int

    @property
    def n_blobs(self) -> int:
        return len(self.table.experts.blob_bytes)

    @property
    def trunk_infos(self) -> tuple[TensorInfo, ...]:
        infos: list[TensorInfo] = []
        at = 0
        for tensor, ggml_type in self.trunk:
            infos.append(TensorInfo(tensor.name, tensor.ne, ggml_type, at))
            at = pad_up(at + infos[-1].n_bytes, DEFAULT_ALIGNMENT)
        return tuple(infos)

    def trunk_header(self, checksums: Sequence[Sequence[int]], trunk: Sequence[int]) -> bytes:
        """The header of trunk.gguf with these checksums, per set and of the trunk; same length."""
        experts, *low = (
            dataclasses.replace(s.blobs, blob_checksum=tuple(sums))
            for s, sums in zip(self.sets, checksums, strict=True)
        )
        table = dataclasses.replace(
            self.table,
            experts=experts,
            low=low[0] if low else None,
            trunk_checksum=tuple(trunk),
        )
        pairs = [_encode(key, pair) for key, pair in self.metadata.items()]
        for key, kind, item, value in (*table.pairs(), *self.layouts):
            pairs.append(encode_pair(key, kind, value, item))
        return encode_header(pairs, self.trunk_infos, DEFAULT_ALIGNMENT)

    def blank_header(self) -> bytes:
        return self.trunk_header([[0] * self.n_blobs for _ in self.sets], [0] * len(self.trunk))

    @property
    def expert_bytes(self) -> tuple[int, ...]:
        """Of the files of each set."""
        return tuple(sum(s.blobs.file_bytes) for s in self.sets)

    @property
    def trunk_bytes(self) -> int:
        last = self.trunk_infos[-1]
        return len(self.blank_header()) + pad_up(last.offset + last.n_bytes, DEFAULT_ALIGNMENT)

    @property
    def identity(self) -> str:
        """A hash over all that decides the bundle's bytes, but for the weights themselves."""
        digest = hashlib.sha256(self.blank_header())
        for s in self.sets:
            for header in s.headers:
                digest.update(header)
        return digest.hexdigest()


def make_blueprint(
    source: Source,
    quant: str,
    sets: Sequence[Sequence[Matrix]],
    trunk: Sequence[tuple[SourceTensor, int]],
    metadata: Mapping[str, Pair],
    layouts: Sequence[BundlePair],
    shard_bytes: int | None,
) -> Blueprint:
    """``sets`` has every stack's matrices in source order, for the experts and the low copy."""
    architecture = _encode(ARCHITECTURE, metadata[ARCHITECTURE])
    laid_out = tuple(
        _lay_out_set(name, matrices, source.n_experts, architecture, shard_bytes)
        for name, matrices in zip((EXPERTS, LOW), sets, strict=False)
    )
    table = BundleTable(
        source_name=source.name,
        source_bytes=source.n_bytes,
        source_sha256=source.sha256,
        quant=quant,
        layers=tuple(matrices[0].stack.layer for matrices in laid_out[0].layers),
        experts=laid_out[0].blobs,
        low=laid_out[1].blobs if len(laid_out) > 1 else None,
        trunk_checksum=(0,) * len(trunk),
    )
    return Blueprint(table, laid_out, tuple(trunk), metadata, layouts, source.n_experts)


def _lay_out_set(
    name: str,
    matrices: Sequence[Matrix],
    n_experts: int,
    architecture: bytes,
    shard_bytes: int | None,
) -> SetBlueprint:
    by_layer: dict[int, list[Matrix]] = {}
    for matrix in matrices:
        by_layer.setdefault(matrix.stack.layer, []).append(matrix)
    placed = {
        layer: place_matrices([(m.stack.name, m.ggml_type, m.stack.ne, m.layout) for m in group])
        for layer, group in by_layer.items()
    }
    pairs = [
        architecture,
        encode_pair("general.alignment", ValueType.UINT32, BLOB_ALIGNMENT),
        encode_pair(VERSION_KEY, ValueType.UINT32, VERSION),
    ]
    shards: list[_Shard] = [_Shard()]
    blob_file: list[int] = []
    starts: list[int] = []  # of each blob in its file's data
    sizes: list[int] = []
    for layer, group in by_layer.items():
        blob = placed[layer]
        n_bytes = blob[-1].offset + blob[-1].n_bytes
        roles = [m.stack.role for m in group]
        for expert in range(n_experts):
            shard = shards[-1]
            infos = matrix_infos(layer, expert, roles, blob, shard.data_bytes)
            if shard_bytes and shard.infos and shard.bytes_with(infos, n_bytes) > shard_bytes:
                shards.append(shard := _Shard())
                infos = matrix_infos(layer, expert, roles, blob, 0)
            blob_file.append(len(shards) - 1)
            starts.append(shard.data_bytes)
            sizes.append(n_bytes)
            shard.add(infos, n_bytes)
    headers = tuple(
        encode_header(
            [*pairs, encode_pair(SHARD_KEY, ValueType.UINT32, i)], shard.infos, BLOB_ALIGNMENT
        )
        for i, shard in enumerate(shards)
    )
    blobs = BlobSet(
        files=tuple(file_name(name, i, len(shards)) for i in range(len(shards))),
        file_bytes=tuple(
            len(header) + shard.data_bytes for header, shard in zip(headers, shards, strict=True)
        ),
        tensors=tuple(tensor for blob in placed.values() for tensor in blob),
        blob_file=tuple(blob_file),
        blob_offset=tuple(
            len(headers[file]) + start for file, start in zip(blob_file, starts, strict=True)
        ),
        blob_bytes=tuple(sizes),
        blob_checksum=(0,) * len(sizes),
    )
    layers = tuple(map(tuple, by_layer.values()))
    return SetBlueprint(blobs, headers, layers, tuple(map(_offsets, placed.values())))


class _Shard:
    """One file while blobs are dealt out."""

    # More than the pairs of such a file take, so that a shard stays within its size.
    _PAIR_BYTES = 512

    def __init__(self) -> None:
        self.infos: list[TensorInfo] = []
        self.info_bytes = 0
        self.data_bytes = 0

    def add(self, infos: Sequence[TensorInfo], n_bytes: int) -> None:
        self.infos += infos
        self.info_bytes += sum(len(encode_info(info)) for info in infos)
        self.data_bytes += pad_up(n_bytes, BLOB_ALIGNMENT)

    def bytes_with(self, infos: Sequence[TensorInfo], n_bytes: int) -> int:
        """The file's size if this blob were added."""
        head = self._PAIR_BYTES + self.info_bytes + sum(len(encode_info(info)) for info in infos)
        return pad_up(head, BLOB_ALIGNMENT) + self.data_bytes + pad_up(n_bytes, BLOB_ALIGNMENT)


def _offsets(blob: Sequence[BundleTensor]) -> tuple[int, ...]:
    return tuple(tensor.offset for tensor in blob)


def trunk_rows(tensor: SourceTensor) -> int:
    return math.prod(tensor.ne[1:])


def _encode(key: str, pair: Pair) -> bytes:
    value = pair.value.tolist() if isinstance(pair.value, np.ndarray) else pair.value
    item = pair.item
    if item is None and pair.kind is GGUFValueType.ARRAY:  # left to be seen, as by gguf's writer
        item = GGUFValueType.get_type(value[0])
    return encode_pair(key, ValueType(pair.kind), value, None if item is None else ValueType(item))
