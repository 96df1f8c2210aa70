"""OpenAI's bodies against what an engine is asked, and what is answered: no HTTP, no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from scripted import BOS, END, ByteTexts, _events, echo, score

from moe_gguf.runtime.api.chat import ChatCompletions
from moe_gguf.runtime.api.completions import Completions
from moe_gguf.runtime.api.refusal import Refusal, refusal_of
from moe_gguf.runtime.api.usage import Stamp
from moe_gguf.runtime.engine.generation import Generation, Result
from moe_gguf.runtime.engine.request import GBNF, Logprob, Request, Sampling, Schema
from moe_gguf.runtime.errors import ExpertReadError, RequestError

TEXTS = ByteTexts()
STAMP = Stamp("cmpl-1", 1700000000, "tiny")
USER = [{"role": "user", "content": "Hi"}]


def completions(prompt: Any = "ab", **fields: Any) -> Completions:
    return Completions({"prompt": prompt, **fields}, TEXTS)


def chat(messages: Any = USER, **fields: Any) -> ChatCompletions:
    return ChatCompletions({"messages": messages, **fields}, TEXTS)


def computed(requests: Sequence[Request]) -> list[Result]:
    results = []
    for request in requests:
        generation = Generation(len(request.tokens))
        generation.put(*_events(request, echo(request)))
        results.append(generation.result())
    return results


def response(call: Completions | ChatCompletions) -> dict[str, Any]:
    return call.response(computed(call.requests), STAMP)


# --- what is asked ------------------------------------------------------------------------------


def test_nothing_but_a_prompt_means_what_llama_cpp_s_tools_mean() -> None:
    (request,) = completions().requests
    assert request == Request(tokens=[BOS, 97, 98], max_tokens=16)
    (request,) = chat().requests
    assert request.max_tokens is None
    assert request.sampling == Sampling()


def test_every_setting_arrives() -> None:
    fields = {
        **{"temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "typical_p": 0.9},
        **{"repeat_penalty": 1.1, "frequency_penalty": -1, "presence_penalty": 2},
        **{"repeat_last_n": 9, "seed": 7, "logit_bias": {"97": -100, "98": 1.5}},
        **{"mirostat": 2, "mirostat_tau": 4, "mirostat_eta": 0.2, "xtc_probability": 0.3},
        **{"dry_multiplier": 0.8, "dry_sequence_breakers": ["\n"], "top_n_sigma": 1},
    }
    expected = Sampling(
        **{"temp": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "typical_p": 0.9},
        **{"repeat_penalty": 1.1, "frequency_penalty": -1, "presence_penalty": 2},
        **{"penalty_last_n": 9, "seed": 7, "logit_bias": {97: -100.0, 98: 1.5}},
        **{"mirostat": 2, "mirostat_tau": 4, "mirostat_eta": 0.2, "xtc_probability": 0.3},
        **{"dry_multiplier": 0.8, "dry_breakers": ["\n"], "top_n_sigma": 1},
    )
    for call in (completions(**fields), chat(**fields)):
        assert call.requests[0].sampling == expected
    (request,) = completions(
        stop="x", max_tokens=5, ignore_eos=True, skip_special_tokens=False
    ).requests
    assert (request.stop, request.max_tokens, request.ignore_eos, request.special) == (
        *(["x"], 5),
        *(True, True),
    )


def test_other_ways_to_say_the_same() -> None:
    def sampling(**fields: Any) -> Sampling:
        return completions(**fields).requests[0].sampling

    assert sampling(repetition_penalty=1.2) == sampling(repeat_penalty=1.2)
    assert sampling(top_k=-1).top_k == 0
    assert sampling(seed=-1).seed is None
    assert sampling(seed=2**63).seed == 2**63 % (2**32 - 1)
    assert sampling(logit_bias=[[97, False], ["98", 2]]).logit_bias == {97: -math.inf, 98: 2.0}
    assert completions(max_tokens=-1).requests[0].max_tokens is None
    assert chat(max_tokens=3, max_completion_tokens=4).requests[0].max_tokens == 4
    assert completions(max_tokens=16.0).requests[0].max_tokens == 16


def test_null_is_left_out_and_unknown_fields_are_ignored() -> None:
    names = ["temperature", "top_p", "presence_penalty", "stop", "logit_bias", "n", "seed"]
    names += ["max_tokens", "logprobs", "echo", "response_format", "grammar", "best_of", "suffix"]
    assert completions(**dict.fromkeys(names)).requests == completions().requests
    names = ["tools", "top_logprobs", "logprobs", "modalities", "max_completion_tokens"]
    assert chat(**dict.fromkeys(names)).requests == chat().requests
    others = {"user": 3, "metadata": {}, "stream": True, "prompt_cache_key": "x"}
    assert completions(**others).requests == completions().requests


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", [[BOS, 97]]),
        ("", [[BOS]]),
        (["a", "b"], [[BOS, 97], [BOS, 98]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
        (["a", [98]], [[BOS, 97], [98]]),
        ("\ud83d\ude00", [[BOS, *"😀".encode()]]),
        ("\ud83d", [[BOS, *"\ufffd".encode()]]),
    ],
)
def test_prompts(prompt: Any, expected: list[list[int]]) -> None:
    assert [request.tokens for request in completions(prompt).requests] == expected


def test_several_answers_to_a_prompt_differ() -> None:
    call = completions(["a", "b"], n=3, seed=2**32 - 3)
    seeds = [request.sampling.seed for request in call.requests]
    assert seeds == [2**32 - 3, 2**32 - 2, 0] * 2
    choices = response(call)["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    assert [choice["text"] for choice in choices] == ["A"] * 3 + ["B"] * 3
    assert {r.sampling.seed for r in completions(n=2).requests} == {None}


SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Schema(schema=True)),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, Schema(schema=SCHEMA)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            Schema(schema=SCHEMA),
        ),
        ({"json_schema": SCHEMA}, Schema(schema=SCHEMA)),
        ({"grammar": "root ::= [0-9]"}, GBNF(text="root ::= [0-9]")),
        ({"grammar": ""}, None),
    ],
)
def test_constraints(fields: dict[str, Any], expected: object) -> None:
    assert chat(**fields).requests[0].constraint == expected
    assert completions(**fields).requests[0].constraint == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"stop": [""]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"logit_bias": {"258": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"²": 1}}, "logit_bias"),
        ({"logit_bias": {"1": "x"}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": 1}, "logit_bias"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema.schema",
        ),
        ({"grammar": "root ::= []", "json_schema": {}}, "json_schema"),
        ({"grammar": 1}, "grammar"),
    ],
)
def test_a_bad_value_is_refused_by_its_name(fields: dict[str, Any], param: str) -> None:
    for make in (completions, chat):
        with pytest.raises(Refusal) as refused:
            make(**fields)
        assert refused.value.param == param
        assert refused.value.status == 400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [258]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 2049}, "prompt"),
        ({"prompt": "a" * 4096}, "prompt"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"echo": 1}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"prompt": ["a"] * 17, "n": 128}, "n"),
    ],
)
def test_a_bad_completion_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as refused:
        completions(**fields)
    assert refused.value.param == param


def part(kind: str, **fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": kind, **fields}]}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "bot", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": part("image_url", image_url={})}, "messages[0].content[0].type"),
        ({"messages": part("text")}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "refuse"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a" * 5000}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"modalities": ["text", "audio"]}, "modalities"),
    ],
)
def test_a_bad_chat_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as refused:
        chat(**fields)
    assert refused.value.param == param


@pytest.mark.parametrize("body", [None, [], "x", 3])
def test_a_body_that_is_no_object(body: object) -> None:
    for kind in (Completions, ChatCompletions):
        with pytest.raises(Refusal):
            kind(body, TEXTS)


def test_messages_as_people_send_them() -> None:
    call = chat(
        [
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "c"},
        ]
    )
    text = "<developer>Be brief.<user>a\nb<assistant>[f {}]<tool>c<assistant>"
    assert bytes(call.requests[0].tokens[1:]).decode() == text


# --- what is answered ---------------------------------------------------------------------------


def test_a_completion() -> None:
    body = response(completions("ab"))
    assert body.pop("timings")["predicted_n"] == 2
    assert body == {
        **{"id": "cmpl-1", "object": "text_completion", "created": 1700000000, "model": "tiny"},
        "choices": [{"index": 0, "text": "AB", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            **{"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
    (choice,) = response(completions("ab", max_tokens=1, echo=True))["choices"]
    assert choice == {"index": 0, "text": "abA", "logprobs": None, "finish_reason": "length"}
    assert response(completions(["a", "b"], n=2))["usage"]["prompt_tokens"] == 4


def test_a_chat_completion() -> None:
    body = response(chat(logprobs=True, top_logprobs=2, max_tokens=1))
    assert body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"] == {
        **{"role": "assistant", "content": "<", "refusal": None, "annotations": []},
    }
    assert choice["finish_reason"] == "length"
    (first,) = choice["logprobs"]["content"]
    assert (first["token"], first["bytes"]) == ("<", [60])
    assert [one["bytes"] for one in first["top_logprobs"]] == [[0], [1]]
    assert response(chat())["choices"][0]["logprobs"] is None


def scored(prompt: Any, **fields: Any) -> list[dict[str, Any]]:
    """The choices of what lm-eval's local-completions sends to score texts."""
    fields = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True} | fields
    call = completions(prompt, model="m", **fields)
    assert all(request.prompt_logprobs == 1 for request in call.requests)
    choices: list[dict[str, Any]] = response(call)["choices"]
    return choices


