"""Options stand in one place; whoever shows a sentence spells the options in it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

import moe_gguf.runtime.errors as errors_module
from moe_gguf import converters
from moe_gguf.runtime.bench.spec import Spec
from moe_gguf.runtime.cli.options import option_flags, spelling_of
from moe_gguf.runtime.errors import UserError, option, spell
from moe_gguf.runtime.options import Options, entry

RUNTIME = Path(errors_module.__file__).parent


@dataclass(frozen=True)
class More(Options):
    grace: float = entry(1.5, "S", "how long to wait")
    patience: int | None = entry(None, "N|auto", "how often", lossy=True)


def parsed(options: type[Options], *args: str) -> dict[str, Any]:
    """What a command with these options is called with."""
    given: dict[str, Any] = {}

    @click.command()
    @option_flags(options)
    def command(**values: Any) -> None:
        given.update(values)

    command.main(list(args), standalone_mode=False)
    return given


def test_every_field_is_a_flag_with_the_field_s_default() -> None:
    assert parsed(Options) == Options().arguments()


def test_flags_give_values_of_their_fields_types() -> None:
    text = "--memory 2GB --lanes 3 --experts-used 2 --low-share 0.25 --low-on-miss --warm"
    expected = Options(
        memory="2GB", lanes=3, experts_used=2, low_share=0.25, low_on_miss=True, warm=True
    )
    assert parsed(Options, *text.split()) == expected.arguments()
    assert parsed(Options, "--lanes", "auto")["lanes"] is None
    for wrong in ("--experts-used few", "--low-share some", "--lanes few"):
        with pytest.raises(click.BadParameter):
            parsed(Options, *wrong.split())


def test_a_new_field_is_all_a_new_option_needs() -> None:
    values = parsed(More, "--grace", "2")
    assert (values["grace"], values["patience"]) == (2.0, None)
    held = More.taken_from(values)
    assert values == {}
    assert held == More(grace=2.0)
    assert held.arguments()["grace"] == 2.0
    assert "patience" in held.lossless()
    assert More(patience=2).losses() == {"patience": 2}


def test_options_taken_from_arguments_leave_the_rest() -> None:
    arguments = {"policy": "lru", "n_ctx": 512}
    assert Options.taken_from(arguments) == Options(policy="lru")
    assert arguments == {"n_ctx": 512}


def test_a_bench_row_s_options_reach_its_process_unchanged() -> None:
    options = Options(memory=10**9, policy="lru", low_share=0.5, lanes=2)
    spec = Spec("m.gguf", 8, 24, 256, None, options, stock=True, fill=True)
    assert Spec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused_by_name(share: float) -> None:
    with pytest.raises(UserError, match=f"low_share={share} is out of range"):
        Options(low_share=share)


# --- sentences ----------------------------------------------------------------------------------


def test_an_option_is_spelled_as_its_reader_writes_it() -> None:
    @click.command()
    @click.option("--ctx", "n_ctx")
    @click.option("-n", "n_predict")
    def command() -> None: ...

    flags = spelling_of(command)
    text = f"{option('n_ctx')}, {option('n_predict', 3)}, {option('low_share', 0.25)}"
    assert spell(text) == "n_ctx, n_predict=3, low_share=0.25"
    assert spell(text, flags) == "--ctx, -n 3, --low-share 0.25"
    assert str(UserError(text)) == "n_ctx, n_predict=3, low_share=0.25"


def sentences(path: Path) -> Iterator[str]:
    """The strings of a source file that are no docstrings and have a space in them."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            text = node.value
            if isinstance(text, str) and " " in text:
                yield text


def test_below_the_command_line_sentences_name_options_not_flags() -> None:
    """Someone who writes Python or HTTP has no flags; a whole command to type may have them."""
    typed = re.compile(r"(trace|convert) --[a-z-]+")
    rooms = (RUNTIME, Path(converters.__file__).parent)
    files = [path for room in rooms for path in room.rglob("*.py") if path.parent.name != "cli"]
    assert len(files) > 30
    found = [
        f"{path.name}: {text}"
        for path in files
        for text in sentences(path)
        if re.search(r"(?<![\w-])--?[a-z]", typed.sub("", text)) and "pip install" not in text
    ]
    assert found == []
