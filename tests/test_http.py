"""HTTP as clients meet it, over a scripted engine: who comes in, what is answered, what is left."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted import Scripted, speak
from service import NAME, SERVERS, service

from moe_gguf.runtime.engine.request import Request
from moe_gguf.runtime.errors import RequestError, UserError
from moe_gguf.runtime.server import serving, static
from moe_gguf.runtime.server.settings import Settings, hosts_of, read_keys

CHAT = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}]}
MESSAGES = {**CHAT, "max_tokens": 100}
ADDRESSES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"model": NAME, "input": "Hi"},
    "/v1/messages": MESSAGES,
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with service() as (_, url):
        yield url


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=10) as client:
        yield client


def events(text: str) -> list[Any]:
    """The data of a stream's events."""
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert isinstance(body["error"]["message"], str)
    return dict(body["error"])


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ADDRESSES)
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"3", b'"x"', b"\xff", b"[" * 100_000, b"1" * 10_000, b"NaN", b"{}"]
)
def test_what_is_no_request_is_refused_in_the_caller_s_form(
    client: httpx.Client, path: str, body: bytes
) -> None:
    response = client.post(path, content=body)
    said = error(response, 400)
    assert said["type"] == "invalid_request_error"
    assert (response.json().get("type") == "error") == (path == "/v1/messages")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ADDRESSES)
def test_bad_values_have_a_status_in_streams_too(
    client: httpx.Client, path: str, stream: bool
) -> None:
    body = {**ADDRESSES[path], "temperature": "hot", "stream": stream}
    assert "temperature" in error(client.post(path, json=body), 400)["message"]
    assert error(client.post(path, json={**body, "stream": "yes"}), 400)


def test_a_model_is_to_be_named(client: httpx.Client) -> None:
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages"):
        body = {k: v for k, v in ADDRESSES[path].items() if k != "model"}
        said = error(client.post(path, json=body), 400)
        assert "model is missing" in said["message"]
        with service(require_model=False) as (_, url):
            assert httpx.post(url + path, json=body).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/v1/files/..%2f..%2fetc%2fpasswd", 404),
        ("POST", "/v1/embeddings", 501),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/responses/resp_1", 404),
    ],
)
def test_addresses_that_are_none(client: httpx.Client, method: str, path: str, status: int) -> None:
    error(client.request(method, path, json={} if method == "POST" else None), status)


class Odd(Exception):
    """A type that nobody expects."""


@pytest.mark.parametrize("raised", [Odd("oops"), KeyError("x"), OSError(5, "EIO"), Odd()])
@pytest.mark.parametrize("path", ADDRESSES)
def test_whatever_fails_is_answered_and_the_connection_stays(path: str, raised: Exception) -> None:
    def script(request: Request) -> bytes:
        raise raised

    with service(Scripted(script)) as (_, url), httpx.Client(base_url=url) as client:
        for _ in range(2):  # on the same connection
            said = error(client.post(path, json=ADDRESSES[path]), 500)
            assert said["type"] in ("server_error", "api_error")
        response = client.post(path, json={**ADDRESSES[path], "stream": True})
        assert response.status_code == 200
        found = events(response.text)
        told = [one for one in found if one != "[DONE]" and one.get("error")]
        assert told
        assert "message" in told[0]["error"]
        if path == "/v1/responses":
            assert found[-1]["type"] == "response.failed"


def test_what_an_engine_refuses_at_once_has_a_status_in_streams(client: httpx.Client) -> None:
    def script(request: Request) -> bytes:
        raise RequestError("the grammar cannot be used", "grammar")

    with service(Scripted(script)) as (_, url):
        for path, body in ADDRESSES.items():
            said = error(httpx.post(url + path, json={**body, "stream": True}), 400)
            assert said["message"] == "the grammar cannot be used"


def test_a_prompt_longer_than_the_context(client: httpx.Client) -> None:
    body = {"prompt": "a" * 5000}
    assert (
        error(client.post("/v1/completions", json=body), 400)["code"] == "context_length_exceeded"
    )


# --- who comes in -------------------------------------------------------------------------------


def test_keys() -> None:
    with service(keys=("one", "two")) as (_, url), httpx.Client(base_url=url) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/").status_code == 200
        for headers in ({}, {"authorization": "Bearer three"}, {"x-api-key": ""}):
            for path, body in ADDRESSES.items():
                response = client.post(path, json=body, headers=headers)
                assert error(response, 401)["type"] == "authentication_error"
            for path in ("/v1/models", "/stats", "/metrics", "/slots", "/props", "/openapi.json"):
                error(client.get(path, headers=headers), 401)
        for headers in ({"authorization": "Bearer one"}, {"x-api-key": "two"}):
            assert client.get("/v1/models", headers=headers).status_code == 200


