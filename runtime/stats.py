"""What a model has done so far: tokens, seconds, hits, bytes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from .system import rss_peak

if TYPE_CHECKING:
    from .llama import Llama


def stats_line(stats: dict[str, Any]) -> str:
    from .sizes import format_size

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


class _Timer:
    """Times every decode of one Llama, turns its failures into exceptions, makes the stats."""

    def __init__(self, llama: Llama) -> None:
        context = llama._ctx
        self._opened = llama.opened
        self._controller = llama._controller
        self.last_step: Step | None = None
        self._decode, self._encode = context.decode, context.encode
        context.decode = self._timed(self._decode)
        context.encode = self._timed(self._encode)
        self.reset()

    def reset(self) -> None:
        self._opened.plugin.stats(reset=True)
        self._controller.reset_stats()
        # Per phase (prefill, decode): tokens, seconds, bytes read.
        self._tokens, self._seconds, self._bytes = [0, 0], [0.0, 0.0], [0, 0]

    def _timed(self, step: Any) -> Any:
        def timed(batch: Any) -> None:
            n_tokens = int(batch.batch.n_tokens)
            phase = int(n_tokens == 1)
            plugin = self._opened.plugin
            before = plugin.stats().read_bytes
            plugin.step(phase, 1)
            start_ns = time.perf_counter_ns()
            try:
                step(batch)
            except RuntimeError as error:
                # llama_decode returned a code; a positive one is about the KV cache, not ours.
                if "returned -" not in str(error):
                    raise
                raise self._controller.recover() from None
            self.last_step = Step(start_ns, time.perf_counter_ns(), n_tokens)
            self._seconds[phase] += (self.last_step.end_ns - start_ns) / 1e9
            self._tokens[phase] += n_tokens
            self._bytes[phase] += plugin.stats().read_bytes - before

        return timed

    def table(self) -> dict[str, Any]:
        native = self._opened.plugin.stats()
        controller = self._controller
        hits, misses = controller.hits, controller.misses
        demanded = hits + misses
        late = native.guess_promoted
        recall = self._opened.recall()
        budget = self._opened.budget
        assert budget is not None

        def rate(phase: int) -> float:
            return self._tokens[phase] / self._seconds[phase] if self._seconds[phase] else 0.0

        return {
            "prefill_tps": rate(0),
            "decode_tps": rate(1),
            "prefill_tokens": self._tokens[0],
            "decode_tokens": self._tokens[1],
            "hits": hits,
            "misses": misses,
            "hit_rate": hits / demanded if demanded else 0.0,
            "hit_rate_in_time": (hits - late) / demanded if demanded else 0.0,
            "bytes_read": native.read_bytes,
            "bytes_per_token": self._bytes[1] / self._tokens[1] if self._tokens[1] else 0.0,
            "low_share": controller.low_pairs / controller.pairs if controller.pairs else 0.0,
            "low_bytes_read": self._opened.low_bytes_read(),
            "stall_s": native.stall_ns / 1e9,
            "compute_s": native.compute_ns / 1e9,
            "route_s": native.route_ns / 1e9,
            "guess_s": native.guess_ns / 1e9,
            "disk_s": native.disk_ns / 1e9,
            "decode_s": self._seconds[1],
            "guesses": native.guess_loads,
            "guesses_used": controller.residency.guesses_used,
            "guesses_late": late,
            "guess_bytes": native.guess_bytes,
            "recall": sum(recall.values()) / len(recall) if recall else None,
            "layers": [
                {
                    "layer": layer,
                    "hit_rate": n / max(1, n + controller.layer_misses.get(layer, 0)),
                    "recall": recall.get(layer),
                }
                for layer, n in sorted(controller.layer_hits.items())
            ],
            "budget_bytes": budget.total,
            "rss_peak_bytes": rss_peak(),
            "slots": budget.n_slots,
            "policy": self._opened.options.policy,
            "reads": str(self._opened.mode),
            "device": "cpu",
        }


class Step(NamedTuple):
    """One call of llama_decode, on the clock of ``time.perf_counter_ns``."""

    start_ns: int
    end_ns: int
    n_tokens: int
