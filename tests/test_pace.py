"""How many guesses there is time for: windows, costs, and when guessing does not pay at all."""

from __future__ import annotations

import pytest
from conftest import TinyFile
from harness import ours

from moe_gguf.policies.base import Guess, Phase
from moe_gguf.policies.pace import Everything, IdleDisk, Meters
from moe_gguf.runtime.engine.context import Row

MB = 1_000_000
BLOB = 4 * MB  # read in 4 ms: the disk of these tests reads 1 GB/s
LAYERS = 4
CHUNK = 1 << 20


class Machine:
    """A model whose every layer takes ``compute_ns`` and then waits for ``n_waits`` reads."""

    def __init__(self, pace: IdleDisk, compute_ns: int, n_waits: int, stall_ns: int) -> None:
        self.pace = pace
        self.compute_ns = compute_ns
        self.n_waits = n_waits
        self.stall_ns = stall_ns
        self.guess_ns = 0
        self.speed = 1  # bytes per ns
        self.now_ns = self.disk_ns = self.read_bytes = self.n = 0

    def event(self, phase: Phase = Phase.DECODE, n_sequences: int = 1) -> bool:
        first = self.n == 0
        wants = self.pace.event(
            Meters(
                self.n % LAYERS,
                phase,
                n_sequences,
                self.now_ns,
                self.disk_ns,
                self.read_bytes,
                0 if first else self.stall_ns,
                0 if first else self.guess_ns,
                0 if first else self.n_waits,
                0 if first else self.n_waits,
            )
        )
        self.n += 1
        n_bytes = self.n_waits * BLOB
        self.read_bytes += n_bytes
        self.disk_ns += n_bytes // self.speed
        self.now_ns += self.compute_ns + n_bytes // self.speed
        return wants

    def run(self, n: int, phase: Phase = Phase.DECODE, n_sequences: int = 1) -> bool:
        return [self.event(phase, n_sequences) for _ in range(n)][-1]


def guesses(*confidences: float) -> list[Guess]:
    return [Guess(key, p) for key, p in enumerate(confidences)]


def test_nothing_is_guessed_before_the_disk_is_known() -> None:
    pace = IdleDisk(CHUNK)
    machine = Machine(pace, 10 * MB, 1, 4 * MB)
    assert not machine.run(8)
    assert machine.run(8)
    assert pace.ns_per_byte == pytest.approx(1)


def test_the_window_bounds_the_number() -> None:
    """10 ms of idle disk hold two reads of 4 ms and half of a third."""
    pace = IdleDisk(CHUNK)
    Machine(pace, 10 * MB, 1, 4 * MB).run(40)
    sure = guesses(*[0.99] * 8)
    assert pace.choose(sure, BLOB) == sure[:3]
    # Each read is 1 ms of stall at most: a third that falls half outside still pays, if sure.
    assert pace.choose(guesses(0.99, 0.99, 0.05), BLOB) == guesses(0.99, 0.99)


def test_a_saturated_disk_gets_no_guesses() -> None:
    pace = IdleDisk(CHUNK)
    machine = Machine(pace, 0, 2, 8 * MB)
    assert not machine.run(40)
    assert pace.choose(guesses(1.0), BLOB) == []


def test_unsure_guesses_are_left() -> None:
    pace = IdleDisk(CHUNK)
    Machine(pace, 100 * MB, 1, 4 * MB).run(40)
    chosen = pace.choose(guesses(0.9, 0.5, 0.01, 0.3), BLOB)
    assert [guess.confidence for guess in chosen] == [0.9, 0.5, 0.3]


def test_reads_that_nobody_waits_for_are_not_worth_a_guess() -> None:
    """From the page cache a read overlaps the computation: there is no stall to save."""
    pace = IdleDisk(CHUNK)
    machine = Machine(pace, 10 * MB, 2, stall_ns=20_000)
    machine.guess_ns = 300_000
    assert not machine.run(200)
    machine.stall_ns = 8 * MB  # and back, when the cache is gone
    assert machine.run(200)


def test_copies_from_the_page_cache_are_not_made_ahead() -> None:
    for buffered in (False, True):
        pace = IdleDisk(CHUNK, buffered)
        machine = Machine(pace, 10 * MB, 1, 4 * MB)
        assert machine.run(40)  # 1 GB/s: buffered or not, that is a disk
        machine.speed = 10
        assert machine.run(40) is not buffered


@pytest.mark.parametrize("other", [Phase.PREFILL, Phase.MIXED])
def test_phases_are_measured_apart(other: Phase) -> None:
    """A prompt's long computation is no window for a token, and its costly guess no argument."""
    pace = IdleDisk(CHUNK)
    machine = Machine(pace, 10 * MB, 1, 4 * MB)
    machine.guess_ns = 100_000
    machine.run(40)
    before = pace.choose(guesses(*[0.99] * 8), BLOB)
    machine.compute_ns, machine.guess_ns = 1000 * MB, 50 * MB
    machine.run(4 * LAYERS, other)
    machine.compute_ns, machine.guess_ns = 10 * MB, 100_000
    assert machine.event()
    assert machine.event()
    assert pace.choose(guesses(*[0.99] * 8), BLOB) == before


def test_eight_sequences_are_paced_as_decoding() -> None:
    """What was measured of one counts for eight, and what of eight, for one."""
    pace = IdleDisk(CHUNK)
    machine = Machine(pace, 10 * MB, 1, 4 * MB)
    machine.run(40)
    before = pace.choose(guesses(*[0.99] * 8), BLOB)
    assert len(before) == 3
    machine.event(n_sequences=8)
    assert pace.choose(guesses(*[0.99] * 8), BLOB) == before
    machine.compute_ns = 0  # eight keep the disk busy
    machine.run(200, n_sequences=8)
    assert pace.choose(guesses(0.9), BLOB) == []
    machine.event(n_sequences=1)
    assert pace.choose(guesses(0.9), BLOB) == []


def test_what_a_wrong_guess_costs_is_what_cannot_be_called_back() -> None:
    """Half inside the window and as likely wrong as right: it pays if the rest can be stopped."""
    chosen = {}
    for chunk_bytes in (0, BLOB):
        pace = IdleDisk(chunk_bytes)
        Machine(pace, 2 * MB, 1, 4 * MB).run(40)
        chosen[chunk_bytes] = pace.choose(guesses(0.5), BLOB)
    assert chosen == {0: guesses(0.5), BLOB: []}


def test_everything_means_everything() -> None:
    pace = Everything()
    assert pace.event(Meters(0, Phase.DECODE, 1, 0, 0, 0, 0, 0, 0, 0))
    assert pace.choose(guesses(0.1, 0.9), BLOB) == guesses(0.1, 0.9)


def test_the_engine_says_the_phase_and_how_many_sequences(tiny_file: TinyFile) -> None:
    said: list[tuple[Phase, int]] = []

    class Watching(Everything):
        def event(self, meters: Meters) -> bool:
            said.append((meters.phase, meters.n_sequences))
            return True

    with ours(tiny_file("qwen3moe"), 19, policy="fate", pace=Watching()) as model:
        context = model.context(n_seq_max=3)
        for phase in Phase:
            context.decode([Row(7 * seq, int(phase), seq) for seq in range(3)], phase)
    assert said == [(phase, 3) for phase in Phase for _ in range(3)]
