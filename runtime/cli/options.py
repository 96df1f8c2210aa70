"""The flags that commands share, made from ``runtime.options``, and how a command spells them.

Knows what is written on a command line; opens no model and reads no prompt.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Container
from dataclasses import Field, fields
from typing import Any

import click

from ..errors import Spelling, as_argument
from ..options import Entry, Options

Command = Callable[..., Any]


class Number(click.FloatRange):
    """A number in a range; ``nan`` is in none."""

    name = "number"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number = float(super().convert(value, param, ctx))
        if number != number:
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


def _or_auto(kind: click.ParamType[Any]) -> Callable[[str], Any]:
    """Values of ``kind``, or ``auto``, which stands for None."""

    def convert(value: str) -> Any:
        if value == "auto":
            return None
        try:
            return kind(value)
        except click.BadParameter:
            raise click.BadParameter(f"{value!r} is neither a number nor auto") from None

    return convert


_TYPES: dict[Any, click.ParamType[Any]] = {int: click.INT, float: click.FLOAT, str: click.STRING}


def option_flags(
    options: type[Options] = Options, without: Container[str] = ()
) -> Callable[[Command], Command]:
    """A flag for every field of ``options``, but for those named."""

    def decorate(command: Command) -> Command:
        types = typing.get_type_hints(options)
        for field in reversed(fields(options)):
            if field.name not in without:
                command = _flag(field, types[field.name])(command)
        return command

    return decorate


def _flag(field: Field[Any], hint: Any) -> Callable[[Command], Command]:
    entry: Entry = field.metadata["entry"]
    default = field.default
    flag = f"--{field.name.replace('_', '-')}"
    if hint is bool:
        return click.option(flag, is_flag=True, help=entry.help)
    # Of ``str | int`` and ``int | None`` the command line gives the first.
    kind = _TYPES[(typing.get_args(hint) or (hint,))[0]]
    or_auto = entry.metavar is not None and entry.metavar.endswith("|auto")
    if or_auto and default is None:
        default = "auto"
    return click.option(
        flag,
        type=_or_auto(kind) if or_auto else kind,
        default=default,
        metavar=entry.metavar,
        help=entry.help,
        show_default=default is not None,
    )


def model_options(command: Command) -> Command:
    """MODEL, and the flags of every command that opens one: ``Llama``'s arguments by name."""
    context = click.option(
        "--ctx",
        "n_ctx",
        type=click.IntRange(min=0),
        metavar="N",
        help="context length; 0: the model's own; default: that, but at most 4096",
    )
    threads = click.option(
        "--threads",
        "n_threads",
        type=click.IntRange(1, 512),
        metavar="N",
        help="default: the physical cores",
    )
    argument = click.argument("model", metavar="MODEL")
    return argument(option_flags()(context(threads(command))))


def parallel_options(goal: str) -> Callable[[Command], Command]:
    """How many sequences are computed at once, and what for; ``goal`` if nothing is said."""
    parallel = click.option(
        "--parallel",
        type=_or_auto(click.IntRange(1, 256)),
        default="auto",
        metavar="N|auto",
        help="sequences in memory at once; auto: as the planner sees fit",
        show_default=True,
    )
    goals = click.option(
        "--goal",
        type=click.Choice(["latency", "throughput"]),
        default=goal,
        help="what is to be best: waiting, or tokens per second of all together",
        show_default=True,
    )
    return lambda command: parallel(goals(command))


def prompt_options(command: Command) -> Command:
    prompt = click.option("-p", "--prompt", help="prompt text")
    file = click.option(
        "-f", "--file", "prompt_file", type=click.Path(), help="read the prompt from a file"
    )
    return prompt(file(command))


def state_options(command: Command) -> Command:
    """Of commands that go on from what earlier ones computed: ``Engine``'s arguments by name."""
    folder = click.option(
        "--cache-dir",
        type=click.Path(),
        metavar="DIR",
        help="keep what was computed of conversations in files here, and go on from it",
    )
    size = click.option(
        "--cache-size",
        default="4GiB",
        metavar="SIZE",
        show_default=True,
        help="what these files may take; those unused for the longest go",
    )
    return folder(size(command))


def spelling_of(command: click.Command) -> Spelling:
    """How ``command`` spells options: ``n_ctx`` as ``--ctx``, and what it lacks by its name."""
    flags = {p.name: p.opts[0] for p in command.params if isinstance(p, click.Option)}

    def spell(name: str, value: str | None) -> str:
        flag = flags.get(name, f"--{name.replace('_', '-')}")
        return flag if value is None else f"{flag} {value}"

    return spell


def as_flag(name: str, value: str | None) -> str:
    """How the command that runs now spells an option; without one, how Python does."""
    context = click.get_current_context(silent=True)
    return (as_argument if context is None else spelling_of(context.command))(name, value)
