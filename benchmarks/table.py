"""What it costs to leave a table on disk: decoding with its rows read from there, and with all of
it in memory, turn about.

    python benchmarks/table.py ngrams.gguf --make
    python benchmarks/table.py ngrams.gguf --memory 1GB --resident-memory 7GB

``--make`` writes a qwen4exp of random weights whose n-gram table has 5 GB: four rows of it per
token, and hardly one twice. Each row is a process with its budget; the two decode token by token in
turn, from a cold page cache, and must generate the same tokens. Prints a table of medians, then all
of it as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from moe_gguf import Llama
from moe_gguf.policies.base import Phase
from moe_gguf.runtime.bench import process
from moe_gguf.runtime.columns import columns
from moe_gguf.runtime.formats.open import read_layout
from moe_gguf.runtime.formats.tables import PER_LAYER
from moe_gguf.runtime.sizes import parse_size

ROWS = ("resident", "disk")
N_LAYERS, N_HEADS, ROW_ITEMS = 12, 4, 256
TABLE_ROWS = 5_000_000_000 // (4 * ROW_ITEMS)
_BLOCK_ROWS = 1 << 15
PROMPT = [7 * i % 256 for i in range(32)]


def make(path: Path) -> None:
    """Write the model: the tests' tiny one in a larger shape, and its table."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import tables
    import tiny
    import zoo
    from mutant import Mutant

    small, large = path.with_suffix(".small"), path.with_suffix(".large")
    vocabulary = Mutant.read(tiny.write_tiny("qwen3moe", small)).fields
    shape: dict[str, Any] = {
        "embedding_length": 1024, "block_count": N_LAYERS, "expert_feed_forward_length": 1024,
        "attention.compress_ratios": [4] * N_LAYERS,
        "rope.dimension_count": 32, "embedding_length_per_layer_input": ROW_ITEMS,
    }  # fmt: skip
    zoo.MADE["qwen4exp"] |= shape
    kinds = dict(zoo._wanted_types())  # of the first layers; the rest would be F32
    kinds |= {
        name.replace("blk.0", f"blk.{i}"): kinds[name]
        for i in range(N_LAYERS)
        for name in list(kinds)
        if name.startswith("blk.0.")
    }
    zoo._wanted_types = lambda: kinds.items()
    zoo.write("qwen4exp", large, vocabulary)
    mutant = Mutant.read(large)
    per_head = TABLE_ROWS // N_HEADS
    mutant.fields["qwen4exp.ple.head_offsets"].value = [i * per_head for i in range(N_HEADS)]
    mutant.fields["qwen4exp.ple.head_vocab_sizes"].value = [per_head] * N_HEADS
    mutant.fields["qwen4exp.ple.layer_multipliers"].value = [1_000_003, 7_654_321, 15_485_863]
    mutant.write(small)
    tables.with_rows(small, path, TABLE_ROWS)
    small.unlink()
    large.unlink()
    table = next(t for t in read_layout(path).tensors if t.name == PER_LAYER)
    random = np.random.default_rng(0)
    block = random.standard_normal((_BLOCK_ROWS, ROW_ITEMS)).astype(np.float32).tobytes()
    with path.open("r+b") as file:
        file.seek(table.offset)
        for start in range(0, table.n_bytes, len(block)):
            file.write(block[: table.n_bytes - start])


def serve(row: str, args: argparse.Namespace) -> None:
    """One row in this process: a token for each line of stdin, and the counters at its end."""
    memory = parse_size(args.resident_memory if row == "resident" else args.memory)
    llama = Llama(
        args.model, memory=memory, policy="lru", reads=args.reads, table_rows=row,
        n_ctx=len(PROMPT) + args.n_predict, n_threads=args.threads,
    )  # fmt: skip
    llama.eval(PROMPT)
    llama.reset_stats()
    for _ in sys.stdin:
        logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        token = int(np.ctypeslib.as_array(logits, (llama.n_vocab(),)).argmax())
        start, start_cpu = time.perf_counter(), time.process_time()
        llama.eval([token], Phase.DECODE)
        ms, cpu_ms = time.perf_counter() - start, time.process_time() - start_cpu
        print(json.dumps({"token": token, "ms": 1e3 * ms, "cpu_ms": 1e3 * cpu_ms}), flush=True)
    print(json.dumps({**llama.stats(), "mode": llama.mode_line}), flush=True)


def measure(argv: Sequence[str], n_tokens: int) -> dict[str, Any]:
    """Tokens of both rows, turn about: a busy machine is then as busy for one as for the other."""
    script = str(Path(__file__).resolve())
    children = {
        row: subprocess.Popen(
            [sys.executable, script, *argv, "--row", row],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for row in ROWS
    }  # fmt: skip
    tokens: dict[str, list[dict[str, Any]]] = {row: [] for row in ROWS}
    for i in range(n_tokens):
        for row in ROWS if i % 2 else ROWS[::-1]:
            to, back = children[row].stdin, children[row].stdout
            assert to is not None and back is not None
            to.write("\n")
            to.flush()
            line = back.readline()
            if not line:
                raise SystemExit(f"table: {row} ended early")
            tokens[row].append(json.loads(line))
    stats = {row: json.loads(child.communicate()[0]) for row, child in children.items()}
    return {row: {"tokens": tokens[row], "stats": stats[row]} for row in ROWS}


def cells(run: Mapping[str, Any], resident: Mapping[str, Any]) -> list[str]:
    ms = [token["ms"] for token in run["tokens"]]
    pairs = [b["ms"] / a["ms"] for a, b in zip(run["tokens"], resident["tokens"], strict=True)]
    stats = run["stats"]
    return [
        f"{statistics.median(ms):.1f}",
        f"{min(ms):.1f}",
        f"{statistics.median(token['cpu_ms'] for token in run['tokens']):.1f}",
        f"{statistics.median(pairs):.3f}",
        f"{1e3 * stats['stall_s'] / len(ms):.2f}",
        f"{stats['table_rows']}",
        f"{stats['rss_peak_bytes'] / 1e6:.0f}",
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure what a table on disk costs.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--make", action="store_true", help="write the model and do nothing else")
    parser.add_argument("--memory", default="1GB", help="with the table on disk")
    parser.add_argument("--resident-memory", default="7GB", help="with the table in memory")
    parser.add_argument("-n", "--n-predict", type=int, default=96)
    parser.add_argument("--threads", type=int, help="default: the physical cores")
    parser.add_argument("--reads", default="direct", choices=["auto", "direct", "buffered"])
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.make:
        make(args.model)
        return 0
    if args.row is not None:
        serve(args.row, args)
        return 0
    print(process.drop_page_cache([args.model]), file=sys.stderr)
    runs = measure(sys.argv[1:] if argv is None else argv, args.n_predict)
    titles = ["", "ms", "least ms", "CPU ms", "of resident", "stalled ms", "rows", "peak MB"]
    table = [titles, *([row, *cells(runs[row], runs["resident"])] for row in ROWS)]
    print("\n".join(columns(table, "<>")))
    said = [[token["token"] for token in runs[row]["tokens"]] for row in ROWS]
    print(json.dumps({"memory": args.memory, "rows": runs}))
    return 0 if said[0] == said[1] else 1


if __name__ == "__main__":
    raise SystemExit(main())
