"""The command line as a person meets it: what goes where, exit codes, and one sentence per error.

Most commands run in this process, because starting one takes longer than a tiny model does. What
only a process of its own shows (signals, pipes, start-up time, its memory) is tested with one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import tiny
from chat_files import template, templates
from conftest import Command, TinyFile

from moe_gguf import Engine
from moe_gguf.policies.presets import POLICIES
from moe_gguf.runtime import budget as budgets
from moe_gguf.runtime.budget import Budget, Needs
from moe_gguf.runtime.chat.process import libraries
from moe_gguf.runtime.chat.templates import CHILDREN_BYTES
from moe_gguf.runtime.cli import main, run
from moe_gguf.runtime.cli.inspect import describe
from moe_gguf.runtime.cli.plan import plan_document
from moe_gguf.runtime.cli.replay import replay_document, replay_text
from moe_gguf.runtime.engine.request import Event, Finished, Sampling, Timings, Token
from moe_gguf.runtime.formats.gguf_header import read_header
from moe_gguf.runtime.sizes import MB

# The names every command and document uses.
STATS = {
    *("prefill_tps", "decode_tps", "hits", "misses", "hit_rate", "bytes_read", "bytes_per_token"),
    *("stall_s", "compute_s", "guesses", "guesses_used", "budget_bytes", "rss_peak_bytes"),
    *("slots", "policy", "reads", "device"),
}


@pytest.fixture
def model(tiny_file: TinyFile) -> Path:
    return tiny_file("qwen3moe")


def process(*args: object, **kwargs: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "moe_gguf", *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **kwargs,
    )


# --- run ----------------------------------------------------------------------------------------

ONE = ("--threads", 1)


def test_text_goes_to_stdout_and_mode_budget_and_stats_to_stderr(
    moe_gguf: Command, model: Path
) -> None:
    result = moe_gguf("run", model, *ONE, "-p", "Hello", "-n", 6, "--temp", 0)
    assert result.code == 0
    assert result.out.strip()
    mode, *table, stats = result.err.splitlines()
    rows = [line.split()[0] for line in table]
    assert rows == ["trunk", "KV", "compute", "process", "experts", "total"]
    for what in (
        model.name,
        "trunk",
        "KV",
        "compute",
        "experts",
        "process",
        "reads",
        "policy fate",
    ):
        assert what in mode
    assert "6 tokens" not in stats  # the first comes from the prefill
    assert "(5 tokens)" in stats


def test_json_is_one_document(moe_gguf: Command, model: Path) -> None:
    args = ("run", model, *ONE, "-p", "Hello", "-n", 6, "--temp", 0)
    document = json.loads(moe_gguf(*args, "--json").out)
    assert list(document) == ["text", "reasoning", "tokens", "prompt_tokens", "stats"]
    assert len(document["tokens"]) == 6
    assert document["text"] + "\n" == moe_gguf(*args).out
    assert set(document["stats"]) >= STATS
    assert document["stats"]["rss_peak_bytes"] > 0


def test_run_writes_a_timeline(moe_gguf: Command, model: Path, tmp_path: Path) -> None:
    args = ("run", model, *ONE, "-p", "Hello", "--temp", 0)
    file = tmp_path / "t.json"
    result = moe_gguf(*args, "-n", 4, "--timeline", file)
    assert result.out == moe_gguf(*args, "-n", 4).out
    assert result.err.splitlines()[-1].startswith(f"moe-gguf: wrote {file}: 1 token(s) in ")
    assert json.loads(file.read_text())["traceEvents"]
    nothing = moe_gguf(*args, "-n", 0, "--timeline", file)
    assert (nothing.code, "no token to draw" in nothing.err) == (2, True)
    absent = moe_gguf(*args, "--timeline", tmp_path / "absent" / "t.json").error(2)
    assert "its folder does not exist" in absent


def test_the_prompt_comes_from_an_option_a_file_or_a_pipe(
    moe_gguf: Command, model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompt"
    file.write_text("Hello world\n")
    args = ("run", model, *ONE, "-n", 4, "--temp", 0)
    option = moe_gguf(*args, "-p", "Hello world").out
    assert moe_gguf(*args, "-f", file).out == option
    assert moe_gguf(*args, stdin=b"Hello world\n").out == option


def test_a_seed_makes_sampling_repeatable(moe_gguf: Command, model: Path) -> None:
    args = ("run", model, *ONE, "-p", "Hello", "-n", 12, "--temp", 1.5)
    assert moe_gguf(*args, "--seed", 7).out == moe_gguf(*args, "--seed", 7).out
    assert moe_gguf(*args, "--seed", 7).out != moe_gguf(*args, "--seed", 8).out


def test_chat_uses_the_template(moe_gguf: Command, model: Path) -> None:
    args = ("run", model, *ONE, "-p", "Hello", "-n", 2, "--json")
    plain, chat = (json.loads(moe_gguf(*args, *more).out) for more in ((), ("--chat",)))
    assert chat["prompt_tokens"] > plain["prompt_tokens"]
    system = json.loads(moe_gguf(*args, "--chat", "--system", "Be brief").out)
    assert system["prompt_tokens"] > chat["prompt_tokens"]


def test_thoughts_are_told_apart_from_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe gets the answer, and the next prompt the thoughts where its template wants them."""
    made = templates(template("Qwen-Qwen3-0.6B"))
    prompt = made.apply([{"role": "user", "content": "hi"}])

    class Engine:
        templates = made

        @contextlib.contextmanager
        def submit(self, given: Any, **settings: Any) -> Iterator[list[Event]]:
            assert given is prompt
            pieces = ["<think>\nLet me", " see.", "\n</think>", "\n\nHello", " there"]
            none = Timings(0, 0, 0)
            ended = Finished("length", None, "!", 1, 0, 5, none)
            yield [*(Token(i, piece, None, none) for i, piece in enumerate(pieces)), ended]

    answer = run._Answer(Engine(), prompt)  # type: ignore[arg-type]
    answer.compute(9, Sampling(), run._tell)
    made.close()
    assert answer.tokens == [0, 1, 2, 3, 4]
    assert answer.said() == {
        "role": "assistant",
        "content": "Hello there!",
        "reasoning_content": "Let me see.",
    }
    said = capsys.readouterr()
    assert (said.out, said.err) == ("Hello there!", "Let me see.\n\n")


