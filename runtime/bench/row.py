"""One run of one bench row in a process of its own: open the model, prefill, decode, report.

    python -m moe_gguf.runtime.bench.row SPEC [CACHE]

SPEC is a ``Spec`` as JSON, CACHE a folder (see ``cache``); the last line of stdout is the result as
JSON. Stock rows and ours go
through the same calls in the same order, so that what differs is the engine. Knows nothing of
cgroups, other rows or repetition.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...policies.base import Phase
from .. import cache
from ..errors import UserError
from . import group
from .prose import prose
from .spec import Spec

if TYPE_CHECKING:
    import llama_cpp

    from ..llama import Llama

N_BATCH = 512
# Decoding is cut off here: a row that thrashes makes its point with few tokens.
DECODE_LIMIT_S = 90.0
# What a result takes from ``Llama.stats``; a policy that does not predict leaves some out.
STATS = (
    *("hits", "misses", "hit_rate", "hit_rate_in_time", "bytes_read", "bytes_per_token"),
    *("low_share", "low_bytes_read"),
    *("guesses", "guesses_used", "guesses_late", "guess_bytes", "recall", "layers"),
    *("disk_s", "guess_s", "table_rows", "table_missed", "table_ahead"),
    *("stall_s", "route_s", "compute_s", "slots", "reads", "budget_bytes"),
)


def measure(spec: Spec, **given: Any) -> dict[str, Any]:
    """Times, rates and greedy tokens of one run; our own counters cover the counted tokens.

    ``given``: what ``Llama`` takes besides, a policy of the caller's for example.
    """
    from .. import disk
    from ..formats.open import read_layout
    from ..llama import Llama
    from ..system import rss_peak

    if spec.sequences and not spec.probe_only:
        return group.measure(spec)
    if spec.probe_only:
        return disk.ceiling(read_layout(Path(spec.model)), spec.options.lanes)._asdict()
    start = time.perf_counter()
    llama = _open(spec, **given)
    startup_s = time.perf_counter() - start
    if spec.open_only:
        return {"startup_s": startup_s, "rss_peak_bytes": rss_peak()}
    prompt = prompt_tokens(llama, spec.prompt_tokens)
    if spec.fill:
        _fill(llama, spec.n_ctx)
    ours = llama if isinstance(llama, Llama) else None

    start = time.perf_counter()
    tokens = [_step(llama, prompt, Phase.PREFILL)]
    prefill_s = time.perf_counter() - start
    prefill_low_share = ours.stats()["low_share"] if ours is not None else None
    decoded = _decode(llama, tokens, spec.n_predict)
    result: dict[str, Any] = {
        "startup_s": startup_s,
        "prompt_tokens": len(prompt),
        "prefill_s": prefill_s,
        "prefill_tps": len(prompt) / prefill_s,
        **decoded,
        "threads": llama.n_threads,
        "kernels": _kernels(spec, llama),
        "tokens": tokens,
        "rss_peak_bytes": rss_peak(),
    }
    if ours is not None:
        result |= _counters(ours, decoded["decode_s"], prefill_low_share)
        if spec.timeline is not None:
            result["timeline"] = _draw(ours, tokens[-1:], Path(spec.timeline))
    llama.close()
    return result


def _counters(llama: Llama, decode_s: float, prefill_low_share: float | None) -> dict[str, Any]:
    """What our engine counted over the counted tokens, and shares of their time."""
    stats = llama.stats()
    return {
        **{name: stats.get(name) for name in STATS},
        "prefill_low_share": prefill_low_share,
        "disk_share": stats["disk_s"] / decode_s,
        "stall_share": stats["stall_s"] / decode_s,
        "controller_share": (stats["route_s"] + stats["guess_s"]) / decode_s,
        "mode_line": llama.mode_line,
        "warmed": llama.arena.n_warmed,
    }


def _draw(llama: Llama, token: list[int], path: Path) -> str:
    """Write the timeline of one more step."""
    from .. import timeline

    timeline.record(llama.arena)
    _step(llama, token, Phase.DECODE)
    return timeline.write(llama.arena, llama.last_step, path)


def _open(spec: Spec, **given: Any) -> llama_cpp.Llama:
    import llama_cpp
    import llama_cpp.llama_cpp as bindings

    from ..llama import Llama
    from ..system import physical_cores

    threads = spec.n_threads or physical_cores()
    common: dict[str, Any] = {"n_ctx": spec.n_ctx, "n_batch": N_BATCH, "n_threads": threads}
    if not spec.stock:
        given = {"make_policy": spec.make_policy, **given}
        return Llama(spec.model, **spec.options.arguments(), **common, **given)
    defaults = bindings.llama_model_default_params

    def with_kernels() -> Any:
        # Repacked kernels sum in another order: like with like, stock and ours agree bit for bit.
        params = defaults()
        params.use_extra_bufts = spec.repack
        return params

    bindings.llama_model_default_params = with_kernels
    return llama_cpp.Llama(
        spec.model, use_mmap=spec.mmap, n_threads_batch=threads, verbose=False, **common
    )


def _kernels(spec: Spec, llama: llama_cpp.Llama) -> str:
    from ..llama import Llama

    repacked = llama.found.kernels.is_repacked if isinstance(llama, Llama) else spec.repack
    return "repacked" if repacked else "plain"


def prompt_tokens(llama: llama_cpp.Llama, n: int) -> list[int]:
    """The first ``n`` tokens of the prose, told over and over if it is too short."""
    text = prose() * (1 + n // 100)  # the prose is some 150 words
    tokens: list[int] = llama.tokenize(text.encode(), add_bos=True, special=False)
    if len(tokens) < n:
        raise UserError(f"this model's tokenizer makes only {len(tokens)} tokens of the prompt")
    return tokens[:n]


def _fill(llama: llama_cpp.Llama, n_ctx: int) -> None:
    """Touch every weight: batches of assorted tokens, then whatever they did not ask for."""
    from ..llama import Llama

    size = min(N_BATCH, n_ctx - 1)
    for prime in (7919, 104729):
        llama.reset()
        llama.eval([(prime * i) % llama.n_vocab() for i in range(1, size)])
    if isinstance(llama, Llama):
        layers, n_experts = llama.found.layout.layers, llama.found.layout.n_experts
        llama.arena.fill(e.layer * n_experts + i for e in layers for i in range(n_experts))
    llama.reset()
    llama._ctx.kv_cache_clear()


def _step(llama: llama_cpp.Llama, tokens: list[int], phase: Phase) -> int:
    """Feed ``tokens``; the most likely next one."""
    import numpy as np

    from ..llama import Llama

    if isinstance(llama, Llama):
        llama.eval(tokens, phase)
    else:
        llama.eval(tokens)
    logits = llama._ctx.get_logits_ith(-1)
    return int(np.argmax(np.ctypeslib.as_array(logits, shape=(llama.n_vocab(),))))


def _decode(llama: llama_cpp.Llama, tokens: list[int], n: int) -> dict[str, Any]:
    """Append up to ``n`` greedy tokens; how many were counted, and their time.

    A quarter of them is warm-up, and never more than half of the time; then our counters begin.
    """
    from ..llama import Llama
    from ..system import Stolen

    start = time.perf_counter()
    warm_up = _append(llama, tokens, n // 4, start + DECODE_LIMIT_S / 2)
    if isinstance(llama, Llama):
        llama.reset_stats()
    begin, stolen = time.perf_counter(), Stolen()
    counted = _append(llama, tokens, n - n // 4, start + DECODE_LIMIT_S)
    decode_s = time.perf_counter() - begin
    return {
        "warm_up_tokens": warm_up,
        "decode_tokens": counted,
        "decode_s": decode_s,
        "decode_tps": counted / decode_s,
        "stolen_share": stolen.share,
    }


def _append(llama: llama_cpp.Llama, tokens: list[int], n: int, deadline: float) -> int:
    """Append up to ``n`` greedy tokens, ends of text included; how many (at least one of many)."""
    for done in range(n):
        if done and time.perf_counter() > deadline:
            return done
        tokens.append(_step(llama, tokens[-1:], Phase.DECODE))
    return n


def main() -> None:
    """Exit codes: 0 done, 2 unusable input (the result is then ``{"error": sentence}``).

    The sentence's options are not spelled: who reads it knows how.
    """
    for folder in sys.argv[2:]:
        cache.use(Path(folder))
    try:
        result, code = measure(Spec.from_json(sys.argv[1])), 0
    except UserError as error:
        result, code = {"error": error.args[0]}, 2
    except KeyboardInterrupt:
        sys.exit(130)
    print(json.dumps(result), flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
