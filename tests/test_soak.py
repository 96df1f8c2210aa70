"""Clients of every temper at once: none hangs, none goes unanswered, nothing is left of any.

Over a scripted engine, over a model inside this process, whose every step is then repeated on stock
llama.cpp, and over a server of its own. `make soak` sends 2,000 requests to each, `make test` some.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import TinyFile
from harness import Stock, fix_slots
from scripted import Scripted, speak
from service import service
from tape import Tape, check
from test_server import KEY, served

from moe_gguf import Engine
from moe_gguf.runtime.api.texts import EngineTexts
from moe_gguf.runtime.engine.model import context_shape
from moe_gguf.runtime.engine.schedule import Schedule
from moe_gguf.runtime.server.run import Run
from moe_gguf.runtime.server.service import Computes, Service

N = int(os.environ.get("SOAK_REQUESTS", "100"))
AT_A_TIME = 16
ADDRESSES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
MALFORMED = (b"{", b"[]", b'{"model": 3}', b"\xff\xfe", b'{"messages": [[[[', b"")
_S = 60.0  # longest that anyone waits
GROWTH = 16 << 20  # bytes; an answer of each kind that leaked would be more


class Crowd:
    """Requests of one client after the other; what became of each is counted."""

    def __init__(self, client: httpx.AsyncClient, model: str, seed: int) -> None:
        self._client, self._model = client, model
        self._random = random.Random(seed)
        self.came: dict[str, int] = {}

    def _body(self) -> tuple[str, dict[str, Any]]:
        path = self._random.choice(ADDRESSES)
        text = "Hi " * self._random.randrange(1, 60)
        body: dict[str, Any] = {"model": self._model, "stream": self._random.random() < 0.6}
        n = self._random.randrange(1, 40)
        body["max_output_tokens" if path == "/v1/responses" else "max_tokens"] = n
        if path == "/v1/completions":
            return path, body | {"prompt": text}
        if path == "/v1/responses":
            return path, body | {"input": text}
        return path, body | {"messages": [{"role": "user", "content": text}]}

    async def one(self) -> None:
        temper = self._random.choices(("patient", "leaves", "slow", "malformed"), (6, 2, 1, 1))[0]
        async with asyncio.timeout(_S):
            how = await getattr(self, f"_{temper}")()
        self.came[how] = self.came.get(how, 0) + 1

    async def _patient(self) -> str:
        path, body = self._body()
        response = await self._client.post(path, json=body)
        assert response.status_code == 200, response.text
        if body["stream"]:
            assert '"error"' not in response.text.replace('"error":null', "")
            ends = ("[DONE]", "message_stop", "response.completed", "response.incomplete")
            assert any(end in response.text[-20_000:] for end in ends)
        else:
            json.loads(response.text)
        return "answered"

    async def _leaves(self) -> str:
        path, body = self._body()
        try:
            async with asyncio.timeout(self._random.random() * 0.1):
                await self._client.post(path, json=body)
        except TimeoutError:
            return "left"
        return "answered"

    async def _slow(self) -> str:
        path, body = self._body()
        async with self._client.stream("POST", path, json=body | {"stream": True}) as response:
            async for _ in response.aiter_raw(256):
                await asyncio.sleep(0.005)
        return "answered"

    async def _malformed(self) -> str:
        path = self._random.choice(ADDRESSES)
        response = await self._client.post(path, content=self._random.choice(MALFORMED))
        assert response.status_code == 400, response.text
        assert response.json()["error"]["message"]
        return "refused"


async def soak(url: str, model: str, n: int, headers: dict[str, str] | None = None) -> Crowd:
    """``n`` requests, so many at a time."""
    limits = httpx.Limits(max_connections=AT_A_TIME)
    async with httpx.AsyncClient(
        base_url=url, limits=limits, timeout=_S, headers=headers
    ) as client:
        crowd = Crowd(client, model, seed=n)
        left = iter(range(n))

        async def lane() -> None:
            for _ in left:
                await crowd.one()

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_A_TIME):
                group.create_task(lane())
    return crowd


def run(found: Service, url: str, engine: Computes, n: int = N) -> None:
    """A soak after which nobody is left in the service."""
    crowd = asyncio.run(soak(url, found.served.name, n))
    assert sum(crowd.came.values()) == n
    assert {"answered", "refused", "left"} <= set(crowd.came)
    deadline = time.monotonic() + 5
    while (found.n_calls or engine.sequences()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (found.n_calls, engine.sequences(), found.runs) == (0, [], set())
    gc.collect()
    left = [one for one in gc.get_objects() if isinstance(one, Run) and one.service is found]
    assert not left


def test_no_client_is_lost() -> None:
    engine = Scripted(speak, pause_s=0.0002)
    with service(engine) as (found, url):
        run(found, url, engine)


def test_every_step_is_stocks(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """What clients leave and begin in any order is computed as stock computes it."""
    path, tape, schedule = tiny_file("qwen3moe"), Tape(), Schedule(4, chunk=64)
    shape = context_shape(512, 4, cells=1024, chunk=64, score_rows=8, n_threads=1)
    fix_slots(monkeypatch, 14)
    with (
        Engine(
            path,
            memory="1GB",
            repack="off",
            n_ctx=512,
            parallel=4,
            cells=1024,
            schedule=schedule,
            score_rows=8,
            n_threads=1,
            observer=tape,
        ) as engine,
        service(engine, EngineTexts(engine)) as (found, url),
    ):
        run(found, url, engine)
        stats = engine.stats()
        engine._loop.scheduler.check_integrity()
        engine._loop.states.check_integrity()
    assert stats["requests"]["cancelled"] > 0
    assert stats["misses"] > 0
    stock = Stock(path)
    try:
        check(tape, stock.model, shape.params())
    finally:
        stock.close()


def test_a_server_keeps_its_budget(tiny_file: TinyFile, tmp_path: Path) -> None:
    """A process that serves many is no larger than one that served some, and holds as few files."""
    options = ("--api-key", KEY, "--parallel", "4", "--ctx", "512")
    options += ("--alias", "tiny", "--memory", "250MB")
    headers = {"Authorization": f"Bearer {KEY}"}
    with served(tiny_file("qwen3moe"), tmp_path / "stderr", *options) as (process, client):
        name = client.get("/v1/models").json()["data"][0]["id"]
        url, there = str(client.base_url), psutil.Process(process.pid)
        asyncio.run(soak(url, name, max(50, N // 4), headers))
        before, files = there.memory_info().rss, there.num_fds()
        asyncio.run(soak(url, name, N, headers))
        stats = client.get("/stats").json()
        assert stats["requests"]["running"] == stats["requests"]["waiting"] == 0
        assert there.memory_info().rss <= before + GROWTH
        assert there.memory_info().rss <= stats["budget_bytes"]
        assert there.num_fds() <= files + 4
