"""The server over a model: a process on a port, spoken to over HTTP. What HTTP itself does is
tested without one (test_http)."""

from __future__ import annotations

import base64
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import tiny

from moe_gguf.runtime.chat.templates import CHILDREN_BYTES

KEY = "secret"
COMMAND = (sys.executable, "-m", "moe_gguf", "serve")


@contextmanager
def served(
    model: Path, log: Path, *options: str
) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """A running server and a client of it; ``log`` gets its stderr."""
    command = [*COMMAND, str(model), "--port", "0", "--threads", "1", *options]
    with log.open("wb") as stderr, subprocess.Popen(command, stderr=stderr) as process:
        try:
            url = address(process, log)
            headers = {"Authorization": f"Bearer {KEY}"}
            with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
                yield process, client
        finally:
            process.kill()


def address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait for the line that says where it listens."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text().splitlines():
            if line.startswith("moe-gguf: serving tiny at http://127.0.0.1:"):
                return line.split(" at ")[1].split("/v1")[0]
        time.sleep(0.05)
    raise AssertionError(f"no server: {log.read_text()}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tiny("qwen3moe", tmp_path_factory.mktemp("served") / "tiny.gguf")


@pytest.fixture(scope="module")
def client(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    log = tmp_path_factory.mktemp("log") / "stderr"
    with served(model, log, "--api-key", KEY, "--parallel", "4") as (_, client):
        yield client


def test_children_are_in_the_budget(model: Path, tmp_path: Path) -> None:
    """What runs beside the server's process has its place in the table."""
    with served(model, tmp_path / "stderr", "--parallel", "2") as (process, client):
        assert chat(client).status_code == 200
        assert "beside     67.1 MB" in (tmp_path / "stderr").read_text()
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        assert sum(child.memory_info().rss for child in children) <= CHILDREN_BYTES


def complete(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 4, **body})


def chat(client: httpx.Client, text: str = "Hello", **body: Any) -> httpx.Response:
    messages = [{"role": "user", "content": text}]
    asked = {"model": "tiny", "messages": messages, "max_tokens": 4, **body}
    return client.post("/v1/chat/completions", json=asked)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end as OpenAI's do."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]", response.text
    return [json.loads(line) for line in lines[:-1]]


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body: dict[str, Any] = response.json()["error"]
    assert body["message"]
    return body


def test_the_model_has_its_file_s_name(client: httpx.Client) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "tiny"
    assert card["meta"]["n_params"] > 0
    assert complete(client).json()["model"] == "tiny"
    assert chat(client, model="gpt-4").json()["model"] == "gpt-4"


def test_streams_say_what_whole_answers_say(client: httpx.Client) -> None:
    whole = complete(client, temperature=0).json()
    assert whole["usage"]["completion_tokens"] == 4
    assert whole["timings"]["predicted_n"] == 4
    chunks = events(complete(client, temperature=0, stream=True))
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == whole["choices"][0]["text"]

    said = chat(client, temperature=0).json()["choices"][0]["message"]["content"]
    deltas = [c["choices"][0]["delta"] for c in events(chat(client, temperature=0, stream=True))]
    assert "".join(delta.get("content") or "" for delta in deltas) == said


def test_both_protocols_have_one_prompt(client: httpx.Client) -> None:
    chat_usage = chat(client).json()["usage"]
    body = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]}
    answer = client.post("/v1/messages", json=body).json()
    used = answer["usage"]
    assert used["input_tokens"] + used["cache_read_input_tokens"] == chat_usage["prompt_tokens"]
    count = client.post("/v1/messages/count_tokens", json=body).json()["input_tokens"]
    assert count == chat_usage["prompt_tokens"]
    answer = client.post("/v1/responses", json={"model": "tiny", "input": "Hello"}).json()
    assert answer["usage"]["input_tokens"] == chat_usage["prompt_tokens"]
    prompt = client.post("/apply-template", json={"messages": body["messages"]}).json()["prompt"]
    asked = {"content": prompt, "add_special": True}
    tokens = client.post("/tokenize", json=asked).json()["tokens"]
    assert len(tokens) == count
    assert client.post("/detokenize", json={"tokens": tokens}).json()["content"].endswith(prompt)


