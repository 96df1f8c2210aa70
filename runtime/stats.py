"""One meter: what a model has done since it was opened or the meter was reset, as one table.

Owns the times and tokens of steps, by phase and by sequence. Every other counter has its owner (the
plugin, the controller) and only grows; the meter remembers where they stood and resets nobody's.
The names of the table are the same everywhere: ``Llama.stats``, ``run --json``, ``bench``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ..policies.base import Phase
from .arena import Arena
from .controller import Demands
from .plugin.abi import Stats
from .sizes import format_size
from .system import rss_peak


class Step(NamedTuple):
    """One call of llama_decode, on the clock of ``time.perf_counter_ns``."""

    start_ns: int
    end_ns: int
    n_tokens: int
    phase: Phase
    n_sequences: int


@dataclass
class Tally:
    """Sums over steps of one phase, or over one sequence's share of them."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    bytes_read: int = 0
    sequences: int = 0  # summed over steps

    @property
    def tps(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class SequenceTally:
    """What one sequence has computed, and how long its steps took, others' tokens included."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    seconds: float = 0.0


class _Marks(NamedTuple):
    """Where the others' counters stood when the meter was reset."""

    native: Stats
    demands: Demands


class Meter:
    """The meter of one model's steps, whoever computes them."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self.last_step: Step | None = None
        self.reset()

    def reset(self) -> None:
        self.phases = {phase: Tally() for phase in Phase}
        self.sequences: dict[int, SequenceTally] = {}
        self._marks = _Marks(self._arena.plugin.stats(), self._arena.demands())

    def forget(self, sequence: int) -> None:
        """A sequence has ended; its number may come again."""
        self.sequences.pop(sequence, None)

    @contextmanager
    def step(self, phase: Phase, tokens: Mapping[int, int]) -> Iterator[None]:
        """Around one llama_decode of ``tokens`` per sequence; a failed one is not counted.

        Tells the plugin what the step is. In a mixed step a sequence with one token decodes.
        """
        arena = self._arena
        arena.say(phase, len(tokens))
        before = arena.plugin.stats().read_bytes
        start_ns = time.perf_counter_ns()
        yield
        end_ns = time.perf_counter_ns()
        n_tokens, seconds = sum(tokens.values()), (end_ns - start_ns) / 1e9
        self.last_step = Step(start_ns, end_ns, n_tokens, phase, len(tokens))
        tally = self.phases[phase]
        tally.steps += 1
        tally.tokens += n_tokens
        tally.seconds += seconds
        tally.bytes_read += arena.plugin.stats().read_bytes - before
        tally.sequences += len(tokens)
        for sequence, n in tokens.items():
            mine = self.sequences.setdefault(sequence, SequenceTally())
            if phase is Phase.PREFILL:
                mine.prefill_tokens += n
            else:
                mine.decode_tokens += n
            mine.seconds += seconds

    def native(self) -> Stats:
        """The plugin's counters since the reset; ``scratch_bytes`` is the highest ever."""
        return self._arena.plugin.stats().since(self._marks.native)

    def demands(self) -> Demands:
        """The controller's counters since the reset."""
        return self._arena.demands().since(self._marks.demands)

    def table(self) -> dict[str, Any]:
        arena = self._arena
        native, demands, recall = self.native(), self.demands(), arena.recall()
        hits, misses = sum(demands.hits.values()), sum(demands.misses.values())
        demanded, late = hits + misses, native.guess_promoted
        prefill, decode = self.phases[Phase.PREFILL], self.phases[Phase.DECODE]
        budget, found = arena.budget, arena.found
        return {
            "prefill_tps": prefill.tps,
            "decode_tps": decode.tps,
            "prefill_tokens": prefill.tokens,
            "decode_tokens": decode.tokens,
            "hits": hits,
            "misses": misses,
            "hit_rate": hits / demanded if demanded else 0.0,
            "hit_rate_in_time": (hits - late) / demanded if demanded else 0.0,
            "bytes_read": native.read_bytes,
            "bytes_per_token": decode.bytes_read / decode.tokens if decode.tokens else 0.0,
            "low_share": demands.low_pairs / demands.pairs if demands.pairs else 0.0,
            "low_bytes_read": arena.low_bytes(demands.low_loads),
            "stall_s": native.stall_ns / 1e9,
            "compute_s": native.compute_ns / 1e9,
            "route_s": native.route_ns / 1e9,
            "guess_s": native.guess_ns / 1e9,
            "tell_s": native.tell_ns / 1e9,
            "disk_s": native.disk_ns / 1e9,
            "decode_s": decode.seconds,
            "guesses": native.guess_loads,
            "guesses_used": demands.guesses_used,
            "guesses_late": late,
            "guess_bytes": native.guess_bytes,
            "table_rows": native.table_rows,
            "table_missed": native.table_missed,
            "table_ahead": native.table_ahead,
            "recall": sum(recall.values()) / len(recall) if recall else None,
            "layers": [
                {
                    "layer": layer,
                    "hit_rate": n / max(1, n + demands.misses.get(layer, 0)),
                    "recall": recall.get(layer),
                }
                for layer, n in sorted(demands.hits.items())
            ],
            "phases": {phase.name.lower(): asdict(tally) for phase, tally in self.phases.items()},
            "budget_bytes": budget.total,
            "rss_peak_bytes": rss_peak(),
            "slots": budget.n_slots,
            "policy": found.options.policy,
            "reads": str(found.mode),
            "device": found.device,
            "device_slots": 0 if arena.pools is None else sum(arena.pools.n_slots.values()),
            "uploads": native.uploads,
            "uploads_ahead": native.uploads_ahead,
            "device_routed": native.routed,
            "bytes_uploaded": native.upload_bytes,
            "cpu_experts": native.cpu_experts,
            "cpu_pairs": native.cpu_pairs,
            "cpu_s": native.cpu_ns / 1e9,
            "device_waits": native.waits,
            "device_passed": native.passed,
            "device_wait_s": native.wait_ns / 1e9,
        }


def stats_line(stats: Mapping[str, Any]) -> str:
    """A table in one line of stderr."""
    demanded = stats["hits"] + stats["misses"]
    low = f", {stats['low_share']:.1%} computed from low copies" if stats["low_share"] else ""
    return (
        f"moe-gguf: prefill {stats['prefill_tps']:.1f} tok/s ({stats['prefill_tokens']} tokens), "
        f"decode {stats['decode_tps']:.2f} tok/s ({stats['decode_tokens']} tokens); "
        f"hits {stats['hits']} of {demanded} ({stats['hit_rate']:.1%}){low}; "
        f"read {format_size(stats['bytes_read'])} ({format_size(stats['bytes_per_token'])} per "
        f"token), stalled {stats['stall_s']:.2f} s; peak {format_size(stats['rss_peak_bytes'])} of "
        f"{format_size(stats['budget_bytes'])}"
    )
