"""`moe-gguf convert`: a source becomes a bundle, a few matrices at a time.

Chooses types and layouts, then runs the one pipeline: readers, quantizing threads and the writer
work on neighbouring matrices at once, with a window of bytes between them that bounds the memory.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from gguf import GGML_QUANT_VERSION, GGUFValueType

from moe_gguf.converters.bundle import BundleWriter
from moe_gguf.converters.imatrix import Imatrix, Weights, read_imatrix
from moe_gguf.converters.mix import (
    FILE_TYPES,
    NEEDS_IMATRIX,
    fitting_type,
    is_quantizable,
    trunk_types,
    type_name,
    type_number,
)
from moe_gguf.converters.plan import Matrix, Plan, make_plan, trunk_rows
from moe_gguf.converters.quantize import Job, Quantizer, Then
from moe_gguf.converters.source import FORGET_BYTES, ExpertStack, Pair, Source, TrunkTensor
from moe_gguf.converters.source_gguf import GgufSource
from moe_gguf.runtime import repack
from moe_gguf.runtime.budget import format_size
from moe_gguf.runtime.bundle import COPY, PLAIN, BundlePair, is_bundle
from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.gguf_header import type_bytes
from moe_gguf.runtime.progress import Report as Progress

Note = Callable[[str], None]

LAYOUTS = ("auto", "plain", "repacked")

# Bytes that are read, quantized or waiting to be written: a few pieces of any size, so that nobody
# waits for another, in little memory, so that a copied byte is still in the cache.
WINDOW_BYTES, WINDOW_PIECES = 16 << 20, 3
# A piece has no more than this: of an expert's matrix, which is usually smaller, of a trunk tensor.
MATRIX_BYTES, SLICE_BYTES = 32 << 20, 8 << 20
READERS = 2


@dataclass(frozen=True)
class Options:
    """What to make of a source; `quant` None keeps a GGUF's bytes and takes q4_k for the rest."""

    quant: str | None = None
    low_quant: str | None = None
    imatrix: Path | None = None
    layout: str = "auto"
    shard_bytes: int | None = None
    threads: int | None = None


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
    from moe_gguf.converters.source_hf import open_hf

    return open_hf(path)


def convert(
    source: Source, folder: Path, options: Options, progress: Progress, note: Note
) -> Summary:
    """Write the bundle, or the rest of it.

    UserError for what cannot be converted, OSError for a disk that fails; either way, and after
    any kill, the folder is no bundle yet and the same call goes on where this one stopped.
    """
    choices = _choose(source, options, note)
    plan = make_plan(
        source,
        choices.quant,
        choices.sets,
        choices.trunk,
        choices.metadata,
        _describe_layouts(choices.sets),
        options.shard_bytes,
    )
    identity = plan.identity(_hash(options.imatrix) if options.imatrix else "")
    with BundleWriter(folder, plan, identity, note) as writer:
        threads = options.threads or len(os.sched_getaffinity(0))
        with Quantizer(threads) as quantizer, ThreadPoolExecutor(READERS, "read") as readers:
            work = _work(plan, writer.done, quantizer, choices.imatrix)
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
    return _summary(plan)


# --- choosing -----------------------------------------------------------------------------------


class _Choices(NamedTuple):
    quant: str
    sets: list[list[Matrix]]
    trunk: list[tuple[TrunkTensor, int]]
    metadata: Mapping[str, Pair]
    imatrix: Imatrix


def _choose(source: Source, options: Options, note: Note) -> _Choices:
    quant = (options.quant or _default_quant(source)).lower()
    if options.imatrix and quant == COPY and options.low_quant is None:
        raise UserError("--imatrix weighs a quantization: give --quant or --low-quant with it")
    if options.layout not in LAYOUTS:
        raise UserError(f"{options.layout!r} is no layout: choose one of {', '.join(LAYOUTS)}")
    imatrix = read_imatrix(options.imatrix) if options.imatrix else {}
    fallbacks: Counter[tuple[int, int, int]] = Counter()
    types: dict[str, int] = {t.name: t.ggml_type for t in source.trunk}
    metadata = dict(source.metadata)
    if quant != COPY:
        wanted = type_number(quant)
        mix = trunk_types(source, wanted, bool(imatrix))
        for tensor in source.trunk:
            types[tensor.name] = _fit(mix[tensor.name], tensor.ne[0], fallbacks)
        u32 = GGUFValueType.UINT32
        metadata["general.file_type"] = Pair(FILE_TYPES[quant], u32)
        metadata["general.quantization_version"] = Pair(GGML_QUANT_VERSION, u32)
    sets = []
    for name in (quant, options.low_quant):
        if name is not None:
            number = None if name == COPY else type_number(name)
            sets.append([_matrix(stack, number, options, fallbacks) for stack in source.experts])
    for (kind, fitting, row), n in sorted(fallbacks.items()):
        note(f"rows of {row} do not fit {type_name(kind)}: {n} tensors become {type_name(fitting)}")
    if options.layout == "repacked" and all(m.layout == PLAIN for s in sets for m in s):
        kinds = ", ".join(sorted({type_name(m.ggml_type) for s in sets for m in s}))
        raise UserError(f"this CPU's kernels take {kinds} as it is; give --layout plain")
    choices = _Choices(quant, sets, [(t, types[t.name]) for t in source.trunk], metadata, imatrix)
    _check_imatrix(source, choices)
    return choices


def _default_quant(source: Source) -> str:
    """Weights that are quantized stay as they are; floats of a checkpoint become q4_k."""
    if isinstance(source, GgufSource):
        return COPY
    quantized = {type_name(s.ggml_type) for s in source.experts} - {"f32", "f16", "bf16"}
    return min(quantized, default="q4_k")


