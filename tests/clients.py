"""The packages that people use - openai's and anthropic's - against the server: sync, async,
streamed, with tools, thoughts and files. Their types are strict; no model is needed."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from pydantic import BaseModel
from service import NAME, service

ASKED: Any = [{"role": "user", "content": "Hi"}]
PARAMETERS = {"type": "object", "properties": {"location": {"type": "string"}}}
FUNCTION = {"name": "get_weather", "description": "", "parameters": PARAMETERS}
TOOL: Any = {"type": "function", "function": FUNCTION}
DOCUMENT = Path(__file__).parents[1] / "docs/serving.md"
SAYS = "Hello there, friend!"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with service() as (_, url):
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)


@pytest.fixture(scope="module")
def claude(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="x", max_retries=0)


def test_openai_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=NAME, messages=ASKED, logprobs=True, n=2)
    assert [choice.message.content for choice in answer.choices] == [SAYS] * 2
    assert answer.choices[0].logprobs is not None
    assert answer.usage is not None and answer.usage.prompt_tokens > 0
    more: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model=NAME, messages=ASKED, **more))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == SAYS
    assert chunks[-1].usage.completion_tokens == len(SAYS)
    assert {choice.finish_reason for c in chunks for choice in c.choices} == {None, "stop"}


def test_openai_tools_and_thoughts(client: openai.OpenAI) -> None:
    more: Any = {"tools": [TOOL], "tool_choice": "required", "reasoning_effort": "low"}
    answer = client.chat.completions.create(model=NAME, messages=ASKED, **more).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    (call,) = answer.message.tool_calls or ()
    assert json.loads(call.function.arguments) == {"location": "Paris"}  # type: ignore[union-attr]
    assert answer.message.reasoning_content == "Let me see."  # type: ignore[attr-defined]
    with client.chat.completions.stream(model=NAME, messages=ASKED, **more) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion().choices[0]
    (call,) = final.message.tool_calls or ()
    assert call.function.name == "get_weather"
    assert final.finish_reason == "tool_calls"


class Weather(BaseModel):
    location: str


def test_openai_parse(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Weather, name="get_weather")
    more: Any = {"tools": [tool], "tool_choice": "required"}
    answer = client.chat.completions.parse(model=NAME, messages=ASKED, **more)
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.function.parsed_arguments == Weather(location="Paris")


def test_openai_async(url: str) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x") as client:

            async def one(i: int) -> str:
                if i % 2:
                    answer = await client.chat.completions.create(model=NAME, messages=ASKED)
                    return answer.choices[0].message.content or ""
                text = ""
                async for c in await client.chat.completions.create(
                    model=NAME, messages=ASKED, stream=True
                ):
                    text += c.choices[0].delta.content or ""
                return text

            return await asyncio.gather(*map(one, range(8)))

    assert asyncio.run(ask()) == [SAYS] * 8


def test_openai_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=NAME, input="Hi", reasoning={"effort": "low"})
    assert answer.output_text == SAYS
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    tool: Any = {"type": "function", **FUNCTION, "strict": False}
    asked: Any = {"input": "Hi", "tools": [tool, {"type": "web_search"}], "tool_choice": "required"}
    with client.responses.stream(model=NAME, reasoning={"effort": "low"}, **asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert "response.function_call_arguments.done" in kinds
    thought, call = final.output
    assert thought.type == "reasoning" and thought.content
    assert call.type == "function_call" and json.loads(call.arguments) == {"location": "Paris"}
    with pytest.raises(openai.BadRequestError, match="not stored here"):
        client.responses.create(model=NAME, input="Hi", previous_response_id="resp_1")


def test_openai_completions_and_errors(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=NAME, prompt=[[97, 98]], echo=True, logprobs=1)
    assert answer.choices[0].text == "ab" + SAYS[:16]
    assert answer.choices[0].logprobs is not None
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=NAME, messages=ASKED, temperature=-1)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.InternalServerError, match="no embeddings"):
        client.embeddings.create(model=NAME, input="Hi")


def test_openai_batches(client: openai.OpenAI) -> None:
    def line(i: int, **body: Any) -> bytes:
        url = "/v1/chat/completions"
        asked = {"custom_id": f"{i}", "method": "POST", "url": url, "body": body}
        return json.dumps(asked).encode() + b"\n"

    lines = [line(i, model=NAME, messages=ASKED) for i in range(20)]
    lines.append(line(20, messages=ASKED, temperature="hot"))
    file = client.files.create(file=("in.jsonl", b"".join(lines)), purpose="batch")
    assert file.filename == "in.jsonl"
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    deadline = time.monotonic() + 10
    while batch.status not in ("completed", "failed") and time.monotonic() < deadline:
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed", batch
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (20, 1)
    answers = [
        json.loads(one) for one in client.files.content(batch.output_file_id or "").iter_lines()
    ]
    assert {one["custom_id"] for one in answers} == {str(i) for i in range(20)}
    (bad,) = client.files.content(batch.error_file_id or "").iter_lines()
    assert json.loads(bad)["response"]["status_code"] == 400
    assert [one.id for one in client.batches.list()] == [batch.id]
    assert len(list(client.files.list())) == 3
    client.files.delete(file.id)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    with pytest.raises(openai.NotFoundError):
        client.batches.create(
            input_file_id="../../etc/passwd",
            endpoint="/v1/chat/completions",
            completion_window="24h",
        )


@pytest.mark.parametrize("package", ["openai", "anthropic"])
def test_what_the_documents_say(url: str, package: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = DOCUMENT.read_text().replace("http://127.0.0.1:8080", url).replace("NAME", NAME)
    (block,) = re.findall(rf"^```python\n(import {package}\n.*?)^```", text, flags=re.M | re.S)
    exec(block, {})
    assert capsys.readouterr().out.strip() == SAYS


def test_anthropic_messages(claude: anthropic.Anthropic) -> None:
    more: Any = {"model": NAME, "max_tokens": 2000, "messages": ASKED}
    answer = claude.messages.create(**more)
    assert [block.text for block in answer.content] == [SAYS]  # type: ignore[union-attr]
    assert answer.stop_reason == "end_turn"
    assert claude.messages.count_tokens(model=NAME, messages=ASKED).input_tokens > 2
    thinks: Any = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
    tool: Any = {"name": "get_weather", "input_schema": PARAMETERS}
    calls: Any = {"tools": [tool], "tool_choice": {"type": "any"}}
    with claude.messages.stream(**more, **thinks, **calls) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert [block.type for block in final.content] == ["thinking", "tool_use"]
    assert final.content[1].input == {"location": "Paris"}  # type: ignore[union-attr]
    assert final.stop_reason == "tool_use"
    assert final.usage.output_tokens > 0
    with claude.messages.stream(**more) as stream:
        assert "".join(stream.text_stream) == SAYS
    short = claude.messages.create(**{**more, "max_tokens": 3})
    assert short.stop_reason == "max_tokens"
    with pytest.raises(anthropic.BadRequestError) as refused:
        claude.messages.create(**{**more, "messages": []})
    assert refused.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]


def test_anthropic_async(url: str) -> None:
    async def ask() -> str:
        async with (
            anthropic.AsyncAnthropic(base_url=url, auth_token="x") as client,
            client.messages.stream(model=NAME, max_tokens=100, messages=ASKED) as stream,
        ):
            return await stream.get_final_text()

    assert asyncio.run(ask()) == SAYS