def test_chat_without_its_library_says_how_to_mend_it(
    moe_gguf: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_gguf.runtime.plugin.library.built_file", lambda name: None)
    libraries.cache_clear()
    result = moe_gguf("run", model, *ONE, "-p", "x", "--chat")
    libraries.cache_clear()
    assert result.code == 2
    assert "reinstall moe-gguf where pip can download it" in result.err
    assert len(result.err.splitlines()) == 1  # before anything is loaded


def test_chat_s_children_are_in_the_plan_and_in_the_run(moe_gguf: Command, model: Path) -> None:
    run = moe_gguf("run", model, *ONE, "-p", "x", "-n", 1, "--chat")
    plan = moe_gguf("plan", model, *ONE, "--chat")
    for told in (run.err, plan.out):
        assert "beside     67.1 MB" in told
    without = json.loads(moe_gguf("plan", model, *ONE, "--json").out)
    with_them = json.loads(moe_gguf("plan", model, *ONE, "--json", "--chat").out)
    assert with_them["beside_bytes"] == CHILDREN_BYTES
    more = with_them["smallest_bytes"] - without["smallest_bytes"]
    assert abs(more - CHILDREN_BYTES) <= 2 * MB


def with_template(model: Path, path: Path, old: bytes, new: bytes) -> Path:
    """The model with other text in its chat template, padded to the same length."""
    data = model.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new.ljust(len(old))))
    return path


def test_a_chat_template_that_refuses(moe_gguf: Command, model: Path, tmp_path: Path) -> None:
    old = b"<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    new = b"{{ m.content=='x' and raise_exception('?') }}"
    path = with_template(model, tmp_path / "m.gguf", old, new)
    result = moe_gguf("run", path, *ONE, "-p", "x", "--chat")
    assert result.code == 2
    assert "refuses this conversation" in result.err.splitlines()[-1]
    assert moe_gguf("run", path, *ONE, "-p", "x", "-n", 1).code == 0


def test_a_chat_template_that_is_none(moe_gguf: Command, model: Path, tmp_path: Path) -> None:
    path = with_template(model, tmp_path / "m.gguf", b"{% endfor %}", b"{% end")
    assert moe_gguf("run", path, *ONE, "-p", "x", "-n", 1).code == 0
    result = moe_gguf("run", path, *ONE, "-p", "x", "--chat")
    assert result.code == 2
    assert "chat template cannot be used" in result.err.splitlines()[-1]