def test_concurrent_requests_are_all_answered(client: httpx.Client) -> None:
    """Also a stream that is under way when others arrive."""
    with ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(complete, client, temperature=0, max_tokens=40, stream=i % 2 == 0)
            for i in range(8)
        ]
    for i, job in enumerate(jobs):
        response = job.result()
        if i % 2 == 0:
            assert events(response)[-1]["choices"][0]["finish_reason"]
        else:
            assert response.json()["usage"]["completion_tokens"] > 0


def test_stats_are_those_of_every_command(client: httpx.Client) -> None:
    complete(client)
    stats = client.get("/stats").json()
    assert stats["hits"] + stats["misses"] > 0
    assert stats["rss_peak_bytes"] <= stats["budget_bytes"]
    assert f"moe_gguf_expert_hits_total {float(stats['hits'])}" in client.get("/metrics").text
    assert client.get("/props").json()["architecture"] == "qwen3moe"


@pytest.mark.parametrize("token", [305, -5, 99_999_999, 2**40])
def test_ids_outside_the_vocabulary(client: httpx.Client, token: int) -> None:
    """Each ended the process."""
    answer = client.post("/detokenize", json={"tokens": [1, token]})
    assert (
        f"token {token} is not in this model's vocabulary of 305" in error(answer, 400)["message"]
    )
    assert error(complete(client, logit_bias={str(token): 1}), 400)["param"] == "logit_bias"
    assert error(complete(client, prompt=[token]), 400)["param"] == "prompt"
    assert complete(client).status_code == 200


@pytest.mark.parametrize(
    "grammar",
    [
        "root ::= (",
        "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000,
        "root ::= " + '"a"?' * 6000,
        "root ::= [z-a]",
    ],
    ids=["open", "nested", "endless", "dead"],
)
def test_grammars_that_ended_the_process(client: httpx.Client, grammar: str) -> None:
    told = "the grammar cannot be used"
    assert told in error(complete(client, grammar=grammar), 400)["message"]
    stream = complete(client, grammar=grammar, stream=True)
    if stream.status_code == 200:  # it turned out to allow nothing when there was a token to choose
        (chunk,) = events(stream)
        assert told in chunk["error"]["message"]
    else:
        assert told in error(stream, 400)["message"]
    assert complete(client).status_code == 200


def test_a_grammar_and_a_schema_are_obeyed(client: httpx.Client) -> None:
    text = complete(client, grammar="root ::= [0-9]+", max_tokens=12).json()["choices"][0]["text"]
    assert text.isdigit()
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = chat(client, response_format=wanted, max_tokens=60).json()["choices"][0]
    assert json.loads(answer["message"]["content"]) == {"a": 1}


