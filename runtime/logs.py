"""What llama.cpp says while it works: captured, so that it can become numbers and sentences."""

from __future__ import annotations

import ctypes
import logging
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

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


# Whom lines go to that nobody captures.
_listeners: list[Any] = [llama_cpp._logger.llama_log_callback]


class _Captures(threading.local):
    """The captures of one thread, innermost last: what others compute meanwhile is none of them."""

    def __init__(self) -> None:
        self.logs: list[tuple[Log, bool]] = []


_captures = _Captures()


@llama_cpp.llama_log_callback
def _on_line(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """The only callback llama.cpp is given: a thread may be in it at any time, so none is freed."""
    if not _captures.logs:
        _listeners[-1](level, text, user_data)
        return
    log, echo = _captures.logs[-1]
    line = text.decode("utf-8", errors="replace")
    log.add(level, line)
    if echo:
        print(line, end="", file=sys.stderr, flush=True)


def _listen() -> None:
    llama_cpp.llama_log_set(_on_line, ctypes.c_void_p(0))


@contextmanager
def capture() -> Iterator[Log]:
    """Collect what llama.cpp says in this thread instead of printing it; with ``verbose`` models,
    print it as well."""
    log = Log()
    # llama-cpp-python's own switch: 0 until the first model says whether it is verbose.
    echo = 0 < llama_cpp._logger.logger.level <= logging.DEBUG
    _listen()
    _captures.logs.append((log, echo))
    try:
        yield log
    finally:
        _captures.logs.pop()


@llama_cpp.llama_log_callback
def _deaf(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    pass


def echo() -> None:
    """Print what is captured as well, from now on."""
    llama_cpp._logger.set_verbose(True)


def silence() -> None:
    """Print nothing of llama.cpp's from now on: a command says what matters in its own words."""
    _listeners[0] = _deaf
    _listen()


class Sizes(NamedTuple):
    """Bytes a context asks for."""

    kv: int
    compute: int
    on_device: int = 0  # graph buffers of the device that was asked about


# llama.cpp has no C call for these sizes; it prints them, also when it only simulates (no_alloc).
# The release is pinned, and tests/test_budget.py fails when a line changes.
_KV = re.compile(r"^llama_(?:kv_cache|memory)\S*: .*?\bsize =\s*([0-9.]+) MiB \(")
_KV_STATE = re.compile(r"DSV4 .* state, .*?size =\s*([0-9.]+) MiB|ratio = .*size =\s*([0-9.]+) MiB")
_COMPUTE = re.compile(r"(\S+\s+(?:compute|output)) buffer size =\s*([0-9.]+) MiB")


def context_sizes(log: Log, device: str | None = None) -> Sizes:
    """The KV cache (or recurrent state) and graph buffers announced in a log."""
    kv = 0.0
    # A simulation names a buffer once per backend that computes in it, CPU and plugin.
    compute: dict[str, float] = {}
    for _, line in log.lines:
        if match := _KV.search(line) or _KV_STATE.search(line):
            kv += float(next(group for group in match.groups() if group))
        elif match := _COMPUTE.search(line):
            compute[match[1]] = max(compute.get(match[1], 0.0), float(match[2]))
    on_device = sum(n for name, n in compute.items() if name.split()[0] == device)
    host = sum(compute.values()) - on_device
    return Sizes(int(kv * _MIB), int(host * _MIB), int(on_device * _MIB))