def test_what_is_computed_for_a_key_is_kept_apart() -> None:
    engine = Scripted(speak)
    with service(engine, keys=("one", "two")) as (_, url):
        for key in ("one", "two", "one"):
            httpx.post(f"{url}/v1/messages", json=MESSAGES, headers={"x-api-key": key})
    first, second, third = (request.owner for request in engine.requests)
    assert first == third != second
    assert "one" not in first


def test_an_address_that_others_reach_needs_keys(tmp_path: Any) -> None:
    for host in ("0.0.0.0", "::", "192.168.0.5", "example.org"):
        with pytest.raises(UserError, match="api_key"):
            hosts_of(host, (), insecure=False)
        assert hosts_of(host, ("key",), insecure=False) is None
        assert hosts_of(host, (), insecure=True) is None
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        assert "localhost" in (hosts_of(host, (), insecure=False) or ())
    file = tmp_path / "keys"
    file.write_text("# mine\n\n one \ntwo\n")
    assert read_keys(file) == ["one", "two"]
    file.write_text("#\n")
    with pytest.raises(UserError, match="no key"):
        read_keys(file)
    assert Settings(keys=("a",)).owner(None) is None


def test_the_page_asks_its_own_server_alone(tmp_path: Path) -> None:
    """Nothing that a model writes may run or call home, were it markup after all."""
    with service(keys=("secret",)) as (_, url), httpx.Client(base_url=url) as client:
        for address in ("/", "/page.js", "/page.css", "/markdown.js", "/icon.svg"):
            answer = client.get(address)
            assert answer.status_code == 200, address
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "script-src 'self';" in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
        sources = [path.read_text() for path in Path(static.__file__).parent.glob("page/*.*")]
        assert len(sources) >= 7
        assert not any(re.search(r"innerHTML|insertAdjacent|eval\(", text) for text in sources)
        for closed in ("/experts", "/stats", "/slots"):
            error(client.get(closed), 401)
    (tmp_path / "index.html").write_text("another")
    with service(ui=tmp_path) as (_, url):  # what it may do, its builders know
        assert "content-security-policy" not in httpx.get(url).headers


def test_other_pages_in_a_browser_are_kept_out() -> None:
    hosts = hosts_of("127.0.0.1", (), insecure=False)
    with service(hosts=hosts) as (_, url), httpx.Client(base_url=url) as client:
        assert client.post("/v1/messages", json=MESSAGES).status_code == 200
        for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}):
            error(client.post("/v1/messages", json=MESSAGES, headers=headers), 403)
        assert client.get("/health", headers={"origin": url}).status_code == 200
    with service(origins=("https://mine.example",)) as (_, url):
        headers = {"origin": "https://mine.example", "access-control-request-method": "POST"}
        answer = httpx.options(f"{url}/v1/messages", headers=headers)
        assert answer.headers["access-control-allow-origin"] == "https://mine.example"
        answer = httpx.post(f"{url}/v1/messages", json=MESSAGES, headers=headers)
        assert answer.headers["access-control-allow-origin"] == "https://mine.example"


