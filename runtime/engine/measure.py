"""Measures a model on this machine, in a few seconds, for a planner to conclude from.

A child process opens the model within the budget and computes: a short prompt, chunks of two
longer ones whose routes it records, then steps of 1, 2, 4, ... sequences that go on with different
texts, as far as the time allows. What the plugin counts beside the clock says what of a step was
experts, waiting, and the rest. The parent remembers the result. Knows no goals and no schedules.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import llama_cpp._logger
import numpy as np
import psutil

from ...policies.base import Phase, RouteEvent
from .. import child, disk, opening
from ..errors import UserError, reason
from ..opening import Found
from ..options import Options
from ..params import ContextShape
from ..plugin.abi import Stats
from ..progress import Report
from ..sizes import MB, format_size
from .context import Logits, Row
from .measurements import Measurements, Size, age_s, place, recall, remember
from .model import Model, context_shape
from .reuse import Routes, reuse
from .room import simulated

SECONDS = 8.0  # about; what does not fit is extrapolated
_GROUPS = (1, 2, 4, 8, 16, 32, 64)
_SURE = 32  # up to here groups are measured whatever it takes: from fewer no group can be foretold
# Steps of a group, where time allows; larger ones: 2. A quarter, and one, fill the slots.
_STEPS = {1: 12, 2: 5, 4: 4, 8: 3}
_STEP_SHARE = 0.15  # of the time, for those of a group
_PROMPT_SHARE = 0.4  # of the time, for chunks of prompts
_LEAST_CHUNK, _MOST_CHUNK = 24, 128
_START = 5  # tokens of a sequence that only decodes, of which the last is its first step's
_FIRST = 8  # tokens of the prompt that only wakes everything up
_TOP_K, _TEMPERATURE = 40, 0.8  # llama.cpp's own defaults
_LAYERS = 6  # whose routes are recorded
_DISK_S = 0.4  # a disk whose speed is limited gives more in its first tenth of a second
_BUSY_S = 3600.0  # so long what was measured beside others' work counts
_CALM = 0.7  # of the processor time that computing could have had: less, and others had the rest
_LIMIT_S = 600.0  # a child that takes longer hangs


def measured(
    found: Found, n_threads: int | None, progress: Report | None = None, anew: bool = False
) -> Measurements:
    """What is remembered of this model, or else, and if it is to be ``anew``, measured now; what
    was measured on a busy machine is believed for an hour only."""
    known = place(found, n_threads)
    before = None if anew else recall(known)
    if before is not None and (before.calm or age_s(known) < _BUSY_S):
        return before
    taken = measure(found, n_threads, progress)
    remember(known, taken)
    return taken


def measure(
    found: Found,
    n_threads: int | None,
    progress: Report | None = None,
    seconds: float = SECONDS,
) -> Measurements:
    """Measure in a child, for about so long; UserError where the budget is too small for it."""
    options = asdict(found.options)
    options["repack"] = "on" if found.kernels.at_reads else "off"
    taken_by_us = 0
    if found.options.memory != "auto":  # this process is in the budget too
        taken_by_us = int(psutil.Process().memory_info().rss)
        options["memory"] = max(MB, found.total - taken_by_us)
    told = {
        "path": str(found.layout.path.absolute()),
        "options": options,
        "n_threads": n_threads,
        "seconds": seconds,
    }
    with (
        tempfile.TemporaryFile("w+", errors="replace") as said,
        subprocess.Popen(
            child.command(__name__, json.dumps(told)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            cwd=child.FOLDER,
        ) as process,
    ):
        late = threading.Timer(_LIMIT_S, process.kill)
        late.start()
        try:
            if (taken := _listen(process, progress)) is not None:
                return taken
            process.wait()
        except UserError as error:
            beside = f", beside {format_size(taken_by_us)} of this process" if taken_by_us else ""
            raise UserError(f"{error} (while measuring this model{beside})") from None
        except BaseException:
            process.kill()
            raise
        finally:
            late.cancel()
        said.seek(0)
        lines = said.read().strip().splitlines()
        raise RuntimeError(
            f"measuring this model failed: {lines[-1] if lines else f'code {process.returncode}'}"
        )


def _listen(process: subprocess.Popen[str], progress: Report | None) -> Measurements | None:
    """What the child says at last; None if it ends without a result."""
    assert process.stdout is not None
    for line in process.stdout:
        match json.loads(line):
            case {"done": float(done), "of": float(of)}:
                if progress is not None:
                    progress(done, of)
            case {"measured": str(text)}:
                return Measurements.from_json(text)
            case {"error": str(error)}:
                raise UserError(error)
    return None


def disk_speed(found: Found) -> float:
    """Bytes per second that expert reads come at now, the machine idle."""
    return disk.speed(found.layout, found.mode, _DISK_S)


# --- in the child -------------------------------------------------------------------------------


class _Texts:
    """Tokens of different texts: what Python's own help says of its topics. A model without a
    vocabulary gets any tokens."""

    def __init__(self, model: Model) -> None:
        from pydoc_data.topics import topics

        texts = [text for _, text in sorted(topics.items()) if len(text) > 2000]
        random.Random(0).shuffle(texts)
        self._model, self._texts, self._next = model, texts, 0

    def take(self, n: int) -> list[int]:
        """The first ``n`` tokens of a text that was not taken yet."""
        vocabulary = self._model.vocabulary
        if not vocabulary.has_texts:
            rng = random.Random(self._next)
            self._next += 1
            return [rng.randrange(vocabulary.n_tokens) for _ in range(n)]
        text = self._texts[self._next % len(self._texts)]
        text = text[text.find(" ", len(text) // 2) :]  # they begin alike
        self._next += 1
        text = (text * (1 + 8 * n // len(text)))[: 16 * n]
        return vocabulary.tokenize(text.encode(), True, False)[:n]


class _Reading(NamedTuple):
    wall_s: float
    stats: Stats
    distinct: float

    @property
    def size(self) -> tuple[float, float, float, float, float, float]:
        """The numbers of a ``Size`` but for its rows."""
        stats = self.stats
        expert, stall = stats.compute_ns / 1e9, stats.stall_ns / 1e9
        other = max(0.0, self.wall_s - expert - stall)
        disk_s = min(self.wall_s, stats.disk_ns / 1e9)
        return other, expert, stall, disk_s, stats.read_bytes, self.distinct


@dataclass
class _Sequence:
    number: int
    token: int  # the next one
    pos: int


class _Routes:
    """A recorder of the routes of some layers."""

    def __init__(self, layers: Sequence[int]) -> None:
        # Of a prompt's last layer only the last token is computed.
        some = np.unique(np.linspace(0, max(0, len(layers) - 2), _LAYERS).astype(int))
        self.ids: dict[int, list[Routes]] = {layers[i]: [] for i in some}

    def record(
        self, event: RouteEvent, ids_flat: list[int], continuation: bool, cancelled: Sequence[int]
    ) -> None:
        if not continuation and event.layer in self.ids:
            ids = np.array(ids_flat, np.int32).reshape(event.n_tokens, -1)
            self.ids[event.layer].append(ids)

    def record_guesses(self, offered: Sequence[Any], chosen: Sequence[Any]) -> None:
        pass

    def all(self) -> Routes:
        return np.stack([np.concatenate(ids) for ids in self.ids.values()])


class _Measuring:
    """A model being measured, for about so many seconds."""

    def __init__(self, model: Model, seconds: float, report: Report) -> None:
        self.model, self.seconds, self._report = model, seconds, report
        self.texts = _Texts(model)
        self.start = time.monotonic()
        self.sequences: list[_Sequence] = []
        self.compute_s = 0.0  # of all steps together
        self._cpu = psutil.Process().cpu_times()
        self._random = np.random.default_rng(0)

    def report(self) -> None:
        self._report(min(time.monotonic() - self.start, self.seconds * 0.99), self.seconds)

    def left_s(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def step(self, rows: Sequence[Row], phase: Phase) -> tuple[_Reading, Logits]:
        arena = self.model.arena
        before, demands = arena.plugin.stats(), arena.demands()
        logits = self.model.context.decode(rows, phase)
        last = self.model.meter.last_step
        assert last is not None
        stats, demands = arena.plugin.stats().since(before), arena.demands().since(demands)
        needed = sum(demands.hits.values()) + sum(demands.misses.values())
        self.report()
        wall_s = (last.end_ns - last.start_ns) / 1e9
        self.compute_s += max(0.0, wall_s - stats.stall_ns / 1e9)
        return _Reading(wall_s, stats, needed / len(arena.controller.layers)), logits

    def is_calm(self, n_threads: int) -> bool:
        """Whether computing had the processors for itself so far."""
        now, before = psutil.Process().cpu_times(), self._cpu
        cpu_s = now.user + now.system - before.user - before.system
        return bool(cpu_s >= _CALM * n_threads * self.compute_s)

    def n_steps(self, group: int, step_s: float) -> int:
        """How many of a group that takes so long for one."""
        most = _STEPS.get(group, 2)
        return max(2, min(most, int(_STEP_SHARE * self.seconds / step_s)))

    def prompt(self, n: int) -> Size:
        """Begin a sequence with a chunk of ``n`` tokens."""
        number = len(self.sequences)
        tokens = self.texts.take(n)
        rows = [Row(t, i, number, i == n - 1) for i, t in enumerate(tokens)]
        reading, logits = self.step(rows, Phase.PREFILL)
        self.sequences.append(_Sequence(number, self.sample(logits[0]), n))
        return Size(n, *reading.size)

    def sample(self, logits: Logits) -> int:
        """As a model is used: one of the best few."""
        best = np.argpartition(logits, -_TOP_K)[-_TOP_K:] if len(logits) > _TOP_K else None
        best = np.arange(len(logits)) if best is None else best
        noisy = logits[best] / _TEMPERATURE + self._random.gumbel(size=len(best))
        return int(best[np.argmax(noisy)])

    def decode(self, group: int, n_steps: int) -> tuple[Size, list[_Reading]]:
        """Steps of the group's sequences; the first ones are not counted."""
        if len(self.sequences) < group:
            self._begin(group - len(self.sequences))
        readings = []
        for _ in range(n_steps):
            some = self.sequences[-group:]
            reading, logits = self.step([Row(s.token, s.pos, s.number) for s in some], Phase.DECODE)
            readings.append(reading)
            for sequence, row in zip(some, logits, strict=True):
                sequence.token, sequence.pos = self.sample(row), sequence.pos + 1
        counted = readings[(n_steps > 1) + n_steps // 4 :]
        sizes = np.array([reading.size for reading in counted])
        return Size(group, *(float(x) for x in sizes.mean(axis=0))), counted

    def _begin(self, n: int) -> None:
        """More sequences, each with a text of its own: those with a start in common would ask for
        the same experts."""
        rows: list[Row] = []
        for number in range(len(self.sequences), len(self.sequences) + n):
            tokens = self.texts.take(_START)
            rows += [Row(t, i, number, False) for i, t in enumerate(tokens[:-1])]
            self.sequences.append(_Sequence(number, tokens[-1], len(tokens) - 1))
        self.step(rows, Phase.PREFILL)

    def again(self, n: int) -> _Reading | None:
        """The last token of the last sequence once more, all its experts in place; None where the
        memory cannot go back."""
        sequence = self.sequences[-1]
        reading = None
        for _ in range(n):
            row = Row(sequence.token, sequence.pos, sequence.number)
            reading, _ = self.step([row], Phase.DECODE)
            if not self.model.memory.remove(sequence.number, sequence.pos):
                sequence.pos += 1
                return None
        return reading


def take(model: Model, n_most: int, seconds: float, report: Report) -> Measurements:
    """Measure an open model whose context has room for ``n_most`` sequences."""
    found, m = model.found, _Measuring(model, seconds, report)
    speed = disk_speed(found)
    m.prompt(_FIRST)
    first, _ = m.decode(1, 3)
    n = int(_PROMPT_SHARE * m.left_s() / 3 / first.seconds)
    n = max(_LEAST_CHUNK, min(_MOST_CHUNK, n))
    recorder = _Routes(model.arena.controller.layers)
    model.arena.controller.recorder = recorder
    prompts = [m.prompt(n), m.prompt(2 * n)]
    model.arena.controller.recorder = None
    one, fresh = m.decode(1, m.n_steps(1, first.seconds))
    cost = _read_cost(one, fresh, m.again(3))
    sizes = [one]
    for group in _GROUPS[1:]:
        n_steps = m.n_steps(group, 1.8 * sizes[-1].seconds)
        expected = 1.8 * n_steps * sizes[-1].seconds
        if group > n_most or (group > _SURE and expected > m.left_s()):
            break
        sizes.append(m.decode(group, n_steps)[0])
    return Measurements(
        tuple(sizes),
        tuple(prompts),
        reuse(recorder.all(), found.layout.n_experts, found.options.policy),
        speed,
        model.arena.budget.resident_share,
        _trunk_bytes(found) / one.other_s,
        cost,
        m.is_calm(int(llama_cpp.llama_n_threads(model.context.ctx))),
        time.monotonic() - m.start,
    )


def _read_cost(one: Size, fresh: Sequence[_Reading], again: _Reading | None) -> float:
    """Seconds of processor time that go into reading a byte: what a step with reads computes longer
    than one without."""
    if again is None or one.read_bytes <= 2 * again.stats.read_bytes:
        return 0.0
    usual = statistics.median(sum(reading.size[:2]) for reading in fresh)
    more = usual - sum(again.size[:2])
    more_bytes = one.read_bytes - float(again.stats.read_bytes)
    return max(0.0, min(more, usual / 4)) / more_bytes


def _trunk_bytes(found: Found) -> int:
    """Of the trunk, what every token goes through: not the table of embeddings, unless it is the
    output matrix as well."""
    sizes = {tensor.name: tensor.n_bytes for tensor in found.layout.tensors}
    unread = sizes.get("token_embd.weight", 0) if "output.weight" in sizes else 0
    return max(1, found.layout.trunk_bytes - unread)


def _open(found: Found, n_threads: int | None) -> tuple[Model, int]:
    """The model with room for as many sequences as fit, and how many those are."""
    refused: UserError | None = None
    for n_most in (64, 16, 4):
        shape = _shape(n_most, n_threads)
        try:
            simulated(found, shape).divide()
            return Model(found, shape), n_most
        except UserError as error:
            refused = error
    assert refused is not None
    raise refused


def _shape(n_most: int, n_threads: int | None) -> ContextShape:
    cells = 512 + 16 * n_most
    return context_shape(
        cells, n_most, cells=cells, chunk=2 * _MOST_CHUNK, score_rows=1, n_threads=n_threads
    )


def main() -> None:
    """The child: a line of JSON for all there is to say."""
    told = json.loads(sys.argv[1])
    llama_cpp._logger.set_verbose(False)

    def say(**what: Any) -> None:
        print(json.dumps(what), flush=True)

    try:
        found = opening.find(Path(told["path"]), Options(**told["options"]))
        model, n_most = _open(found, told["n_threads"])
        try:
            taken = take(
                model, n_most, told["seconds"], lambda done, of: say(done=done, of=float(of))
            )
        finally:
            model.close()
        say(measured=taken.to_json())
    except UserError as error:
        say(error=error.args[0])
    except OSError as error:
        say(error=f"the model could not be measured: {reason(error)}")


if __name__ == "__main__":
    main()
