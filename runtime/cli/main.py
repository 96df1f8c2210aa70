"""The command line. The only module that reads the environment, the terminal and standard input.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 unusable input,
130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import NoReturn

import click

from ..errors import UserError
from .options import note

# Imported when called for: some of them need numpy, and a mistake should be told at once.
COMMANDS = {
    "run": "run",
    "inspect": "inspect",
    "plan": "plan",
    "convert": "convert",
    "trace": "trace",
    "replay": "replay",
    "serve": "serve",
    "bench": "bench",
    "quality": "quality",
    "carve-demo": "demo",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f".{COMMANDS[name]}", __package__)
        command: click.Command = getattr(module, name.replace("-", "_"))
        return command


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="moe-gguf")
@click.option("--debug", is_flag=True, help="show tracebacks and llama.cpp's log; works anywhere")
def cli(debug: bool) -> None:
    """Run Mixture-of-Experts GGUF models larger than memory."""


def main() -> NoReturn:
    """Entry point: turns exceptions into one sentence and an exit code."""
    args = sys.argv[1:]
    if debug := "--debug" in args:  # anywhere, though click knows it in front only
        args = ["--debug", *(arg for arg in args if arg != "--debug")]
    try:
        sys.exit(cli.main(args, standalone_mode=False))
    except BrokenPipeError:  # the reader of our stdout left; nobody is there to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        text, code = _explained(error)
    note(text)
    sys.exit(code)


def _explained(error: BaseException) -> tuple[str, int]:
    """What to say about an error, and the exit code."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return error.format_message(), 2
    if isinstance(error, click.UsageError):
        text, code = error.format_message(), 2
    elif isinstance(error, UserError):
        text, code = error.spelled(_as_flag), 2
    elif isinstance(error, KeyboardInterrupt | click.Abort):
        text, code = "interrupted", 130
    elif isinstance(error, OSError | MemoryError | RuntimeError | ValueError):
        text, code = str(error) or type(error).__name__, 1
    else:
        text, code = f"{type(error).__name__}: {error}; this is a bug: --debug shows where", 1
    return f"moe-gguf: error: {text}", code


def _as_flag(name: str, value: str | None) -> str:
    """How the command line spells an option."""
    flag = f"--{name.replace('_', '-')}"
    return flag if value is None else f"{flag} {value}"
