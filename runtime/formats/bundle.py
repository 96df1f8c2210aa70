"""What a bundle says about itself: key names, the table they carry, and the padding of its blobs.

A bundle is a folder with `trunk.gguf`, whose keys are this table, and expert files in which the
matrices of one expert lie together. The one definition of the format, shared by those who write
bundles and those who run them; it reads no files itself.

Everything about a blob is a multiple of `BLOB_ALIGNMENT` except its length, which ends with its
last matrix: files are padded, so that a direct read may be rounded up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .ggml_types import pad_up, type_bytes
from .gguf_header import GgufHeader, Scalar, TensorInfo, ValueType
from .keys import Keys

VERSION = 1
BLOB_ALIGNMENT = 4096
TRUNK = "trunk.gguf"  # written last: a folder without it is no bundle
ROUTING = "routing.gguf"  # statistics that `trace` may add
PREFIX = "moe_gguf."
VERSION_KEY = PREFIX + "version"
SHARD_KEY = PREFIX + "shard"  # in an expert file: its index in the table's files
EXPERTS, LOW = "experts", "low"  # the two sets of blobs; the second is optional
PLAIN = "plain"  # the layout of matrices as any GGUF has them
MEND = "convert the model again"
COPY = "copy"  # the quant of a bundle that was regrouped only

U32, U64, STRING = ValueType.UINT32, ValueType.UINT64, ValueType.STRING
BundlePair = tuple[str, ValueType, ValueType | None, Scalar | Sequence[Scalar]]


def is_bundle(path: Path) -> bool:
    return (path / TRUNK).is_file()


def file_name(blobs: str, index: int, count: int) -> str:
    stem = "experts" if blobs == EXPERTS else "experts-low"
    return f"{stem}-{index + 1:05}-of-{count:05}.gguf"


def matrix_name(layer: int, expert: int, role: str) -> str:
    return f"blk.{layer}.exp.{expert}.{role}.weight"


@dataclass(frozen=True)
class BundleTensor:
    """One role of one layer, the same for each of its experts."""

    name: str  # of the stacked tensor in a stock GGUF: blk.3.ffn_gate_exps.weight
    ggml_type: int
    ne: tuple[int, int]
    layout: str  # PLAIN, or the name of a kernel's layout
    offset: int  # of the matrix inside its blob

    @property
    def n_bytes(self) -> int:
        return type_bytes(self.ggml_type, self.ne[0] * self.ne[1])


@dataclass(frozen=True)
class BlobSet:
    """Every expert once. Tensors run by layer, then role; blobs by layer, then expert."""

    files: tuple[str, ...]
    file_bytes: tuple[int, ...]
    tensors: tuple[BundleTensor, ...]
    blob_file: tuple[int, ...]
    blob_offset: tuple[int, ...]  # in that file
    blob_bytes: tuple[int, ...]
    blob_checksum: tuple[int, ...]  # xxh3_64 of blob_bytes bytes from blob_offset

    def pairs(self, blobs: str) -> Iterator[BundlePair]:
        at = f"{PREFIX}{blobs}."
        yield at + "files", ValueType.ARRAY, STRING, self.files
        yield at + "files.bytes", ValueType.ARRAY, U64, self.file_bytes
        yield at + "tensors", ValueType.ARRAY, STRING, [t.name for t in self.tensors]
        yield at + "tensors.type", ValueType.ARRAY, U32, [t.ggml_type for t in self.tensors]
        yield at + "tensors.ne", ValueType.ARRAY, U64, [n for t in self.tensors for n in t.ne]
        yield at + "tensors.layout", ValueType.ARRAY, STRING, [t.layout for t in self.tensors]
        yield at + "tensors.offset", ValueType.ARRAY, U64, [t.offset for t in self.tensors]
        yield at + "blobs.file", ValueType.ARRAY, U32, self.blob_file
        yield at + "blobs.offset", ValueType.ARRAY, U64, self.blob_offset
        yield at + "blobs.bytes", ValueType.ARRAY, U64, self.blob_bytes
        yield at + "blobs.checksum", ValueType.ARRAY, U64, self.blob_checksum

    @classmethod
    def parse(cls, header: GgufHeader, blobs: str) -> BlobSet:
        at = f"{PREFIX}{blobs}."
        keys = Keys(header.path, header.get, MEND)
        names = keys.texts(at + "tensors")
        types = keys.integers(at + "tensors.type", count=len(names))
        ne = keys.integers(at + "tensors.ne", count=2 * len(names))
        layouts = keys.texts(at + "tensors.layout", count=len(names))
        offsets = keys.integers(at + "tensors.offset", count=len(names))
        files = keys.texts(at + "files")
        blob_bytes = keys.integers(at + "blobs.bytes")
        return cls(
            files=files,
            file_bytes=keys.integers(at + "files.bytes", count=len(files)),
            tensors=tuple(
                BundleTensor(names[i], types[i], (ne[2 * i], ne[2 * i + 1]), layouts[i], offsets[i])
                for i in range(len(names))
            ),
            blob_file=keys.integers(at + "blobs.file", 0, len(files) - 1, len(blob_bytes)),
            blob_offset=keys.integers(at + "blobs.offset", count=len(blob_bytes)),
            blob_bytes=blob_bytes,
            blob_checksum=keys.integers(at + "blobs.checksum", count=len(blob_bytes)),
        )


@dataclass(frozen=True)
class BundleTable:
    """All keys of ours in a trunk.gguf. `parse` checks their presence, kinds and counts only."""

    source_name: str
    source_bytes: int
    source_sha256: str
    quant: str  # COPY, or the type experts were quantized to
    layers: tuple[int, ...]  # those that route
    experts: BlobSet
    low: BlobSet | None
    trunk_checksum: tuple[int, ...]  # xxh3_64 per tensor of trunk.gguf, in its order

    def pairs(self) -> Iterator[BundlePair]:
        """Key, kind, kind of items, value; in the order they are written."""
        yield VERSION_KEY, U32, None, VERSION
        yield PREFIX + "source.name", STRING, None, self.source_name
        yield PREFIX + "source.bytes", U64, None, self.source_bytes
        yield PREFIX + "source.sha256", STRING, None, self.source_sha256
        yield PREFIX + "quant", STRING, None, self.quant
        yield PREFIX + "layers", ValueType.ARRAY, U32, self.layers
        yield from self.experts.pairs(EXPERTS)
        if self.low is not None:
            yield from self.low.pairs(LOW)
        yield PREFIX + "trunk.checksum", ValueType.ARRAY, U64, self.trunk_checksum

    @classmethod
    def parse(cls, header: GgufHeader) -> BundleTable:
        """The table in the header of a trunk.gguf; UserError if it is not one of this version."""
        version = header.get(VERSION_KEY)
        if version != VERSION:
            raise UserError(
                f"{header.path} is no bundle of version {VERSION} ({VERSION_KEY} is {version});"
                " convert the model again"
            )
        keys = Keys(header.path, header.get, MEND)
        return cls(
            source_name=keys.text(PREFIX + "source.name"),
            source_bytes=keys.integer(PREFIX + "source.bytes"),
            source_sha256=keys.text(PREFIX + "source.sha256"),
            quant=keys.text(PREFIX + "quant"),
            layers=keys.integers(PREFIX + "layers"),
            experts=BlobSet.parse(header, EXPERTS),
            low=BlobSet.parse(header, LOW) if f"{PREFIX}{LOW}.files" in header.pairs else None,
            trunk_checksum=keys.integers(PREFIX + "trunk.checksum", count=len(header.tensors)),
        )


def place_matrices(
    matrices: Sequence[tuple[str, int, tuple[int, int], str]],
) -> tuple[BundleTensor, ...]:
    """Lay the matrices of one blob behind each other: (name, type, ne, layout) of each."""
    placed: list[BundleTensor] = []
    at = 0
    for name, ggml_type, ne, layout in matrices:
        placed.append(BundleTensor(name, ggml_type, ne, layout, at))
        at = pad_up(at + placed[-1].n_bytes, BLOB_ALIGNMENT)
    return tuple(placed)


def matrix_infos(
    layer: int, expert: int, roles: Sequence[str], blob: Sequence[BundleTensor], data_offset: int
) -> list[TensorInfo]:
    """One expert in the header of its file; data_offset counts from where the data starts."""
    return [
        TensorInfo(matrix_name(layer, expert, role), t.ne, t.ggml_type, data_offset + t.offset)
        for role, t in zip(roles, blob, strict=True)
    ]
