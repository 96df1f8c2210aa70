"""How well the planner foretells a run: the same machine, other budgets, groups and disks.

    python benchmarks/planner.py olmoe.gguf --json result.json

Measures the model once, as ``moe-gguf plan --measure`` does, or takes what is remembered. Then each
point of the grid is a process in a cgroup of its budget, its disk as slow as asked (root only; what
cannot be limited is said): it plans for so many sequences, opens the model by that plan, and
decodes distinct texts for a few seconds. With ``--whole`` every step holds all of them, whatever
the plan would do. Prints a table, then all of it as one line of JSON. A point is good when
prediction and run differ by at most 15 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_gguf import Engine
from moe_gguf.runtime import opening
from moe_gguf.runtime.bench import cgroup, process
from moe_gguf.runtime.columns import columns
from moe_gguf.runtime.engine import measure, planning
from moe_gguf.runtime.engine.costs import Costs
from moe_gguf.runtime.engine.curves import Curves
from moe_gguf.runtime.engine.planner import Workload
from moe_gguf.runtime.engine.request import Token
from moe_gguf.runtime.engine.schedule import Schedule
from moe_gguf.runtime.formats.open import read_layout
from moe_gguf.runtime.options import Options
from moe_gguf.runtime.sizes import GB, MB

GOOD = 0.15
PROMPT = 8  # tokens
SETTLING = 32  # tokens of all together, and 3 of each, before the clock starts
STEPS = 4


def answer_of(n: int) -> int:
    """Tokens of each of ``n`` answers, so that they last and their cells leave room for slots."""
    return 192 if n <= 4 else 64 if n <= 16 else 24


# --- one point, in a process of its own ---------------------------------------------------------


def texts(n: int) -> list[str]:
    """Distinct texts, none of which the measurement has seen from its beginning."""
    from pydoc_data.topics import topics

    words = " ".join(text for _, text in sorted(topics.items())).split()
    step = len(words) // (n + 1)
    return [" ".join(words[i * step + step // 2 :][: 4 * PROMPT]) for i in range(n)]


def row(spec: dict[str, Any]) -> dict[str, Any]:
    """Plan, open, decode; what was foretold and what came."""
    options = {"memory": spec["memory"], "reads": "direct", "policy": spec["policy"]}
    n, n_threads = spec["sequences"], spec["threads"]
    found = opening.find(Path(spec["model"]), Options(**options))
    workload = Workload(PROMPT, answer_of(n))
    n_ctx = 256  # of one sequence
    made = planning.planned(
        found, "throughput", n_ctx=n_ctx, parallel=n, workload=workload, n_threads=n_threads
    )
    facts = planning.facts(found, n_ctx, n_threads)
    measured = measure.measured(found, n_threads)
    schedule = Schedule(n, 0, made.schedule.chunk) if spec["whole"] else made.schedule
    engine = Engine(
        spec["model"], n_ctx=n_ctx, parallel=n, cells=made.cells, schedule=schedule,
        n_threads=n_threads, chat=False, **options,
    )  # fmt: skip
    with engine:
        share = engine.arena.budget.resident_share
        costs = Costs(Curves(measured, facts.shape), share, facts.disk_bytes_per_s)
        held = PROMPT + answer_of(n) / 2
        if schedule.quantum:
            predicted, stalled = made.predicted.decode_tps, made.predicted.stall_share
            n_bytes = made.predicted.bytes_per_token
        else:
            step = costs.decode(n, held)
            predicted, stalled = n / step.seconds, step.stall_s / step.seconds
            n_bytes = step.read_bytes / n
        came = _decode(engine, n, spec["seconds"])
    return {
        "group": schedule.group, "quantum": schedule.quantum, "share": share,
        "disk_bytes_per_s": facts.disk_bytes_per_s, "predicted_tps": predicted,
        "predicted_stall_share": stalled, "predicted_bytes_per_token": n_bytes, **came,
    }  # fmt: skip


def _decode(engine: Engine, n: int, seconds: float) -> dict[str, Any]:
    """Tokens per second of all together, prompts left out: from one token's arrival to another's,
    since a step may take seconds, and at least ``STEPS`` of each sequence."""
    prompts = [engine.tokenize(text)[:PROMPT] for text in texts(n)]
    running = [
        engine.submit(tokens, max_tokens=answer_of(n), ignore_eos=True, seed=i)
        for i, tokens in enumerate(prompts)
    ]
    counts = _Counter(running)
    least = max(3, SETTLING // n)
    counts.wait(least, 300.0)
    before, start, counted = engine.stats(), counts.last_s, counts.total
    counts.wait(answer_of(n) - 1, seconds)
    counts.wait(least + STEPS, 300.0)
    after, wall_s, tokens = engine.stats(), counts.last_s - start, counts.total - counted
    for generation in running:
        generation.cancel()

    def more(name: str) -> float:
        return float(after[name] - before[name])

    return {
        "tps": tokens / wall_s,
        "tokens": tokens,
        "stall_share": more("stall_s") / wall_s,
        "disk_share": more("disk_s") / wall_s,
        "bytes_per_token": more("bytes_read") / max(1, tokens),
    }


class _Counter:
    """Reads the events of all generations, each in a thread."""

    def __init__(self, running: Sequence[Any]) -> None:
        import threading

        self.counts = [0] * len(running)
        self.ended = [False] * len(running)
        self.last_s = 0.0  # when a token came
        for i, generation in enumerate(running):
            threading.Thread(target=self._read, args=(i, generation), daemon=True).start()

    def _read(self, i: int, generation: Any) -> None:
        try:
            for event in generation:
                if isinstance(event, Token):
                    self.counts[i] += 1
                    self.last_s = time.perf_counter()
        except Exception:  # cancelled
            pass
        finally:
            self.ended[i] = True

    @property
    def total(self) -> int:
        return sum(self.counts)

    def wait(self, least: int, seconds: float) -> None:
        """Until each has so many tokens, for so long at most, or until one ends."""
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline and not any(self.ended):
            if min(self.counts) >= least:
                time.sleep(0.05)  # for those of the same step
                return
            time.sleep(0.002)


# --- the grid -----------------------------------------------------------------------------------


def run_point(spec: dict[str, Any], limits: cgroup.Limits) -> process.Run:
    command = [sys.executable, str(Path(__file__).absolute()), "--row", json.dumps(spec)]
    process.drop_page_cache([Path(spec["model"])])
    if limits == cgroup.Limits():
        return process.run_process(command, None, 400.0)
    with cgroup.limited(limits) as group:
        return process.run_process(command, group, 400.0)


def limits_of(memory: int, disk: str, model: Path) -> cgroup.Limits:
    limits = cgroup.Limits(memory=memory)
    if disk != "native":
        devices = cgroup.disks_of(read_layout(model).files)
        limits = cgroup.Limits(memory, cgroup.DiskLimit(devices, int(float(disk) * MB)))
    if (why := cgroup.refusal(limits)) is not None:
        print(f"not limited to {memory / GB:.2f} GB, disk {disk}: {why}", file=sys.stderr)
        return cgroup.Limits()
    return limits


def grid(args: argparse.Namespace) -> list[dict[str, Any]]:
    model = args.model.absolute()
    size = sum(file.stat().st_size for file in read_layout(model).files)
    measured_with = opening.find(
        model,
        Options(memory=int(args.measure_share * size), reads="direct", policy=args.policy),
    )
    start = time.perf_counter()
    known = planning.known(measured_with, args.threads) is not None
    measure.measured(measured_with, args.threads)
    said = "remembered" if known else f"measured in {time.perf_counter() - start:.1f} s"
    print(f"{model.name}: {said}", file=sys.stderr)
    points = []
    for disk in args.disks:
        for budget in args.budgets:
            memory = int(budget * size)
            limits = limits_of(memory, disk, model)
            for n in args.groups:
                spec = {
                    "model": str(model), "memory": memory, "sequences": n, "whole": args.whole,
                    "seconds": args.seconds, "threads": args.threads, "policy": args.policy,
                }  # fmt: skip
                run = run_point(spec, limits)
                point = {"budget": budget, "disk": disk, "sequences": n, **spec, **run.result}
                point["failure"] = run.failure
                if run.failure is None:
                    point["error"] = point["predicted_tps"] / point["tps"] - 1
                points.append(point)
                print(line(point), file=sys.stderr, flush=True)
    return points


def line(point: dict[str, Any]) -> str:
    where = f"{point['budget']:.0%} disk {point['disk']} n {point['sequences']}"
    if point["failure"]:
        return f"{where}: {point['failure']}"
    return (
        f"{where}: foretold {point['predicted_tps']:.1f}, came {point['tps']:.1f} tok/s "
        f"({point['error']:+.0%}), stalled {point['predicted_stall_share']:.0%} / "
        f"{point['stall_share']:.0%}"
    )


def report(points: Sequence[dict[str, Any]]) -> str:
    head = "budget|slots|disk|at once|group|turn|foretold|came|error|stalled foretold|came"
    rows = [head.split("|")]
    for p in points:
        if p["failure"]:
            continue
        row = f"{p['budget']:.0%}|{p['share']:.0%}|{p['disk']}|{p['sequences']}|{p['group']}|"
        row += f"{p['quantum']}|{p['predicted_tps']:.1f}|{p['tps']:.1f}|{p['error']:+.0%}|"
        row += f"{p['predicted_stall_share']:.0%}|{p['stall_share']:.0%}"
        rows.append(row.split("|"))
    errors = [abs(p["error"]) for p in points if not p["failure"]]
    if errors:
        good = sum(error <= GOOD for error in errors)
        rows.append([f"{good} of {len(errors)} within {GOOD:.0%}; median "
                     f"{statistics.median(errors):.0%}, worst {max(errors):.0%}"])  # fmt: skip
    return "\n".join(columns(rows, ">"))


def main() -> None:
    if sys.argv[1:2] == ["--row"]:
        print(json.dumps(row(json.loads(sys.argv[2]))), flush=True)
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    some = {"nargs": "+"}
    parser.add_argument("--budgets", type=float, default=[0.2, 0.35, 0.6, 0.8], **some)
    parser.add_argument("--groups", type=int, default=[1, 8, 16, 64], **some)
    parser.add_argument("--disks", default=["native", "1000", "500"], help="MB/s", **some)
    parser.add_argument("--seconds", type=float, default=6.0, help="of decoding per point")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--policy", default="fate")
    parser.add_argument("--measure-share", type=float, default=0.6, help="budget of the measuring")
    parser.add_argument("--whole", action="store_true", help="no turns: all in every step")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    points = grid(args)
    print(report(points))
    document = json.dumps({"model": args.model.name, "points": points})
    if args.json is not None:
        args.json.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
