"""What contexts of any size take of a model's memory, from a few simulated loads.

llama.cpp's needs grow with cells, rows, outputs and sequences by straight lines, and the graph's
buffers also with cells times rows (the mask of attention). So a handful of loads tells them all,
and a planner may ask for hundreds. No weight is read.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

from .. import opening
from ..opening import Found, Measured
from ..params import ContextShape, ModelParams
from .model import context_shape

# Two sizes of each kind, apart enough for a slope and small enough for any model.
_CELLS, _CHUNK, _SEQUENCES = (1024, 4096), (64, 512), (1, 17)


class Room(NamedTuple):
    """Bytes of everything but slots."""

    fixed: float  # trunk, process, and a context of no size
    cell: float  # of a token in the KV cache
    sequence: float  # of a sequence: what it remembers beside cells
    row: float  # of a step
    cell_row: float
    output: float  # of a row of logits

    def bytes(self, sequences: int, cells: int, rows: int, outputs: int) -> int:
        return int(
            self.fixed
            + self.cell * cells
            + self.sequence * sequences
            + (self.row + self.cell_row * cells) * rows
            + self.output * outputs
        )

    def with_cells(self, factor: float) -> Room:
        """The same with cells of so many times the size."""
        return self._replace(cell=self.cell * factor)


def room(found: Found, n_threads: int | None = None) -> Room:
    """Of a found model. UserError where llama.cpp cannot make a context."""
    (few, many), (short, long), (one, more) = _CELLS, _CHUNK, _SEQUENCES

    def needs(cells: int, chunk: int, sequences: int = one, outputs: int = one) -> Measured:
        shape = context_shape(
            cells, sequences, cells=cells, chunk=chunk, score_rows=outputs, n_threads=n_threads
        )
        return simulated(found, shape)

    base = needs(few, short)
    wide, deep = needs(few, long), needs(many, short)
    both, crowd = needs(many, long), needs(few, short, sequences=more, outputs=more)
    loud = needs(few, short, outputs=more)
    cell = _slope(deep.needs.kv - base.needs.kv, many - few)
    compute = base.needs.compute
    cell_row = _slope(
        both.needs.compute - wide.needs.compute - deep.needs.compute + compute,
        (many - few) * (long - short),
    )
    row = _slope(wide.needs.compute - compute, long - short) - cell_row * few
    output = _slope(loud.needs.compute - compute, more - one)
    sequence = _slope(crowd.needs.kv - base.needs.kv, more - one)
    row, at_base = max(0.0, row), cell * few + sequence * one + output * one
    fixed = base.needs.total - at_base - (row + cell_row * few) * short
    return Room(fixed, cell, sequence, row, cell_row, output)


def simulated(found: Found, shape: ContextShape) -> Measured:
    """What the model needs in a context of this shape."""
    overrides = {}
    if found.options.experts_used is not None:
        overrides[f"{found.layout.architecture}.expert_used_count"] = found.n_used
    params = ModelParams(overrides)
    with contextlib.closing(found.bind()) as binding:
        return opening.measure(found, binding, params.params, shape.params())


def _slope(rise: float, run: float) -> float:
    return max(0.0, rise / run)
