"""What the documents claim about the checkout holds: paths, commands, options, figures.

A document that names something is wrong the day the thing is renamed, and nobody notices. These
tests know how our documents are written: commands and names stand in code, a table of measurements
stands in the section that names its JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from moe_gguf.policies.presets import POLICIES
from moe_gguf.runtime.bench.report import points
from moe_gguf.runtime.cli.main import COMMANDS, cli

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    "ARCHITECTURE.md",
    "docs/policies.md",
    "docs/serving.md",
    "benchmarks/README.md",
    "benchmarks/RESULTS.md",
)
PACKAGE = ("moe_gguf", "runtime", "converters", "policies")
FOLDERS = (*PACKAGE, "benchmarks", "tests", "docs", "deploy")

FILE = re.compile(r"(?<![\w/.-])[\w./-]+\.(?:py|cpp|h|json|png|md)\b")
FOLDER = re.compile(r"(?<![\w/.:<@-])(?:\w+/)+(?![\w<])")
OPTION = re.compile(r"(?<![\w-])--?[a-z][\w-]*")
ELSEWHERE = {"llama.cpp", "opencode.json"}  # a name that ends like a file; a client's own file


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def code(text: str) -> list[str]:
    """Every line of code blocks, without its comment, and every code span of the prose."""
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, flags=re.M | re.S)
    blocks += re.findall(r"\n\n((?:    \S.*\n)+)", text)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    whole = [block.replace("\\\n", " ") for block in blocks]
    lines = [line.split(" #")[0].strip() for block in whole for line in block.splitlines()]
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def prose(text: str) -> str:
    """The text without commands, whose arguments are examples and no files of ours."""
    text = re.sub(r"`[^`]*moe-gguf [^`]*`", "", text)
    return "\n".join(
        line for line in text.splitlines() if not re.search(r"moe-gguf\)? +[a-z]", line)
    )


def is_there(name: str, document: str) -> bool:
    """Whether it is a path from the root or from the document, or the end of a path."""
    for base in (ROOT, (ROOT / document).parent):
        if (base / name).exists():
            return True
    return any(path for folder in FOLDERS for path in (ROOT / folder).rglob(name.rstrip("/")))


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """What each command understands, by click's own parameters."""
    context = click.Context(cli)
    understood = {"": names(cli, context)}
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        understood[name] = names(command, click.Context(command, parent=context))
    return understood


def names(command: click.Command, context: click.Context) -> set[str]:
    return {name for param in command.get_params(context) for name in param.opts}


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len(read("README.md").splitlines()) <= 120


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_names_a_file_that_moved(document: str) -> None:
    text = prose(read(document))
    named = {match for kind in (FILE, FOLDER) for match in kind.findall(text)} - ELSEWHERE
    assert named
    assert sorted(name for name in named if not is_there(name, document)) == []


def test_the_readme_forgets_a_folder() -> None:
    tree = read("README.md").rpartition("## Where things are")[2]
    listed = set(re.findall(r"(?<![\w/])([\w/]+/)(?=[ :])", tree))
    sources = {path for top in PACKAGE for path in (ROOT / top).rglob("*.*")}
    folders = {p.parent for p in sources if p.suffix in {".py", ".cpp", ".h"}}
    folders |= {ROOT / folder for folder in FOLDERS}
    assert listed == {f"{folder.relative_to(ROOT).as_posix()}/" for folder in folders}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_names_a_command_or_an_option_that_is_not_there(
    document: str, options: dict[str, set[str]]
) -> None:
    known = set().union(*options.values())
    wrong = []
    for text in code(read(document)):
        called = re.match(r"(?:sudo )?(?:\$\(which )?moe-gguf\)? +(\S+)", text)
        command = called[1] if called else text.split(" ")[0]
        if called and command not in {*COMMANDS, "COMMAND"}:
            wrong.append(text)
        # An option alone belongs to some command; `COMMAND` stands for each of them.
        understood = options.get(command, known) | {"--help"}
        unquoted = re.sub(r'".*?"', "", text)
        if called or text.startswith("-") or command in COMMANDS:
            wrong += [text for option in OPTION.findall(unquoted) if option not in understood]
    assert wrong == []


def test_the_readme_names_a_target_the_makefile_lacks() -> None:
    targets = set(re.findall(r"^(\w+):", read("Makefile"), flags=re.M))
    named = {text.split()[1] for text in code(read("README.md")) if text.startswith("make ")}
    assert named
    assert named <= targets


