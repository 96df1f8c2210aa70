"""Conversations in a model's own template, tool calls, schemas and streams, through llama.cpp's own
library; and that neither a template, nor a request, nor an answer ends this process.

Needs what the build downloads; nothing here is skipped without it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_files import CLOCK, WEATHER, names, template, templates

from moe_gguf.runtime.chat import process
from moe_gguf.runtime.chat.messages import MAX_DEPTH, messages_of, schema_of, tools_of
from moe_gguf.runtime.chat.parser import Call, Delta, Parser
from moe_gguf.runtime.chat.process import ChatMissing, Process
from moe_gguf.runtime.chat.templates import Templates
from moe_gguf.runtime.errors import RequestError
from moe_gguf.runtime.grammar import gbnf
from moe_gguf.runtime.grammar.asked import GBNF, Schema
from moe_gguf.runtime.plugin import library

ALL = bool(os.environ.get("CHAT_ALL"))
PLAIN = (  # shows whatever it is given
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls|tojson }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
HI = [{"role": "user", "content": "hi"}]
SOME = ("Qwen-Qwen3-0.6B", "openai-gpt-oss-120b", "GLM-4.6", "mistralai-Mistral-Nemo-Instruct-2407")


@pytest.fixture(scope="module")
def qwen() -> Iterator[Templates]:
    """Thinks, calls tools."""
    made = templates(template("Qwen-Qwen3-0.6B"), "<|im_start|>", "<|im_end|>", "<tool_call>")
    yield made
    made.close()


@pytest.fixture(scope="module")
def plain() -> Iterator[Templates]:
    made = templates(PLAIN)
    yield made
    made.close()


# --- the library --------------------------------------------------------------------------------


def test_library_is_of_the_release_that_runs() -> None:
    answer = Process().ask({"op": "schema", "schema": {"type": "boolean"}})
    assert 'root ::= ("true" | "false")' in answer["grammar"]


def test_library_of_another_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0.1")
    with pytest.raises(ChatMissing, match=r"built for llama-cpp-python .*, not 0\.0\.1"):
        templates(PLAIN).apply(HI)


def test_install_without_the_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "built_file", lambda name: None)
    process.libraries.cache_clear()
    with pytest.raises(ChatMissing, match=r"built without llama.cpp's headers.*reinstall"):
        templates(PLAIN).apply(HI)


def test_foreign_wheel_without_common_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process, "LLAMA_LIBRARIES", (str(tmp_path),))
    process.libraries.cache_clear()
    with pytest.raises(ChatMissing, match=r"no libllama-common .*--no-binary llama-cpp-python"):
        templates(PLAIN).apply(HI)


def test_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_bytes(b"not a library")
    monkeypatch.setattr(process, "libraries", lambda: (tmp_path / "broken.so", tmp_path))
    with pytest.raises(ChatMissing, match="does not load"):
        templates(PLAIN).apply(HI)
    error = "libssl.so.3: cannot open shared object file: No such file or directory"
    assert "install libssl3" in process._unloadable(error)


# --- templates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names() if ALL else SOME)
def test_template_renders_calls_and_reads(name: str) -> None:
    made = templates(template(name))
    prompt = made.apply([{"role": "system", "content": "Be brief."}, *HI])
    assert "hi" in prompt.text
    parser = made.parser(prompt)
    parser.push("Hello")
    parser.finish()
    assert "Hello" in parser.message.content + parser.message.reasoning
    if not (made.caps["supports_tools"] or made.caps["supports_tool_calls"]):
        with pytest.raises(RequestError, match="knows no tools"):
            made.apply(HI, tools=[WEATHER])
        return
    for choice in ("auto", "none", "required"):
        if choice == "required" and name.startswith("ibm-granite-granite-3.3"):
            continue  # its calls have no form that llama.cpp knows
        prompt = made.apply(HI, tools=[WEATHER, CLOCK], tool_choice=choice)
        # Some write calls, but are not shown tools: llama-server lets that pass, too.
        assert "get_weather" in prompt.text or not made.caps["supports_tools"]
        if choice == "required":
            assert isinstance(prompt.constraint, GBNF) and not prompt.constraint.lazy
        if isinstance(prompt.constraint, GBNF):
            gbnf.read(prompt.constraint.text, "root")  # our own bounds let it pass
            assert prompt.constraint.lazy == bool(
                prompt.constraint.trigger_patterns or prompt.constraint.trigger_tokens
            )
        assert choice != "none" or prompt.constraint is None
    made.close()


@pytest.mark.parametrize(
    "bomb",
    [
        "{% for i in range(1000000000000) %}x{% endfor %}",
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(60) %}"
        "{% set n.s = n.s + n.s %}{% endfor %}",
        "{% nonsense %}",
    ],
    ids=["memory", "time", "nesting", "recursion", "doubling", "syntax"],
)
def test_template_that_would_end_the_process(bomb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "CPU_S", 0.5)
    made = templates(bomb)
    with pytest.raises(RequestError, match="cannot be used"):
        made.apply(HI)
    began = time.monotonic()
    with pytest.raises(RequestError, match="cannot be used"):  # and is not tried again
        made.apply(HI)
    assert time.monotonic() - began < 0.1


def test_conversation_that_ends_the_template_leaves_the_next_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "CPU_S", 0.5)
    made = templates(
        "{% if messages[0].content == 'bomb' %}{% for i in range(9999) %}"
        "{% for i in range(9999) %}{% endfor %}{% endfor %}{% endif %}" + PLAIN
    )
    with pytest.raises(RequestError, match="does not come to an end"):
        made.apply([{"role": "user", "content": "bomb"}])
    assert made.apply(HI).text == "<s>[user]hi[assistant]"


def test_reason_of_a_template_is_told(plain: Templates) -> None:
    made = templates(
        PLAIN + "{% if messages|length > 1 %}{{ raise_exception('one only') }}{% endif %}"
    )
    made.apply(HI)
    with pytest.raises(RequestError, match=r"refuses this conversation .*one only"):
        made.apply(HI * 2)


def test_start_token_stands_once() -> None:
    made = templates(PLAIN, adds_bos=True)
    prompt = made.apply(HI)
    assert prompt.text == "[user]hi[assistant]"
    assert prompt.tokens[0] == 256 and 256 not in prompt.tokens[1:]
    assert made.encode(HI) == prompt.tokens


def test_model_without_a_template() -> None:
    with pytest.raises(RequestError, match="no chat template"):
        templates("")
    made = Templates(templates(PLAIN)._vocabulary, {}, template="chatml")
    assert made.apply(HI).text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


# --- people's JSON ------------------------------------------------------------------------------


def test_contents_of_every_form_are_one(plain: Templates) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert "[user]a\nb[" in plain.apply([{"role": "user", "content": parts}]).text
    assert "[system]s[" in plain.apply([{"role": "developer", "content": "s"}, *HI]).text
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}
    turns = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
    text = plain.apply([*turns, {"role": "tool", "tool_call_id": "1", "content": "ok"}]).text
    assert "[assistant][{" in text and "[tool]ok" in text
    half = plain.apply([{"role": "user", "content": "\ud83d\ude00\ud800"}])
    assert half.text == "<s>[user]\U0001f600\ufffd[assistant]"


def _deep(n: int) -> Any:
    out: Any = {}
    for _ in range(n):
        out = {"a": out}
    return out


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        (["hi"], "messages[0]"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "king", "content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 7}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": "x", "name": 7}], "messages[0].name"),
        ([{"role": "assistant"}], "messages[0].content"),
        ([{"role": "assistant", "tool_calls": {"a": 1}}], "messages[0].tool_calls"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            [
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"function": {"name": "f", "arguments": "[" * 5000 + "]" * 5000}}
                    ],
                }
            ],
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_unusable_messages_name_their_field(messages: object, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        messages_of(messages)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ({}, None, "tools"),
        ([7], None, "tools[0]"),
        ([{"type": "web_search"}], None, "tools[0].type"),
        ([{"type": "function", "function": {}}], None, "tools[0].function.name"),
        (
            [{"function": {"name": "f", "parameters": _deep(MAX_DEPTH + 1)}}],
            None,
            "tools[0].function.parameters",
        ),
        ([{"function": {"name": "f", "parameters": {"a": float("nan")}}}], None, None),
        ([WEATHER], {"type": "function", "function": {"name": "other"}}, "tool_choice"),
        ([WEATHER], "always", "tool_choice"),
        (None, "required", "tool_choice"),
    ],
)
def test_unusable_tools_name_their_field(tools: object, choice: object, param: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        tools_of(tools, choice)
    assert param is None or caught.value.param == param


def test_response_formats() -> None:
    assert schema_of(None) is None and schema_of({"type": "text"}) is None
    assert schema_of({"type": "json_object"}) == Schema(schema=True)
    given = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}
    assert schema_of(given) == Schema(schema={"type": "integer"})
    for bad in (7, {"type": "xml"}, {"type": "json_schema"}, {"type": "json_object", "schema": 7}):
        with pytest.raises(RequestError):
            schema_of(bad)


def test_conversation_longer_than_is_taken(plain: Templates) -> None:
    with pytest.raises(RequestError, match="longer than"):
        plain.apply([{"role": "user", "content": "x" * process.MAX_BYTES}])


# --- what an answer is held to ------------------------------------------------------------------


def test_tools_begin_to_hold_at_a_call(qwen: Templates) -> None:
    prompt = qwen.apply(HI, tools=[WEATHER])
    assert isinstance(prompt.constraint, GBNF) and prompt.constraint.lazy
    assert prompt.constraint.trigger_patterns == ["<tool_call>\n"]
    assert prompt.thinking is not None and prompt.thinking.ends == ["</think>"]
    assert not prompt.thinking.begun


def test_forced_call_describes_the_end_of_the_prompt(qwen: Templates) -> None:
    named = {"type": "function", "function": {"name": "get_time"}}
    auto, forced = (
        qwen.apply(HI, tools=[WEATHER, CLOCK], tool_choice=choice) for choice in ("auto", named)
    )
    assert auto.text == forced.text  # so that a prefix is computed once
    assert isinstance(forced.constraint, GBNF) and not forced.constraint.lazy
    assert "get_time" in forced.constraint.text and "get_weather" not in forced.constraint.text
    assert forced.constraint.prefill == auto.tokens[-len(forced.constraint.prefill) :]


def test_counts_beyond_a_grammar_are_shown_but_not_held(qwen: Templates) -> None:
    tool = json.loads(json.dumps(WEATHER))
    tool["function"]["parameters"]["properties"]["city"]["maxLength"] = 100_000
    prompt = qwen.apply(HI, tools=[tool])
    assert "100000" in prompt.text and isinstance(prompt.constraint, GBNF)
    gbnf.read(prompt.constraint.text, "root")


def test_schema_that_no_grammar_is_made_of_does_not_refuse_a_tool(qwen: Templates) -> None:
    tool = json.loads(json.dumps(WEATHER))
    tool["function"]["parameters"]["properties"]["city"] = {"$ref": "#/nowhere"}
    prompt = qwen.apply(HI, tools=[tool])
    assert "#/nowhere" in prompt.text and isinstance(prompt.constraint, GBNF)


def test_schema_leaves_room_to_think(qwen: Templates, plain: Templates) -> None:
    schema = Schema(schema={"type": "object", "properties": {"a": {"type": "integer"}}})
    assert plain.apply(HI, held_to=schema).constraint is schema
    assert qwen.apply(HI, held_to=schema, thinking=False).constraint is schema
    prompt = qwen.apply(HI, held_to=schema)
    assert isinstance(prompt.constraint, GBNF) and "<think>" in prompt.constraint.text
    parser = qwen.parser(prompt)
    parser.finish('<think>\nhm\n</think>\n\n{"a": 1}')
    assert (parser.message.reasoning, parser.message.content) == ("hm", '{"a": 1}')


def test_thinking_can_be_switched(qwen: Templates) -> None:
    assert qwen.thinks
    off = qwen.apply(HI, thinking=False).text
    assert off.endswith("<think>\n\n</think>\n\n")
    assert qwen.apply(HI, reasoning_effort="none").text == off
    assert qwen.apply(HI, template_kwargs={"enable_thinking": False}).text == off
    assert qwen.apply(HI).text != off
    with pytest.raises(RequestError, match="true or false"):
        qwen.apply(HI, template_kwargs={"enable_thinking": "yes"})


def test_grammar_of_a_client_excludes_tools(qwen: Templates) -> None:
    own = GBNF(text='root ::= "x"')
    assert qwen.apply(HI, held_to=own).constraint is own
    with pytest.raises(RequestError, match="together with tools"):
        qwen.apply(HI, held_to=own, tools=[WEATHER])


# --- reading ------------------------------------------------------------------------------------

CALLS = (
    "<think>\nLet me see.\n</think>\n\nOne moment.\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
)


def _parser(made: Templates) -> Parser:
    return made.parser(made.apply(HI, tools=[WEATHER, CLOCK], parallel_tool_calls=True))


@pytest.mark.parametrize("n", [1, 7, 1000])
def test_stream_says_everything_once(qwen: Templates, n: int) -> None:
    parser = _parser(qwen)
    deltas = [parser.push(CALLS[i : i + n]) for i in range(0, len(CALLS), n)]
    deltas.append(parser.finish())
    assert "".join(d.reasoning for d in deltas) == "Let me see."
    assert "".join(d.content for d in deltas) == "One moment."
    told = [call for delta in deltas for call in delta.calls]
    assert [(c.index, c.name) for c in told if c.name] == [(0, "get_weather"), (1, "get_time")]
    assert all((c.id is None) == (c.name is None) for c in told)
    assert [c.index for c in told] == sorted(c.index for c in told)
    first, second = parser.message.calls
    assert json.loads(first.arguments) == {"city": "Köln", "days": 2}
    assert json.loads(second.arguments) == {} and first.id != second.id


def test_malformed_call_is_content(qwen: Templates) -> None:
    bad = "Well: <tool_call>\n{get_weather of Köln}\n</tool_call>"
    whole, parts = _parser(qwen), _parser(qwen)
    whole.finish(bad)
    for letter in bad:
        parts.push(letter)
    parts.finish()
    assert whole.message.content == parts.message.content == bad
    assert not whole.message.calls and not parts.message.calls


def test_answer_that_was_cut_is_told_as_far_as_it_goes(qwen: Templates) -> None:
    parser = _parser(qwen)
    parser.finish(CALLS[: CALLS.index("Köln") + 2], cut=True)
    assert [call.name for call in parser.message.calls] == ["get_weather"]


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 100_000, "\udcff\x00<think>"])
def test_answer_that_would_end_the_process_is_content(qwen: Templates, text: str) -> None:
    parser = _parser(qwen)
    parser.push('<tool_call>\n{"name": "get_weather", "arguments": {"city": ' + text)
    parser.finish()
    other = _parser(qwen)
    other.finish("fine")
    assert other.message.content == "fine"


def test_lost_process_loses_no_answer(qwen: Templates) -> None:
    parser = _parser(qwen)
    parser.push(CALLS[:80])
    running = qwen._read._running
    assert running is not None
    os.kill(running._popen.pid, signal.SIGKILL)
    running._popen.wait()
    assert parser.push(CALLS[80:90]) == Delta()  # the one that finds it lost
    parser.push(CALLS[90:])
    parser.finish()
    assert [call.name for call in parser.message.calls] == ["get_weather", "get_time"]


def test_call_that_grew_is_one() -> None:
    parser = _parser(templates(template("Qwen-Qwen3-0.6B")))
    for part in (
        "<tool_call>\n",
        '{"name": "get_we',
        'ather", "arg',
        'uments": {"city"',
        ': "K"}}',
    ):
        parser.push(part)
    parser.finish("\n</tool_call>")
    (call,) = parser.message.calls
    assert isinstance(call, Call) and call.name == "get_weather"
    assert json.loads(call.arguments) == {"city": "K"}
