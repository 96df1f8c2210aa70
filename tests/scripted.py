"""An engine without a model: a token is a byte, and what is answered follows from the prompt.

Also a program, `scripted.py IN OUT WINDOW`: a batch with it, to be killed.
"""

from __future__ import annotations

import asyncio
import base64
import codecs
import json
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moe_gguf.runtime.api.texts import Conversation
from moe_gguf.runtime.batch.answers import Answerer
from moe_gguf.runtime.batch.figures import Figures
from moe_gguf.runtime.batch.job import Batch
from moe_gguf.runtime.batch.lines import extent
from moe_gguf.runtime.batch.output import Output
from moe_gguf.runtime.chat.messages import messages_of, tools_of
from moe_gguf.runtime.chat.parser import Call, Delta, Message
from moe_gguf.runtime.chat.templates import Prompt
from moe_gguf.runtime.engine.generation import Generation
from moe_gguf.runtime.engine.request import (
    Cancelled,
    Event,
    Finished,
    Logprob,
    Progress,
    PromptScored,
    Request,
    Timings,
    Token,
)
from moe_gguf.runtime.errors import RequestError

BOS, END = 256, 257
N_VOCAB = 258


class ByteTexts:
    """Tokens of texts where each byte is one; a prompt begins with a token of its own.

    Its template writes `<role>content`, its model sees images, thinks in `<think>…</think>` and
    calls tools as `<call>{"name": …, "arguments": …}</call>`.
    """

    n_ctx = 4096
    n_vocab = N_VOCAB

    def encode(self, text: str) -> list[int]:
        return [BOS, *text.encode()]

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        return self.encode(text)[not add_special :]

    def conversation(self, asked: Conversation) -> Prompt:
        tools = tools_of(asked.tools, asked.tool_choice)
        told = messages_of(_seen(asked.messages))
        if any(message["content"] == "refuse" for message in told):
            raise RequestError("the template refuses this")
        text = "".join(f"<{one['role']}>{_said(one)}" for one in told)
        if asked.reasoning_effort or asked.thinking:
            text += "<think>"
        if tools.choice == "required":
            text += f"<must call {tools.offered[0]['function']['name']}>"
        if not asked.continue_final:
            text += "<assistant>"
        return Prompt(
            text=text,
            tokens=self.encode(text),
            constraint=asked.held_to,
            stops=["<end>"],
            preserved=frozenset(),
            thinking=None,
            delimiters=[],
            parser_state={},
        )

    def reader(self, prompt: Prompt) -> ByteReader:
        return ByteReader()

    def piece(self, token: int, special: bool = True) -> bytes:
        if token < BOS:
            return bytes([token])
        return {BOS: b"<s>", END: b"</s>"}[token] if special else b""

    def text(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.piece, tokens)).decode(errors="replace")


def _seen(messages: Any) -> Any:
    """Images as words."""
    if not isinstance(messages, list):
        return messages
    seen = {"type": "text", "text": "[image]"}
    return [
        {
            **one,
            "content": [
                seen
                if isinstance(part, dict)
                and part.get("type") == "image_url"
                and (part.get("image_url") or {}).get("url")
                else part
                for part in one["content"]
            ],
        }
        if isinstance(one, dict) and isinstance(one.get("content"), list)
        else one
        for one in messages
    ]


def _said(message: dict[str, Any]) -> str:
    content = message["content"]
    text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
    reasoning = message.get("reasoning_content")
    calls = "".join(
        f"[{call['function']['name']} {call['function']['arguments']}]"
        for call in message.get("tool_calls", ())
    )
    return f"({reasoning}){text}{calls}" if reasoning else text + calls


class ByteReader:
    """Reads what a model that is scripted writes."""

    def __init__(self) -> None:
        self.message = Message()
        self._text = ""

    def push(self, text: str) -> Delta:
        """Whole parts only, but for plain content."""
        self._text += text
        return self._told(partial=True)

    def finish(self, text: str = "", cut: bool = False) -> Delta:
        self._text += text
        return self._told(partial=False)

    def _told(self, partial: bool) -> Delta:
        rest, reasoning, calls = self._text, "", []
        if rest.startswith("<think>"):
            reasoning, _, rest = rest.removeprefix("<think>").partition("</think>")
        while "<call>" in rest:
            before, _, behind = rest.partition("<call>")
            call, ended, rest = behind.partition("</call>")
            rest = before + rest
            if ended:
                found = json.loads(call)
                arguments = json.dumps(found["arguments"])
                index = len(calls)
                calls.append(Call(index, f"call{index}", found["name"], arguments))
        if partial and "<" in rest[-6:]:
            rest = rest[: rest.rindex("<")]
        if partial and "</" in reasoning[-8:]:
            reasoning = reasoning[: reasoning.rindex("</")]
        told = self.message
        delta = Delta(
            reasoning[len(told.reasoning) :],
            rest[len(told.content) :],
            calls[len(told.calls) :],
        )
        told.add(delta)
        return delta


def score(token: int, n_top: int) -> Logprob:
    """The better the lower the token is, with those below it as the best."""
    top = [(t, -0.5 - t / 1000) for t in range(n_top)]
    return Logprob(token, -0.5 - token / 1000, top)


def echo(request: Request) -> bytes:
    """The prompt in capitals, without the mark of its beginning."""
    return bytes(token for token in request.tokens if token < BOS).upper()


