"""``moe-gguf run``: text from a prompt, or a conversation."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ExpertReadError, UserError
from ..system import check_writable
from .model import open_llama
from .options import Number, model_options, prompt_options
from .terminal import argument_text, note, prompt_text, report_error

if TYPE_CHECKING:
    from ..generate import Sampling
    from ..llama import Llama


@click.command()
@model_options
@prompt_options
@click.option(
    "-n",
    "n_predict",
    default=-1,
    type=click.IntRange(min=-1),
    metavar="N",
    help="tokens to generate; -1: until the model ends",
)
@click.option("--chat", is_flag=True, help="use the model's chat template; converse on a terminal")
@click.option("--system", help="system message for --chat")
@click.option(
    "--temp",
    default=0.8,
    type=Number(0, 100),
    help="temperature; 0 is greedy",
    show_default=True,
)
@click.option("--top-k", default=40, type=click.IntRange(min=0), help="0: off", show_default=True)
@click.option("--top-p", default=0.95, type=Number(0, 1), show_default=True)
@click.option("--min-p", default=0.05, type=Number(0, 1), show_default=True)
@click.option("--repeat-penalty", default=1.0, type=Number(0.01, 100), show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**32 - 2), metavar="N", help="default: random")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document instead of text")
@click.option(
    "--timeline",
    "timeline_file",
    type=click.Path(),
    help="write what the last token's time went to, for ui.perfetto.dev",
)
def run(
    model: str,
    prompt: str | None,
    prompt_file: str | None,
    n_predict: int,
    chat: bool,
    system: str | None,
    as_json: bool,
    timeline_file: str | None,
    **options: Any,
) -> None:
    """Generate text with MODEL inside a memory budget.

    The prompt comes from -p, -f or a pipe; --chat without one starts a conversation.
    """
    from .. import timeline
    from ..generate import Sampling

    sampling = Sampling(
        *(options.pop(k) for k in ("temp", "top_k", "top_p", "min_p", "repeat_penalty", "seed"))
    )
    text = prompt_text(prompt, prompt_file, wants_terminal=chat)
    if system is not None and not chat:
        raise UserError("--system belongs to --chat: give both or neither")
    if system is not None:
        argument_text(system, "--system")
    if text is None and as_json:
        raise UserError("--json is for one answer: give a prompt with -p, -f or a pipe")
    if timeline_file is not None:
        check_writable(Path(timeline_file))
    llama = open_llama(model, **options)
    try:
        if timeline_file is not None:
            timeline.record(llama)
        if text is None:
            _converse(llama, system, n_predict, sampling)
        else:
            _complete(llama, text, chat, system, n_predict, sampling, as_json)
        if timeline_file is not None:
            note(f"moe-gguf: wrote {timeline_file}: {timeline.write(llama, Path(timeline_file))}")
    finally:
        llama.close()


def _complete(
    llama: Llama,
    text: str,
    chat: bool,
    system: str | None,
    n_predict: int,
    sampling: Sampling,
    as_json: bool,
) -> None:
    from ..generate import generate
    from ..prompts import Chat, encode
    from ..stats import stats_line

    tokens = Chat(llama, system).ask(text) if chat else encode(llama, text)
    pieces, interrupted = [], False
    try:
        for piece in generate(llama, tokens, n_predict, sampling):
            pieces.append(piece)
            if not as_json:
                click.echo(piece.text, nl=False)
    except KeyboardInterrupt:
        interrupted = True
    except Exception:  # whatever it is: it goes on, only its sentence gets a line of its own
        if pieces and not as_json:
            click.echo()
        raise
    stats = llama.stats()
    if as_json:
        document = {
            "text": "".join(piece.text for piece in pieces),
            "tokens": [piece.token for piece in pieces],
            "prompt_tokens": len(tokens),
            "stats": stats,
        }
        click.echo(json.dumps(document))
    else:
        click.echo()
    note(stats_line(stats))
    if interrupted:
        sys.exit(130)


def _converse(llama: Llama, system: str | None, n_predict: int, sampling: Sampling) -> None:
    """A conversation on the terminal; Ctrl-C stops an answer, Ctrl-D ends it."""
    from ..generate import generate
    from ..prompts import Chat
    from ..stats import stats_line

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() line editing and history
    chat = Chat(llama, system)
    note("Type a message; Ctrl-C stops an answer, Ctrl-D ends the conversation.")
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            note("")
            break
        if not text.strip():
            continue
        answer: list[str] = []
        try:
            for piece in generate(llama, chat.ask(text), n_predict, sampling):
                answer.append(piece.text)
                click.echo(piece.text, nl=False)
        except KeyboardInterrupt:
            note(" [stopped]")
        except ExpertReadError as error:  # the model stays usable
            note("")
            report_error(error)
        except UserError as error:  # the conversation outgrew the context
            report_error(error)
            break
        click.echo()
        chat.answer("".join(answer))
    note(stats_line(llama.stats()))
