"""``moe-gguf run``: text from a prompt, or a conversation."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ExpertReadError, UserError
from ..system import check_writable
from .model import open_engine
from .options import Number, model_options, prompt_options, state_options
from .terminal import argument_text, note, prompt_text, report_error

if TYPE_CHECKING:
    from ..chat.templates import Prompt
    from ..engine.engine import Engine
    from ..engine.request import Sampling

Tell = Callable[[str, str], None]  # more of the thoughts, more of the content


@click.command()
@model_options
@state_options
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
    from ..chat.process import libraries
    from ..engine.request import Sampling

    names = ("temp", "top_k", "top_p", "min_p", "repeat_penalty", "seed")
    sampling = Sampling(**{name: options.pop(name) for name in names})
    text = prompt_text(prompt, prompt_file, wants_terminal=chat)
    if system is not None and not chat:
        raise UserError("--system belongs to --chat: give both or neither")
    if system is not None:
        argument_text(system, "--system")
    if text is None and as_json:
        raise UserError("--json is for one answer: give a prompt with -p, -f or a pipe")
    if timeline_file is not None:
        check_writable(Path(timeline_file))
    if chat:
        libraries()  # before anything is loaded
    # Of one answer nothing is gone back to; in a conversation a state that cannot be cut is.
    kept = "auto" if text is None else 0
    engine = open_engine(model, kept=kept, chat=chat, **options)
    try:
        if timeline_file is not None:
            timeline.record(engine.arena)
        if text is None:
            _converse(engine, system, n_predict, sampling)
        else:
            _complete(engine, text, chat, system, n_predict, sampling, as_json)
        if timeline_file is not None:
            line = timeline.write(engine.arena, engine.last_step, Path(timeline_file))
            note(f"moe-gguf: wrote {timeline_file}: {line}")
    finally:
        engine.close()


def _complete(
    engine: Engine,
    text: str,
    chat: bool,
    system: str | None,
    n_predict: int,
    sampling: Sampling,
    as_json: bool,
) -> None:
    from ..stats import stats_line

    prompt = engine.templates.apply(_messages(system, text)) if chat else engine.encode(text)
    answer = _Answer(engine, prompt)
    interrupted = False
    try:
        answer.compute(n_predict, sampling, _quiet if as_json else _tell)
    except KeyboardInterrupt:
        interrupted = True
    except Exception:  # whatever it is: it goes on, only its sentence gets a line of its own
        if answer.tokens and not as_json:
            click.echo()
        raise
    stats = engine.stats()
    if as_json:
        document = {
            "text": answer.content,
            "reasoning": answer.reasoning,
            "tokens": answer.tokens,
            "prompt_tokens": answer.n_prompt,
            "stats": stats,
        }
        click.echo(json.dumps(document))
    else:
        click.echo()
    note(stats_line(stats))
    if interrupted:
        sys.exit(130)


def _converse(engine: Engine, system: str | None, n_predict: int, sampling: Sampling) -> None:
    """A conversation on the terminal; Ctrl-C stops an answer, Ctrl-D ends it."""
    from ..stats import stats_line

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() line editing and history
    _ = engine.templates.caps  # a model without one is told of before anything is typed
    messages = _messages(system)
    note("Type a message; Ctrl-C stops an answer, Ctrl-D ends the conversation.")
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            note("")
            break
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        answer = None
        try:
            answer = _Answer(engine, engine.templates.apply(messages))
            answer.compute(n_predict, sampling, _tell)
        except KeyboardInterrupt:
            note(" [stopped]")
        except ExpertReadError as error:  # the model stays usable
            note("")
            report_error(error)
        except UserError as error:  # the conversation outgrew the context
            report_error(error)
            break
        click.echo()
        if answer is None:
            messages.pop()
        else:
            messages.append(answer.said())
    note(stats_line(engine.stats()))


def _messages(system: str | None, *texts: str) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": "user", "content": text} for text in texts]


class _Answer:
    """What the model says to a prompt: the tokens of a text, or a conversation as its template
    writes it, whose answer has thoughts apart from its content."""

    def __init__(self, engine: Engine, prompt: list[int] | Prompt) -> None:
        self._engine, self._prompt = engine, prompt
        self._reader = None if isinstance(prompt, list) else engine.templates.parser(prompt)
        self.n_prompt = len(prompt if isinstance(prompt, list) else prompt.tokens)
        self.tokens: list[int] = []
        self.content = self.reasoning = ""

    def compute(self, n_predict: int, sampling: Sampling, tell: Tell) -> None:
        """Until it ends, and ``tell`` what comes; left early, it is cancelled."""
        from ..engine.request import Finished, Token

        if n_predict == 0:
            return
        most = None if n_predict < 0 else n_predict
        try:
            with self._engine.submit(self._prompt, max_tokens=most, sampling=sampling) as events:
                for event in events:
                    if isinstance(event, Token):
                        self.tokens.append(event.token)
                        self._read(event.text, tell)
                    elif isinstance(event, Finished):
                        self._read(event.text, tell, event.reason)
        except BaseException:  # what its reader holds back was said too
            self._read("", _quiet, "cancelled")
            raise

    def _read(self, text: str, tell: Tell, end: str | None = None) -> None:
        reasoning = ""
        if self._reader is not None:
            new = self._reader.finish(text, end != "stop") if end else self._reader.push(text)
            reasoning, text = new.reasoning, new.content
        self.reasoning += reasoning
        if text and self.reasoning and not self.content:
            reasoning += "\n\n"
        self.content += text
        tell(reasoning, text)

    def said(self) -> dict[str, str]:
        """As a message of the conversation."""
        thoughts = {"reasoning_content": self.reasoning} if self.reasoning else {}
        return {"role": "assistant", "content": self.content, **thoughts}


def _tell(reasoning: str, content: str) -> None:
    """Thoughts are no part of the text that a pipe gets."""
    click.secho(reasoning, nl=False, err=True, dim=True)
    click.echo(content, nl=False)


def _quiet(reasoning: str, content: str) -> None:
    pass