def test_limits() -> None:
    with service(most_body_bytes=1000) as (_, url):
        body = {"prompt": "a" * 2000}
        error(httpx.post(f"{url}/v1/completions", json=body), 413)
        chunks = iter([b"a" * 600] * 3)
        error(httpx.post(f"{url}/v1/completions", content=chunks), 413)
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{url}/health", headers={"x": "a" * 200_000}).raise_for_status()
    with service(body_timeout_s=0.1) as (_, url):
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=5) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{")
            assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_headers_that_trickle_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_HEADERS_S", 0.2)
    whole = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"

    def ask(connection: socket.socket) -> None:
        connection.sendall(whole)
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(1000)
        assert answer.startswith(b"HTTP/1.1 200")

    def trickle(connection: socket.socket) -> None:
        for letter in whole[:-4].decode() + 200 * "x":
            connection.sendall(letter.encode())
            time.sleep(0.02)

    with service() as (_, url):
        port = int(url.rpartition(":")[2])
        for is_kept in (False, True):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as slow:
                if is_kept:
                    ask(slow)
                start = time.monotonic()
                with pytest.raises((ConnectionResetError, BrokenPipeError)):
                    trickle(slow)
                assert time.monotonic() - start < 4
        with socket.create_connection(("127.0.0.1", port), timeout=5) as kept:
            for _ in range(3):
                ask(kept)
                time.sleep(0.3)


def test_a_full_house_says_when_to_come_again() -> None:
    engine = Scripted(lambda request: b"a" * 200, pause_s=0.02)
    engine.parallel = 1
    with service(engine, queue=1) as (_, url), ThreadPoolExecutor(4) as pool:
        body = {"prompt": "Hi", "max_tokens": 20}
        jobs = [pool.submit(httpx.post, f"{url}/v1/completions", json=body) for _ in range(4)]
        answers = [job.result() for job in jobs]
        full = [answer for answer in answers if answer.status_code == 429]
        assert len(full) == 2
        assert error(full[0], 429)["type"] == "rate_limit_error"
        assert int(full[0].headers["retry-after"]) >= 1
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200


# --- coming, leaving, stopping ------------------------------------------------------------------


def waiting(engine: Scripted, n: int = 1) -> None:
    """Until so many requests are computed."""
    deadline = time.monotonic() + 5
    while len(engine.running) != n and time.monotonic() < deadline:
        time.sleep(0.005)
    assert len(engine.running) == n


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ADDRESSES)
def test_a_client_that_leaves_frees_its_sequence(path: str, stream: bool) -> None:
    engine = Scripted(lambda request: b"a" * 100_000, pause_s=0.01)
    with service(engine) as (found, url):
        body = json.dumps({**ADDRESSES[path], "max_tokens": 100_000, "stream": stream}).encode()
        port = int(url.rpartition(":")[2])
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port)) as leaving:
            leaving.sendall(head.encode() + body)
            waiting(engine)
        waiting(engine, 0)
        deadline = time.monotonic() + 2
        while found.n_calls and time.monotonic() < deadline:
            time.sleep(0.005)
        assert found.n_calls == 0


def test_comments_keep_a_connection_alive_during_a_long_prompt() -> None:
    ready = threading.Event()

    def script(request: Request) -> bytes:
        return b"late"

    engine = Scripted(script, before=ready)
    with service(engine, keep_alive_s=0.05) as (_, url):
        body = {**CHAT, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            while next(lines) != ": keep-alive":
                pass
            ready.set()
            assert "[DONE]" in "".join(lines)


def test_an_answer_that_takes_too_long_is_ended() -> None:
    engine = Scripted(lambda request: b"a" * 100_000, pause_s=0.01)
    with service(engine, timeout_s=0.2) as (_, url):
        said = error(httpx.post(f"{url}/v1/chat/completions", json=CHAT), 504)
        assert "0.2 s" in said["message"]
        body = {**CHAT, "stream": True}
        found = events(httpx.post(f"{url}/v1/chat/completions", json=body).text)
        assert found[-2]["error"]["type"] == "timeout_error"
        waiting(engine, 0)


@pytest.mark.parametrize(("grace_s", "status"), [(5.0, 200), (0.1, 503)])
def test_a_stop_lets_calls_finish_within_the_grace(grace_s: float, status: int) -> None:
    engine = Scripted(lambda request: b"a" * 50, pause_s=0.02)
    with service(engine, grace_s=grace_s) as (_, url), ThreadPoolExecutor(2) as pool:
        job = pool.submit(httpx.post, f"{url}/v1/chat/completions", json=CHAT)
        body = {**CHAT, "stream": True}
        stream = pool.submit(httpx.post, f"{url}/v1/chat/completions", json=body)
        waiting(engine, 2)
        SERVERS[-1].stop()
        assert job.result().status_code == status
        last = events(stream.result().text)[-2]
        assert ("error" in last) == (status == 503)
        SERVERS[-1].wait(2)
        assert not SERVERS[-1].is_alive


def test_health_tells_how_far_loading_is() -> None:
    with service(is_open=False) as (found, url):
        found.progress = (1, 4)
        response = httpx.get(f"{url}/health")
        assert response.status_code == 503
        assert response.json()["progress"] == 0.25
        for path, body in ADDRESSES.items():
            said = error(httpx.post(url + path, json=body), 503)
            assert "25% is done" in said["message"]
        assert httpx.get(f"{url}/metrics").status_code == 200
        assert httpx.get(f"{url}/").status_code == 200


# --- answers ------------------------------------------------------------------------------------


def test_several_prompts_are_streamed_at_once(client: httpx.Client) -> None:
    body = {"prompt": ["a", "b"], "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    found = events(client.post("/v1/completions", json=body).text)
    texts = ["", "", "", ""]
    for chunk in found[:-2]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == ["Hello there, frie"[:16]] * 4
    assert found[-2]["usage"]["completion_tokens"] == 64
    assert found[-1] == "[DONE]"


def test_scores_are_the_same_in_pieces(client: httpx.Client) -> None:
    body = {"prompt": "aäb", "echo": True, "logprobs": 2, "max_tokens": 3}
    whole = client.post("/v1/completions", json=body).json()["choices"][0]
    text, scores = "", {name: [] for name in whole["logprobs"]}
    for chunk in events(client.post("/v1/completions", json={**body, "stream": True}).text)[:-1]:
        text += chunk["choices"][0]["text"]
        for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
            scores[name] += values
    assert text == whole["text"]
    assert scores == whole["logprobs"]


def test_claude_code_s_billing_line_is_dropped(client: httpx.Client) -> None:
    def n(system: Any) -> int:
        body = {**MESSAGES, "system": system}
        answer = client.post("/v1/messages/count_tokens", json=body).json()
        return int(answer["input_tokens"])

    line = "x-anthropic-billing-header: cc_version=2; cch=0a1b2;"
    blocks = [{"type": "text", "text": line}, {"type": "text", "text": "Be brief."}]
    assert n(blocks) == n("Be brief.") == n(f"{line}\nBe brief.")


def test_a_conversation_has_one_prompt_by_every_protocol() -> None:
    engine = Scripted(speak)
    with service(engine) as (_, url):
        call = {"name": "f", "arguments": '{"a": 1}'}
        chat = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "2"},
        ]
        use = {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}}
        result = {"type": "tool_result", "tool_use_id": "1", "content": "2"}
        blocks = [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [result]},
        ]
        items = [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "function_call", "call_id": "1", **call},
            {"type": "function_call_output", "call_id": "1", "output": "2"},
        ]
        named = {"model": NAME}
        for path, body in (
            ("chat/completions", {"messages": chat}),
            ("messages", {"messages": blocks, "system": "Be brief.", "max_tokens": 9}),
            ("responses", {"input": items, "instructions": "Be brief."}),
        ):
            answer = httpx.post(f"{url}/v1/{path}", json={**named, **body})
            assert answer.status_code == 200, answer.text
    assert len({tuple(request.tokens) for request in engine.requests}) == 1


