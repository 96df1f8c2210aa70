"""An engine without a model: a token is a byte, and what is answered follows from the prompt.

Also a program, `scripted.py IN OUT WINDOW`: a batch with it, to be killed.
"""

from __future__ import annotations

import asyncio
import codecs
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_gguf.runtime.batch.answers import Answerer
from moe_gguf.runtime.batch.figures import Figures
from moe_gguf.runtime.batch.job import Batch
from moe_gguf.runtime.batch.lines import extent
from moe_gguf.runtime.batch.output import Output
from moe_gguf.runtime.engine.generation import Generation
from moe_gguf.runtime.engine.request import (
    Cancelled,
    Event,
    Finished,
    Logprob,
    PromptScored,
    Request,
    Timings,
    Token,
)
from moe_gguf.runtime.errors import RequestError

BOS, END = 256, 257
N_VOCAB = 258


class ByteTexts:
    """Tokens of texts where each byte is one; a prompt begins with a token of its own."""

    n_ctx = 4096
    n_vocab = N_VOCAB

    def encode(self, text: str) -> list[int]:
        return [BOS, *text.encode()]

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        if any(message["content"] == "refuse" for message in messages):
            raise RequestError("the template refuses this")
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return self.encode(f"{text}<assistant>")

    def piece(self, token: int, special: bool = True) -> bytes:
        if token < BOS:
            return bytes([token])
        return {BOS: b"<s>", END: b"</s>"}[token] if special else b""

    def text(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.piece, tokens)).decode(errors="replace")


def score(token: int, n_top: int) -> Logprob:
    """The better the lower the token is, with those below it as the best."""
    top = [(t, -0.5 - t / 1000) for t in range(n_top)]
    return Logprob(token, -0.5 - token / 1000, top)


def echo(request: Request) -> bytes:
    """The prompt in capitals, without the mark of its beginning."""
    return bytes(token for token in request.tokens if token < BOS).upper()


Script = Callable[[Request], bytes]


class Scripted:
    """Answers with ``script``, in random order, a token at a time; what it raises is raised."""

    def __init__(self, script: Script = echo, pause_s: float = 0.0, seed: int = 0) -> None:
        self.requests: list[Request] = []
        self.most = 0  # at a time
        self._script, self._pause_s = script, pause_s
        self._random = random.Random(seed)
        self._running: list[tuple[Generation, list[Event] | Exception]] = []
        self._wake = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

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

    def _run(self) -> None:
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
    """As an engine's, with the end token behind an answer that is shorter than it may be."""
    top, n_top = request.prompt_logprobs, request.top_logprobs
    scored = [] if top is None else [score(token, top) for token in request.tokens[1:]]
    events: list[Event] = [PromptScored(scored, 0)]
    most = request.max_tokens
    tokens = answer if most is None else answer[:most]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        logprob = None if n_top is None else score(token, n_top)
        events.append(Token(token, decoder.decode(bytes([token])), logprob))
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
