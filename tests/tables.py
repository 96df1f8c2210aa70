"""Model files with a big table, and with tables of another type.

Owns how such a file is made of a tiny one: sparse, so that it costs neither time nor disk. Knows
nothing of the runtime.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Quant
from mutant import Mutant, Weight
from tiny import random_weights

from moe_gguf.runtime.formats.ggml_types import type_bytes
from moe_gguf.runtime.formats.tables import PER_LAYER


def with_rows(source: Path, path: Path, n_rows: int, name: str = PER_LAYER) -> Path:
    """The model with ``n_rows`` rows in that table, which lies behind all other tensors.

    The rows it had keep their bytes; the new ones are a hole in the file.
    """
    mutant = Mutant.read(source)
    table = mutant.weights.pop(name)
    row_bytes = type_bytes(table.ggml_type, table.ne[0])
    assert n_rows * row_bytes > 1 << 26, "a Mutant writes out what is smaller"
    mutant.weights[name] = Weight([table.ne[0], n_rows], table.ggml_type, table.data)
    mutant.write(path)
    with path.open("r+b") as file:
        start = file.seek(0, 2)
        file.write(table.data)
        file.truncate(start + n_rows * row_bytes)
    return path


def with_table_last(source: Path, path: Path, name: str) -> Path:
    """The model with that table behind all other tensors."""
    mutant = Mutant.read(source)
    mutant.weights[name] = mutant.weights.pop(name)
    return mutant.write(path)


def with_type(source: Path, path: Path, name: str, quant: Quant) -> Path:
    """The model with random rows of this type in that table."""
    mutant = Mutant.read(source)
    ne = mutant.weights[name].ne
    kind = Quant.F32 if quant is Quant.BF16 else quant
    values = random_weights(np.random.default_rng(0), kind, ne[::-1], 0.5)
    raw = values.view("<u2")[..., 1::2] if quant is Quant.BF16 else values
    mutant.weights[name] = Weight(ne, int(quant), raw.tobytes())
    return mutant.write(path)
