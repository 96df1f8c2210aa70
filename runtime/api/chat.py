"""Bodies of ``/v1/chat/completions``: a conversation, and the message that continues it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..chat.parser import Call, Delta
from ..engine.generation import Result
from ..engine.request import Event, Finished, Logprob, Progress, Token
from . import settings
from .fields import Fields
from .refusal import Refusal
from .stream import DONE, Piece
from .texts import Conversation, Reader, Texts
from .turn import Turn, continues, finished, template_kwargs
from .usage import Stamp, TimingsSoFar, finish_reason, finite, head, progress, timings, usage

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class ChatCompletions:
    """One body; ``requests`` are to be computed, in any order: its choices."""

    def __init__(self, body: object, texts: Texts) -> None:
        fields = Fields(body)
        self.texts = texts
        _refuse_others(fields)
        self.top = _top_logprobs(fields)
        self.turn = Turn(
            conversation(fields),
            texts,
            max_tokens=settings.length(fields, None),
            sampling=settings.sampling(fields, texts.n_vocab),
            stop=fields.texts("stop", settings.MOST_STOPS),
            n=settings.n_choices(fields),
            top_logprobs=self.top,
            ignore_eos=fields.flag("ignore_eos"),
            special=not fields.flag("skip_special_tokens", default=True),
            progress=fields.flag("return_progress") and fields.flag("stream"),
        )
        self.requests = self.turn.requests
        self.include_usage = settings.include_usage(fields)
        self.timings_per_token = fields.flag("timings_per_token")

    def response(self, results: Sequence[Result], stamp: Stamp) -> dict[str, Any]:
        """The response body of what the requests came to."""
        answers = [self.turn.answered(result) for result in results]
        n_reasoning = sum(self.turn.n_tokens(one.message.reasoning) for one in answers)
        choices = []
        for i, (answer, result) in enumerate(zip(answers, results, strict=True)):
            message, calls = answer.message, answer.message.calls
            said: dict[str, Any] = {
                "role": "assistant",
                "content": None if calls and not message.content else message.content,
                "refusal": None,
                "annotations": [],
            }
            if message.reasoning:
                said["reasoning_content"] = message.reasoning
            if calls:
                said["tool_calls"] = [_whole(call) for call in calls]
            choices.append(
                {
                    "index": i,
                    "message": said,
                    "logprobs": None if self.top is None else self.logprobs(result.logprobs),
                    "finish_reason": _reason(answer.end, bool(calls)),
                }
            )
        ends = [result.finished for result in results]
        return {
            **head(stamp, "chat.completion"),
            "choices": choices,
            "usage": usage(ends, len(ends), n_reasoning),
            "timings": timings(ends[0]),
        }

    def stream(self, stamp: Stamp) -> ChatStream:
        return ChatStream(self, stamp)

    def logprobs(self, scores: Sequence[Logprob]) -> dict[str, Any]:
        content = [
            {
                **self._scored(score.token, score.logprob),
                "top_logprobs": [self._scored(token, logprob) for token, logprob in score.top],
            }
            for score in scores
        ]
        return {"content": content, "refusal": None}

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        piece = self.texts.piece(token)
        return {
            "token": piece.decode(errors="replace"),
            "logprob": finite(logprob),
            "bytes": [*piece],
        }


class ChatStream:
    """Chunks of one body's choices."""

    def __init__(self, call: ChatCompletions, stamp: Stamp) -> None:
        self._call, self._stamp = call, stamp
        self._readers: list[Reader] = [call.turn.reader() for _ in call.requests]
        self._timings = [
            TimingsSoFar(call.turn.n_prompt, call.timings_per_token) for _ in call.requests
        ]
        self._ends: list[Finished] = []
        self._scores: list[list[Logprob]] = [[] for _ in call.requests]  # not sent yet

    def begin(self) -> list[Piece]:
        first = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk(i, first) for i in range(len(self._readers))]

    def push(self, i: int, events: Sequence[Event]) -> list[Piece]:
        tokens = [event for event in events if isinstance(event, Token)]
        self._scores[i] += [token.logprob for token in tokens if token.logprob is not None]
        pieces = [
            self._chunk(i, {}, prompt_progress=progress(event, self._call.turn.n_prompt))
            for event in events
            if isinstance(event, Progress)
        ]
        so_far = self._timings[i].push(events)
        pieces += [
            self._chunk(i, delta, **so_far)
            for delta in _deltas(self._call.turn.read(self._readers[i], events))
        ]
        if (end := finished(events)) is not None:
            self._ends.append(end)
            calls = bool(self._readers[i].message.calls)
            pieces.append(self._chunk(i, {}, _reason(end, calls), timings=timings(end)))
        return pieces

    def end(self) -> list[Piece]:
        if not self._call.include_usage:
            return [DONE]
        turn = self._call.turn
        n_reasoning = sum(turn.n_tokens(reader.message.reasoning) for reader in self._readers)
        used = usage(self._ends, len(self._ends), n_reasoning)
        head_ = head(self._stamp, "chat.completion.chunk")
        return [Piece({**head_, "choices": [], "usage": used}), DONE]

    def fail(self, refusal: Refusal) -> list[Piece]:
        return [Piece(refusal.body()), DONE]

    def _chunk(
        self, i: int, delta: dict[str, Any], reason: str | None = None, **more: Any
    ) -> Piece:
        scores, self._scores[i] = self._scores[i], []
        choice = {
            "index": i,
            "delta": delta,
            "logprobs": self._call.logprobs(scores) if scores else None,
            "finish_reason": reason,
        }
        chunk = {**head(self._stamp, "chat.completion.chunk"), "choices": [choice], **more}
        if self._call.include_usage:
            chunk["usage"] = None
        return Piece(chunk)


