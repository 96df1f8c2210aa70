"""The options that commands share, and what they make of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import platformdirs

from ..errors import UserError, reason

if TYPE_CHECKING:
    from ..llama import Llama

# llama_cpp and numpy are imported inside the commands: help and mistakes should answer at once.


def note(text: str) -> None:
    click.echo(text, err=True)


def resolve(model: str) -> Path:
    """The file a MODEL argument names."""
    if model == "demo":
        return _demo()
    if model.startswith("hf:"):
        raise UserError("hf: models are not supported yet: download the GGUF and give its path")
    return Path(model)


def _demo() -> Path:
    """The demo model, carved by a child: the memory that takes must not count in this process."""
    command = [sys.executable, "-m", "moe_gguf", "carve-demo"]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode != 0:  # it has told why
        sys.exit(child.returncode)
    return Path(child.stdout.rstrip("\n"))


def cache_dir() -> Path:
    """Where files made for the user are kept; MOE_GGUF_CACHE overrides it."""
    return Path(os.environ.get("MOE_GGUF_CACHE") or platformdirs.user_cache_dir("moe-gguf"))


def debugging() -> bool:
    return bool(click.get_current_context().find_root().params["debug"])


def quieten() -> None:
    """Keep llama.cpp's own log off the terminal unless debugging."""
    from .. import logs

    if debugging():
        logs.echo()
    else:
        logs.silence()


def lanes_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--lanes N|auto``; None stands for auto."""

    def parse(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
        if value == "auto":
            return None
        try:
            return int(value)
        except ValueError:
            raise UserError(f"{value!r} is not a number of lanes: give 1 to 64, or auto") from None

    return click.option(
        "--lanes",
        default="auto",
        metavar="N|auto",
        callback=parse,
        help="reader threads",
        show_default=True,
    )(command)


class Number(click.FloatRange):
    """A number in a range; ``nan`` is in none."""

    name = "number"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number = float(super().convert(value, param, ctx))
        if number != number:
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


def low_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What may be read from the bundle's low copy."""
    share = click.option(
        "--low-share",
        default=0.0,
        type=Number(0, 1),
        metavar="F",
        help="read the least popular experts of a prompt, up to this share of its votes, "
        "from the bundle's low copy (lossy); 0.25 is a good start; 0: off",
    )
    on_miss = click.option(
        "--low-on-miss",
        is_flag=True,
        help="in generation read missing experts from the bundle's low copy (lossy)",
    )
    return share(on_miss(command))


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options every command that opens a model shares."""
    for option in reversed(
        (
            click.argument("model", metavar="MODEL"),
            click.option(
                "--memory",
                default="auto",
                metavar="SIZE",
                help="what the whole process may use: 2.4GB, 4GiB, auto",
            ),
            click.option(
                "--policy",
                default="fate",
                metavar="NAME",
                show_default=True,
                help="what stays in memory and what is read ahead",
            ),
            click.option(
                "--ctx",
                "n_ctx",
                type=click.IntRange(min=0),
                metavar="N",
                help="context length; 0: the model's own; default: that, but at most 4096",
            ),
            click.option(
                "--threads",
                "n_threads",
                type=click.IntRange(1, 512),
                metavar="N",
                help="default: the physical cores",
            ),
            click.option(
                "--reads", default="auto", metavar="MODE", help="auto, direct or buffered"
            ),
            lanes_option,
            click.option(
                "--experts-used",
                type=int,
                metavar="K",
                help="experts per token instead of the model's own number (lossy)",
            ),
            low_options,
            click.option("--device", default="cpu", help="where experts are computed (cpu)"),
        )
    ):
        command = option(command)
    return command


def warm_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--warm",
        is_flag=True,
        help="fill memory first with what was popular in runs of trace --save-routing",
    )(command)


def prompt_options(command: Callable[..., Any]) -> Callable[..., Any]:
    prompt = click.option("-p", "--prompt", help="prompt text")
    file = click.option(
        "-f", "--file", "prompt_file", type=click.Path(), help="read the prompt from a file"
    )
    return prompt(file(command))


def open_llama(model: str, *, recorder: Any = None, **options: Any) -> Llama:
    """Open MODEL with the shared options and say on stderr what is in force."""
    from ..llama import Llama
    from ..progress import bar

    quieten()
    path = resolve(model)
    with bar(f"loading {path.name}") as progress:
        llama = Llama(
            path,
            recorder=recorder,
            progress=progress,
            verbose=debugging(),
            **options,
        )
    if not debugging():  # a verbose model has said it
        note(llama.mode_line)
    note(llama.arena.budget.table())
    if warning := llama.arena.budget.warning():
        note(f"moe-gguf: warning: {warning}")
    if llama.found.options.warm:
        note(llama.arena.warm_line())
    if llama.n_ctx() > (trained := llama.found.layout.n_ctx_train):
        note(f"moe-gguf: warning: this model was trained for a context of {trained} tokens only")
    return llama


def prompt_text(prompt: str | None, file: str | None, wants_terminal: bool) -> str | None:
    """The prompt, or None for a conversation on the terminal."""
    if prompt is not None and file is not None:
        raise UserError("-p and -f exclude each other: give the prompt once")
    if prompt is not None:
        return prompt
    if file is not None:
        try:
            return _decoded(Path(file).read_bytes(), file)
        except OSError as error:
            raise UserError(f"cannot read the prompt from {file} ({reason(error)})") from None
    if not sys.stdin.isatty():
        if text := _decoded(sys.stdin.buffer.read(), "standard input"):
            return text
    elif wants_terminal:
        return None
    raise UserError("give a prompt with -p, -f or a pipe, or start a conversation with --chat")


def _decoded(data: bytes, source: str) -> str:
    """Text without the line end that editors and ``echo`` put behind it."""
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError:
        raise UserError(f"{source} is not text in UTF-8: convert it first") from None


def checkpoint(source: str) -> Path:
    """The file or folder a SRC argument names."""
    if not source.startswith("hf:"):
        return resolve(source)
    from ...converters.hf.hub import download

    return download(source)


def check_writable(path: Path) -> None:
    """Raise now what would be raised after the work."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: its folder does not exist")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: its folder may not be written to")
