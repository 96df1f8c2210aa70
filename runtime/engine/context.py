"""One llama_context: rows in, logits out, a failed step as an exception.

The lower half of whatever computes: it owns the context and its batch, and knows neither sampling
nor who wants which tokens. Works on any llama_model; with an arena, steps are metered and a step
that the plugin failed leaves the arena usable.
"""

from __future__ import annotations

import ctypes
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
from .observer import Observer

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


class Batch:
    """The rows of one step as columns, in memory that llama.cpp reads."""

    def __init__(self, n_most: int) -> None:
        self.token, self.pos, self.seq, self.n_seq = np.zeros((4, n_most), np.int32)
        self.output = np.zeros(n_most, np.int8)
        self.n_seq[:] = 1
        self._seqs = self.seq.ctypes.data + 4 * np.arange(n_most, dtype=np.uintp)
        self.raw = llama_cpp.llama_batch()
        for name, column in (
            ("token", self.token),
            ("pos", self.pos),
            ("n_seq_id", self.n_seq),
            ("seq_id", self._seqs),
            ("logits", self.output),
        ):
            field = type(getattr(self.raw, name))
            setattr(self.raw, name, ctypes.cast(column.ctypes.data, field))
        self.clear()

    def clear(self) -> None:
        self.n = self.n_outputs = 0
        self.tokens: dict[int, int] = {}  # how many of each sequence

    def add(self, tokens: Sequence[int], pos: int, seq: int, n_outputs: int) -> int:
        """Consecutive tokens of a sequence from ``pos`` on, the last ``n_outputs`` of which want
        their logits; the index of the first row."""
        first, n = self.n, len(tokens)
        end = first + n
        self.token[first:end] = tokens
        self.pos[first:end] = pos if n == 1 else np.arange(pos, pos + n)
        self.seq[first:end] = seq
        self.output[first : end - n_outputs] = False
        self.output[end - n_outputs : end] = True
        self.tokens[seq] = self.tokens.get(seq, 0) + n
        self.n, self.n_outputs = end, self.n_outputs + n_outputs
        return first


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
        observer: Observer | None = None,
    ) -> None:
        self.arena = arena
        self.meter = meter
        self.observer = observer
        with logs.capture() as log:
            self.ctx = llama_cpp.llama_init_from_model(model, params)
        if not self.ctx:
            raise UserError(f"llama.cpp cannot make a context for this model: {log.reason()}")
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)))
        self.n_batch = int(llama_cpp.llama_n_batch(self.ctx))
        self.n_outputs = int(params.n_outputs_max) or self.n_batch
        self.batch = Batch(self.n_batch)

    def decode(self, rows: Sequence[Row], phase: Phase) -> Logits:
        """Compute the rows, at most ``n_batch``; logits [n, n_vocab] of those that ask for output.

        ``phase`` is what the caller knows of them: a prompt, one token of each running sequence, or
        both. A failed step raises what failed it; StepFailed where that was not the arena.
        """
        self.batch.clear()
        for row in rows:
            self.batch.add((row.token,), row.pos, row.seq, int(row.output))
        self.step(phase)
        wanted = [i for i, row in enumerate(rows) if row.output]
        logits = np.empty((len(wanted), self.n_vocab), np.float32)
        for place, i in enumerate(wanted):
            logits[place] = self.logits(i)
        return logits

    def step(self, phase: Phase) -> None:
        """``decode`` of what is in ``batch``, whose logits stay where they are."""
        batch = self.batch
        # llama.cpp ends the process over more.
        assert batch.n <= self.n_batch and batch.n_outputs <= self.n_outputs
        batch.raw.n_tokens = batch.n
        with nullcontext() if self.meter is None else self.meter.step(phase, batch.tokens):
            if self.arena is not None:
                if self.meter is None:
                    self.arena.say(phase, len(batch.tokens))
                if self.arena.ahead is not None:
                    columns = (batch.token, batch.pos, batch.seq)
                    self.arena.ahead.step(*(column[: batch.n].tolist() for column in columns))
            code = int(llama_cpp.llama_decode(self.ctx, batch.raw))
            if self.observer is not None:
                self.observer.decoded(self, phase, code)
            if code != 0:
                raise self._failure(code)

    def logits(self, i: int) -> Logits:
        """Of row ``i`` of the last step, which wanted them; valid until the next step."""
        pointer = llama_cpp.llama_get_logits_ith(self.ctx, i)
        logits: Logits = np.ctypeslib.as_array(pointer, (self.n_vocab,))
        return logits

    def _failure(self, code: int) -> BaseException:
        if code < 0 and self.arena is not None:
            return self.arena.recover()
        return StepFailed(code)

    def close(self) -> None:
        if self.ctx:
            llama_cpp.llama_free(self.ctx)
            self.ctx = None