def test_what_llama_s_server_has_beside_the_protocols(client: httpx.Client) -> None:
    card = client.get("/v1/models").json()["data"][0]
    assert (card["id"], card["context_length"], card["max_model_len"]) == (NAME, 4096, 4096)
    assert client.get(f"/v1/models/{NAME}").json() == card
    # Anthropic's clients read the same card, and errors of their own form.
    assert (card["type"], card["display_name"], card["max_input_tokens"]) == ("model", NAME, 4096)
    refused = client.get("/v1/models/other", headers={"anthropic-version": "2023-06-01"})
    assert refused.json()["type"] == "error"
    assert client.get("/props").json()["total_slots"] == 4
    assert [slot["is_processing"] for slot in client.get("/slots").json()] == [False] * 4
    assert client.get("/stats").json()["hits"] == 3
    assert client.get("/experts").json()["layers"] == [0, 1]
    assert client.post("/tokenize", json={"content": "ab"}).json() == {"tokens": [97, 98]}
    body = {"content": "a", "add_special": True, "with_pieces": True}
    pieces = client.post("/tokenize", json=body).json()["tokens"]
    as_vllm = client.post("/tokenize", json={"prompt": "ab", "add_special_tokens": False}).json()
    assert (as_vllm["tokens"], as_vllm["count"]) == ([97, 98], 2)
    assert client.post("/detokenize", json={"tokens": [97, 98]}).json()["prompt"] == "ab"
    assert set(client.get("/tokenizer_info").json()) == {"bos_token", "eos_token", "chat_template"}
    assert [one["piece"] for one in pieces] == ["<s>", "a"]
    assert client.post("/detokenize", json={"tokens": [97, 98]}).json()["content"] == "ab"
    for token in (258, -1, 2**40):
        said = error(client.post("/detokenize", json={"tokens": [token]}), 400)
        assert f"token {token} is not in this model's vocabulary" in said["message"]
    template = client.post("/apply-template", json={"messages": CHAT["messages"]}).json()
    assert template == {"prompt": "<user>Hi<assistant>"}


def test_metrics(client: httpx.Client) -> None:
    client.post("/v1/chat/completions", json=CHAT)
    client.get("/made-up")
    text = client.get("/metrics").text
    for name in (
        'moe_gguf_http_requests_total{path="/v1/chat/completions",status="200"}',
        "moe_gguf_first_token_seconds_bucket",
        "moe_gguf_between_tokens_seconds_count",
        "moe_gguf_queue_seconds_sum",
        "moe_gguf_generated_tokens_total",
        "moe_gguf_expert_hits_total 3.0",
        "moe_gguf_sequences_running",
    ):
        assert name in text
    assert "made-up" not in text
