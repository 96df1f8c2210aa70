"""The command line's entry point: finds the command and turns exceptions into exit codes.

The command line is the only part of moe-gguf that reads the environment, the terminal and standard
input. Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 unusable
input, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

from .. import cache
from ..errors import UserError
from ..text import LINE_LIMIT, shown
from .options import spelling_of
from .terminal import note

# Each in a file of its name, imported only to run or to help with it: some need numpy, and help
# and mistakes should answer at once. The texts are the first sentences of the commands' own.
COMMANDS = {
    "batch": "Answer the requests in the file IN, OpenAI's batch lines, into the file OUT.",
    "bench": "Measure MODEL under a memory cap: stock llama.cpp against our policies, turn about.",
    "convert": "Make the bundle DST, a folder, from SRC: a GGUF, a Hugging Face folder or "
    "hf:owner/repo.",
    "inspect": "Show what is in MODEL: architecture, experts, sizes, types.",
    "plan": "Say whether MODEL fits a budget and what it would hold, without loading it.",
    "quality": "Score a text with MODEL: perplexity, and what a lossy setting costs against the "
    "lossless run.",
    "replay": "Replay TRACE under any policy and arena size, without the model.",
    "run": "Generate text with MODEL inside a memory budget.",
    "serve": "Serve MODEL over HTTP: OpenAI's and Anthropic's protocols, and a page at /.",
    "trace": "Record which experts MODEL routes to while it generates (greedily).",
}
HIDDEN = {"carve-demo": "demo"}  # and the file it is in


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in (*COMMANDS, *HIDDEN):
            return None
        module = importlib.import_module(f".{HIDDEN.get(name, name)}", __package__)
        command: click.Command = getattr(module, name.replace("-", "_"))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:  # spelled here, where it is known whose flags it speaks of
            assert ctx.invoked_subcommand is not None
            command = self.get_command(ctx, ctx.invoked_subcommand)
            assert command is not None
            error.args = (error.spelled(spelling_of(command)),)
            raise


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="moe-gguf")
@click.option("--debug", is_flag=True, help="show tracebacks and llama.cpp's log; works anywhere")
def cli(debug: bool) -> None:
    """Run Mixture-of-Experts GGUF models larger than memory."""
    if folder := os.environ.get("MOE_GGUF_CACHE"):
        cache.use(Path(folder))


def main() -> NoReturn:
    """Run the command that ``sys.argv`` names; an exception becomes one sentence and a code."""
    _open_streams()
    args = sys.argv[1:]
    if debug := "--debug" in args:  # anywhere, though click knows it in front only
        args = ["--debug", *(arg for arg in args if arg != "--debug")]
    try:
        sys.exit(cli.main(args, standalone_mode=False))
    except BrokenPipeError:  # the reader of our stdout left; nobody is there to be told
        _drop_unwritten()
        sys.exit(1)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        text, code = _explain(error)
    _drop_unwritten()
    note(text)
    sys.exit(code)


def _drop_unwritten() -> None:
    """What stdout does not take now it would not take at exit either, which then ends with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_streams() -> None:
    """Stand-ins for standard streams that whoever started us has closed.

    Else the next file opened, a model or a bundle, got its number, and what is printed went there.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            fd = os.open(os.devnull, os.O_RDWR)
            if fd != number:
                os.dup2(fd, number)
                os.close(fd)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def _explain(error: BaseException) -> tuple[str, int]:
    """What to say about an error, and the exit code."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return error.format_message(), 2
    if isinstance(error, click.UsageError):
        text, code = error.format_message(), 2
    elif isinstance(error, UserError):
        text, code = shown(error, LINE_LIMIT), 2
    elif isinstance(error, MemoryError):
        from ..system import shell_limits

        why = shell_limits() or str(error) or type(error).__name__
        text, code = f"the system refuses this process more memory ({why})", 1
    elif isinstance(error, KeyboardInterrupt | click.Abort):
        text, code = "interrupted", 130
    elif isinstance(error, OSError | RuntimeError | ValueError):
        text, code = shown(str(error) or type(error).__name__, LINE_LIMIT), 1
    else:
        text, code = f"{type(error).__name__}: {error}; this is a bug: --debug shows where", 1
    return f"moe-gguf: error: {text}", code
