"""The command line. The only module that reads the environment, the terminal and standard input.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 unusable input,
130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
import platformdirs

from moe_gguf.runtime.errors import ExpertReadError, UserError, reason

if TYPE_CHECKING:
    from moe_gguf.runtime.generate import Sampling
    from moe_gguf.runtime.llama import Llama

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
    from moe_gguf.runtime import logs

    if not debugging():
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


class _Number(click.FloatRange):
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
        type=_Number(0, 1),
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
    from moe_gguf.runtime.llama import Llama
    from moe_gguf.runtime.progress import bar

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
    assert llama.opened.budget is not None
    note(llama.opened.budget.table())
    if warning := llama.opened.budget.warning():
        note(f"moe-gguf: warning: {warning}")
    if llama.opened.options.warm:
        note(llama.opened.warm_line())
    if llama.n_ctx() > (trained := llama.opened.layout.n_ctx_train):
        note(f"moe-gguf: warning: this model was trained for a context of {trained} tokens only")
    return llama


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="moe-gguf")
@click.option("--debug", is_flag=True, help="show tracebacks and llama.cpp's log; works anywhere")
def cli(debug: bool) -> None:
    """Run Mixture-of-Experts GGUF models larger than memory."""


@cli.command()
@model_options
@warm_option
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
    type=_Number(0, 100),
    help="temperature; 0 is greedy",
    show_default=True,
)
@click.option("--top-k", default=40, type=click.IntRange(min=0), help="0: off", show_default=True)
@click.option("--top-p", default=0.95, type=_Number(0, 1), show_default=True)
@click.option("--min-p", default=0.05, type=_Number(0, 1), show_default=True)
@click.option("--repeat-penalty", default=1.0, type=_Number(0.01, 100), show_default=True)
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
    from moe_gguf.runtime import timeline
    from moe_gguf.runtime.generate import Sampling

    sampling = Sampling(
        *(options.pop(k) for k in ("temp", "top_k", "top_p", "min_p", "repeat_penalty", "seed"))
    )
    text = _prompt_text(prompt, prompt_file, wants_terminal=chat)
    if system is not None and not chat:
        raise UserError("--system belongs to --chat: give both or neither")
    if text is None and as_json:
        raise UserError("--json is for one answer: give a prompt with -p, -f or a pipe")
    if timeline_file is not None:
        _check_writable(Path(timeline_file))
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


def _prompt_text(prompt: str | None, file: str | None, wants_terminal: bool) -> str | None:
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


def _complete(
    llama: Llama,
    text: str,
    chat: bool,
    system: str | None,
    n_predict: int,
    sampling: Sampling,
    as_json: bool,
) -> None:
    from moe_gguf.runtime.generate import Chat, encode, generate

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
    from moe_gguf.runtime.generate import Chat, generate

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
        said: list[str] = []
        try:
            for piece in generate(llama, chat.ask(text), n_predict, sampling):
                said.append(piece.text)
                click.echo(piece.text, nl=False)
        except KeyboardInterrupt:
            note(" [stopped]")
        except ExpertReadError as error:  # the model stays usable
            note(f"\nmoe-gguf: error: {error}")
        except UserError as error:  # the conversation outgrew the context
            note(f"moe-gguf: error: {error}")
            break
        click.echo()
        chat.answer("".join(said))
    note(stats_line(llama.stats()))


def stats_line(stats: dict[str, Any]) -> str:
    from moe_gguf.runtime.budget import format_size

    demanded = stats["hits"] + stats["misses"]
    low = f", {stats['low_share']:.1%} computed from low copies" if stats["low_share"] else ""
    return (
        f"moe-gguf: prefill {stats['prefill_tps']:.1f} tok/s ({stats['prefill_tokens']} tokens), "
        f"decode {stats['decode_tps']:.2f} tok/s ({stats['decode_tokens']} tokens); "
        f"hits {stats['hits']} of {demanded} ({stats['hit_rate']:.1%}){low}; "
        f"read {format_size(stats['bytes_read'])} ({format_size(stats['bytes_per_token'])} per "
        f"token), stalled {stats['stall_s']:.2f} s; peak {format_size(stats['rss_peak_bytes'])} of "
        f"{format_size(stats['budget_bytes'])}"
    )


@cli.command()
@click.argument("model", metavar="MODEL")
@click.option("--json", "as_json", is_flag=True)
@click.option("--verify", "verified", is_flag=True, help="read a bundle whole, compare checksums")
def inspect(model: str, as_json: bool, verified: bool) -> None:
    """Show what is in MODEL: architecture, experts, sizes, types.

    Exits with 1 when --verify finds a difference.
    """
    from moe_gguf.runtime.describe import describe, describe_text

    path = resolve(model)
    document = describe(path)
    if verified:
        document["damage"] = _verify(path)
    click.echo(json.dumps(document) if as_json else describe_text(document))
    if document.get("damage"):
        sys.exit(1)


def _verify(path: Path) -> list[str]:
    """Compare a bundle with its checksums and say on stderr what came of it; the findings."""
    from moe_gguf.converters.verify import verify
    from moe_gguf.runtime.bundle import is_bundle
    from moe_gguf.runtime.progress import bar

    if not is_bundle(path):
        raise UserError(f"{path} has no checksums to verify: only bundles do, see convert")
    with bar(f"verifying {path.name}", in_bytes=True) as progress:
        findings = verify(path, progress)
    for finding in findings:
        note(f"moe-gguf: error: {finding}; convert the model again")
    if not findings:
        note(f"moe-gguf: verified {path}: every byte is as it was written")
    return findings


@cli.command()
@click.argument("source", metavar="SRC")
@click.argument("folder", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--quant",
    metavar="TYPE",
    help="type of the experts: q4_k, q8_0, f16, …; the trunk gets llama.cpp's mix for it; "
    "default: copy for a GGUF, whose bytes stay, q4_k for a Hugging Face checkpoint",
)
@click.option("--low-quant", metavar="TYPE", help="also write a smaller copy of every expert")
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="importance matrix of llama-imatrix, GGUF or .dat",
)
@click.option(
    "--layout",
    default="auto",
    metavar="NAME",
    help="of the experts: plain as in any GGUF, repacked for this CPU's kernels, or auto",
    show_default=True,
)
@click.option("--shard-size", metavar="SIZE", help="start a new expert file before this size")
@click.option(
    "--threads",
    type=click.IntRange(1, 512),
    metavar="N",
    help="that quantize; default: one per core",
)
@click.option("--verify", "verified", is_flag=True, help="read the bundle again at the end")
def convert(
    source: str,
    folder: Path,
    quant: str | None,
    low_quant: str | None,
    imatrix: Path | None,
    layout: str,
    shard_size: str | None,
    threads: int | None,
    verified: bool,
) -> None:
    """Make the bundle DST, a folder, from SRC: a GGUF, a Hugging Face folder or hf:owner/repo.

    An interrupted conversion goes on where it stopped when the same command is given again.
    """
    from moe_gguf.converters.convert import Options, open_source
    from moe_gguf.converters.convert import convert as run_convert
    from moe_gguf.runtime.budget import parse_size
    from moe_gguf.runtime.progress import bar

    def say(text: str) -> None:
        note(f"moe-gguf: {text}")

    quieten()
    shard_bytes = None if shard_size is None else parse_size(shard_size)
    options = Options(quant, low_quant, imatrix, layout, shard_bytes, threads)
    try:
        with (
            contextlib.closing(open_source(_checkpoint(source))) as opened,
            bar(f"converting {opened.name}", in_bytes=True) as progress,
        ):
            summary = run_convert(opened, folder, options, progress, say)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on where this one stopped")
        sys.exit(130)
    say(f"wrote {folder}")
    for line in summary.lines():
        note(line)
    if verified and _verify(folder):
        sys.exit(1)


def _checkpoint(source: str) -> Path:
    """The file or folder a SRC argument names."""
    if not source.startswith("hf:"):
        return resolve(source)
    from moe_gguf.converters.hub import download

    return download(source)


@cli.command()
@model_options
@click.option("--json", "as_json", is_flag=True)
def plan(model: str, as_json: bool, **options: Any) -> None:
    """Say whether MODEL fits a budget and what it would hold, without loading it.

    Exits with 1 when it does not fit.
    """
    from moe_gguf.runtime.planner import plan_document, plan_text
    from moe_gguf.runtime.progress import bar

    quieten()
    path = resolve(model)
    with bar(f"measuring {path.name}"):  # like run: the process has the same size then
        document = plan_document(path, verbose=debugging(), **options)
    click.echo(json.dumps(document) if as_json else plan_text(document))
    if not document["fits"]:
        sys.exit(1)


@cli.command()
@model_options
@warm_option
@prompt_options
@click.option(
    "-n", "n_predict", default=128, type=click.IntRange(min=1), metavar="N", show_default=True
)
@click.option("--chat", is_flag=True, help="use the model's chat template")
@click.option("-o", "--output", required=True, type=click.Path(), help="the trace file to write")
@click.option(
    "--save-routing",
    is_flag=True,
    help="also add to the statistics beside MODEL that --warm starts from",
)
def trace(
    model: str,
    prompt: str | None,
    prompt_file: str | None,
    n_predict: int,
    chat: bool,
    output: str,
    save_routing: bool,
    **options: Any,
) -> None:
    """Record which experts MODEL routes to while it generates (greedily)."""
    from moe_gguf.policies.trace import TraceRecorder
    from moe_gguf.runtime.generate import Chat, Sampling, encode, generate
    from moe_gguf.runtime.routing import load
    from moe_gguf.runtime.traces import add_routing, trace_metadata

    text = _prompt_text(prompt, prompt_file, wants_terminal=False)
    assert text is not None
    _check_writable(Path(output))
    recorder = TraceRecorder()
    llama = open_llama(model, recorder=recorder, **options)
    opened = llama.opened
    try:
        if save_routing:  # so that mistakes show now
            _check_writable(opened.routing_path)
            load(opened.routing_path, opened.routing_identity)
        tokens = Chat(llama).ask(text) if chat else encode(llama, text)
        interrupted = False
        try:
            for piece in generate(llama, tokens, n_predict, Sampling(temp=0.0)):
                click.echo(piece.text, nl=False)
        except KeyboardInterrupt:
            interrupted = True
        click.echo()
        recorded = recorder.save(Path(output), trace_metadata(llama, complete=not interrupted))
        note(stats_line(llama.stats()))
        note(f"moe-gguf: wrote {output}" + (", up to the interrupt" if interrupted else ""))
        if save_routing:
            path, identity = opened.routing_path, opened.routing_identity
            note(f"moe-gguf: {add_routing(path, identity, opened.gate_recall(), recorded)}")
    finally:
        llama.close()
    if interrupted:
        sys.exit(130)


def _check_writable(path: Path) -> None:
    """Raise now what would be raised after the work."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: its folder does not exist")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: its folder may not be written to")


