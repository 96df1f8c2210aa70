"""One llama_context: rows in, logits out, a failed step as an exception.

The lower half of whatever computes: it owns the context and its batch, and knows neither sampling
nor who wants which tokens. Works on any llama_model; with an arena, steps are metered and a step
that the plugin failed leaves the arena usable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
import numpy.typing as npt

from ...policies.base import Phase
from .. import logs
from ..arena import Arena
from ..errors import UserError
from ..stats import Meter

Logits = npt.NDArray[np.float32]


class Row(NamedTuple):
    """One token of a batch."""

    token: int
    pos: int
    seq: int = 0
    output: bool = True  # its logits are wanted


class StepFailed(RuntimeError):
    """llama_decode refused a batch or failed; ``code`` is llama.cpp's own, 1: no room in the KV
    cache, and nothing changed."""

    def __init__(self, code: int) -> None:
        super().__init__(f"llama_decode returned {code}")
        self.code = code


def _columns(batch: Sequence[Row]) -> tuple[list[int], list[int], list[int]]:
    return [row.token for row in batch], [row.pos for row in batch], [row.seq for row in batch]


class Context:
    """A context over ``model``, a llama_model that outlives it; ``params`` are llama.cpp's own.

    ``arena`` is the model's, if it has one, and ``meter`` counts its steps. UserError where
    llama.cpp cannot make such a context.
    """

    def __init__(
        self,
        model: Any,
        params: llama_cpp.llama_context_params,
        arena: Arena | None = None,
        meter: Meter | None = None,
    ) -> None:
        self.arena = arena
        self.meter = meter
        with logs.capture() as log:
            self.ctx = llama_cpp.llama_init_from_model(model, params)
        if not self.ctx:
            raise UserError(f"llama.cpp cannot make a context for this model: {log.reason()}")
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)))
        self._batch = llama_cpp.llama_batch_init(int(llama_cpp.llama_n_batch(self.ctx)), 0, 1)

    def decode(self, batch: Sequence[Row], phase: Phase) -> Logits:
        """Compute the rows, at most ``n_batch``; logits [n, n_vocab] of those that ask for output.

        ``phase`` is what the caller knows of them: a prompt, one token of each running sequence, or
        both. A failed step raises what failed it; StepFailed where that was not the arena.
        """
        raw = self._batch
        raw.n_tokens = len(batch)
        for i, row in enumerate(batch):
            raw.token[i], raw.pos[i] = row.token, row.pos
            raw.n_seq_id[i], raw.seq_id[i][0] = 1, row.seq
            raw.logits[i] = row.output
        tokens = Counter(row.seq for row in batch)
        with nullcontext() if self.meter is None else self.meter.step(phase, tokens):
            if self.meter is None and self.arena is not None:
                self.arena.say(phase, len(tokens))
            if self.arena is not None and self.arena.ahead is not None:
                self.arena.ahead.step(*_columns(batch))
            code = llama_cpp.llama_decode(self.ctx, raw)
            if code != 0:
                raise self._failure(code)
        wanted = [i for i, row in enumerate(batch) if row.output]
        logits = np.empty((len(wanted), self.n_vocab), np.float32)
        for place, i in enumerate(wanted):
            pointer = llama_cpp.llama_get_logits_ith(self.ctx, i)
            logits[place] = np.ctypeslib.as_array(pointer, (self.n_vocab,))
        return logits

    def _failure(self, code: int) -> BaseException:
        if code < 0 and self.arena is not None:
            return self.arena.recover()
        return StepFailed(code)

    def close(self) -> None:
        if self.ctx:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self.ctx)
            self.ctx = None
