"""Grammars and schemas of requests: none ends the process or takes it for long, and those that
llama.cpp can run give its own text.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from conftest import TinyFile
from mutant import Mutant
from test_faults import SETTINGS, TOKENS, set_items

import moe_gguf
from moe_gguf.runtime import logs
from moe_gguf.runtime.errors import RequestError
from moe_gguf.runtime.grammar import gbnf
from moe_gguf.runtime.grammar.grammar import check_schema
from moe_gguf.runtime.grammar.stacks import Machine

SECONDS = 10.0  # for a refusal, on a busy machine


@pytest.fixture(scope="module")
def llama(tiny_file: TinyFile) -> Iterator[moe_gguf.Llama]:
    model = moe_gguf.Llama(tiny_file("qwen3moe"), **SETTINGS)
    yield model
    model.close()


@pytest.fixture(scope="module")
def stock(tiny_file: TinyFile) -> Iterator[llama_cpp.Llama]:
    model = llama_cpp.Llama(str(tiny_file("qwen3moe")), n_ctx=256, n_threads=1, verbose=False)
    yield model
    model.close()


def grammar(text: str) -> llama_cpp.LlamaGrammar:
    return llama_cpp.LlamaGrammar.from_string(text, verbose=False)


def complete(llama: llama_cpp.Llama, text: str, **more: Any) -> str:
    asked = {"max_tokens": 12, "temperature": 0} | more
    out = llama.create_completion("Hello", grammar=grammar(text), **asked)
    return str(out["choices"][0]["text"])


def chain(n: int, rule: Callable[[int], str]) -> str:
    rules = "\n".join(f"r{i} ::= {rule(i)}" for i in range(n))
    return f'root ::= r0\n{rules}\nr{n} ::= "x"'


REFUSED = {
    "nested parentheses": ("root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000, "nested"),
    "nested groups that repeat": ("root ::= " + '("a" ' * 30_000 + ")?" * 30_000, "nested|longer"),
    "many that may be left out": ("root ::= " + '"a"? ' * 6000, "too many ways"),
    "some that may be left out": ("root ::= " + '"a"? ' * 3000, "too many ways"),
    "more at least than at most": ('root ::= "a"{5,2}', "there are none"),
    "far too many repetitions": ('root ::= "a"{99999999999999999999999}', "repetitions"),
    "repetitions of repetitions": ("root ::= ([a-z]{0,99}){0,99}", "repetitions"),
    "long texts repeated": (f'root ::= "{"a" * 90_000}"{{2000}}', "elements"),
    "rules that begin with each other": (
        chain(60, lambda i: f'r{i + 1} "a" | r{i + 1} "b"'),
        "too many ways",
    ),
    "a chain of rules": (chain(9000, lambda i: f"r{i + 1}"), "too many ways"),
    "an empty alternative before itself": ('root ::= "y"? root "x" | "z"', "begins with itself"),
    "a rule that begins with itself": ('root ::= root "a" | "b"', "begins with itself"),
    "a circle through what may be empty": (
        'root ::= a b "x"\na ::= ("y"?)\nb ::= root',
        "too many ways",
    ),
    "two ways for every character": (
        'root ::= [a-z ] root "b" | [a-z ] root "c" | [a-z ] root "d" | [a-z ] root "e" | "x"',
        "too many ways",
    ),
    "no character at all": ("root ::= [z-a]", "allows no token"),
    "no character later": ('root ::= "a" [^\\U00000000-\\UFFFFFFFF]', "allows no token"),
    "a NUL": ('root ::= "a"\0', "NUL"),
    "nothing": ("", "no rule root"),
    "no root": ('other ::= "a"', "no rule root"),
    "a rule that is not there": ("root ::= other", "no rule other"),
    "a parenthesis": ("root ::= (", "expected|ends"),
    "a quote": ('root ::= "a', "expected|ends"),
    "an escape": (r'root ::= "\q"', "no escape"),
    "half a character": ('root ::= "\ud800"', "no text"),
    "very long": ("root ::= " + '"a" ' * 100_000, "longer"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_grammar_that_would_not_end_well_is_refused(what: str, llama: moe_gguf.Llama) -> None:
    text, says = REFUSED[what]
    start = time.monotonic()
    with pytest.raises(RequestError, match=f"the grammar cannot be used: .*({says})"):
        complete(llama, text)
    assert time.monotonic() - start < SECONDS
    assert complete(llama, "root ::= [0-9]+")  # the model goes on


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 1000},
        "list": {"type": "array", "items": {"type": "integer"}, "maxItems": 900},
        "kind": {"enum": [f"v{i}" for i in range(500)]},
    },
}
TAKEN = {
    "digits": "root ::= [0-9]+",
    "nested groups": "root ::= " + "(" * 1900 + '"a"' + ")" * 1900,
    "JSON": llama_cpp.llama_grammar.JSON_GBNF,
    "C": llama_cpp.llama_grammar.C_GBNF,
    "chess": llama_cpp.llama_grammar.CHESS_GBNF,
    "a list": llama_cpp.llama_grammar.LIST_GBNF,
    "a schema": llama_cpp.llama_grammar.json_schema_to_gbnf(json.dumps(SCHEMA)),
    "an empty class": 'root ::= [] "a"',
    "anything": "root ::= .*",
    "not these": "root ::= [^a-z\\n]+",
    "comments": "# one\nroot ::= # two\n  other # three\nother ::= ([ab] | # four\n [cd])+\n",
    "repetitions": 'root ::= "a"{3} [b]{0,2} "c"{2,} .{1,4}',
    "escapes": r'root ::= "\x41\u0042\U00000043\t\"" [\]\-\\]',
    "a circle that does not grow": 'root ::= (" "?) root | "a" root',
    "a token": "root ::= <[40]> !<[41]> <[42]>",
    "beyond ASCII": 'root ::= "é" [à-ü]+ "漢字"',
}


@pytest.mark.parametrize("what", TAKEN)
def test_a_grammar_gives_stock_s_text(
    what: str, llama: moe_gguf.Llama, stock: llama_cpp.Llama
) -> None:
    for more in ({}, {"temperature": 1.2, "seed": 3, "repeat_penalty": 1.3}):
        assert complete(llama, TAKEN[what], **more) == complete(stock, TAKEN[what], **more)


def test_ways_that_multiply_while_tokens_come(llama: moe_gguf.Llama) -> None:
    """Two more for every token, though none alone has many."""
    text = 'root ::= "the" root "b" | "the" root "c" | "d"'
    token = llama.tokenize(b"the", add_bos=False)
    assert len(token) == 1
    with pytest.raises(RequestError, match="too many ways to go on"):
        complete(llama, text, max_tokens=200, logit_bias={token[0]: 100.0})
    assert complete(llama, "root ::= [0-9]+")


def test_a_long_token_makes_a_small_grammar_large(tiny_file: TinyFile, tmp_path: Path) -> None:
    """Which it is depends on the vocabulary: here is one with a token of 64 spaces."""
    text = 'root ::= " " root "b" | " " root "c" | "x"'
    mutant = Mutant.read(tiny_file("qwen3moe"))
    set_items(TOKENS, {270: "Ġ" * 64})(mutant.fields)
    llama = moe_gguf.Llama(mutant.write(tmp_path / "m.gguf"), **SETTINGS)
    with pytest.raises(RequestError, match="too many ways to go on"):
        complete(llama, text)
    llama.close()


# --- the slow twin --------------------------------------------------------------------------------

PARTS = ('"a"', '"bc"', "[a-c]", "[^x]", ".", "x", "root", "(", ")", "|", "*", "+", "?", "{2}")
PARTS += (
    "{1,3}",
    "{,2}",
    "{2",
    " ",
    "\n",
    "x ::= ",
    "\\",
    "<[3]>",
    "!",
    '"',
    "[",
    "]",
    "#c",
    "::=",
)


def test_what_can_be_read_is_what_llama_cpp_reads(llama: moe_gguf.Llama) -> None:
    """Random grammars; those that are refused for their work are not shown to it."""
    rng = random.Random(0)
    agreed = {True: 0, False: 0}
    for _ in range(1500):
        text = "root ::= " + "".join(rng.choice(PARTS) + " " for _ in range(rng.randrange(1, 8)))
        text += rng.choice(("", '\nx ::= "y"', '\nx ::= "y" | '))
        try:
            Machine(text)
            ours = True
        except RequestError as error:
            if any(word in str(error) for word in ("too many", "there are none", "more than")):
                continue
            ours = False
        with logs.capture():
            sampler = llama_cpp.llama_sampler_init_grammar(
                llama._model.vocab, text.encode(), b"root"
            )
        assert ours == bool(sampler), text
        if sampler:
            llama_cpp.llama_sampler_free(sampler)
        agreed[ours] += 1
    assert min(agreed.values()) > 100


def test_stacks_follow_the_text() -> None:
    machine = Machine('root ::= "a"{2,3} ("b" | "c" root)?')
    machine.accept("aa")
    assert machine.stacks and () in machine.stacks
    machine.accept("ca")
    assert machine.stacks and () not in machine.stacks
    machine.accept("x")
    assert not machine.stacks


def test_the_bounds_are_what_a_schema_may_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for n in (1000, 1001):
        schema = {"type": "string", "maxLength": n}
        text = llama_cpp.llama_grammar.json_schema_to_gbnf(json.dumps(schema))
        if n == 1000:
            check_schema(schema)
            Machine(text)
        else:
            with pytest.raises(RequestError, match=f"more than {gbnf.MAX_REPEATS}"):
                Machine(text)


# --- schemas --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"type": "string", "maxLength": 16_000}, "maxLength 16000 of x is further than"),
        ({"type": "string", "maxLength": 10**9}, "maxLength"),
        ({"type": "string", "minLength": 10**6}, "minLength 1000000 of x"),
        ({"type": "array", "items": {"type": "integer"}, "maxItems": 30_000}, "maxItems 30000"),
        ({"anyOf": [{"type": "string", "maxLength": 5000}]}, "maxLength 5000"),
    ],
)
def test_a_schema_that_counts_too_far_is_refused_by_name(
    value: dict[str, Any], says: str, llama: moe_gguf.Llama
) -> None:
    schema = {"type": "object", "properties": {"x": value}}
    message = [{"role": "user", "content": "a"}]
    formats = {"type": "json_object", "schema": schema}
    with pytest.raises(RequestError, match=says):
        llama.create_chat_completion(message, response_format=formats, max_tokens=4)
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    forced = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(RequestError, match=says):
        llama.create_chat_completion(message, tools=[tool], tool_choice=forced, max_tokens=4)
    assert llama.create_chat_completion(message, tools=[tool], max_tokens=4)  # no grammar of it


def test_a_schema_that_counts_as_far_as_a_grammar_is_used(llama: moe_gguf.Llama) -> None:
    value = {"type": "string", "maxLength": 1000}
    long = {"type": "string", "minLength": 1500, "maxLength": 2400}
    schema = {"type": "object", "properties": {"maxLength": value, "y": long}}
    out = llama.create_chat_completion(
        [{"role": "user", "content": "a"}],
        response_format={"type": "json_object", "schema": schema},
        max_tokens=12,
        temperature=0,
    )
    assert out["choices"][0]["message"]["content"].startswith("{")
