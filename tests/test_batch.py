"""Batch files: every line answered exactly once, whatever is in it and however often a run dies."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, TinyFile
from harness import fix_slots
from scripted import ByteTexts, Scripted, answer, echo

from moe_gguf import Engine
from moe_gguf.policies.trace import load_trace
from moe_gguf.runtime.api.texts import EngineTexts
from moe_gguf.runtime.batch import job as job_module
from moe_gguf.runtime.batch import lines as line_module
from moe_gguf.runtime.batch import output as output_module
from moe_gguf.runtime.batch.answers import Answerer
from moe_gguf.runtime.batch.figures import Figures, summary
from moe_gguf.runtime.batch.job import Batch, Broken
from moe_gguf.runtime.batch.lines import extent
from moe_gguf.runtime.batch.output import Output
from moe_gguf.runtime.batch.workload import workload
from moe_gguf.runtime.cli.replay import replay_document
from moe_gguf.runtime.engine.planner import Workload
from moe_gguf.runtime.engine.request import EngineClosed, Request
from moe_gguf.runtime.errors import ExpertReadError, RequestError, UserError

N_LINES = int(os.environ.get("BATCH_LINES", "60"))
N_KILLS = int(os.environ.get("BATCH_KILLS", "3"))


def asked(custom_id: str, prompt: Any = "abc", url: str = "/v1/completions", **body: Any) -> str:
    line = {
        "custom_id": custom_id,
        "method": "POST",
        "url": url,
        "body": {"prompt": prompt, **body},
    }
    return json.dumps(line)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "in.jsonl"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def read(target: Path) -> list[dict[str, Any]]:
    data = target.read_bytes()
    assert not data or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def by_id(target: Path) -> dict[str, dict[str, Any]]:
    answers = read(target)
    found = {one["custom_id"]: one for one in answers}
    assert len(found) == len(answers)
    return found


def text(one: dict[str, Any]) -> str:
    assert one["error"] is None
    assert one["response"]["status_code"] == 200
    answered: str = one["response"]["body"]["choices"][0]["text"]
    return answered


# --- lines --------------------------------------------------------------------------------------


def test_every_line_is_answered_by_its_id(source: Path, target: Path) -> None:
    source.write_text("\n".join(asked(f"id-{i}", f"text {i}") for i in range(50)) + "\n")
    figures = answer(source, target)
    assert {name: text(one) for name, one in by_id(target).items()} == {
        f"id-{i}": f"TEXT {i}" for i in range(50)
    }
    assert figures.n_done == figures.n_answered == 50


def test_a_line_that_is_no_request_becomes_its_error(source: Path, target: Path) -> None:
    long = asked("long", "x" * 200)
    with pytest.MonkeyPatch.context() as patch:
        for module in (line_module, output_module):
            patch.setattr(module, "MOST_BYTES", 180)
        source.write_bytes(
            b"\xef\xbb\xbf"  # a byte order mark
            + b"\r\n".join(
                [
                    asked("first", "ä\u2028ö 🜁").encode(),
                    b"",
                    b"not json",
                    b"[1, 2]",
                    b"\xff\xfe",
                    b"[" * 170,
                    b'{"custom_id": "nan", "body": NaN}',
                    b'{"url": "/v1/completions"}',
                    b'{"custom_id": 7, "url": "/v1/completions"}',
                    b'{"custom_id": "get", "method": "GET", "url": "/v1/completions"}',
                    asked("elsewhere", url="/v1/embeddings").encode(),
                    b'{"custom_id": "no body", "url": "/v1/completions"}',
                    asked("first", "again").encode(),
                    long.encode(),
                    b"  \t ",
                    asked("last").encode(),  # without a line end
                ]
            )
        )
        figures = answer(source, target)
    answers = read(target)
    assert len(answers) == 14 == figures.n_asked
    number = {int(one["id"].split("_")[2]): one for one in answers}
    assert text(number[1]) == "ä\u2028ö 🜁"  # capitals are ASCII only
    codes = {n: one["error"]["code"] for n, one in number.items() if one["error"]}
    invalid = dict.fromkeys((3, 4, 5, 6, 7), "invalid_json")
    assert codes == invalid | {
        8: "invalid_custom_id",
        9: "invalid_custom_id",
        10: "invalid_method",
        11: "invalid_url",
        13: "duplicate_custom_id",
        14: "line_too_long",
    }
    assert number[11]["custom_id"] == "elsewhere"
    assert number[3]["custom_id"] is None
    assert number[12]["response"]["status_code"] == 400
    assert text(number[16]) == "ABC"
    before = target.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        for module in (line_module, output_module):
            patch.setattr(module, "MOST_BYTES", 180)
        assert answer(source, target).n_before == 14
    assert target.read_bytes() == before


def test_a_body_that_cannot_be_answered_gets_a_status_and_a_param(
    source: Path, target: Path
) -> None:
    source.write_text(
        "\n".join(
            [
                asked("hot", temperature="hot"),
                asked("grammar", grammar="bad"),
                asked("fine"),
            ]
        )
    )

    def script(request: Request) -> bytes:
        if request.constraint is not None:
            raise RequestError("the grammar cannot be used")
        return echo(request)

    figures = answer(source, target, Scripted(script))
    answers = by_id(target)
    assert text(answers["fine"]) == "ABC"
    for name, param in (("hot", "temperature"), ("grammar", None)):
        assert answers[name]["error"] is None
        assert answers[name]["response"]["status_code"] == 400
        error = answers[name]["response"]["body"]["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
    assert (figures.n_answered, figures.n_refused, figures.n_failed) == (1, 2, 0)


def test_a_line_of_ten_megabytes(source: Path, target: Path) -> None:
    prompt = "lorem ipsum " * 830_000
    source.write_text("\n".join([asked("long", prompt), asked("short")]))
    answer(source, target)
    answers = by_id(target)
    error = answers["long"]["response"]["body"]["error"]
    assert error["code"] == "context_length_exceeded"
    assert text(answers["short"]) == "ABC"


def test_an_empty_file_is_done(source: Path, target: Path) -> None:
    source.write_bytes(b"")
    assert answer(source, target).n_asked == 0
    assert target.read_bytes() == b""


def test_any_reader_can_split_the_output(source: Path, target: Path) -> None:
    """Unicode knows more line ends than JSON lines do, and half surrogates are in no encoding."""
    names = ["a\u2028b", "c\x85d", "\ud800 half", "日本"]
    source.write_text("\n".join(asked(name, name) for name in names))
    answer(source, target)
    found = [json.loads(line)["custom_id"] for line in target.read_text().splitlines()]
    assert sorted(found) == sorted(names)


# --- what is asked of the engine ----------------------------------------------------------------


def test_no_more_is_submitted_than_the_window(source: Path, target: Path) -> None:
    source.write_text("\n".join(asked(f"{i}", ["a", "b", "c"], n=2) for i in range(40)))
    engine = Scripted()
    answer(source, target, engine, window=5)
    assert len(engine.requests) == 240
    assert engine.most <= 5


def test_prompts_that_begin_alike_follow_each_other(source: Path, target: Path) -> None:
    names = [f"{topic} {i}" for i in range(9) for topic in ("one", "two", "three")]
    source.write_text("\n".join(asked(name, name) for name in names))
    engine = Scripted()
    answer(source, target, engine, window=1)
    begun = [bytes(request.tokens[1:4]) for request in engine.requests]
    assert begun == sorted(begun)


def test_a_read_that_fails_once_costs_nothing(source: Path, target: Path) -> None:
    source.write_text("\n".join(asked(f"{i}", f"{i}") for i in range(20)))
    failed: set[bytes] = set()

    def script(request: Request) -> bytes:
        prompt = echo(request)
        if prompt not in failed:
            failed.add(prompt)
            raise ExpertReadError("EIO")
        return prompt

    assert answer(source, target, Scripted(script)).n_answered == 20


def test_an_expert_that_cannot_be_read_fails_its_lines(source: Path, target: Path) -> None:
    source.write_text("\n".join(asked(f"{i}", f"{i}") for i in range(20)))

    def script(request: Request) -> bytes:
        if echo(request).endswith(b"7"):
            raise ExpertReadError("expert 7 cannot be read")
        return echo(request)

    figures = answer(source, target, Scripted(script))
    assert (figures.n_answered, figures.n_failed) == (18, 2)
    response = by_id(target)["17"]["response"]
    assert response["status_code"] == 500
    assert response["body"]["error"]["type"] == "server_error"


def test_a_broken_disk_does_not_fail_all_lines(source: Path, target: Path) -> None:
    source.write_text("\n".join(asked(f"{i}") for i in range(200)))

    def script(_: Request) -> bytes:
        raise ExpertReadError("the disk is gone")

    with pytest.raises(Broken, match="16 lines in a row failed: the disk is gone"):
        answer(source, target, Scripted(script))
    assert len(read(target)) < 40


def test_an_engine_that_closes_ends_the_batch(source: Path, target: Path) -> None:
    source.write_text("\n".join(asked(f"{i}") for i in range(20)))

    def script(_: Request) -> bytes:
        raise EngineClosed

    with pytest.raises(EngineClosed):
        answer(source, target, Scripted(script))
    assert read(target) == []


def test_a_planner_is_told_what_to_expect(source: Path) -> None:
    source.write_text(
        "\n".join(
            [
                asked("a", "x" * 40, max_tokens=8),
                asked("b", ["x" * 80, [1] * 30], max_tokens=16),
                asked("c", [5] * 20),
                "{",
                asked("d", 7),
            ]
        )
    )
    assert workload(source, 50) == Workload(20, 12, 40)
    source.write_text("")
    assert workload(source, 0) == Workload(most=1)


# --- the output file ----------------------------------------------------------------------------


@pytest.fixture
def done(source: Path, target: Path) -> list[bytes]:
    """Ten lines, answered: the lines of the output."""
    source.write_text("\n".join(asked(f"id-{i}", f"text {i}") for i in range(10)))
    answer(source, target)
    return target.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    "torn",
    [b"", b"{", b'{"id": "batch_', b'{"id": "batch_req_10_00', b"\0" * 4096, None],
    ids=["nothing", "one byte", "half an id", "an id", "a power cut", "all but the line end"],
)
def test_a_torn_last_line(
    source: Path, target: Path, done: list[bytes], torn: bytes | None
) -> None:
    tail = done[-1][:-1] if torn is None else torn
    target.write_bytes(b"".join(done[:-1]) + tail)
    engine = Scripted()
    answer(source, target, engine)
    assert len(by_id(target)) == 10
    assert len(engine.requests) == (0 if torn is None else 1)


def test_answers_that_were_removed_are_computed_again(
    source: Path, target: Path, done: list[bytes]
) -> None:
    target.write_bytes(b"".join(done[::2]))
    engine = Scripted()
    figures = answer(source, target, engine)
    assert len(by_id(target)) == 10
    assert (figures.n_before, len(engine.requests)) == (5, 5)


def test_lines_that_were_added_are_answered(source: Path, target: Path, done: list[bytes]) -> None:
    source.write_text(f"{source.read_text()}\n{asked('id-10')}\n{asked('id-3')}\n")
    answer(source, target)
    answers = read(target)
    assert len(answers) == 12
    assert [one["error"]["code"] for one in answers if one["error"]] == ["duplicate_custom_id"]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("id-4", "other"),
        lambda text: text.replace("text 4", "text 5"),
        lambda text: "\n".join(text.splitlines()[:5]),
        lambda text: "\n".join(reversed(text.splitlines())),
    ],
    ids=["another id", "another body", "fewer lines", "another order"],
)
def test_an_output_of_another_input_is_refused(
    source: Path, target: Path, done: list[bytes], change: Any
) -> None:
    source.write_text(change(source.read_text()))
    before = target.read_bytes()
    with pytest.raises(UserError, match="belongs to another input"):
        answer(source, target)
    assert target.read_bytes() == before


@pytest.mark.parametrize("foreign", ["notes", "notes\n", '{"id": "x"}\n', "\n\nx\n"])
def test_a_file_that_is_no_output_is_left_alone(source: Path, target: Path, foreign: str) -> None:
    source.write_text(asked("a"))
    target.write_text(foreign)
    with pytest.raises(UserError, match="is no answer of a batch"):
        answer(source, target)
    assert target.read_text() == foreign


def test_a_full_disk_leaves_whole_lines(source: Path, target: Path) -> None:
    source.write_text("\n".join(asked(f"{i}") for i in range(30)))
    write, n = os.write, 0

    def full(fd: int, data: bytes) -> int:
        nonlocal n
        n += 1
        if n == 8:
            return write(fd, data[: len(data) // 2])
        if n > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_module.os, "write", _only(full, target))
        with pytest.raises(OSError, match="No space left"):
            answer(source, target)
    assert len(read(target)) == 7
    answer(source, target)
    assert len(by_id(target)) == 30


def _only(full: Any, target: Path) -> Any:
    """``full`` for the output, the system's own for the event loop's pipes."""
    write = os.write

    def chosen(fd: int, data: bytes) -> int:
        named = os.readlink(f"/proc/self/fd/{fd}")
        return int(full(fd, data) if named == str(target) else write(fd, data))

    return chosen


def test_paths_that_cannot_work(source: Path, target: Path, tmp_path: Path) -> None:
    source.write_text(asked("a"))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for given, wanted, sentence in (
        (tmp_path, target, "is a folder"),
        (tmp_path / "absent", target, "cannot read"),
        (pipe, target, "not a file"),
        (source, source, "is the input"),
        (source, tmp_path, "is a folder"),
        (source, tmp_path / "no" / "out", "does not exist"),
        (source, pipe, "only a file"),
    ):
        with pytest.raises(UserError, match=sentence):
            answer(given, wanted)
    source.write_bytes("a".encode("utf-16"))
    with pytest.raises(UserError, match="UTF-8"):
        answer(source, target)


def test_two_runs_at_a_time(source: Path, target: Path) -> None:
    source.write_text(asked("a"))
    with target.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing"):
            answer(source, target)


def test_an_interrupt_keeps_what_is_done(source: Path, target: Path) -> None:
    source.write_text("\n".join(asked(f"{i}", "x" * 50, max_tokens=50) for i in range(60)))
    engine = Scripted(pause_s=1e-4)
    found = extent(source)
    output = Output(target, source, found.n_lines)
    figures = Figures(found.n_asked, 0)

    async def interrupted() -> None:
        batch = Batch(
            source, output, Answerer(engine, ByteTexts(), "m"), figures, 4, lambda _: None
        )
        task = asyncio.create_task(batch.run())
        while output.n_written < 5:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(interrupted())
    assert output.n_synced == output.n_written == figures.n_done < 60
    assert engine._running == []  # cancelled
    output.close()
    answer(source, target)
    assert len(by_id(target)) == 60


def test_killed_at_random(source: Path, target: Path) -> None:
    """`make stress` kills 20 times over 1,000 lines."""
    rng = random.Random(N_LINES)
    source.write_text(
        "\n".join(
            asked(f"id-{i}", "x" * rng.randrange(1, 60), max_tokens=60) for i in range(N_LINES)
        )
    )
    command = [sys.executable, Path(__file__).with_name("scripted.py"), source, target, "8"]
    kills = seen = 0
    while kills < N_KILLS:
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        before = seen
        # What remains to be done is spread over the kills that remain.
        aim = before + max(1, int((N_LINES - before) / (N_KILLS - kills + 1) * rng.uniform(0.5, 1)))
        while process.poll() is None and seen < aim:
            time.sleep(0.002)
            seen = target.read_bytes().count(b"\n") if target.exists() else 0
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err.decode()
        kills += 1
    assert 0 < seen < N_LINES  # so that it was interrupted at all
    subprocess.run(command, check=True)
    answers = read(target)
    assert Counter(one["custom_id"] for one in answers) == Counter(
        f"id-{i}" for i in range(N_LINES)
    )
    assert all(one["response"]["status_code"] == 200 for one in answers)


# --- what it was ---------------------------------------------------------------------------------


def test_figures(source: Path, target: Path) -> None:
    source.write_text("\n".join(asked(f"{i}", "x" * 10) for i in range(4)))
    figures = answer(source, target)
    stats = {
        "phases": {"prefill": {"seconds": 1.0}, "decode": {"seconds": 3.0}},
        **{"stall_s": 1.0, "prefill_tps": 44.0, "decode_tps": 13.3, "bytes_read": 4e6},
        **{"bytes_per_token": 1e5, "rss_peak_bytes": 1e9, "budget_bytes": 2e9},
    }
    table = figures.table(stats)
    assert table["prompt_tokens"] == 44
    assert table["completion_tokens"] == 40
    assert table["stall_share"] == 0.25
    assert table["first_token_s"]["p50"] == pytest.approx(0.1)
    assert table["between_tokens_s"]["p95"] == pytest.approx(0.1 / 9)
    json.dumps(table)
    assert "4 of 4 lines in" in summary(table)
    assert "stalled 25.0%" in summary(table)


# --- with a model -------------------------------------------------------------------------------


def test_what_a_model_answers_and_scores(tiny_file: TinyFile, source: Path, target: Path) -> None:
    """The same as the engine says when it is asked directly, request by request."""
    with Engine(tiny_file("qwen3moe"), n_ctx=256, parallel=4, n_threads=1) as engine:
        texts, asked_for = EngineTexts(engine), ("Hello", "Hello there", "A sea")
        lines = [asked(text, text, max_tokens=6, temperature=0) for text in asked_for]
        prompts = [texts.encode(text) for text in asked_for]
        scoring = {"max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
        lines.append(asked("scores", prompts, **scoring))
        # The model ends at once: a harness still finds a score for the one token it asked for.
        end = {str(engine.vocabulary.ending_tokens[0]): 1000}
        lines.append(asked("ends", prompts[0], logit_bias=end, **scoring))
        lines.append(asked("full", "word " * 300))
        source.write_text("\n".join(lines))
        answerer = Answerer(engine, texts, "tiny")
        figures = answer(source, target, answerer=answerer, window=4)
        answers = by_id(target)
        for name, tokens in zip(asked_for, prompts, strict=True):
            alone = engine.submit(tokens, max_tokens=6, temp=0).result()
            assert text(answers[name]) == alone.text
        choices = answers["scores"]["response"]["body"]["choices"]
        for choice, tokens in zip(choices, prompts, strict=True):
            alone = engine.submit(tokens, max_tokens=1, temp=0, prompt_logprobs=1).result()
            scores = [score.logprob for score in alone.prompt_logprobs]
            got = choice["logprobs"]["token_logprobs"]
            assert got[0] is None
            assert got[1:-1] == pytest.approx(scores, abs=0.05)  # another number of rows
            assert len(got) == len(tokens) + 1
        (choice,) = answers["ends"]["response"]["body"]["choices"]
        assert choice["finish_reason"] == "stop"
        assert len(choice["logprobs"]["token_logprobs"]) == len(prompts[0]) + 1
        assert choice["text"] == texts.text(prompts[0])
        assert answers["full"]["response"]["body"]["error"]["code"] == "context_length_exceeded"
        json.dumps(figures.table(engine.stats()))
        assert "6 of 6 lines" in summary(figures.table(engine.stats()))


def test_the_command(moe_gguf: Command, tiny_file: TinyFile, source: Path, target: Path) -> None:
    source.write_text("\n".join([asked("a", max_tokens=4), "{", asked("b", max_tokens=4)]))
    command = ("batch", tiny_file("qwen3moe"), source, target, "--threads", 1, "--ctx", 128)
    result = moe_gguf(*command, "--parallel", 1, "--json")
    assert result.code == 0
    document = json.loads(result.out)
    assert (document["lines"], document["answered"], document["refused"]) == (3, 2, 1)
    assert document["stats"]["requests"]["finished"] == 2
    assert "moe-gguf: 3 of 3 lines, 1 refused in" in result.err
    before = target.read_bytes()
    result = moe_gguf(*command)
    assert (result.code, result.out) == (0, "")
    assert result.err == "moe-gguf: 3 of 3 lines (3 before): there is nothing to do\n"
    assert target.read_bytes() == before
    source.write_text(asked("other"))
    assert "belongs to another input" in moe_gguf(*command).error(2)


@pytest.mark.parametrize("policy", ["lru", "klotski", "fate"])
def test_what_a_group_asked_for_is_replayed(
    policy: str,
    moe_gguf: Command,
    tiny_file: TinyFile,
    source: Path,
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fix_slots(monkeypatch, 14)
    source.write_text("\n".join(asked(f"{i}", f"{i} words", max_tokens=12) for i in range(6)))
    trace = tmp_path / "trace.npz"
    command = ("batch", tiny_file("qwen3moe"), source, target, "--threads", 1, "--ctx", 128)
    result = moe_gguf(*command, "--parallel", 4, "--policy", policy, "--trace", trace)
    assert result.code == 0
    assert f"wrote {trace}" in result.err
    assert max(event.n_sequences for event in load_trace(trace).events) == 4
    document = replay_document(trace, None, None)
    assert document["recorded"]["policy"] == policy
    assert document["recorded"]["hits"] > 0
    assert document["recorded"]["reproduced"]
    assert "one machine" in moe_gguf(*command, "--ray", "auto", "--trace", trace).error(2)


def test_ctrl_c_says_how_to_go_on(tiny_file: TinyFile, source: Path, target: Path) -> None:
    source.write_text("\n".join(asked(f"{i}", max_tokens=60) for i in range(400)))
    model = tiny_file("qwen3moe")
    process = subprocess.Popen(
        [
            *(
                sys.executable,
                "-m",
                "moe_gguf",
                "batch",
                model,
                source,
                target,
                "--threads",
                "1",
                "--parallel",
                "1",
            )
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (target.exists() and target.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    n = len(read(target))
    assert 0 < n < 400
    assert err.splitlines()[-1] == (
        f"moe-gguf: interrupted: {n} of 400 lines are answered; the same command goes on with the "
        "others"
    )


def test_only_what_is_on_the_disk_is_told(source: Path, target: Path) -> None:
    source.write_text("\n".join(asked(f"{i}", "x" * 50, max_tokens=50) for i in range(60)))
    found = extent(source)
    output = Output(target, source, found.n_lines)
    told: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_module, "_TICK_SECONDS", 0.01)
        answerer = Answerer(Scripted(pause_s=1e-4), ByteTexts(), "m")
        figures = Figures(found.n_asked, 0)
        tell = lambda n: told.append((n, output.n_synced))  # noqa: E731
        asyncio.run(Batch(source, output, answerer, figures, 4, tell).run())
    output.close()
    assert len(told) > 3
    assert all(n <= synced for n, synced in told)
    assert told[-1] == (60, 60)
