"""What a command says on standard error, and the prompt it is given."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..errors import UserError, reason, spell
from ..text import LINE_LIMIT, decoded, printable, shown
from .options import as_flag


def note(text: str) -> None:
    """A line on standard error; names from files in it are only data."""
    click.echo(printable(text), err=True)


def warn(text: str) -> None:
    note(f"moe-gguf: warning: {spell(text, as_flag)}")


def report_error(error: Exception) -> None:
    """Tell of an error that does not end the command."""
    text = error.spelled(as_flag) if isinstance(error, UserError) else str(error)
    note(f"moe-gguf: error: {shown(text, LINE_LIMIT)}")


def debugging() -> bool:
    return bool(click.get_current_context().find_root().params["debug"])


def quieten() -> None:
    """Keep llama.cpp's own log off the terminal unless debugging."""
    from .. import logs

    if debugging():
        logs.echo()
    else:
        logs.silence()


def prompt_text(prompt: str | None, file: str | None, wants_terminal: bool) -> str | None:
    """The prompt, or None for a conversation on the terminal."""
    if prompt is not None and file is not None:
        raise UserError("-p and -f exclude each other: give the prompt once")
    if prompt is not None:
        return argument_text(prompt, "-p")
    if file is not None:
        try:
            return _decode(Path(file).read_bytes(), file)
        except OSError as error:
            raise UserError(f"cannot read the prompt from {file} ({reason(error)})") from None
    if not sys.stdin.isatty():
        if text := _decode(sys.stdin.buffer.read(), "standard input"):
            return text
    elif wants_terminal:
        return None
    raise UserError("give a prompt with -p, -f or a pipe, or start a conversation with --chat")


def _decode(data: bytes, source: str) -> str:
    """Text without the line end that editors and ``echo`` put behind it."""
    try:
        return decoded(data).removesuffix("\n")
    except ValueError:
        raise UserError(f"{source} is not text in UTF-8: convert it first") from None


def argument_text(text: str, option: str) -> str:
    """An argument that is text; the system hands over bytes, and any."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"what {option} gives is not text in UTF-8: put it into a file") from None
    return text
