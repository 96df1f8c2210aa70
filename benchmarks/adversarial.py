"""What wrong guesses cost: LRU alone and with predictors that are never right, turn about.

    python benchmarks/adversarial.py olmoe.gguf --memory 2.12GB

Each run is a fresh process, as in `moe-gguf bench`. Rows:

- `lru`: no guesses; what the others are measured against;
- `worst`: LRU and a gate predictor that ranks first what the next layer's router likes least; what
  comes of it is learned, as by any predictor;
- `random`: the same with the experts of every router shuffled;
- `worst-claimed`, `random-claimed`: nothing is learned from being wrong: the least liked experts,
  or random ones, get the confidence that the right predictor has in its own first guesses;
- `fate`: the policy as it is.

Guesses are paced as in `fate`. All rows must generate the same tokens. Prints a table of medians,
then all of it as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moe_gguf.policies import presets
from moe_gguf.policies.base import Guess, Inputs, RouteEvent
from moe_gguf.policies.cache import LRU
from moe_gguf.policies.order import Popularity
from moe_gguf.policies.pace import IdleDisk
from moe_gguf.policies.predict import GateGuesses, GatePredictor, Router
from moe_gguf.policies.presets import Facts, Policy
from moe_gguf.runtime import bench, bench_row
from moe_gguf.runtime.bench_row import Spec
from moe_gguf.runtime.budget import parse_size
from moe_gguf.runtime.errors import UserError

COLUMNS = ("tok/s", "of lru", "guesses", "used", "guessed MB", "read MB", "hits", "guess ms")


def worst(router: Router) -> Router:
    """The same router with every logit negated."""
    bias = None if router.logit_bias is None else -router.logit_bias
    return Router(-router.weight, router.rule, bias, router.norm)


def shuffled(router: Router) -> Router:
    """The same router with its experts in another order."""
    order = np.random.default_rng(0).permutation(len(router.weight))
    bias = None if router.logit_bias is None else router.logit_bias[order]
    return Router(router.weight[order], router.rule, bias, router.norm)


def learning(lie: Callable[[Router], Router], facts: Facts) -> Policy:
    """LRU with the guesses of wrong routers, whose chances are learned."""
    routers = {layer: lie(router) for layer, router in facts.routers().items()}
    gates = GatePredictor(routers, facts.n_used, "residual")
    return Policy(LRU(), Popularity(), GateGuesses(gates, facts.n_experts), IdleDisk())


class Claims(GateGuesses):
    """Other experts with the confidence of the right ones; ``lie`` reorders a layer's keys."""

    def __init__(
        self, gates: GatePredictor, n_experts: int, lie: Callable[[Sequence[int]], Sequence[int]]
    ) -> None:
        super().__init__(gates, n_experts)
        self.lie = lie

    def guess(self, event: RouteEvent, x: Inputs) -> Sequence[Guess]:
        right = super().guess(event, x)
        keys = self.lie([guess.key for guess in right])
        width = 2 * self.gates.n_used  # as many as are guessed in earnest
        return [Guess(key, r.confidence) for key, r in zip(keys[:width], right, strict=False)]


def claiming(lie: Callable[[Sequence[int]], Sequence[int]], facts: Facts) -> Policy:
    """LRU with wrong guesses in which the pace is made to trust."""
    gates = GatePredictor(facts.routers(), facts.n_used, "residual", width=facts.n_experts)
    return Policy(LRU(), Popularity(), Claims(gates, facts.n_experts, lie), IdleDisk())


def least_liked_first(keys: Sequence[int]) -> Sequence[int]:
    return keys[::-1]


def in_any_order(rng: random.Random, keys: Sequence[int]) -> Sequence[int]:
    return rng.sample(keys, len(keys))


# The policies of the rows that no name on --policy has.
WRONG: Mapping[str, Callable[[Facts], Policy]] = {
    "worst": partial(learning, worst),
    "random": partial(learning, shuffled),
    "worst-claimed": partial(claiming, least_liked_first),
    "random-claimed": lambda facts: claiming(partial(in_any_order, random.Random(0)), facts),
}
ROWS = ("lru", *WRONG, "fate")


def run_here(spec: Spec) -> dict[str, Any]:
    """One run in this process, with the wrong policies known by name."""
    presets.POLICIES = {**presets.POLICIES, **WRONG}
    return bench_row.measure(spec)


def run_apart(spec: Spec) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--spec", json.dumps(asdict(spec))]
    run = bench.run_process(command, None)
    if run.failure is not None:
        raise UserError(f"{spec.policy}: {run.failure}")
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
            runs[name].append(run_apart(spec))
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
        print(json.dumps(run_here(Spec(**json.loads(args.spec)))), flush=True)
        return 0
    names = list(dict.fromkeys(["lru", *args.rows.split(",")]))
    if args.model is None or not set(names) <= set(ROWS):
        parser.error(f"give a model, and rows among {', '.join(ROWS)}")
    specs = {
        name: Spec(
            model=str(args.model.resolve()), policy=name, mmap=False, repack=False,
            memory=parse_size(args.memory), n_predict=args.n_predict,
            prompt_tokens=args.prompt_tokens, n_ctx=args.prompt_tokens + args.n_predict,
            threads=None, reads=args.reads, lanes=None, fill=False,
        )
        for name in names
    }  # fmt: skip
    try:
        runs = measure(specs, args.repeat)
    except UserError as error:
        print(f"adversarial: {error}", file=sys.stderr)
        return 2
    print(" ".join(f"{title:>10}" for title in ("", *COLUMNS)))
    table = {name: cells(runs[name], runs["lru"]) for name in names}
    for name, row in table.items():
        print(f"{name:<14}" + " ".join(f"{cell:>10}" for cell in row))
    first = runs["lru"][0]["tokens"]
    differ = [
        n for n in names if any(not bench.same_start(run["tokens"], first) for run in runs[n])
    ]
    if differ:
        print(f"other tokens than lru: {', '.join(differ)}", file=sys.stderr)
    print(json.dumps({"memory": args.memory, "rows": runs}))
    return 1 if differ else 0


if __name__ == "__main__":
    raise SystemExit(main())
