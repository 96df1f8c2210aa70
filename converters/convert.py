"""`moe-gguf convert`: a source becomes a bundle, a few matrices at a time.

Chooses types and layouts, then runs the one pipeline: readers, quantizing threads and the writer
work on neighbouring matrices at once, with a window of bytes between them that bounds the memory.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..runtime.errors import UserError
from ..runtime.formats import interleaving
from ..runtime.formats.bundle import is_bundle
from ..runtime.formats.ggml_types import type_bytes
from ..runtime.progress import Report
from ..runtime.sizes import format_size
from ..runtime.system import usable_cores
from .blueprint import Blueprint, Matrix, make_blueprint, trunk_rows
from .bundle_writer import BundleWriter, is_complete
from .choose import ConvertOptions, KernelLayouts, Note, choose, describe_layouts
from .imatrix import Imatrix, Weights
from .mix import type_name
from .quantize import Job, Quantizer
from .source import FORGET_BYTES, Source, SourceTensor
from .source_gguf import GgufSource

# Bytes that are read, quantized or waiting to be written: a few pieces of any size, so that nobody
# waits for another, in little memory, so that a copied byte is still in the cache.
WINDOW_BYTES, WINDOW_PIECES = 16 << 20, 3
# A piece has no more than this: of an expert's matrix, which is usually smaller, of a trunk tensor.
MATRIX_BYTES, SLICE_BYTES = 32 << 20, 8 << 20
READERS = 2


class Summary(NamedTuple):
    """What was made, in numbers."""

    n_weights: int
    n_expert_weights: int
    expert_bytes: int
    low_bytes: int  # 0: no low copy
    trunk_bytes: int
    expert_types: tuple[str, ...]  # with their share of the bytes, largest first
    low_types: tuple[str, ...]
    trunk_types: tuple[str, ...]
    is_new: bool  # False: it was there before, complete

    def lines(self) -> list[str]:
        rows = [("experts", self.expert_bytes, self.n_expert_weights, self.expert_types)]
        if self.low_bytes:
            rows.append(("low copy", self.low_bytes, self.n_expert_weights, self.low_types))
        rest = self.n_weights - self.n_expert_weights
        rows.append(("trunk", self.trunk_bytes, rest, self.trunk_types))
        total = sum(row[1] for row in rows)
        rows.append(("total", total, 0, ()))
        return [
            f"{name:<9}{format_size(n_bytes):>9}"
            + (f"  {8 * n_bytes / weights:5.2f} bits per weight" if weights else "")
            + (f"  {', '.join(types)}" if types else "")
            for name, n_bytes, weights, types in rows
        ]


def open_source(path: Path) -> Source:
    """The checkpoint at this path, told by its form."""
    if not path.is_dir():
        return GgufSource(path)
    if is_bundle(path):
        raise UserError(f"{path} is a bundle already; convert the model it was made from")
    from .hf.source import open_hf

    return open_hf(path)


def convert(
    source: Source,
    folder: Path,
    options: ConvertOptions,
    kernels: KernelLayouts,
    progress: Report,
    note: Note,
) -> Summary:
    """Write the bundle, or the rest of it.

    UserError for what cannot be converted, OSError for a disk that fails; either way, and after
    any kill, the folder is no bundle yet and the same call goes on where this one stopped. Once it
    is complete, the same call writes nothing.
    """
    for sentence in source.notes:
        note(sentence)
    choices = choose(source, options, kernels, note)
    blueprint = make_blueprint(
        source,
        choices.quant,
        choices.sets,
        choices.trunk,
        choices.metadata,
        describe_layouts(choices.sets),
        options.shard_bytes,
    )
    if is_complete(folder, blueprint):
        return _summary(blueprint, is_new=False)
    with BundleWriter(folder, blueprint, note) as writer:
        threads = options.threads or usable_cores()
        with Quantizer(threads) as quantizer, ThreadPoolExecutor(READERS, "read") as readers:
            work = _work(blueprint, writer.done, quantizer, kernels, choices.imatrix)
            passed = 0
            for piece, jobs in _ahead(readers, work):
                for which, job in enumerate(jobs):
                    offset = piece.offsets[which] if piece.offsets else None
                    writer.put(job.result(), which, offset)
                if piece.ends_step:
                    writer.end_step()
                passed += piece.n_bytes
                if passed >= FORGET_BYTES:
                    source.forget()
                    passed = 0
                progress(writer.done_bytes, writer.total_bytes)
        writer.finish()
    return _summary(blueprint, is_new=True)


# --- the pipeline -------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """Rows of one expert's matrix or of a trunk tensor on their way to the writer."""

    n_bytes: int  # as read or as written, whichever is more
    start: Callable[[], list[Job]]  # reads them, and starts a job for each set
    offsets: tuple[int, ...]  # in each set's blob; none for rows that follow those before
    ends_step: bool