def conversation(fields: Fields) -> Conversation:
    """What a body of OpenAI's asks a model to go on with."""
    effort = fields.text("reasoning_effort")
    if effort is not None and effort not in _EFFORTS:
        raise fields.wrong("reasoning_effort", f"one of {', '.join(_EFFORTS)}")
    form = fields.text("reasoning_format")
    if form not in (None, "none", "auto", "deepseek", "deepseek-legacy"):
        raise fields.wrong("reasoning_format", "none, auto or deepseek")
    messages = fields.value("messages")
    continued = fields.optional_flag("continue_final_message")  # vLLM's way to ask for it
    if continued and fields.value("add_generation_prompt"):
        raise Refusal(
            "continue_final_message and add_generation_prompt exclude each other",
            "continue_final_message",
        )
    if continued is None:
        continued = continues(messages)
    return Conversation(
        messages=messages,
        tools=fields.value("tools"),
        tool_choice=fields.value("tool_choice"),
        parallel_tool_calls=fields.optional_flag("parallel_tool_calls"),
        held_to=settings.constraint(fields),
        reasoning_effort=effort,
        template_kwargs=template_kwargs(fields),
        split_reasoning=form != "none",
        continue_final=continued,
        add_generation_prompt=fields.flag("add_generation_prompt", default=True),
    )


def count_tokens(body: object, texts: Texts) -> dict[str, Any]:
    """The response body of ``/v1/chat/completions/input_tokens``."""
    call = ChatCompletions(body, texts)
    return {"object": "response.input_tokens", "input_tokens": call.turn.n_prompt}


def _reason(end: Finished, calls: bool) -> str:
    return "tool_calls" if calls and end.reason == "stop" else finish_reason(end.reason)


def _deltas(delta: Delta) -> list[dict[str, Any]]:
    """One for each part: clients read what they know of a delta, and some only one."""
    found: list[dict[str, Any]] = []
    if delta.reasoning:
        found.append({"reasoning_content": delta.reasoning})
    if delta.content:
        found.append({"content": delta.content})
    return found + [{"tool_calls": [_more(call)]} for call in delta.calls]


def _more(call: Call) -> dict[str, Any]:
    """Of a call; its name comes with the first."""
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _whole(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _top_logprobs(fields: Fields) -> int | None:
    top = fields.integer("top_logprobs", 0, settings.MOST_TOP)
    if fields.flag("logprobs"):
        return top or 0
    if top is not None:
        raise Refusal("top_logprobs belongs to logprobs: set that to true", "top_logprobs")
    return None


def _refuse_others(fields: Fields) -> None:
    """What would change the answer and is not done."""
    for name in ("functions", "function_call"):
        if fields.value(name):
            raise Refusal(f"{name} are not supported: give tools", name)
    if (fields.value("modalities") or ["text"]) != ["text"]:
        raise Refusal("only text is answered: leave modalities out", "modalities")
    if fields.value("audio"):
        raise Refusal("only text is answered: leave audio out", "audio")