@cli.command()
@click.argument("trace_file", metavar="TRACE", type=click.Path())
@click.option(
    "--policy", "policies", default=None, metavar="A,B,…", help="default: every policy and belady"
)
@click.option(
    "--slots",
    default=None,
    metavar="N,…",
    help="arena sizes; default: the recorded one and a range",
)
@click.option("--json", "as_json", is_flag=True)
def replay(trace_file: str, policies: str | None, slots: str | None, as_json: bool) -> None:
    """Replay TRACE under any policy and arena size, without the model."""
    from moe_gguf.runtime.traces import replay_document, replay_text

    document = replay_document(Path(trace_file), policies, slots)
    click.echo(json.dumps(document) if as_json else replay_text(document))


@cli.command()
@model_options
@warm_option
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option(
    "--port",
    default=8080,
    type=click.IntRange(0, 65535),
    help="0: any that is free",
    show_default=True,
)
@click.option("--api-key", envvar="MOE_GGUF_API_KEY", show_envvar=True, help="require this key")
def serve(model: str, host: str, port: int, api_key: str | None, **options: Any) -> None:
    """Serve MODEL over the OpenAI API (llama-cpp-python's server, one request at a time)."""
    from moe_gguf.runtime import server

    listener = server.listen(host, port)
    llama = open_llama(model, **options)
    try:
        server.serve(llama, listener, api_key)
    finally:
        llama.close()


