"""Rows of tables on disk are known before a step begins: they follow from its tokens.

Owns how, for each table: a row per token, or rows of hashes over the last few tokens. What it says
is a hint that starts reads early; a wrong one costs time alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .formats.layout import EMBEDDING, ModelLayout, PlacedTensor
from .formats.tables import PER_LAYER

Rows = NDArray[np.int32]
_64_BITS = (1 << 64) - 1
RowsOf = Callable[[Sequence[int], Sequence[int], Sequence[int]], Rows]


class Ahead:
    """``fetch`` starts reading rows of one of ``tables``, which it is told by number."""

    def __init__(
        self,
        layout: ModelLayout,
        tables: Sequence[PlacedTensor],
        fetch: Callable[[int, Rows], None],
    ) -> None:
        known = [(i, _rows_of(layout, table)) for i, table in enumerate(tables)]
        self._known = [(i, rows_of) for i, rows_of in known if rows_of is not None]
        self._fetch = fetch

    def step(self, tokens: Sequence[int], at: Sequence[int], sequences: Sequence[int]) -> None:
        """The next step computes these tokens, at these positions of these sequences."""
        for i, rows_of in self._known:
            self._fetch(i, rows_of(tokens, at, sequences))


def _rows_of(layout: ModelLayout, table: PlacedTensor) -> RowsOf | None:
    if table.name == PER_LAYER and layout.keys.has(".ple.ngram_size"):
        return NGrams(layout).rows
    if table.name == EMBEDDING or table.ne[1] == layout.n_vocab:
        return lambda tokens, at, sequences: np.array(tokens, np.int32)
    return None


class NGrams:
    """Which rows an n-gram table is asked for: of each token's last few, a hash per head.

    The formula is llama.cpp's (llm_graph_input_qwen4exp_ple::set_input). Remembers the newest
    tokens of each sequence; one that it does not know, for it was shifted or copied, counts as
    missing.
    """

    def __init__(self, layout: ModelLayout) -> None:
        keys = layout.keys
        self._size = keys.integer(".ple.ngram_size")
        self._per_gram = keys.integer(".ple.heads_per_ngram")
        self._eos = keys.integer(".ple.eos_token_id")
        self._factors = keys.integers(".ple.layer_multipliers")
        self._first_rows = keys.integers(".ple.head_offsets")
        self._n_rows = keys.integers(".ple.head_vocab_sizes")
        self._seen: dict[int, dict[int, int]] = {}  # by sequence: tokens by position

    def rows(self, tokens: Sequence[int], at: Sequence[int], sequences: Sequence[int]) -> Rows:
        for token, position, sequence in zip(tokens, at, sequences, strict=True):
            self._seen.setdefault(sequence, {})[position] = token
        rows: list[int] = []
        for token, position, sequence in zip(tokens, at, sequences, strict=True):
            rows += self._hashed(self._window(token, position, self._seen[sequence]))
        for sequence, position in dict(zip(sequences, at, strict=True)).items():
            seen = self._seen[sequence]
            self._seen[sequence] = {p: t for p, t in seen.items() if p > position - self._size}
        return np.array(rows, np.int32)

    def _hashed(self, window: Sequence[int]) -> Iterator[int]:
        """The rows of one token. Plain numbers: numpy takes longer for one, and most steps have
        one."""
        mixed, head = window[0] * self._factors[0], 0
        for token, factor in zip(window[1:], self._factors[1:], strict=False):
            mixed ^= token * factor
            for _ in range(self._per_gram):
                yield (mixed & _64_BITS) % self._n_rows[head] + self._first_rows[head]
                head += 1

    def _window(self, token: int, position: int, seen: dict[int, int]) -> list[int]:
        """The token and those before it, newest first; what lies before an end of text is one."""
        window = [token]
        for back in range(1, self._size):
            before = seen.get(position - back, self._eos)
            if before == self._eos:
                break
            window.append(before)
        return window + [self._eos] * (self._size - len(window))
