"""What wrong guesses cost: LRU alone and with predictors that are never right, turn about.

    python benchmarks/adversarial.py olmoe.gguf --memory 2.12GB

Each run is a fresh process, as in `moe-gguf bench`. Rows:

- `lru`: no guesses; what the others are measured against;
- `worst`: LRU, and guesses of the experts that the next layer's router likes least;
- `random`: LRU, and guesses with the experts of every router shuffled;
- `fate`: the policy as it is.

Guesses are paced as in `fate`. All rows must generate the same tokens. Prints a table of medians,
then all of it as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_gguf.policies.cache import LRU
from moe_gguf.policies.order import Popularity
from moe_gguf.policies.pace import IdleDisk
from moe_gguf.policies.predict import Gates
from moe_gguf.policies.presets import Facts, Policy
from moe_gguf.runtime import routers
from moe_gguf.runtime.bench import process, results
from moe_gguf.runtime.bench import row as bench_row
from moe_gguf.runtime.bench.spec import Spec
from moe_gguf.runtime.columns import columns
from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.options import Options
from moe_gguf.runtime.plugin.gates import Router
from moe_gguf.runtime.sizes import parse_size

COLUMNS = ("tok/s", "of lru", "guesses", "used", "guessed MB", "read MB", "hits", "guess ms")


def worst(router: Router) -> Router:
    """The same router, liking best what it liked least."""
    rule = router.rule
    if rule.bias is not None:
        rule = replace(rule, bias=-rule.bias)
    bias = None if router.logit_bias is None else -router.logit_bias
    return Router(-router.weight, rule, bias, router.norm)


def shuffled(router: Router) -> Router:
    """The same router with its experts in another order."""
    order = np.random.default_rng(0).permutation(len(router.weight))
    bias = None if router.logit_bias is None else router.logit_bias[order]
    return Router(router.weight[order], router.rule, bias, router.norm)


LIES: Mapping[str, Callable[[Router], Router]] = {"worst": worst, "random": shuffled}
ROWS = ("lru", *LIES, "fate")


def wrong(facts: Facts) -> Policy:
    """LRU, and guesses paced as in ``fate``."""
    pace = IdleDisk(facts.chunk_bytes, facts.buffered)
    return Policy(LRU(), Popularity(), facts.gates(Gates()), pace)


def lying(lie: Callable[[Router], Router]) -> Callable[..., dict[int, Router]]:
    """``read_routers`` with every router replaced by its lie."""
    return lambda *model: {n: lie(router) for n, router in routers.read_routers(*model).items()}


def run_here(row: str, spec: Spec) -> dict[str, Any]:
    """One run in this process, in which the model's routers may lie."""
    if row not in LIES:
        return bench_row.measure(spec)
    return bench_row.measure(spec, make_policy=wrong, routers=lying(LIES[row]))


def run_in_child(row: str, spec: Spec) -> dict[str, Any]:
    """One run in a process of its own."""
    script = str(Path(__file__).resolve())
    command = [sys.executable, script, "--rows", row, "--spec", spec.to_json()]
    run = process.run_process(command, None)
    if run.failure is not None:
        raise UserError(f"{row}: {run.failure}")
    return run.result


def cells(runs: Sequence[Mapping[str, Any]], lru: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row of the table; bytes, guesses and milliseconds are per token."""

    def median(value: Callable[[Mapping[str, Any]], float]) -> float:
        return statistics.median(map(value, runs))

    def per_token(name: str) -> float:
        return median(lambda run: run[name] / run["decode_tokens"])

    pairs = [a["decode_tps"] / b["decode_tps"] for a, b in zip(runs, lru, strict=True)]
    return [
        f"{median(lambda run: run['decode_tps']):.2f}",
        f"{statistics.median(pairs):.3f}",
        f"{per_token('guesses'):.1f}",
        f"{per_token('guesses_used'):.1f}",
        f"{per_token('guess_bytes') / 1e6:.1f}",
        f"{median(lambda run: run['bytes_per_token']) / 1e6:.1f}",
        f"{median(lambda run: run['hit_rate']):.3f}",
        f"{1e3 * per_token('guess_s'):.1f}",
    ]


def measure(specs: Mapping[str, Spec], n_rounds: int) -> dict[str, list[dict[str, Any]]]:
    """The runs of every row, turn about."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in specs}
    for _ in range(n_rounds):
        for name, spec in specs.items():
            runs[name].append(run_in_child(name, spec))
            print(f"{name}: {runs[name][-1]['decode_tps']:.2f} tok/s", file=sys.stderr)
    return runs


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure what wrong guesses cost.")
    parser.add_argument("model", type=Path, nargs="?", help="a MoE GGUF or a bundle")
    parser.add_argument("--memory", default="2.12GB")
    parser.add_argument("--rows", default=",".join(ROWS), help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("-n", "--n-predict", type=int, default=96)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--reads", default="direct", choices=["auto", "direct", "buffered"])
    parser.add_argument("--spec", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.spec is not None:
        print(json.dumps(run_here(args.rows, Spec.from_json(args.spec))), flush=True)
        return 0
    names = list(dict.fromkeys(["lru", *args.rows.split(",")]))
    if args.model is None or not set(names) <= set(ROWS):
        parser.error(f"give a model, and rows among {', '.join(ROWS)}")
    specs = {
        name: Spec(
            model=str(args.model.resolve()), n_predict=args.n_predict,
            prompt_tokens=args.prompt_tokens, n_ctx=args.prompt_tokens + args.n_predict,
            n_threads=None,
            options=Options(
                memory=parse_size(args.memory), policy="lru" if name in LIES else name,
                reads=args.reads,
            ),
        )
        for name in names
    }  # fmt: skip
    try:
        runs = measure(specs, args.repeat)
    except UserError as error:
        print(f"adversarial: {error}", file=sys.stderr)
        return 2
    table = [["", *COLUMNS], *([name, *cells(runs[name], runs["lru"])] for name in names)]
    print("\n".join(columns(table, "<>")))
    first = runs["lru"][0]["tokens"]
    differ = [
        n for n in names if any(not results.same_start(run["tokens"], first) for run in runs[n])
    ]
    if differ:
        print(f"other tokens than lru: {', '.join(differ)}", file=sys.stderr)
    print(json.dumps({"memory": args.memory, "rows": runs}))
    return 1 if differ else 0


if __name__ == "__main__":
    raise SystemExit(main())