@cli.command()
@click.argument("model", metavar="MODEL")
@click.option(
    "--memory",
    required=True,
    metavar="SIZE,…",
    help="the cap of every limited row; several are measured turn about",
)
@click.option(
    "--rows",
    default="stock-mmap,stock-resident,load-on-demand,lru,lfu",
    show_default=True,
    help="what to measure",
)
@click.option("--repeat", default=3, show_default=True, help="runs of each row, turn about")
@click.option("-n", "n_predict", default=64, show_default=True, help="decoded tokens per run")
@click.option("--prompt-tokens", default=64, show_default=True)
@click.option("--ctx", "n_ctx", default=1024, show_default=True)
@click.option("--threads", type=int, metavar="N")
@click.option("--reads", default="auto", metavar="MODE")
@lanes_option
@warm_option
@low_options
@click.option("--disk-bw", metavar="SIZE", help="let every row read that much per second only")
@click.option("--json", "json_file", type=click.Path(), help="write the results here")
@click.option("--plot", "plot_file", type=click.Path(), help="write a PNG of decode speed here")
@click.option(
    "--plot-layers",
    "layers_file",
    type=click.Path(),
    help="write a PNG of hits and recall by layer here",
)
@click.option(
    "--timeline",
    "timeline_file",
    type=click.Path(),
    help="write what one more token's time went to, for ui.perfetto.dev",
)
@click.option("--timeline-row", metavar="NAME", help="of which row; default: the last of ours")
def bench(model: str, **options: Any) -> None:
    """Measure MODEL under a memory cap: stock llama.cpp against our policies, turn about."""
    from moe_gguf.runtime.bench import bench as run_bench
    from moe_gguf.runtime.bench_report import table

    outcome = run_bench(resolve(model), note=note, **options)
    click.echo(table(outcome.document))
    for error in outcome.errors:
        note(f"moe-gguf: ERROR: {error}")
    if outcome.interrupted or outcome.errors:
        sys.exit(130 if outcome.interrupted else 1)