def harness(choice: dict[str, Any], context: int) -> tuple[float, bool]:
    """The likelihood of what follows ``context`` tokens, as lm-eval reads it from a choice."""
    logprobs = choice["logprobs"]
    scores = logprobs["token_logprobs"][context:-1]
    best = logprobs["top_logprobs"][context:-1]
    greedy = all(one == max(top.values()) for one, top in zip(scores, best, strict=True))
    return sum(scores), greedy


def test_a_harness_reads_the_likelihood_of_a_continuation() -> None:
    first, second = scored([[72, 105, 33], [1, 0, 0]])
    logprobs = first["logprobs"]
    assert first["text"] == "Hi!H"
    assert logprobs["tokens"] == ["H", "i", "!", "H"]
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == [score(t, 1).logprob for t in (105, 33, 72)]
    assert logprobs["top_logprobs"][1] == {"\0": -0.5, "i": -0.605}
    assert harness(first, 1) == (pytest.approx(-0.605 - 0.533), False)
    assert harness(second, 1) == (pytest.approx(-1.0), True)


def test_a_model_that_ends_at_once_does_not_shorten_the_scores() -> None:
    """A harness drops the last score, the generated token's: without one it would drop the
    continuation's."""
    (choice,) = scored([[BOS]], max_tokens=1)
    assert choice["logprobs"]["tokens"] == ["<s>", "</s>"]
    (choice,) = scored([[BOS, 97]], max_tokens=2)
    assert choice["text"] == "<s>aA"
    assert choice["logprobs"]["tokens"] == ["<s>", "a", "A", "</s>"]
    assert choice["logprobs"]["text_offset"] == [0, 3, 4, 5]
    assert choice["logprobs"]["token_logprobs"][-1] == score(END, 1).logprob


