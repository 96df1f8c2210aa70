"""The server as clients meet it: a process on a port, spoken to over HTTP."""

from __future__ import annotations

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
import pytest
import tiny

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
            with httpx.Client(base_url=url, headers=headers, timeout=30) as client:
                yield process, client
        finally:
            process.kill()


def address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait for the line that says where it listens."""
    deadline = time.monotonic() + 30
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
    with served(model, log, "--api-key", KEY) as (_, client):
        yield client


def complete(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 4, **body})


def chat(client: httpx.Client, text: str = "Hello", **body: Any) -> httpx.Response:
    messages = [{"role": "user", "content": text}]
    return client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 4, **body})


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end as OpenAI's do."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body: dict[str, Any] = response.json()["error"]
    assert body["message"]
    return body


def test_the_model_has_its_file_s_name(client: httpx.Client) -> None:
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["tiny"]
    assert complete(client).json()["model"] == "tiny"
    assert chat(client).json()["model"] == "tiny"


def test_completion(client: httpx.Client) -> None:
    answer = complete(client, temperature=0).json()
    assert answer["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] == 4
    assert complete(client, temperature=0).json()["choices"] == answer["choices"]


def test_any_model_name_is_the_one_model(client: httpx.Client) -> None:
    assert complete(client, model="gpt-4").json()["choices"][0]["text"]


def test_streams_say_what_whole_answers_say(client: httpx.Client) -> None:
    whole = complete(client, temperature=0).json()["choices"][0]["text"]
    chunks = events(complete(client, temperature=0, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole

    whole = chat(client, temperature=0).json()["choices"][0]["message"]["content"]
    deltas = [c["choices"][0]["delta"] for c in events(chat(client, temperature=0, stream=True))]
    assert "".join(delta.get("content") or "" for delta in deltas) == whole


def test_concurrent_requests_are_all_answered(client: httpx.Client) -> None:
    """Also a stream that is under way when others arrive."""
    alone = complete(client, temperature=0, max_tokens=40).json()["choices"][0]["text"]
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(complete, client, temperature=0, max_tokens=40, stream=i % 2 == 0)
            for i in range(4)
        ]
    for i, job in enumerate(jobs):
        response = job.result()
        if i % 2 == 0:
            assert "".join(c["choices"][0]["text"] for c in events(response)) == alone
        else:
            assert response.json()["choices"][0]["text"] == alone


def test_without_the_key_nothing_but_health(client: httpx.Client) -> None:
    with httpx.Client(base_url=client.base_url) as stranger:
        assert stranger.get("/health").json() == {"status": "ok"}
        for response in (
            complete(stranger),
            chat(stranger, stream=True),
            stranger.get("/v1/models"),
            stranger.get("/stats"),
            stranger.post("/extras/tokenize", json={"input": "x"}),
        ):
            error(response, 401)
        wrong = {"Authorization": "Bearer guess"}
        error(stranger.get("/v1/models", headers=wrong), 401)


def test_stats_are_those_of_every_command(client: httpx.Client) -> None:
    complete(client)
    stats = client.get("/stats").json()
    assert stats["hits"] + stats["misses"] > 0
    assert stats["rss_peak_bytes"] <= stats["budget_bytes"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": 5},
        {"prompt": ["one", "two"]},
        {"max_tokens": -3},
        {"temperature": "hot"},
        {"logprobs": 2},
        {"grammar": "root ::= ("},  # ended the process
    ],
    ids=lambda body: next(iter(body)),
)
def test_bad_requests_are_the_client_s_fault(client: httpx.Client, body: dict[str, Any]) -> None:
    assert error(complete(client, **body), 400)["type"] == "invalid_request_error"
    assert complete(client).status_code == 200


@pytest.mark.parametrize("token", [305, -5, 99_999_999, 2**40])
def test_ids_outside_the_vocabulary(client: httpx.Client, token: int) -> None:
    """Each ended the process."""
    says = f"token {token} is not in this model's vocabulary of 305"
    answer = client.post("/extras/detokenize", json={"tokens": [1, token]})
    assert says in error(answer, 400)["message"]
    assert says in error(complete(client, logit_bias={str(token): 1}), 400)["message"]
    assert complete(client).status_code == 200


@pytest.mark.parametrize(
    "grammar",
    [
        "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000,
        "root ::= " + '"a"?' * 6000,
        "root ::= [z-a]",
    ],
    ids=["nested", "endless", "dead"],
)
def test_grammars_that_ended_the_process(client: httpx.Client, grammar: str) -> None:
    assert "the grammar cannot be used" in error(complete(client, grammar=grammar), 400)["message"]
    (chunk,) = events(complete(client, grammar=grammar, stream=True))
    assert "the grammar cannot be used" in chunk["error"]["message"]
    assert complete(client).status_code == 200


def test_a_schema_that_counts_too_far(client: httpx.Client) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "string", "maxLength": 100_000}}}
    answer = chat(client, "Hello", response_format={"type": "json_object", "schema": schema})
    assert "maxLength 100000 of x" in error(answer, 400)["message"]
    assert complete(client).status_code == 200


def test_what_is_no_json_or_no_endpoint(client: httpx.Client) -> None:
    error(client.post("/v1/completions", content=b"{"), 400)
    error(client.get("/v1/completions"), 405)
    error(client.post("/v1/nothing", json={}), 404)
    error(client.post("/v1/embeddings", json={"input": "x"}), 404)


def test_a_prompt_longer_than_the_context(client: httpx.Client) -> None:
    text = "Hello world " * 400
    for response in (complete(client, prompt=text), chat(client, text)):
        assert error(response, 400)["code"] == "context_length_exceeded"
    for response in (complete(client, prompt=text, stream=True), chat(client, text, stream=True)):
        (chunk,) = events(response)  # the status was sent before the prompt was looked at
        assert chunk["error"]["code"] == "context_length_exceeded"
    assert complete(client).status_code == 200


def test_a_grammar_that_parses_is_obeyed(client: httpx.Client) -> None:
    text = complete(client, grammar="root ::= [0-9]+", max_tokens=12).json()["choices"][0]["text"]
    assert text.isdigit()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_cleanly_even_while_it_computes(
    model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    log = tmp_path / "stderr"
    with served(model, log, "--ctx", "8192") as (process, client), ThreadPoolExecutor(2) as pool:
        endless = {"max_tokens": 8000, "logit_bias": {"302": -100, "304": -100}}
        jobs = [pool.submit(complete, client, **endless, stream=s) for s in (True, False)]
        while client.get("/stats").json()["decode_tokens"] < 3:
            time.sleep(0.02)
        start = time.monotonic()
        process.send_signal(number)
        assert process.wait(timeout=10) == 0
        assert time.monotonic() - start < 5
        for job in jobs:  # answered, refused or cut off, but not left waiting
            job.exception(timeout=5)
    assert "Traceback" not in log.read_text()


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
