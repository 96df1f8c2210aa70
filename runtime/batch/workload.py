"""What a batch file will ask for, guessed from its beginning: what a planner wants to know."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ..engine.planner import Workload
from .lines import BadLine, lines, parse

_SAMPLE = 256  # lines
_CHARACTERS = 4  # of a token, as good as any guess


def workload(source: Path, n_left: int) -> Workload:
    """Of the lines that are left, as the first ones are."""
    prompts: list[int] = []
    answers: list[int] = []
    scored: list[bool] = []
    n_read = 0
    for n_read, line in enumerate(islice(lines(source), _SAMPLE), 1):  # noqa: B007
        try:
            body = parse(line).body
        except BadLine:
            continue
        if isinstance(body, dict):
            prompts += _prompts(body)
            scored.append(bool(body.get("echo")) and body.get("logprobs") is not None)
            most = body.get("max_completion_tokens", body.get("max_tokens"))
            if type(most) is int and most >= 0:
                answers.append(most)
    usual = Workload()
    n_requests = max(1, n_left * len(prompts) // max(1, n_read))
    return Workload(
        _mean(prompts, usual.prompt),
        _mean(answers, usual.answer),
        n_requests,
        scored=2 * sum(scored) > len(scored),
    )


def _prompts(body: dict[str, Any]) -> Iterator[int]:
    """How long each prompt of a body may be."""
    if messages := body.get("messages"):
        yield len(str(messages)) // _CHARACTERS
        return
    prompt = body.get("prompt")
    prompts: list[Any] = prompt if isinstance(prompt, list) else [prompt]
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        prompts = [prompt]
    for one in prompts:
        if isinstance(one, str):
            yield len(one) // _CHARACTERS
        elif isinstance(one, list):
            yield len(one)


def _mean(values: list[int], usual: int) -> int:
    return max(1, round(sum(values) / len(values))) if values else usual