def test_an_empty_prompt_begins_a_text(moe_gguf: Command, model: Path) -> None:
    assert moe_gguf("run", model, *ONE, "-p", "", "-n", 3, "--temp", 0).code == 0


def test_no_tokens_are_no_error(moe_gguf: Command, model: Path) -> None:
    assert moe_gguf("run", model, *ONE, "-p", "Hello", "-n", 0).out == "\n"


def test_a_context_smaller_than_llama_cpp_makes_them(moe_gguf: Command, model: Path) -> None:
    """llama.cpp rounds up to 256: a prompt that fits those once failed in the base class."""
    prompt = "Hello " * 20
    assert moe_gguf("run", model, *ONE, "--ctx", 8, "-p", prompt, "-n", 2).code == 0


def test_a_context_beyond_the_training_s_is_remarked(moe_gguf: Command, model: Path) -> None:
    result = moe_gguf("run", model, *ONE, "--ctx", 1024, "-p", "x", "-n", 1)
    assert result.code == 0
    assert "trained for a context of 512 tokens" in result.err


def test_fewer_experts_than_the_model_s_are_called_lossy(moe_gguf: Command, model: Path) -> None:
    result = moe_gguf("run", model, *ONE, "--experts-used", 2, "-p", "x", "-n", 1)
    assert "LOSSY: 2 experts used instead of 4" in result.err


def test_debug_works_anywhere_and_shows_what_llama_cpp_says(moe_gguf: Command, model: Path) -> None:
    args = ("run", model, *ONE, "-p", "x", "-n", 1)
    assert "llama_model_loader" not in moe_gguf(*args).err
    assert "llama_model_loader" in moe_gguf("--debug", *args).err
    assert "llama_model_loader" in moe_gguf(*args, "--debug").err
    failed = moe_gguf("run", "absent.gguf", "-p", "x", "--debug")
    assert "Traceback" in failed.err
    assert failed.code == 2