@cli.command()
@model_options
@click.option(
    "-f", "--file", "text_file", type=click.Path(), help="the text; default: a piece of plain prose"
)
@click.option(
    "--against",
    metavar="MODEL",
    help="compare with this model's lossless run instead of MODEL's own",
)
@click.option(
    "--batch",
    "n_batch",
    default=512,
    type=click.IntRange(1, 4096),
    metavar="N",
    help="tokens per step; 1 measures what generation does",
    show_default=True,
)
@click.option("--json", "as_json", is_flag=True)
def quality(
    model: str,
    text_file: str | None,
    against: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Score a text with MODEL: perplexity, and what a lossy setting costs against the lossless run.

    The text is read in chunks of --ctx tokens (default 512).
    """
    from moe_gguf.runtime.bench_row import PROSE
    from moe_gguf.runtime.progress import bar
    from moe_gguf.runtime.quality import quality as run_quality
    from moe_gguf.runtime.quality import quality_text

    text = PROSE if text_file is None else _prompt_text(None, text_file, wants_terminal=False)
    assert text is not None
    path = resolve(model)
    other = None if against is None else resolve(against)
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    document = run_quality(
        path, text, against=other, open_model=open_llama, progress=bar, folder=folder, **options
    )
    click.echo(json.dumps(document) if as_json else quality_text(document))


@cli.command(hidden=True)
def carve_demo() -> None:
    """Make the demo model unless it is there, and print its path."""
    from moe_gguf.converters.demo import demo_model
    from moe_gguf.runtime.progress import bar

    with bar("carving the demo model") as progress:
        path = demo_model(cache_dir(), progress)
    click.echo(path)


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
        text, code = str(error), 2
    elif isinstance(error, KeyboardInterrupt | click.Abort):
        text, code = "interrupted", 130
    elif isinstance(error, OSError | MemoryError | RuntimeError | ValueError):
        text, code = str(error) or type(error).__name__, 1
    else:
        text, code = f"{type(error).__name__}: {error}; this is a bug: --debug shows where", 1
    return f"moe-gguf: error: {text}", code