def speak(request: Request) -> bytes:
    """What a model with tools and thoughts would say."""
    prompt = bytes(token for token in request.tokens if token < BOS).decode(errors="replace")
    thought = "<think>Let me see.</think>" if "<think>" in prompt else ""
    if "<must call " in prompt:
        name = prompt.rpartition("<must call ")[2].partition(">")[0]
        call = json.dumps({"name": name, "arguments": {"location": "Paris"}})
        return f"{thought}<call>{call}</call>".encode()
    return f"{thought}Hello there, friend!".encode()


Script = Callable[[Request], bytes]


class Scripted:
    """Answers with ``script``, in random order, a token at a time; what it raises is raised."""

    def __init__(
        self,
        script: Script = echo,
        pause_s: float = 0.0,
        seed: int = 0,
        before: threading.Event | None = None,  # nothing is computed until it is set
    ) -> None:
        self._before = before
        self.requests: list[Request] = []
        self.most = 0  # at a time
        self._script, self._pause_s = script, pause_s
        self._random = random.Random(seed)
        self._running: list[tuple[Generation, list[Event] | Exception]] = []
        self._wake = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    parallel = 4
    schedule: dict[str, Any] | None = None

    def stats(self) -> dict[str, Any]:
        requests = {"running": len(self._running)}
        return {"hits": 3, "misses": 1, "requests": requests, "schedule": self.schedule}

    def sequences(self) -> list[dict[str, Any]]:
        return []

    def experts(self) -> dict[str, Any]:
        """Two layers of three experts, two of which are there."""
        state, uses = bytes([1, 0, 0, 0, 1, 0]), b"".join(n.to_bytes(4, "little") for n in range(6))
        return {
            **{"layers": [0, 1], "n_experts": 3, "n_used": 1, "n_held": 2, "n_slots": 2},
            "expert_bytes": 1000,
            "state": base64.b64encode(state).decode(),
            "uses": base64.b64encode(uses).decode(),
        }

    def submit(self, prompt: list[int], **settings: Any) -> Generation:
        request = Request(tokens=prompt, **settings)
        generation = Generation(len(prompt))
        generation.on_cancel(lambda: self._cancel(generation))
        try:
            events: list[Event] | Exception = _events(request, self._script(request))
        except RequestError:
            raise
        except Exception as error:
            events = error
        with self._wake:
            self.requests.append(request)
            self._running.append((generation, events))
            self.most = max(self.most, len(self._running))
            self._wake.notify()
        return generation

    def _cancel(self, generation: Generation) -> None:
        with self._wake:
            self._running = [one for one in self._running if one[0] is not generation]
        if not generation.done:
            generation.fail(Cancelled())

    @property
    def running(self) -> list[Generation]:
        return [generation for generation, _ in list(self._running)]

    def _run(self) -> None:
        if self._before is not None:
            self._before.wait()
        while True:
            with self._wake:
                while not self._running:
                    self._wake.wait()
                one = self._running[self._random.randrange(len(self._running))]
                generation, events = one
                if isinstance(events, Exception):
                    self._running.remove(one)
                    generation.fail(events)
                    continue
                generation.put(events.pop(0))
                if not events:
                    self._running.remove(one)
            if self._pause_s:
                time.sleep(self._pause_s)


def _events(request: Request, answer: bytes) -> list[Event]:
    """As an engine's, with the end token behind an answer that is shorter than it may be; a prompt
    is read in quarters."""
    top, n_top = request.prompt_logprobs, request.top_logprobs
    scored = [] if top is None else [score(token, top) for token in request.tokens[1:]]
    n = len(request.tokens)
    steps = [Progress(n * i // 4, 0, 0.1 * i) for i in range(1, 5)] if request.progress else []
    events: list[Event] = [*steps, PromptScored(scored, 0)]
    most = request.max_tokens
    tokens = answer if most is None else answer[:most]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i, token in enumerate(tokens):
        logprob = None if n_top is None else score(token, n_top)
        times = Timings(0.0, 0.1, 0.1 + 0.01 * i)
        events.append(Token(token, decoder.decode(bytes([token])), logprob, times))
    ended = most is None or len(answer) < most
    end = score(END, n_top) if ended and n_top is not None else None
    times = Timings(0.0, 0.1, 0.1 + 0.01 * len(tokens))
    events.append(
        Finished(
            *(
                "stop" if ended else "length",
                None,
                decoder.decode(b"", True),
                len(request.tokens),
                0,
                len(tokens),
            ),
            times,
            end,
        )
    )
    return events


def answer(
    source: Path,
    target: Path,
    engine: Scripted | None = None,
    window: int = 8,
    answerer: Answerer | None = None,
) -> Figures:
    """A batch from one file to the other."""
    found = extent(source)
    output = Output(target, source, found.n_lines)
    try:
        figures = Figures(found.n_asked, output.n_before)
        answerer = answerer or Answerer(engine or Scripted(), ByteTexts(), "scripted")
        asyncio.run(Batch(source, output, answerer, figures, window, lambda _: None).run())
        return figures
    finally:
        output.close()


if __name__ == "__main__":
    answer(Path(sys.argv[1]), Path(sys.argv[2]), Scripted(pause_s=2e-4), int(sys.argv[3]))