@pytest.mark.parametrize("layout", ["gemma4", "updown"])
def test_llama_cpp_s_remarks_stay_off_the_terminal(
    moe_gguf: Command, tiny_file: TinyFile, layout: str
) -> None:
    """These two make it warn while it makes the context."""
    result = moe_gguf("run", tiny_file(layout), *ONE, "-p", "x", "-n", 1)
    assert all(line.startswith(("moe-gguf: ", "  ")) for line in result.err.splitlines())


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-p", "x", "--memory", "lots"], "'lots' is not a size"),
        (["-p", "x", "--memory", "-1GB"], "'-1GB' is not a size"),
        (["-p", "x", "--memory", "40MB"], "smallest budget that works is"),
        (["-p", "x", "--memory", "40MB"], "a smaller --ctx also helps"),
        (["-p", "x", "--policy", "fifo"], "choose one of load-on-demand, lru, lfu"),
        (["-p", "x", "--reads", "mmap"], "use auto, direct, buffered"),
        (["-p", "x", "--lanes", "0"], "give 1 to 64, or auto"),
        (["-p", "x", "--lanes", "few"], "'few' is neither a number nor auto"),
        (["-p", "x", "--device", "cuda0"], "use --device auto"),
        (["-p", "x", "--experts-used", "17"], "this model has 16 experts"),
        (["-p", "x", "--experts-used", "0"], "this model has 16 experts"),
        (["-p", "x", "--threads", "0"], "'--threads'"),
        (["-p", "x", "--ctx", "-1"], "'--ctx'"),
        (["-p", "x", "-n", "-2"], "'-n'"),
        (["-p", "x", "--temp", "-1"], "'--temp'"),
        (["-p", "x", "--temp", "nan"], "'--temp'"),
        (["-p", "x", "--temp", "warm"], "'--temp'"),
        (["-p", "x", "--top-k", "-1"], "'--top-k'"),
        (["-p", "x", "--top-p", "1.1"], "'--top-p'"),
        (["-p", "x", "--seed", "-1"], "'--seed'"),
        (["-p", "x", "--system", "y"], "--chat"),
        (["-p", "x", "-f", "y"], "give the prompt once"),
        (["-p", "x", "--no-such-option"], "--no-such-option"),
        (["-f", "no/such/file"], "cannot read the prompt from no/such/file (no such file"),
        ([], "give a prompt with -p, -f or a pipe"),
        (["--chat"], "give a prompt with -p, -f or a pipe"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_gets_one_sentence_and_2(
    moe_gguf: Command, model: Path, args: list[str], message: str
) -> None:
    assert message in moe_gguf("run", model, *args).error(2)


@pytest.mark.parametrize("command", ["run", "inspect", "plan"])
def test_models_that_are_none(moe_gguf: Command, tmp_path: Path, command: str) -> None:
    text = tmp_path / "text.gguf"
    text.write_text("no model")
    prompt = ("-p", "x") if command == "run" else ()
    assert "no such file" in moe_gguf(command, tmp_path / "absent.gguf", *prompt).error(2)
    assert "is a folder" in moe_gguf(command, tmp_path, *prompt).error(2)
    assert str(text) in moe_gguf(command, text, *prompt).error(2)
    assert "download the GGUF" in moe_gguf(command, "hf:owner/name", *prompt).error(2)


def test_a_prompt_longer_than_the_context(moe_gguf: Command, model: Path) -> None:
    result = moe_gguf("run", model, *ONE, "-p", "Hello world " * 200)
    assert result.code == 2
    assert "but the context holds 512: shorten it or raise --ctx" in result.err.splitlines()[-1]


def test_a_prompt_that_is_not_text(moe_gguf: Command, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt"
    file.write_bytes(b"caf\xe9")
    assert "is not text in UTF-8" in moe_gguf("run", model, "-f", file).error(2)
    assert "is not text in UTF-8" in moe_gguf("run", model, stdin=b"caf\xe9").error(2)


def test_an_expert_that_cannot_be_read(
    moe_gguf: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of llama.cpp's own remarks on the failed step, and the sentence on its own line."""
    open_engine = run.open_engine

    def on_a_bad_disk(*args: Any, **options: Any) -> Engine:
        engine = open_engine(*args, **options)
        engine.arena.plugin.inject(60, errno.EIO)
        return engine

    monkeypatch.setattr(run, "open_engine", on_a_bad_disk)
    args = ("--policy", "load-on-demand", "-p", "Hello", "-n", 50, "--temp", 0)
    result = moe_gguf("run", model, *ONE, *args)
    assert result.code == 1
    assert result.out.endswith("\n")
    assert len(result.out) > 1
    error = result.err.splitlines()[-1]
    assert error.startswith("moe-gguf: error: ")
    assert model.name in error


def test_no_command_shows_help_and_a_wrong_one_is_named(moe_gguf: Command) -> None:
    nothing = moe_gguf()
    assert nothing.code == 2
    assert nothing.err.startswith("Usage:")
    assert "'fly'" in moe_gguf("fly").error(2)
    assert moe_gguf("--help").code == 0


@pytest.mark.parametrize("name", main.COMMANDS)
def test_the_list_of_commands_says_what_each_says_first(name: str) -> None:
    command = main.cli.get_command(click.Context(main.cli), name)
    assert command is not None
    assert command.help is not None
    assert " ".join(command.help.split("\n\n")[0].split()) == main.COMMANDS[name]


def test_the_unforeseen_is_a_sentence_too(
    moe_gguf: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> None:
        raise KeyError("no idea")

    monkeypatch.setattr("moe_gguf.runtime.cli.inspect.describe", broken)
    assert "--debug shows where" in moe_gguf("inspect", model).error(1)


# --- inspect and plan ---------------------------------------------------------------------------


def test_inspect_names_what_the_file_holds(moe_gguf: Command, tiny_file: TinyFile) -> None:
    path = tiny_file("deepseek2", mixed=True, split=True)
    document = json.loads(moe_gguf("inspect", path, "--json").out)
    assert document == json.loads(json.dumps(describe(path)))
    assert document["architecture"] == "deepseek2"
    assert len(document["files"]) == tiny.SPLIT_FILES
    assert document["moe_layers"] == [1, 2, 3]
    assert (document["n_experts"], document["n_experts_used"]) == (16, 4)
    assert document["n_experts_shared"] == 1
    assert document["expert_bytes"] == 16 * sum(document["blob_bytes"])
    assert {g["type"] for g in document["expert_tensors"]} >= {"Q6_K", "Q5_0", "F16"}

    text = moe_gguf("inspect", path).out
    for what in ("deepseek2", "in 3 files", "16 per layer, 4 used per token, 1 shared", "Q6_K"):
        assert what in text


def test_inspect_does_not_load_llama_cpp(model: Path) -> None:
    code = (
        "import sys; from moe_gguf.runtime.cli.inspect import describe, describe_text;"
        "from pathlib import Path; describe_text(describe(Path(sys.argv[1])));"
        "assert 'llama_cpp' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(model)], check=True)


@pytest.mark.parametrize("layout", ["qwen3moe", "gpt-oss", "mixtral", "llama4"])
def test_the_kv_bytes_of_a_token_are_those_plan_measures(tiny_file: TinyFile, layout: str) -> None:
    path = tiny_file(layout)
    per_token = describe(path)["kv_bytes_per_token"]
    kv_bytes = plan_document(path, n_ctx=512)["kv_bytes"]
    assert 512 * per_token == pytest.approx(kv_bytes, abs=0.01 * 2**20)


@pytest.mark.parametrize("layout", ["deepseek2", "updown", "gemma4"])
def test_the_kv_bytes_of_unusual_caches_are_not_guessed(tiny_file: TinyFile, layout: str) -> None:
    assert describe(tiny_file(layout))["kv_bytes_per_token"] is None


def test_plan_says_what_run_does(moe_gguf: Command, model: Path) -> None:
    planned = json.loads(moe_gguf("plan", model, "--memory", "600MB", "--json").out)
    ran = json.loads(moe_gguf("run", model, "--memory", "600MB", "-p", "x", "-n1", "--json").out)
    assert planned["fits"]
    assert planned["slots"] == ran["stats"]["slots"] == 48
    assert planned["budget_bytes"] == ran["stats"]["budget_bytes"]
    assert planned["working_set"] == 12
    low, high = planned["predicted"]["decode_tps"]
    assert low > 0
    assert high is None  # everything fits


def test_plan_s_table_adds_up(moe_gguf: Command, model: Path) -> None:
    smallest = json.loads(moe_gguf("plan", model, "--json").out)["smallest_bytes"]
    d = json.loads(moe_gguf("plan", model, "--memory", smallest, "--json").out)
    needs = [d[f"{name}_bytes"] for name in Needs._fields]
    assert sum(needs) + d["experts_bytes"] <= d["budget_bytes"] == smallest
    assert d["experts_bytes"] == d["slots"] * d["slot_bytes"]
    assert d["smallest_bytes"] < d["everything_fits_bytes"]
    text = moe_gguf("plan", model, "--memory", smallest).out
    assert "fits" in text
    assert "tok/s if every expert is read" in text


def test_a_plan_that_does_not_fit_is_an_answer_and_1(moe_gguf: Command, model: Path) -> None:
    result = moe_gguf("plan", model, "--memory", "40MB")
    assert result.code == 1
    assert "fits 40.0 MB: no, the smallest budget that works is" in result.out
    assert result.err == ""
    document = moe_gguf("plan", model, "--memory", "40MB", "--json")
    assert document.code == 1
    assert json.loads(document.out)["fits"] is False


def test_plan_reads_the_header_only(moe_gguf: Command, model: Path, tmp_path: Path) -> None:
    """So one can ask before a download is complete: behind the header, this file is a hole."""
    header = read_header(model).data_start
    path = tmp_path / "m.gguf"
    path.write_bytes(model.read_bytes()[:header])
    os.truncate(path, model.stat().st_size)
    whole, hole = (json.loads(moe_gguf("plan", m, "--json").out) for m in (model, path))
    for key in ("fits", "trunk_bytes", "kv_bytes", "compute_bytes", "slots"):
        assert hole[key] == whole[key]


# --- trace and replay ---------------------------------------------------------------------------


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``slots(n)``: every budget leaves n slots; in real ones a tiny model always fits whole."""

    def set_slots(n: int) -> None:
        def fit(total: int, needs: Needs, slot_bytes: int, n_all: int, working_set: int) -> Budget:
            return Budget(total, needs, slot_bytes, n, n_all, working_set)

        monkeypatch.setattr(budgets, "fit", fit)

    return set_slots


def test_warnings_and_refusals_spell_options_as_flags(
    moe_gguf: Command, model: Path, slots: Callable[[int], None]
) -> None:
    refused = json.loads(moe_gguf("plan", model, "--memory", "40MB", "--json").out)
    assert refused["reason"].endswith("a smaller --ctx also helps")
    slots(5)
    warned = moe_gguf("run", model, *ONE, "-p", "x", "-n", 1)
    assert "moe-gguf: warning: 5 slots are fewer than the 12 experts" in warned.err
    assert "with --policy lru nearly all" in warned.err
    planned = json.loads(moe_gguf("plan", model, "--json").out)
    assert "with --policy lru nearly all" in planned["warning"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("n_slots", [5, 14, 30, 48])
def test_a_replay_counts_what_the_engine_counted(
    moe_gguf: Command,
    model: Path,
    tmp_path: Path,
    slots: Callable[[int], None],
    policy: str,
    n_slots: int,
) -> None:
    """5 and 14 slots hold fewer experts than a layer of the prompt asks for."""
    slots(n_slots)
    file = tmp_path / "trace"
    prompt = "the token of the world is in a memory and to the expert"
    args = ("-p", prompt, "-n", 20, "-o", file, "--policy", policy)
    recorded = moe_gguf("trace", model, *ONE, *args)
    assert recorded.code == 0
    assert f"wrote {file}" in recorded.err
    document = replay_document(file, None, None)
    guessed = document["metadata"]["guesses"]
    assert not guessed or policy.startswith(("eap", "fate", "klotski"))
    assert document["guesses"] == policy.startswith(("eap", "fate", "klotski"))
    assert (f"guesses: those offered to {policy}" in replay_text(document)) == document["guesses"]
    assert document["recorded"]["policy"] == policy
    assert document["recorded"]["n_slots"] == n_slots
    assert document["recorded"]["hits"] + document["recorded"]["misses"] > 0
    assert document["recorded"]["reproduced"]
    (row,) = (r for r in document["rows"] if (r["policy"], r["slots"]) == (policy, n_slots))
    assert row["guesses"] == guessed
    if not guessed:  # else some may have been given up halfway
        assert row["bytes_read"] == document["metadata"]["bytes_read"]
    best = {r["slots"]: r["misses"] for r in document["rows"] if r["policy"] == "belady"}
    # Reading ahead can save a miss, not a read.
    assert all(r["misses"] + r["guesses"] >= best[r["slots"]] for r in document["rows"])


def test_replay_prints_a_table(
    moe_gguf: Command, model: Path, tmp_path: Path, slots: Callable[[int], None]
) -> None:
    slots(20)
    file = tmp_path / "trace"
    text = moe_gguf("trace", model, *ONE, "-p", "Hello", "-n", 8, "-o", file, "--policy", "lru")
    assert text.out.strip()
    result = moe_gguf("replay", file, "--policy", "lru,belady", "--slots", "12,20")
    assert result.code == 0
    head, verdict, guesses, titles, lru, belady = result.out.splitlines()
    assert "3 MoE layers x 16 experts" in head
    assert verdict.startswith("recorded: lru with 20 slots had ")
    assert verdict.endswith("replaying it gives the same")
    assert guesses.startswith("guesses: none were recorded")
    assert titles.split("  ")[-1] == "20 slots (42%)"
    assert lru.startswith("lru ")
    assert belady.startswith("belady ")
    document = json.loads(moe_gguf("replay", file, "--json").out)
    assert 20 in document["sizes"]
    assert len(document["rows"]) == len(document["sizes"]) * (len(POLICIES) + 1)


def test_replay_s_mistakes(moe_gguf: Command, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace"
    moe_gguf("trace", model, *ONE, "-p", "Hello", "-n", 1, "-o", file)
    assert "no such file" in moe_gguf("replay", tmp_path / "absent").error(2)
    assert "is not a routing trace" in moe_gguf("replay", model).error(2)
    assert "choose from" in moe_gguf("replay", file, "--policy", "fifo").error(2)
    for sizes in ("0", "a", "1,,2"):
        assert "arena" in moe_gguf("replay", file, "--slots", sizes).error(2)


@pytest.mark.parametrize("output", ["no/such/folder/trace", "."])
def test_a_trace_that_cannot_be_written_is_told_before_the_work(
    moe_gguf: Command, model: Path, output: str
) -> None:
    assert f"cannot write {output}" in moe_gguf("trace", model, "-p", "x", "-o", output).error(2)


# --- processes ----------------------------------------------------------------------------------


def test_help_answers_at_once() -> None:
    """Processor time, which a busy machine does not stretch."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert process("run", "--help").wait() == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.3


@pytest.mark.parametrize("args", ["--help", "fly", "run --help", "run m.gguf --no-such-option"])
def test_help_and_mistakes_import_neither_llama_cpp_nor_numpy(args: str) -> None:
    assert imported(args) == []


@pytest.mark.parametrize("name", [*main.COMMANDS, *main.HIDDEN])
def test_help_with_a_command_does_not_import_llama_cpp(name: str) -> None:
    assert "llama_cpp" not in imported(f"{name} --help")


def imported(args: str) -> list[str]:
    """Which of the packages that take long the command line imports."""
    code = """
import sys
from moe_gguf.runtime.cli.main import main
try:
    main()
except SystemExit:
    print([name for name in ("llama_cpp", "numpy") if name in sys.modules], file=sys.stderr)
"""
    command = [sys.executable, "-c", code, *args.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names: list[str] = json.loads(done.stderr.splitlines()[-1].replace("'", '"'))
    return names


def test_a_reader_that_leaves_ends_it_quietly(model: Path) -> None:
    with process("run", model, *ONE, "-p", "x", "--ctx", 8192) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        assert run.stdout.read(1)
        run.stdout.close()
        err = run.stderr.read().decode()
    assert run.returncode == 1
    assert "rror" not in err
    assert "Traceback" not in err


def test_ctrl_c_ends_with_what_was_said_and_130(model: Path) -> None:
    with process("run", model, *ONE, "-p", "x", "--ctx", 32768, "--json") as run:
        assert run.stderr is not None
        run.stderr.readline()  # the mode line: it is about to compute
        time.sleep(0.2)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=10)
    assert run.returncode == 130
    assert json.loads(out)["stats"]["decode_tokens"] > 0
    assert b"Traceback" not in err


def test_a_full_disk_is_told(model: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "moe_gguf", "inspect", str(model)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert run.returncode == 1
    assert "No space left" in run.stderr


def test_a_conversation_on_a_terminal(model: Path) -> None:
    """Ctrl-C stops an answer and the conversation goes on; Ctrl-D ends it."""
    terminal = Terminal("run", model, *ONE, "--chat", "--ctx", 32768)
    terminal.wait_for("Ctrl-D ends")
    terminal.wait_for("> ")
    terminal.send("Hello\r")
    terminal.wait_for("\n")
    time.sleep(0.3)
    terminal.send("\x03")
    terminal.wait_for("[stopped]")
    terminal.wait_for("> ")
    terminal.send("\r")  # nothing said, nothing answered
    terminal.wait_for("> ")
    terminal.send("\x04")
    terminal.wait_for("decode")
    assert terminal.exit_code() == 0


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, *args: object) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            argv = [sys.executable, "-m", "moe_gguf", *map(str, args)]
            os.execve(sys.executable, argv, {**os.environ, "TERM": "dumb"})
        self.unread = ""

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for(self, text: str, seconds: float = 20) -> None:
        """Read on until ``text``; what follows it is read next time."""
        deadline = time.monotonic() + seconds
        while text not in self.unread:
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {text!r} in {self.unread!r}"
            with contextlib.suppress(OSError):  # EIO: the command ended
                data = os.read(self.fd, 4096)
                self.unread += data.decode(errors="replace")
        self.unread = self.unread.split(text, 1)[1]

    def exit_code(self) -> int:
        with contextlib.suppress(OSError):
            while os.read(self.fd, 4096):
                pass
        _, status = os.waitpid(self.pid, 0)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


# --- the demo model -----------------------------------------------------------------------------


def test_carving_the_demo_model_does_not_count_as_running_it(tmp_path: Path) -> None:
    """A child carves: the first run takes no more memory than the second, which finds the file."""
    env = {**os.environ, "MOE_GGUF_CACHE": str(tmp_path)}
    args = ("--memory", "600MB", "--ctx", 256, "-p", "Sleep is", "-n", 2, "--temp", 0, "--json")
    stats = []
    for _ in range(2):
        with process("run", "demo", *args, env=env) as run:
            out, err = run.communicate(timeout=120)
        assert run.returncode == 0, err.decode()
        stats.append(json.loads(out)["stats"])
    first, second = (s["rss_peak_bytes"] for s in stats)
    assert first <= second + 10 * MB
    assert len(list(tmp_path.glob("*.gguf"))) == 1
