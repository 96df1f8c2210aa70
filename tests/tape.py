"""What an engine does to its context, recorded, and the same done to stock llama.cpp's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
from harness import Logits

from moe_gguf.policies.base import Phase
from moe_gguf.runtime.engine.context import Batch, Context
from moe_gguf.runtime.engine.memory import Memory
from moe_gguf.runtime.engine.observer import Observer
from moe_gguf.runtime.engine.store import written


class Decoded(NamedTuple):
    """One call of llama_decode: its rows, and the logits of those that wanted them."""

    columns: tuple[list[int], ...]  # token, position, sequence, output
    phase: Phase
    code: int
    logits: Logits | None

    @property
    def n_rows(self) -> int:
        return len(self.columns[0])


class Tape(Observer):
    """Keeps everything; ``on_step`` is called with the number of each step."""

    def __init__(self, on_step: Callable[[int], object] = lambda n: None) -> None:
        self.operations: list[Any] = []
        self.steps: list[Decoded] = []
        self.saves: list[bytes] = []
        self.stock: list[bytearray] = []  # what stock saves in their place
        self.on_step = on_step

    def decoded(self, context: Context, phase: Phase, code: int) -> None:
        step = taken(context, phase, code)
        self.steps.append(step)
        self.operations.append(step)
        self.on_step(len(self.steps))

    def removed(self, seq: int, start: int, end: int) -> None:
        self.operations.append(lambda memory: memory.remove(seq, start, end))

    def copied(self, source: int, target: int, end: int) -> None:
        self.operations.append(lambda memory: memory.copy(source, target, end))

    def saved(self, seq: int, partial: bool, data: bytearray) -> None:
        self.saves.append(bytes(data))
        self.operations.append(lambda memory: self.stock.append(memory.save(seq, partial)))

    def restored(self, seq: int, partial: bool, data: bytes | bytearray) -> None:
        """Stock is given what stock itself saved then."""
        index = max(i for i, saved in enumerate(self.saves) if saved == data)

        def restore(memory: Memory) -> None:
            assert self.stock[index] == data, "stock saves other bytes"
            memory.restore(seq, self.stock[index], partial)

        self.operations.append(restore)

    def saved_file(self, seq: int, path: Path) -> None:
        """As ``saved``: what a file lacks of it, an eight bytes' head, does not matter."""
        self.saves.append(bytes(8) + body(path.read_bytes()))

        def save(memory: Memory) -> None:
            with tempfile.TemporaryDirectory() as folder:
                memory.save_file(seq, Path(folder, "state"), [0])
                data = bytes(8) + body(Path(folder, "state").read_bytes())
            self.stock.append(bytearray(data))

        self.operations.append(save)

    def restored_file(self, seq: int, path: Path) -> None:
        data = body(path.read_bytes())
        index = max(i for i, saved in enumerate(self.saves) if data.startswith(saved[8:]))

        def restore(memory: Memory) -> None:
            assert data.startswith(self.stock[index][8:]), "stock saves other bytes"
            with tempfile.TemporaryDirectory() as folder:
                written([0], self.stock[index])(Path(folder, "state"))
                memory.restore_file(seq, Path(folder, "state"), 1)

        self.operations.append(restore)

    def cleared(self) -> None:
        self.operations.append(lambda memory: memory.clear())


def body(file: bytes) -> bytes:
    """Of one of llama.cpp's files of a sequence: what follows the tokens."""
    return file[12 + 4 * int.from_bytes(file[8:12], "little") :]


def taken(context: Context, phase: Phase, code: int) -> Decoded:
    batch, n = context.batch, context.batch.n
    columns = tuple(c[:n].tolist() for c in (batch.token, batch.pos, batch.seq, batch.output))
    logits = None
    if code == 0:
        wanted = [context.logits(i).copy() for i in range(n) if batch.output[i]]
        logits = np.stack(wanted) if wanted else np.empty((0, context.n_vocab), np.float32)
    return Decoded(columns, phase, code, logits)


def replay(tape: Tape, model: Any, params: llama_cpp.llama_context_params) -> list[Decoded]:
    """What the same operations give in a context of a stock model.

    A step that a failed read ended is computed here; it leaves the same memory, since what follows
    on the tape removes its sequences.
    """
    context = Context(model, params)
    memory, steps = Memory(context.ctx), []
    tape.stock.clear()
    try:
        for operation in tape.operations:
            if not isinstance(operation, Decoded):
                operation(memory)
                continue
            fill(context.batch, operation)
            context.batch.raw.n_tokens = operation.n_rows
            code = llama_cpp.llama_decode(context.ctx, context.batch.raw)
            steps.append(taken(context, operation.phase, code))
    finally:
        context.close()
    return steps


def fill(batch: Batch, step: Decoded) -> None:
    batch.clear()
    for token, pos, seq, output in zip(*step.columns, strict=True):
        batch.add((token,), pos, seq, output)


def check(tape: Tape, model: Any, params: llama_cpp.llama_context_params) -> None:
    """The gate: stock gives the same logits in every step, to the last bit."""
    for i, (ours, stock) in enumerate(
        zip(tape.steps, replay(tape, model, params), strict=True), start=1
    ):
        assert ours.code < 0 or ours.code == stock.code, f"step {i}"
        if ours.logits is not None:
            assert stock.logits is not None
            assert np.isfinite(stock.logits).all()
            same = np.array_equal(ours.logits, stock.logits)
            assert same, f"step {i} of {len(tape.steps)} ({ours.phase.name}, {ours.n_rows} rows)"
