"""A conversation as its model's template writes it, and what that implies for the answer.

Owns how a template's answer is read in terms of this package: a constraint, stop texts, tokens that
must be seen. Templates and grammars themselves are llama.cpp's, in a process of their own.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import RequestError
from ..formats.keys import Keys
from ..grammar.asked import GBNF, Schema
from ..grammar.grammar import MAX_COUNT, MAX_LEAST, check_schema
from ..text import shown
from ..vocab import Vocabulary
from .messages import Json, Tools, messages_of, plain, tools_of
from .parser import Parser
from .process import Process, ProcessEnded

KEY = "tokenizer.chat_template"
TOOL_KEY = f"{KEY}.tool_use"
_SPECIAL = re.compile(r"[.^$|()*+?\[\]{}\\]")  # in a regular expression


# Of the two processes that a model's templates are run in: 27 MB each were measured, libraries
# included, and 36 in one that had written a conversation of a million characters.
CHILDREN_BYTES = 2 * (32 << 20)


def room(keys: Keys) -> int:
    """Bytes that conversations of a model take beside this process, by its file's metadata."""
    return CHILDREN_BYTES if any(keys.value(key) for key in (KEY, TOOL_KEY)) else 0


class Thinking(NamedTuple):
    """Between which texts a model thinks, and whether the prompt has begun a thought already."""

    start: str
    ends: Sequence[str]
    begun: bool


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model is to continue, and how its answer is to be held and read.

    The answer must be generated with ``preserved`` tokens shown as text, and end at ``stops``.
    ``delimiters`` are texts with which a message of a role begins: computed states are best kept
    there. ``parser_state`` is the parser's.
    """

    text: str
    tokens: Sequence[int]
    constraint: GBNF | Schema | None
    stops: Sequence[str]
    preserved: frozenset[int]
    thinking: Thinking | None
    delimiters: Sequence[tuple[str, str]]
    parser_state: Mapping[str, Any]


class Templates:
    """The templates of a model, by its vocabulary and the metadata of its file.

    ``template`` is used in their place; "chatml" is a common one, for a model that has none.
    Nothing is started or read before the first use. Any thread may use one.
    """

    def __init__(
        self, vocabulary: Vocabulary, metadata: Mapping[str, str], template: str | None = None
    ) -> None:
        named = {"default": template} if template else _templates(metadata)
        if not named:
            raise RequestError("this model has no chat template: give plain prompts")
        self._vocabulary = vocabulary
        bos, eos = (_shown(vocabulary, token) for token in (vocabulary.bos, vocabulary.eos))
        self._bos = bos if vocabulary.adds_bos else ""
        self._eos = eos if vocabulary.adds_eos else ""
        self._opening = {"op": "open", "templates": named, "bos": bos, "eos": eos}
        self._lock = threading.Lock()
        self._facts: Json | None = None
        self._refused: RequestError | None = None
        self._render = Process(self._opening)
        self._read = Process()  # one request's schema must not delay another's answer

    @property
    def thinks(self) -> bool:
        """Whether its model may think before it answers, and be told not to."""
        return bool(self._open()["thinks"])

    @property
    def caps(self) -> Mapping[str, bool]:
        """What the template can write, under llama.cpp's names."""
        caps: Mapping[str, bool] = self._open()["caps"]
        return caps

    def apply(
        self,
        messages: object,
        *,
        tools: object = None,
        tool_choice: object = None,
        parallel_tool_calls: bool | None = None,
        held_to: GBNF | Schema | None = None,
        thinking: bool | None = None,
        reasoning_effort: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        split_reasoning: bool = True,
        continue_final: bool = False,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """The prompt of a conversation. RequestError for what a template or this model cannot do.

        ``held_to`` is a client's own constraint. ``thinking`` None: as the template does by itself.
        ``split_reasoning`` False leaves thoughts in the content. ``continue_final``: the last
        message is the model's own and is continued.
        """
        given = tools_of(tools, tool_choice)
        self._check_tools(given, held_to)
        kwargs = dict(template_kwargs or {})
        if reasoning_effort == "none":
            thinking = False
        elif reasoning_effort is not None:
            kwargs["reasoning_effort"] = reasoning_effort
        if thinking is None:
            thinking = kwargs.get("enable_thinking", self.thinks)
        if not isinstance(thinking, bool):
            raise RequestError("enable_thinking must be true or false", "chat_template_kwargs")
        if parallel_tool_calls is None:
            parallel_tool_calls = bool(self.caps.get("supports_parallel_tool_calls"))
        question: Json = {
            "messages": messages_of(messages),
            "tools": given.shown,
            "tool_choice": "none",
            "parallel_tool_calls": parallel_tool_calls,
            "enable_thinking": thinking,
            "reasoning_format": "deepseek" if split_reasoning else "none",
            "chat_template_kwargs": plain(kwargs, "chat_template_kwargs"),
            "continue_final_message": continue_final,
            "add_generation_prompt": add_generation_prompt and not continue_final,
        }
        written = self._ask(question)
        return self._prompt(written, self._answering(question, given, written, held_to), held_to)

    def encode(self, messages: object) -> Sequence[int]:
        """Tokens of a conversation, up to where the model answers."""
        return self.apply(messages).tokens

    def parser(self, prompt: Prompt) -> Parser:
        """A reader of the answer to one prompt."""
        return Parser(self._read, prompt.parser_state)

    def close(self) -> None:
        self._render.close()
        self._read.close()

    # --- asking ---------------------------------------------------------------------------------

    def _open(self) -> Json:
        """What is known of the template; a refused one is not tried again."""
        with self._lock:
            if self._refused is not None:
                raise self._refused
            if self._facts is None:
                try:
                    self._facts = self._render.open()
                except ProcessEnded as error:
                    self._refused = RequestError(
                        f"the model's chat template cannot be used ({_line(error)}): give plain "
                        "prompts, which need none"
                    )
                    raise self._refused from None
            return self._facts

    def _ask(self, question: Json) -> Json:
        self._open()
        try:
            answer = self._render.ask({"op": "apply", **question})
        except ProcessEnded as error:
            answer = {"error": str(error)}
        if "error" in answer:
            raise RequestError(
                f"the model's chat template refuses this conversation ({_line(answer['error'])})",
                "messages",
            )
        return answer

    def _check_tools(self, given: Tools, held_to: GBNF | Schema | None) -> None:
        if not given.shown:
            return
        caps = self.caps
        if not (caps.get("supports_tools") or caps.get("supports_tool_calls")):
            raise RequestError("this model's chat template knows no tools", "tools")
        if given.offered and isinstance(held_to, GBNF):
            raise RequestError("a grammar cannot be given together with tools", "grammar")

    def _answering(
        self, question: Json, given: Tools, written: Json, held_to: GBNF | Schema | None
    ) -> Json:
        """``written`` again, with what the answer is held to by tools, and by a schema where more
        than the schema's object may be in it."""
        more: Json = {}
        if isinstance(held_to, Schema) and (given.offered or _may_think(question, written)):
            schema = {"type": "object"} if held_to.schema is True else dict(held_to.schema)
            check_schema(schema)
            more["json_schema"] = schema
        if not given.offered:
            return self._ask({**question, **more}) if more else written
        more["tool_choice"] = given.choice
        try:
            answered = self._ask({**question, **more, "tools": [_held(t) for t in given.offered]})
        except RequestError:  # a schema that llama.cpp makes no grammar of
            answered = self._ask({**question, **more, "tools": [_free(t) for t in given.offered]})
        if given.choice == "required" and not answered["grammar"]:
            raise RequestError("this model's chat template has no form for calls", "tool_choice")
        return answered

    # --- what llama.cpp answers -----------------------------------------------------------------

    def _prompt(self, written: Json, answered: Json, held_to: GBNF | Schema | None) -> Prompt:
        text: str = written["prompt"]
        text = text.removeprefix(self._bos)  # the vocabulary adds its own
        text = text.removesuffix(self._eos) if self._eos else text
        preserved = {
            tokens[0]
            for name in answered["preserved_tokens"]
            if len(tokens := self._tokens(name)) == 1
        }
        constraint: GBNF | Schema | None = held_to
        if answered["grammar"]:
            constraint = self._grammar(answered, preserved)
        start, ends = answered["thinking_start_tag"], answered["thinking_end_tags"]
        return Prompt(
            text=text,
            tokens=self._tokens(text, add_bos=True),
            constraint=constraint,
            stops=answered["additional_stops"],
            preserved=frozenset(preserved),
            thinking=Thinking(start, ends, _begun(answered)) if ends else None,
            delimiters=[(d["role"], d["delimiter"]) for d in answered["message_delimiters"]],
            parser_state=answered["state"] | {"thinking_end_tags": ends},
        )

    def _grammar(self, answered: Json, preserved: set[int]) -> GBNF:
        """As ``common_sampler_init`` and llama-server make one of triggers."""
        if not answered["grammar_lazy"]:
            return GBNF(
                text=answered["grammar"], prefill=self._prefill(answered["generation_prompt"])
            )
        patterns, tokens = [], []
        for trigger in answered["triggers"]:
            kind, value = trigger["type"], trigger["value"]
            if kind == "token":
                tokens.append(trigger["token"])
            elif kind == "word" and len(single := self._tokens(value)) == 1:
                tokens += single
                preserved.update(single)
            elif kind == "word":
                patterns.append(_SPECIAL.sub(r"\\\g<0>", value))
            elif kind == "pattern":
                patterns.append(value)
            else:
                patterns.append(f"^{value.removeprefix('^').removesuffix('$')}$")
        return GBNF(
            text=answered["grammar"],
            lazy=True,
            trigger_patterns=patterns,
            trigger_tokens=tokens,
        )

    def _prefill(self, generation_prompt: str) -> Sequence[int]:
        """Its tokens, but for a space that some vocabularies put before the first."""
        tokens = self._tokens(generation_prompt)
        if not tokens or generation_prompt[0].isspace():
            return tokens
        first = self._vocabulary.piece(tokens[0], special=True)
        return tokens[1:] if first[:1].isspace() else tokens

    def _tokens(self, text: str, add_bos: bool = False) -> list[int]:
        return self._vocabulary.tokenize(text.encode(), add_bos=add_bos, special=True)


def _templates(metadata: Mapping[str, str]) -> dict[str, str]:
    """A model's own: one for all, and one it may have for tools."""
    default, tool_use = metadata.get(KEY), metadata.get(TOOL_KEY)
    found = {"default": default or tool_use, "tool_use": tool_use}
    return {name: text for name, text in found.items() if text}


def _shown(vocabulary: Vocabulary, token: int) -> str:
    """How templates write a token; nothing for -1."""
    return vocabulary.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""


def _may_think(question: Json, written: Json) -> bool:
    return bool(written["supports_thinking"]) and (question["enable_thinking"] or _begun(written))


def _begun(written: Json) -> bool:
    """Whether the prompt ends inside a thought."""
    start, end = written["thinking_start_tag"], written["generation_prompt"]
    behind = end.rpartition(start)[2] if start and start in end else None
    return behind is not None and not any(tag in behind for tag in written["thinking_end_tags"])


def _held(tool: Json) -> Json:
    """A tool as calls of it are held to: what counts further than a grammar does is left out."""
    parameters = tool["function"]["parameters"]
    try:
        check_schema(parameters)
    except RequestError:
        return _with(tool, _uncounted(parameters))
    return tool


def _free(tool: Json) -> Json:
    """A tool whose calls may have any arguments."""
    return _with(tool, {"type": "object", "additionalProperties": True})


def _with(tool: Json, parameters: Json) -> Json:
    return {**tool, "function": {**tool["function"], "parameters": parameters}}


def _uncounted(node: Any) -> Any:
    if isinstance(node, list):
        return [_uncounted(item) for item in node]
    if not isinstance(node, dict):
        return node
    out = {key: _uncounted(value) for key, value in node.items()}
    for least, most in (("minLength", "maxLength"), ("minItems", "maxItems")):
        low, high = _number(out.get(least)), _number(out.get(most))
        if high - low > MAX_COUNT:
            del out[most]
        if low > MAX_LEAST:
            del out[least]
    return out


def _number(value: object) -> float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else 0


def _line(error: object) -> str:
    """What llama.cpp says of a template, on one line: the last of its lines is the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith("Error:")]
    return shown((telling or lines or ["no reason is given"])[-1 if telling else 0], 300)