def test_the_documents_explain_every_policy() -> None:
    table = re.search(r"^\| policy \|.*?\n\n", read("docs/policies.md"), flags=re.M | re.S)
    assert table
    first_cells = [line.split("|")[1] for line in table[0].strip().splitlines()]
    assert {name for cell in first_cells for name in re.findall(r"`(.+?)`", cell)} == set(POLICIES)


# --- figures -----------------------------------------------------------------------------------


class Metric(NamedTuple):
    key: str
    shown: Callable[[float], str]


METRICS = {
    "decode tok/s": Metric("decode_tps", "{:.2f}".format),
    "prefill tok/s": Metric("prefill_tps", "{:.1f}".format),
    "start-up": Metric("startup_s", "{:.1f} s".format),
    "hits": Metric("hit_rate", lambda share: f"{100 * share:.0f} %"),
    "disk busy": Metric("disk_share", lambda share: f"{100 * share:.0f} %"),
    "of bound": Metric("of_bound", lambda share: f"{100 * share:.0f} %"),
    "stalled": Metric("stall_share", lambda share: f"{100 * share:.1f} %"),
    "stolen": Metric("stolen_share", lambda share: f"{100 * share:.0f} %"),
    "read/token": Metric("bytes_per_token", lambda size: f"{size / 1e6:.0f} MB"),
    "peak": Metric("rss_peak_bytes", lambda size: f"{size / 1e9:.2f} GB"),
    "32 sequences tok/s": Metric("batch_32_tps", "{:.0f}".format),
    "2,048 tokens of prompt tok/s": Metric("prefill_2048_tps", "{:.0f}".format),
}
SPEED = METRICS["decode tok/s"]


class Figure(NamedTuple):
    where: str
    written: str
    measured: str


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def tables(section: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    for table in re.findall(r"(?:^\|.*\n)+", section, flags=re.M):
        head, _, *lines = table.splitlines()
        yield cells(head), [cells(line) for line in lines]


def rows_of(document: Path, cap: str | None) -> dict[str, dict[str, Any]]:
    """The rows of a result by name; of several caps those under the one that is written."""
    data = json.loads(document.read_text())
    if isinstance(data.get("rows"), dict):  # of a device
        return dict(data["rows"])
    found = points(data)
    if cap is not None:
        found = [p for p in found if p["memory_bytes"] == round(float(cap.split()[0]) * 1e9)]
    (point,) = found
    return {row["row"]: {**row["median"], **row} for row in point["rows"]}


def shown(row: dict[str, Any], metric: Metric) -> str:
    value = row.get(metric.key)
    return "-" if value is None else metric.shown(value)


def ratio(document: str, line: list[str], rows: dict[str, Any], named: list[str]) -> Figure:
    """The speed of one row over that of another, with as many digits as are written."""
    speed, base = (rows[name][SPEED.key] for name in named)
    digits = len(line[1].partition(".")[2])
    return Figure(f"{document}: {line[0]}", line[1], f"{speed / base:.{digits}f}")


def figures(document: str) -> Iterator[Figure]:
    """Each figure of the tables whose rows, or whose columns, are rows of a result."""
    for section in re.split(r"^## ", read(document), flags=re.M):
        for head, lines in tables(section):
            columns = [re.sub("^`(.*)`$", r"\1", title) for title in head]
            by_column = [name for title, name in zip(head, columns, strict=True) if title != name]
            compared = "reached" in head
            if head[0] != "row" and not by_column and not compared:
                continue
            for line in lines:
                data = re.search(r"results/[\w-]+\.json", " ".join(line) + section)
                assert data, f"{document}: a table without data: {line}"
                cap = line[head.index("cap")] if "cap" in head else None
                rows = rows_of(ROOT / "benchmarks" / data[0], cap)
                named = by_column or re.findall(r"`(.+?)`", line[0])
                if compared:
                    yield ratio(document, line, rows, named)
                    continue
                for name, written in zip(columns, line, strict=True):
                    where = f"{document}: {line[0]}: {name}"
                    if name in by_column:
                        yield Figure(where, written, shown(rows[name], SPEED))
                    elif name in METRICS:
                        yield Figure(where, written, shown(rows[named[-1]], METRICS[name]))
                    elif name == "ratio":
                        base, speed = (rows[row][SPEED.key] for row in by_column)
                        yield Figure(where, written, f"{speed / base:.2f}")


@pytest.mark.parametrize(("document", "least"), [("README.md", 25), ("benchmarks/RESULTS.md", 120)])
def test_a_figure_differs_from_its_data(document: str, least: int) -> None:
    found = list(figures(document))
    assert len(found) >= least  # the tables were understood at all
    assert [figure for figure in found if figure.written != figure.measured] == []
