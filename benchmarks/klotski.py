"""What many sequences make of one stream of experts, beside stock llama.cpp and the aims we have.

    sudo $(which python) benchmarks/klotski.py olmoe.gguf --bundle olmoe-repacked/ --out results/

Runs ``bench`` once per section, each with rows that are measured turn about, and writes its JSON as
soon as it is there: `numbers` under both caps, `mmap` and `turns` under the larger one, `bundle` on
repacked kernels, `score`. On demand `server`, which is llama-cpp-python's own; `ablation`, from one
sequence to a group, its hot experts read ahead, the order of arrival, one prompt n times; `low`,
with the low copies of a bundle that has some; and `curve`, a plot over 1, 2, 4, ... sequences.

Prompts and answers have 64 tokens, which takes the better part of an hour; ``--quick`` about a
quarter, with shorter ones that need fewer cells. After each section it says what was reached.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_gguf.runtime.bench import report
from moe_gguf.runtime.bench.request import Request
from moe_gguf.runtime.bench.rounds import bench
from moe_gguf.runtime.columns import columns
from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.options import Options
from moe_gguf.runtime.sizes import format_size

SCORED = 512  # tokens of a prompt
BUNDLE = "BUNDLE"  # in rows, the folder named on the command line


class Section(NamedTuple):
    """One call of ``bench``; {n} in its rows is how many prompts are scored."""

    rows: str
    caps: slice = slice(1)  # of those asked for
    scores: bool = False
    plot: bool = False
    low_share: float = 0.0


SECTIONS: Mapping[str, Section] = {
    "numbers": Section(
        "stock-resident:16,stock-resident:64,resident:16,fate:1,fate:16:plan,fate:64:plan",
        slice(None),
    ),
    "mmap": Section("stock-mmap:16,fate:16:plan"),
    "turns": Section("fate:16:plan,fate:16:turns,fate:64:plan,fate:64:turns"),
    "bundle": Section(
        f"stock-repacked:16,fate:16:plan@{BUNDLE},stock-repacked:64,fate:64:plan@{BUNDLE}"
    ),
    "score": Section("stock-resident:{n}:score,fate:{n}:score", scores=True),
    "server": Section(
        f"stock-server:16,fate:16:plan@{BUNDLE},stock-server:64,fate:64:plan@{BUNDLE}"
    ),
    "ablation": Section("fate:1,layered-lfu:64,klotski-whole:64,klotski:64,fate:64,fate:64:same"),
    "low": Section(f"klotski:64@{BUNDLE},klotski+low:64@{BUNDLE}", low_share=0.25),
    "curve": Section("stock-resident:1-128,fate:1-128,fate:2-128:plan", plot=True),
}
USUAL = ("numbers", "mmap", "turns", "bundle", "score")


class Aim(NamedTuple):
    """A figure of one row, over that of another if there is one; what is aimed at is the least, or
    the most."""

    what: str
    row: str
    over: str | None
    key: str
    aim: float
    at_most: bool = False


def _aims(n: int) -> list[Aim]:
    """Of groups of one size; under the smaller cap only the first two, at ``SMALL_CAP``."""
    plan, stock, repacked = f"fate:{n}:plan", f"stock-resident:{n}", f"stock-repacked:{n}"
    return [
        Aim("decode over stock in memory", plan, stock, "decode_tps", LARGE_CAP),
        Aim("job over stock in memory", plan, stock, "job_tps", LARGE_CAP),
        Aim("decode over one stream of ours", plan, "fate:1", "decode_tps", 2.2),
        Aim("decode over stock, mapped", plan, f"stock-mmap:{n}", "decode_tps", 8.0),
        Aim("stalled", plan, None, "stall_share", 0.05, at_most=True),
        Aim("the engine over the bare loop", f"resident:{n}", stock, "decode_tps", 0.97),
        Aim("job over serving in turns", plan, f"fate:{n}:turns", "job_tps", 1.0),
        Aim("job over the server", f"{plan}@{BUNDLE}", f"stock-server:{n}", "job_tps", 1.0),
        Aim("decode over stock, repacked", f"{plan}@{BUNDLE}", repacked, "decode_tps", 0.92),
    ]


LARGE_CAP, SMALL_CAP = 0.92, 0.80  # aims under either
AIMS = (
    *_aims(16),
    *_aims(64),
    Aim("scoring over stock", "fate:{n}:score", "stock-resident:{n}:score", "job_tps", 0.95),
)


def main() -> int:
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    errors: list[str] = []
    for name in args.sections:
        section, start = SECTIONS[name], time.perf_counter()
        if BUNDLE in section.rows and args.bundle is None:
            print(f"{name}: left out, no bundle is named", file=sys.stderr)
            continue
        if "stock-server" in section.rows and args.server is None:
            print(f"{name}: left out, no server is named", file=sys.stderr)
            continue
        try:
            outcome = bench(_request(args, name, section), note=_note)
        except UserError as error:
            print(f"{name}: {error}", file=sys.stderr)
            errors.append(name)
            continue
        print(f"{name}, {time.perf_counter() - start:.0f} s\n\n{report.table(outcome.document)}\n")
        errors += outcome.errors
        for at, point in enumerate(report.points(outcome.document)):
            print(told(point, args, is_small=at > 0), flush=True)
        if outcome.interrupted:
            return 130
    for error in errors:
        print(f"ERROR: {error}", file=sys.stderr)
    return bool(errors)


def told(point: Mapping[str, Any], args: argparse.Namespace, is_small: bool) -> str:
    """What a point's rows reached of the aims they have to do with: rows that were measured turn
    about."""
    medians = {row["row"]: row["median"] for row in point["rows"] if not row["failure"]}
    lines = [["", "reached", "aim"]]
    for aim, row, over in _named(args):
        value = medians.get(row, {}).get(aim.key)
        base = medians.get(over, {}).get(aim.key) if over else 1.0
        if value is None or not base or (is_small and aim.aim != LARGE_CAP):
            continue
        wanted = f"{'at most' if aim.at_most else 'at least'} "
        wanted += f"{SMALL_CAP if is_small else aim.aim:.2f}"
        what = f"{aim.what}: {row}" + (f" / {over}" if over else "")
        lines.append([what, f"{value / base:.3f}", wanted])
    if len(lines) == 1:
        return ""
    return "\n".join([f"in {format_size(point['memory_bytes'])}", *columns(lines, "<>"), ""])


def _named(args: argparse.Namespace) -> Iterator[tuple[Aim, str, str | None]]:
    """The aims, with the names that their rows have here."""
    for aim in AIMS:
        yield aim, _filled(aim.row, args, short=True), aim.over and _filled(aim.over, args, True)


def _filled(rows: str, args: argparse.Namespace, short: bool = False) -> str:
    bundle = "" if args.bundle is None else args.bundle.name if short else str(args.bundle)
    return rows.replace("{n}", str(args.scored)).replace(BUNDLE, bundle)


def _request(args: argparse.Namespace, name: str, section: Section) -> Request:
    prompt, answer = (SCORED, 1) if section.scores else (args.prompt_tokens, args.answer_tokens)
    return Request(
        args.model,
        ",".join(args.caps.split(",")[section.caps]),
        Options(low_share=section.low_share),
        _filled(section.rows, args),
        repeat=args.rounds,
        n_predict=answer,
        prompt_tokens=prompt,
        n_threads=args.threads,
        json_file=str(args.out / f"klotski-{name}.json"),
        server=args.server if "stock-server" in section.rows else None,
        plot_file=str(args.out / f"klotski-{name}.png") if section.plot else None,
    )


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _sections(text: str) -> Sequence[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"there is no section {unknown[0]!r}")
    return names


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--bundle", type=Path, help="the model, repacked by moe-gguf convert")
    parser.add_argument("--server", help="examples/server/server.py of llama-cpp-python's source")
    parser.add_argument("--caps", default="2.4GB,1.3GB", help="default: %(default)s")
    parser.add_argument("--sections", type=_sections, default=USUAL, help=", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="16 + 24 tokens, 4 scored prompts")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int)
    parser.add_argument("--answer-tokens", type=int)
    parser.add_argument("--scored", type=int, help="prompts of 512 tokens that are scored")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    usual = (16, 24, 4) if args.quick else (64, 64, 64)
    for name, value in zip(("prompt_tokens", "answer_tokens", "scored"), usual, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.bundle is not None:
        args.bundle = args.bundle.absolute()
    return args


if __name__ == "__main__":
    raise SystemExit(main())