def test_scoring_alone() -> None:
    (choice,) = scored("ab", max_tokens=0)
    assert choice["text"] == "ab"
    assert choice["logprobs"]["tokens"] == ["<s>", "a", "b"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1]
    assert choice["finish_reason"] == "length"


def test_offsets_without_an_echo_begin_behind_the_prompt() -> None:
    logprobs = response(completions("äb", logprobs=0, max_tokens=2))["choices"][0]["logprobs"]
    assert logprobs["text_offset"] == [2, 2]
    assert logprobs["top_logprobs"][0] == {"bytes:\\xc3": score(0xC3, 0).logprob}


def test_a_part_of_a_character_has_a_name_of_its_own() -> None:
    """Replacement characters would be one name for many tokens, of which a harness sees one."""
    (choice,) = scored([[0xC3, 0xA4, 97]])
    assert choice["text"].startswith("äa")
    assert choice["logprobs"]["tokens"][:3] == ["bytes:\\xc3", "bytes:\\xa4", "a"]
    assert choice["logprobs"]["text_offset"][:3] == [0, 0, 1]


def test_what_is_impossible_is_a_number_in_json() -> None:
    call = completions("a", logprobs=1, max_tokens=1)
    (result,) = computed(call.requests)
    never = Logprob(65, -math.inf, [(65, -math.inf)])
    logprobs = call.response([result._replace(logprobs=[never])], STAMP)["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-9999.0]
    assert logprobs["top_logprobs"] == [{"A": -9999.0}]


def test_every_exception_has_a_body() -> None:
    assert refusal_of(RequestError("no")).body() == {
        "error": {"message": "no", "type": "invalid_request_error", "param": None, "code": None}
    }
    for error in (ExpertReadError("EIO"), KeyError("x"), ValueError()):
        refusal = refusal_of(error)
        assert (refusal.status, refusal.kind) == (500, "server_error")
        assert str(refusal)
