"""Outputs that models have really written, with what they mean (PyPI's canitoolcall), through our
parsers: whole and in pieces, and not one of them raises.

``CHAT_ALL=1`` tries all of them, against the number that llama.cpp's own library was measured to
get right; `make test` tries some.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterator

import pytest
from canitoolcall import checks
from canitoolcall.chunking import ChunkStrategy, split_text
from canitoolcall.fixtures import Fixture, load_fixtures
from canitoolcall.results import ParsedToolCall, ParseResult, Status
from chat_files import template, templates

from moe_gguf.runtime.chat.parser import Message
from moe_gguf.runtime.chat.templates import Templates

ALL = bool(os.environ.get("CHAT_ALL"))
RIGHT_OF_ALL = 250  # of 292, by white space too; the engine's own harness was measured at 238
RIGHT_OF_SOME = 0.75
SOME = ("Qwen-Qwen3-0.6B", "openai-gpt-oss-120b")
PIECES = ("rand:1:8", "char:0") if ALL else ("rand:1:8",)

# Templates of the same format among those of llama.cpp's source distribution.
TEMPLATES = {
    "Qwen/Qwen3-0.6B": "Qwen-Qwen3-0.6B",
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": "Qwen3-Coder",
    "Qwen/Qwen3-Coder-Next": "Qwen3-Coder",
    "Qwen/Qwen3.5-9B": "Qwen3.5-4B",
    "Qwen/Qwen3.8-27B": "Qwen3.5-4B",
    "deepseek-ai/DeepSeek-V3.1": "deepseek-ai-DeepSeek-V3.1",
    "deepseek-ai/DeepSeek-V3.2": "deepseek-ai-DeepSeek-V3.2",
    "deepseek-ai/DeepSeek-V4-Flash": "deepseek-ai-DeepSeek-V4-Flash-0731",
    "google/gemma-4-31B-it": "google-gemma-4-31B-it",
    "moonshotai/Kimi-K2-Instruct-0905": "Kimi-K2-Instruct",
    "moonshotai/Kimi-K3": "Kimi-K3",
    "openai/gpt-oss-20b": "openai-gpt-oss-120b",
    "zai-org/GLM-4.5": "GLM-4.6",
    "zai-org/GLM-4.7": "GLM-4.7-Flash",
}


@functools.cache
def _opened(name: str) -> Templates:
    return templates(template(name))


@pytest.fixture(scope="module", autouse=True)
def close() -> Iterator[None]:
    yield
    for name in {*TEMPLATES.values()} if _opened.cache_info().currsize else ():
        _opened(name).close()
    _opened.cache_clear()


def _result(message: Message) -> ParseResult:
    calls = (ParsedToolCall(call.name or "", call.arguments) for call in message.calls)
    return ParseResult(message.content or None, message.reasoning or None, tuple(calls))


def _read(fixture: Fixture) -> list[ParseResult]:
    """Whole, and in each kind of pieces."""
    made = _opened(TEMPLATES[fixture.models[0]])
    tools = [dict(tool) for tool in fixture.tools] or None
    prompt = made.apply(
        [{"role": "user", "content": "hi"}],
        tools=tools,
        thinking=fixture.thinking,
        parallel_tool_calls=True,
    )
    was_cut = "truncated" in fixture.tags
    whole = made.parser(prompt)
    whole.finish(fixture.raw_output, cut=was_cut)
    out = [_result(whole.message)]
    for pieces in PIECES:
        parser = made.parser(prompt)
        for part in split_text(fixture.raw_output, ChunkStrategy.parse(pieces)):
            parser.push(part)
        parser.finish(cut=was_cut)
        out.append(_result(parser.message))
    return out


def test_recorded_outputs() -> None:
    known = [f for f in load_fixtures() if f.models[0] in TEMPLATES]
    statuses: Counter[Status] = Counter()
    agree: Counter[bool] = Counter()
    some = [f for f in known if TEMPLATES[f.models[0]] in SOME][::7]
    for fixture in known if ALL else some:
        whole, *pieces = _read(fixture)
        agree.update(checks.compare(whole, other) is not Status.FAIL for other in pieces)
        if fixture.expected is not None:
            statuses[checks.compare(checks.expected_as_result(fixture.expected), whole)] += 1
    if ALL:
        assert statuses.total() == 292
        assert statuses[Status.PASS] >= RIGHT_OF_ALL
    else:
        assert statuses[Status.PASS] >= RIGHT_OF_SOME * statuses.total()
    # Malformed ones differ: what was told of a call before it turned out to be none stays told.
    assert agree[False] <= 0.1 * agree.total()