def _work(
    blueprint: Blueprint, first: int, quantizer: Quantizer, kernels: KernelLayouts, imatrix: Imatrix
) -> Iterator[_Piece]:
    """Every piece from step `first` on, in the order of the blueprint."""
    for blob in range(first, blueprint.n_blobs):
        layer, expert = divmod(blob, blueprint.n_experts)
        roles = list(zip(*(s.layers[layer] for s in blueprint.sets), strict=True))
        for role, matrices in enumerate(roles):
            stack = matrices[0].stack
            row = _row_bytes(stack.ne[0], stack.ggml_type, *(m.ggml_type for m in matrices))
            # A kernel's layout interleaves rows, and each piece is packed by itself.
            step = max(MATRIX_BYTES // row // interleaving.MOST_ROWS, 1) * interleaving.MOST_ROWS
            offsets = tuple(s.offsets[layer][role] for s in blueprint.sets)
            weights = imatrix.get(stack.name)
            for at, n in _slices(stack.ne[1], step):
                yield _Piece(
                    n * row,
                    partial(_start_matrix, quantizer, kernels, matrices, expert, at, n, weights),
                    () if at else offsets,
                    role == len(roles) - 1 and at + n == stack.ne[1],
                )
    for tensor, ggml_type in blueprint.trunk[max(first - blueprint.n_blobs, 0) :]:
        row, rows = _row_bytes(tensor.ne[0], tensor.ggml_type, ggml_type), trunk_rows(tensor)
        weights = imatrix.get(tensor.name)
        for at, n in _slices(rows, max(SLICE_BYTES // row, 1)):
            yield _Piece(
                n * row,
                partial(_start_rows, quantizer, tensor, ggml_type, at, n, weights),
                (),
                at + n == rows,
            )


def _row_bytes(row: int, *ggml_types: int) -> int:
    return max(type_bytes(ggml_type, row) for ggml_type in ggml_types)


def _slices(n_rows: int, step: int) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of each slice."""
    return ((at, min(step, n_rows - at)) for at in range(0, n_rows, step))


def _start_matrix(
    quantizer: Quantizer,
    kernels: KernelLayouts,
    matrices: Sequence[Matrix],
    expert: int,
    first: int,
    n: int,
    weights: Weights | None,
) -> list[Job]:
    stack = matrices[0].stack
    row = stack.ne[0]
    data = stack.read(expert, first, n)
    what = f"expert {expert} of {stack.name}"
    values = None if weights is None else weights.read(expert * row, row)
    jobs = []
    for m in matrices:
        pack = None if m.rule is None else partial(kernels.repack, m.ggml_type, stack.ne)
        jobs.append(
            quantizer.submit(what, data, stack.ggml_type, m.ggml_type, row, values, then=pack)
        )
    return jobs


def _start_rows(
    quantizer: Quantizer,
    tensor: SourceTensor,
    ggml_type: int,
    first: int,
    n: int,
    weights: Weights | None,
) -> list[Job]:
    data = tensor.read(first, n)
    job = quantizer.submit(
        tensor.name,
        data,
        tensor.ggml_type,
        ggml_type,
        tensor.ne[0],
        None if weights is None else weights.read(0, weights.n_values),
        first_row=first,
        matrix_rows=(*tensor.ne, 1)[1],
    )
    return [job]


def _ahead(
    pool: ThreadPoolExecutor, pieces: Iterable[_Piece]
) -> Iterator[tuple[_Piece, list[Job]]]:
    """Start pieces while there is room in the window, and hand them on in order."""
    queue: deque[tuple[_Piece, Future[list[Job]]]] = deque()
    held = 0
    for piece in pieces:
        window = max(WINDOW_BYTES, WINDOW_PIECES * piece.n_bytes)
        while queue and held + piece.n_bytes > window:
            first, jobs = queue.popleft()
            yield first, jobs.result()
            held -= first.n_bytes
        queue.append((piece, pool.submit(piece.start)))
        held += piece.n_bytes
    for first, jobs in queue:
        yield first, jobs.result()


# --- reporting ----------------------------------------------------------------------------------


def _summary(blueprint: Blueprint, is_new: bool) -> Summary:
    expert_weights = blueprint.n_experts * sum(
        m.stack.ne[0] * m.stack.ne[1] for layer in blueprint.sets[0].layers for m in layer
    )
    trunk = blueprint.trunk_infos
    sizes = [*blueprint.expert_bytes, 0]
    types = [_shares((t.ggml_type, t.n_bytes) for t in s.blobs.tensors) for s in blueprint.sets]
    return Summary(
        expert_weights + sum(info.n_items for info in trunk),
        expert_weights,
        sizes[0],
        sizes[1],
        blueprint.trunk_bytes,
        types[0],
        types[1] if len(types) > 1 else (),
        _shares((info.ggml_type, info.n_bytes) for info in trunk),
        is_new,
    )


def _shares(parts: Iterable[tuple[int, int]]) -> tuple[str, ...]:
    totals: Counter[int] = Counter()
    for ggml_type, n_bytes in parts:
        totals[ggml_type] += n_bytes
    return tuple(type_name(kind) for kind, _ in totals.most_common())
