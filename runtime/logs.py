"""What llama.cpp says while it works: captured, so that it can become numbers and sentences."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import llama_cpp
import llama_cpp._logger

_MIB = 2**20
_WARN, _ERROR, _CONT = 3, 4, 5


class Log:
    """Lines of one captured stretch, with their levels."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []

    def add(self, level: int, text: str) -> None:
        if level == _CONT and self.lines:
            last_level, last = self.lines[-1]
            self.lines[-1] = (last_level, last + text)
        else:
            self.lines.append((level, text))

    def reason(self) -> str:
        """The first error, without llama.cpp's function names; it names the cause best."""
        errors = [text.strip() for level, text in self.lines if level == _ERROR and text.strip()]
        if not errors:
            return "it gave no reason"
        return re.sub(r"^(\w+: )+", "", errors[0]).removeprefix("error loading model: ")


@contextmanager
def capture() -> Iterator[Log]:
    """Collect llama.cpp's log instead of printing it."""
    log = Log()

    @llama_cpp.llama_log_callback
    def on_line(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        log.add(level, text.decode("utf-8", errors="replace"))

    llama_cpp.llama_log_set(on_line, ctypes.c_void_p(0))
    try:
        yield log
    finally:
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, ctypes.c_void_p(0))


class Sizes(NamedTuple):
    """Bytes a context asks for."""

    kv: int
    compute: int


# llama.cpp has no C call for these sizes; it prints them, also when it only simulates (no_alloc).
# The release is pinned, and tests/test_budget.py fails when a line changes.
_KV = re.compile(r"^llama_(?:kv_cache|memory)\S*: .*?\bsize =\s*([0-9.]+) MiB \(")
_KV_STATE = re.compile(r"DSV4 .* state, .*?size =\s*([0-9.]+) MiB|ratio = .*size =\s*([0-9.]+) MiB")
_COMPUTE = re.compile(r"(?:compute|output) buffer size =\s*([0-9.]+) MiB")


def context_sizes(log: Log) -> Sizes:
    """The KV cache (or recurrent state) and graph buffers announced in a log."""
    kv = compute = 0.0
    for _, line in log.lines:
        if match := _KV.search(line) or _KV_STATE.search(line):
            kv += float(next(group for group in match.groups() if group))
        elif match := _COMPUTE.search(line):
            compute += float(match[1])
    return Sizes(int(kv * _MIB), int(compute * _MIB))