def test_a_prompt_longer_than_the_context(client: httpx.Client) -> None:
    text = "Hello world " * 400
    for stream in (False, True):
        for response in (
            complete(client, prompt=text, stream=stream),
            chat(client, text, stream=stream),
        ):
            assert error(response, 400)["code"] == "context_length_exceeded"
    assert complete(client).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_cleanly_even_while_it_computes(
    model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    log = tmp_path / "stderr"
    options = ("--ctx", "8192", "--grace", "0.2", "--parallel", "2")
    with served(model, log, *options) as (process, client), ThreadPoolExecutor(2) as pool:
        endless = {"max_tokens": 8000, "logit_bias": {"302": -100, "304": -100}}
        jobs = [pool.submit(complete, client, **endless, stream=s) for s in (True, False)]
        while client.get("/stats").json()["decode_tokens"] < 3:
            time.sleep(0.02)
        start = time.monotonic()
        process.send_signal(number)
        assert process.wait(timeout=20) == 0
        assert time.monotonic() - start < 10
        stream, whole = (job.result() for job in jobs)
        assert "the server is stopping" in events(stream)[-1]["error"]["message"]
        error(whole, 503)
    assert "Traceback" not in log.read_text()


def test_a_stream_tells_how_far_its_prompt_is(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": f"{time.time()} " + "word " * 100}]
    body = {"model": "m", "messages": messages, "max_tokens": 2, "stream": True}
    plain = client.post("/v1/chat/completions", json=body)
    assert not any("prompt_progress" in event for event in events(plain))
    messages[0]["content"] += "more"
    streamed = client.post("/v1/chat/completions", json=body | {"return_progress": True})
    told = [e["prompt_progress"] for e in events(streamed) if "prompt_progress" in e]
    assert told[0]["processed"] == told[0]["cache"] > 0  # of the prompt before
    assert told[-1]["processed"] == told[-1]["total"] > 100
    assert told[-1]["time_ms"] > 0


def test_a_stream_tells_how_fast_it_is(client: httpx.Client) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    for path, said in (("chat/completions", chat), ("completions", {"prompt": "hi"})):
        body = {"model": "m", "max_tokens": 16, "stream": True, "ignore_eos": True, **said}
        timed = events(client.post(f"/v1/{path}", json=body | {"timings_per_token": True}))
        told = [event["timings"] for event in timed if "timings" in event]
        n = [each["predicted_n"] for each in told]
        assert n == sorted(n) and n[0] < 16 and n[-1] == 16
        assert told[0]["prompt_n"] == told[-1]["prompt_n"]
        assert told[0]["predicted_ms"] < told[-1]["predicted_ms"]
        plain = events(client.post(f"/v1/{path}", json=body))
        assert sum("timings" in event for event in plain) == 1


def test_an_address_in_use_is_told_before_the_model_is_loaded(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        run = subprocess.run(
            [*COMMAND, str(model), "--port", port], capture_output=True, text=True, timeout=30
        )
    assert run.returncode == 2
    assert run.stderr == (
        f"moe-gguf: error: cannot listen on 127.0.0.1:{port} (address already in use): "
        "give another --host or --port\n"
    )


def test_where_experts_are_and_how_much_they_are_used(client: httpx.Client) -> None:
    before = client.get("/experts").json()
    answer = complete(client, prompt="Where are the experts?").json()
    told, stats = client.get("/experts").json(), client.get("/stats").json()
    shape = len(told["layers"]), told["n_experts"]
    state = np.frombuffer(base64.b64decode(told["state"]), np.uint8).reshape(shape)
    uses, earlier = (
        np.frombuffer(base64.b64decode(one["uses"]), "<u4").reshape(shape) for one in (told, before)
    )
    assert np.count_nonzero(state) == told["n_held"] <= told["n_slots"] == stats["slots"]
    # Of what was asked: where all experts are there, which may come about in a step, nobody asks.
    n_pairs = (uses - earlier).sum(axis=1)
    n_rows = answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"] - 1
    assert 0 < n_pairs.min() <= n_pairs.max() <= n_rows * told["n_used"]
    assert n_pairs[-1] == n_pairs.min()  # the last layer computes only what is put out
    memory, schedule = stats["memory"], stats["schedule"]
    assert sum(n for _, n, _ in memory["parts"]) <= memory["total_bytes"] == stats["budget_bytes"]
    assert memory["resident_bytes"] > 0
    assert schedule["group"] >= 1 and schedule["chunk"] >= 1


def test_an_open_address_needs_a_key(model: Path) -> None:
    command = [*COMMAND, str(model), "--host", "0.0.0.0", "--port", "0"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert run.returncode == 2
    assert run.stderr == (
        "moe-gguf: error: anyone who reaches 0.0.0.0 could use this server: give --api-key, or "
        "--insecure if that is meant\n"
    )


def test_a_model_that_cannot_be_opened_ends_it(tmp_path: Path) -> None:
    command = [*COMMAND, str(tmp_path / "none.gguf"), "--port", "0"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert "none.gguf" in run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_without_its_packages_it_names_the_extra(model: Path) -> None:
    code = "import sys, moe_gguf.runtime.cli.main as m; sys.modules['fastapi'] = None; m.main()"
    run = subprocess.run(
        [sys.executable, "-c", code, "serve", str(model)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert run.returncode == 2
    assert "pip install 'moe-gguf[server]'" in run.stderr
    assert len(run.stderr.splitlines()) == 1
