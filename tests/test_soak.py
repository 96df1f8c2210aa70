"""Clients of every temper at once: none hangs, none goes unanswered, nothing is left of any.

`make soak` runs 2,000 of them over a model; `make test` some over a scripted engine.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import time
from typing import Any

import httpx
from scripted import Scripted, speak
from service import NAME, service

from moe_gguf.runtime.server.run import Run

N = int(os.environ.get("SOAK_REQUESTS", "100"))
AT_A_TIME = 16
ADDRESSES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
MALFORMED = (b"{", b"[]", b'{"model": 3}', b"\xff\xfe", b'{"messages": [[[[', b"")
_S = 60.0  # longest that anyone waits


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


def test_soak() -> None:
    engine = Scripted(speak, pause_s=0.0002)
    with service(engine) as (found, url):
        crowd = asyncio.run(soak(url, NAME, N))
        assert sum(crowd.came.values()) == N
        assert {"answered", "refused", "left"} <= set(crowd.came)
        deadline = time.monotonic() + 5
        while (found.n_calls or engine.running) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (found.n_calls, engine.running, found.runs) == (0, [], set())
        gc.collect()
        left = [one for one in gc.get_objects() if isinstance(one, Run) and one.service is found]
        assert not left