def _fit(wanted: int, row: int, fallbacks: Counter[tuple[int, int, int]]) -> int:
    fitting = fitting_type(wanted, row)
    if fitting != wanted:
        fallbacks[wanted, fitting, row] += 1
    return fitting


def _matrix(
    stack: ExpertStack,
    wanted: int | None,
    options: Options,
    fallbacks: Counter[tuple[int, int, int]],
) -> Matrix:
    ggml_type = stack.ggml_type
    if wanted is not None and is_quantizable(stack.name, stack.ne):
        ggml_type = _fit(wanted, stack.ne[0], fallbacks)
    layout = None
    if options.layout != "plain" and stack.name.endswith(".weight"):
        layout = repack.layout_name(ggml_type, stack.ne)
    return Matrix(stack, ggml_type, layout or PLAIN)


def _describe_layouts(sets: Sequence[Sequence[Matrix]]) -> list[BundlePair]:
    """Keys from which another CPU learns to undo the layouts used."""
    names = {m.layout: None for s in sets for m in s if m.layout != PLAIN}
    return [pair for name in names for pair in repack.describe(name)]


def _check_imatrix(source: Source, choices: _Choices) -> None:
    """Whatever needs weights has them, and those there are have the right size."""
    matrices = {m.stack.name: m for s in choices.sets for m in s}.values()
    items = [(m.stack.name, m.stack.ggml_type, m.stack.ne[0] * source.n_experts) for m in matrices]
    trunk = {t.name: (t, kind) for t, kind in choices.trunk}
    items += [(t.name, t.ggml_type, t.ne[0] * (*t.ne, 1, 1)[2]) for t, _ in trunk.values()]
    targets: dict[str, set[int]] = {name: {kind} for name, (_, kind) in trunk.items()}
    for s in choices.sets:
        for m in s:
            targets.setdefault(m.stack.name, set()).add(m.ggml_type)
    for name, ggml_type, size in items:
        changed = {type_name(kind) for kind in targets[name] if kind != ggml_type}
        weights = choices.imatrix.get(name)
        if weights is not None and changed and weights.n_values != size:
            if name == "token_embd.weight":
                del choices.imatrix[name]  # looked up, not multiplied: never really measured
                continue
            raise UserError(
                f"the importance matrix has {weights.n_values} values for {name} where the model"
                f" has {size}; make one from this model"
            )
        if weights is None and (needy := sorted(changed & NEEDS_IMATRIX)):
            where = "this one lacks" if choices.imatrix else "give one with --imatrix for"
            raise UserError(
                f"{needy[0]} is useless without an importance matrix: {where} {name}"
                + ("; choose a type of more bits" if choices.imatrix else "")
            )


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the pipeline -------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """Rows of one expert's matrix or of a trunk tensor on their way to the writer."""

    n_bytes: int  # as read or as written, whichever is more
    start: Callable[[], list[Job]]  # reads them, and starts a job for each set
    offsets: tuple[int, ...]  # in each set's blob; none for rows that follow those before
    ends_step: bool


def _work(plan: Plan, first: int, quantizer: Quantizer, imatrix: Imatrix) -> Iterator[_Piece]:
    """Every piece from step `first` on, in the order of the plan."""
    for blob in range(first, plan.n_blobs):
        layer, expert = divmod(blob, plan.n_experts)
        roles = list(zip(*(s.layers[layer] for s in plan.sets), strict=True))
        for role, matrices in enumerate(roles):
            stack = matrices[0].stack
            row = _row_bytes(stack.ne[0], stack.ggml_type, *(m.ggml_type for m in matrices))
            # A kernel's layout interleaves rows, and each piece is packed by itself.
            step = max(MATRIX_BYTES // row // repack.MOST_ROWS, 1) * repack.MOST_ROWS
            offsets = tuple(s.offsets[layer][role] for s in plan.sets)
            weights = imatrix.get(stack.name)
            for at, n in _slices(stack.ne[1], step):
                yield _Piece(
                    n * row,
                    partial(_start_matrix, quantizer, matrices, expert, at, n, weights),
                    () if at else offsets,
                    role == len(roles) - 1 and at + n == stack.ne[1],
                )
    for tensor, ggml_type in plan.trunk[max(first - plan.n_blobs, 0) :]:
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
    return [
        quantizer.submit(what, data, stack.ggml_type, m.ggml_type, row, values, then=_packing(m))
        for m in matrices
    ]


def _packing(matrix: Matrix) -> Then | None:
    if matrix.layout == PLAIN:
        return None
    return partial(repack.repack, matrix.ggml_type, matrix.stack.ne)


def _start_rows(
    quantizer: Quantizer,
    tensor: TrunkTensor,
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


def _summary(plan: Plan) -> Summary:
    expert_weights = plan.n_experts * sum(
        m.stack.ne[0] * m.stack.ne[1] for layer in plan.sets[0].layers for m in layer
    )
    trunk = plan.trunk_infos
    sizes = [*plan.expert_bytes, 0]
    types = [_shares((t.ggml_type, t.n_bytes) for t in s.blobs.tensors) for s in plan.sets]
    return Summary(
        expert_weights + sum(info.n_items for info in trunk),
        expert_weights,
        sizes[0],
        sizes[1],
        plan.trunk_bytes,
        types[0],
        types[1] if len(types) > 1 else (),
        _shares((info.ggml_type, info.n_bytes) for info in trunk),
    )


def _shares(parts: Iterable[tuple[int, int]]) -> tuple[str, ...]:
    totals: Counter[int] = Counter()
    for ggml_type, n_bytes in parts:
        totals[ggml_type] += n_bytes
    return tuple(type_name(kind) for kind, _ in totals.most_common())
