"""Groups of sequences under several policies, turn about in one process.

    python benchmarks/groups.py olmoe.gguf -n 1,8,64 --share 0.4 --rows fate,lru,stock

Every row is a model of its own over the same file with the same number of slots; `stock` is
llama.cpp with everything in memory. Rows decode the same sequences, which begin with different
tokens, in blocks of a few steps in turn, so that a change of the machine's speed meets all of them.
All rows must generate the same tokens. `--trace DIR` records each row's routing there, for
`moe-gguf replay`; a recording row tells nothing of speed, since it wants to know every guess.

Prints a table of medians, then all of it as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp._logger
import numpy as np

from moe_gguf.policies.base import Phase
from moe_gguf.policies.presets import POLICIES, PolicyMaker, policy
from moe_gguf.policies.trace import TraceRecorder
from moe_gguf.runtime import opening
from moe_gguf.runtime.arena import start
from moe_gguf.runtime.budget import Budget, Needs
from moe_gguf.runtime.columns import columns
from moe_gguf.runtime.engine.context import Context, Row
from moe_gguf.runtime.opening import Measured
from moe_gguf.runtime.options import Options
from moe_gguf.runtime.sizes import GB
from moe_gguf.runtime.stats import Meter

STOCK = "stock"
# The rows of an ablation: one sequence is -n 1, the group alone `layered-lfu`, hot-only prefetch
# `klotski-whole`, the order `klotski`; `fate-whole` is `fate` as it serves one sequence.
MAKERS: dict[str, PolicyMaker] = {
    **POLICIES,
    "klotski-whole": lambda facts: policy("klotski", facts)._replace(scan=None),
    "fate-whole": lambda facts: policy("fate", facts)._replace(scan=None),
}
COUNTERS = (
    "read_bytes",
    "guess_bytes",
    "stall_ns",
    "compute_ns",
    "route_ns",
    "guess_ns",
    "disk_ns",
)
COLUMNS = (
    "n", "tok/s", "of first", "cpu s", "of which system", "MB/step", "hits", "in time", "stall",
    "disk", "callbacks", "guesses", "rounds",
)  # fmt: skip


def context_params(n: int, n_ctx: int, n_threads: int) -> llama_cpp.llama_context_params:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, 512, 512
    params.n_seq_max, params.n_outputs_max = n, n
    params.n_threads = params.n_threads_batch = n_threads
    params.kv_unified = True
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    return params


class Subject:
    """A model with its sequences; ``block`` decodes some steps of them."""

    def __init__(self, path: Path, name: str, share: float, args: argparse.Namespace) -> None:
        self.policy = name
        self.recorder = TraceRecorder() if args.trace and name != STOCK else None
        self.meter: Meter | None = None
        self.arena = None
        params = llama_cpp.llama_model_default_params()
        if name == STOCK:
            params.use_extra_bufts = False
            params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        else:
            found = opening.find(path, Options(GB, "fate", args.reads))
            self.binding = found.bind()
            measured = opening.place_tables(Measured(found, Needs(0, 0, 0, 0), 0))
            loaded = opening.load(measured, self.binding, params)
            self.model = loaded.model
            n_slots = round(found.n_all * share)
            slot_bytes = found.slots.slot_bytes
            total = max(found.total, measured.needs.with_slots(n_slots, slot_bytes))
            budget = Budget(
                total, measured.needs, slot_bytes, n_slots, found.n_all, found.working_set
            )
            self.arena = start(
                loaded, make_policy=MAKERS[name], budget=budget, recorder=self.recorder
            )
            self.meter = Meter(self.arena)
        self.threads = args.threads
        self.context: Context | None = None

    def begin(self, n: int, n_steps: int) -> None:
        if self.context is not None:
            self.context.close()
        params = context_params(n, n * (n_steps + 8), self.threads)
        self.context = Context(self.model, params, self.arena, self.meter)
        rng = np.random.default_rng(7)
        self.tokens = rng.integers(5, self.context.n_vocab, n).tolist()
        self.said: list[list[int]] = []
        self.pos = 0
        self.seconds: list[float] = []
        self.cpu: list[tuple[float, float]] = []  # all of a step, and what of it the system took
        self.counts: list[dict[str, float]] = []

    def block(self, n_steps: int, counted: bool) -> None:
        assert self.context is not None
        if self.meter is not None:
            self.meter.reset()
        seconds = 0.0
        before = resource.getrusage(resource.RUSAGE_SELF)
        for _ in range(n_steps):
            rows = [Row(token, self.pos, seq) for seq, token in enumerate(self.tokens)]
            begin = time.perf_counter()
            logits = self.context.decode(rows, Phase.DECODE)
            seconds += time.perf_counter() - begin
            self.tokens = logits.argmax(axis=1).tolist()
            self.said.append(self.tokens)
            self.pos += 1
        if not counted:
            return
        after = resource.getrusage(resource.RUSAGE_SELF)
        user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
        self.cpu.append(((user + system) / n_steps, system / n_steps))
        self.seconds.append(seconds / n_steps)
        if self.meter is not None:
            native, demands = self.meter.native(), self.meter.demands()
            hits, misses = sum(demands.hits.values()), sum(demands.misses.values())
            counts = {name: getattr(native, name) / n_steps for name in COUNTERS}
            counts |= {
                "hits": hits / n_steps, "misses": misses / n_steps,
                "late": native.guess_promoted / n_steps, "guesses": native.guess_loads / n_steps,
                "used": demands.guesses_used / n_steps, "rounds": native.rounds / n_steps,
            }  # fmt: skip
            self.counts.append(counts)

    def result(self, n: int, first: Subject) -> dict[str, Any]:
        """Of so many sequences; ratios to ``first`` are block by block."""
        step = statistics.median(self.seconds)
        ratios = [a / b for a, b in zip(first.seconds, self.seconds, strict=True)]
        result: dict[str, Any] = {
            "policy": self.policy, "n": n, "tps": n / step, "step_s": step,
            "of_first": statistics.median(ratios), "blocks": self.seconds,
            "cpu_s": statistics.median(c[0] for c in self.cpu),
            "system_s": statistics.median(c[1] for c in self.cpu),
        }  # fmt: skip
        if self.counts:
            result |= {
                name: statistics.median(c[name] for c in self.counts) for name in self.counts[0]
            }
        return result


def cells(result: dict[str, Any]) -> list[str]:
    r = result
    common = [
        r["policy"], str(r["n"]), f"{r['tps']:.1f}", f"{r['of_first']:.3f}", f"{r['cpu_s']:.3f}",
        f"{r['system_s']:.3f}",
    ]  # fmt: skip
    if "hits" not in r:
        return [*common, *["-"] * (len(COLUMNS) - 5)]
    step_ns, demanded = 1e9 * r["step_s"], r["hits"] + r["misses"]
    return [
        *common,
        f"{r['read_bytes'] / 1e6:.0f}",
        f"{r['hits'] / demanded:.3f}",
        f"{(r['hits'] - r['late']) / demanded:.3f}",
        f"{r['stall_ns'] / step_ns:.1%}",
        f"{r['disk_ns'] / step_ns:.0%}",
        f"{(r['route_ns'] + r['guess_ns']) / 1e6:.1f} ms",
        f"{r['used']:.0f}/{r['guesses']:.0f}",
        f"{r['rounds']:.0f}",
    ]


def save_trace(row: Subject, n: int, folder: Path) -> Path:
    assert row.arena is not None
    assert row.recorder is not None
    found, demands = row.arena.found, row.arena.demands()
    layout = found.layout
    path = folder / f"{row.policy}-{n}.npz"
    row.recorder.save(
        path,
        {
            "model": layout.name, "architecture": layout.architecture,
            "n_experts": layout.n_experts, "n_experts_used": found.n_used,
            "layers": [layer.layer for layer in layout.layers],
            "blob_bytes": [layer.blob_bytes for layer in layout.layers],
            "policy": row.policy, "n_slots": row.arena.budget.n_slots,
            "hits": sum(demands.hits.values()), "misses": sum(demands.misses.values()),
            "guesses": row.arena.plugin.stats().guess_loads,
        },
    )  # fmt: skip
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Groups of sequences, turn about.")
    parser.add_argument("model", type=Path)
    parser.add_argument("-n", default="1,8,64", help="group sizes; default: %(default)s")
    parser.add_argument("--share", type=float, default=0.4, help="slots, of all experts")
    parser.add_argument("--rows", default="fate,stock")
    parser.add_argument("--steps", type=int, default=4, help="steps of a block")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=4, help="steps before the first block")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reads", default="direct", choices=["auto", "direct", "buffered"])
    parser.add_argument("--trace", type=Path, metavar="DIR")
    args = parser.parse_args(argv)
    names = args.rows.split(",")
    unknown = [name for name in names if name not in (*MAKERS, STOCK)]
    if unknown:
        parser.error(f"there is no row {unknown[0]!r}")
    llama_cpp._logger.set_verbose(False)
    results: list[dict[str, Any]] = []
    rows: list[Subject] = []
    for n in map(int, args.n.split(",")):
        if args.trace or not rows:  # a trace begins with empty slots
            rows = [Subject(args.model, name, args.share, args) for name in names]
        n_steps = args.warmup + args.steps * args.blocks
        for row in rows:
            row.begin(n, n_steps)
            row.block(args.warmup, False)
        for _ in range(args.blocks):
            for row in rows:
                row.block(args.steps, True)
        same = all(row.said == rows[0].said for row in rows)
        if not same:
            print(f"n = {n}: the rows generate different tokens", file=sys.stderr)
        results += [row.result(n, rows[0]) for row in rows]
        for row in rows:
            if row.recorder is not None:
                print(save_trace(row, n, args.trace), file=sys.stderr)
        print(
            "\n".join(" ".join(c) for c in map(cells, results[-len(rows) :])),
            file=sys.stderr,
            flush=True,
        )
    print("\n".join(columns([["", *COLUMNS], *map(cells, results)], "<>")))
    print(json.dumps({"share": args.share, "reads": args.reads, "rows": results}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
