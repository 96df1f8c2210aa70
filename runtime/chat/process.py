"""llama.cpp's chat library in a process of its own, which may be lost.

Templates are programs that come with a model's file. llama.cpp runs them without a limit of time,
memory or depth, and parsers recurse as deep as an answer nests; either ends a process. So this one
speaks to a child, which has limits; if it ends, the question that ended it is refused, and the next
one finds a new child. Nor does a user's process need OpenSSL for it, which that library links.

Knows nothing of templates. Run as a module this is the child.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from .. import child
from ..errors import RequestError
from ..trial import verdict_of

LIBRARY = "libmoe-chat.so"
LLAMA_LIBRARIES = ("lib", "llama_cpp/lib")  # in site-packages, where wheels keep libllama-common

CPU_S = 5.0  # of one question; templates and parsers take milliseconds
WALL_S = 60.0  # for a machine that is busy with other things
MEMORY_BYTES = 512 << 20  # of a child; it takes 6 MB, and some times the length of a conversation
MAX_BYTES = 8 << 20  # of a question: two million tokens
_WALL_S_TO_START = 120.0


class ChatMissing(RequestError):
    """There is no chat library here, or it does not load."""


class ProcessEnded(Exception):
    """A question ended the child; why, for the middle of a sentence."""


class Process:
    """A child that answers one question at a time, started when the first is asked.

    ``opening`` is asked of each new child before anything else. Any thread may ask.
    """

    def __init__(self, opening: Mapping[str, Any] | None = None) -> None:
        self._opening = opening
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._running: _Running | None = None

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The answer, which has "error" if llama.cpp refuses. ProcessEnded, ChatMissing."""
        line = json.dumps(question).encode() + b"\n"
        if len(line) > MAX_BYTES:
            raise RequestError(
                f"a conversation of {len(line)} bytes is longer than the {MAX_BYTES} that are "
                "taken: shorten it"
            )
        with self._lock:
            return self._started().ask(line, WALL_S)

    def open(self) -> dict[str, Any]:
        """What is answered to ``opening``."""
        with self._lock:
            return self._started().opened

    def _started(self) -> _Running:
        if self._pid != os.getpid():  # after a fork; the child belongs to the parent
            self._running, self._pid = None, os.getpid()
        if self._running is None or self._running.ended:
            running = _Running()
            if self._opening is not None:
                answer = running.ask(json.dumps(self._opening).encode() + b"\n", WALL_S)
                running.opened = answer
                if "error" in answer:
                    running.close()
                    raise ProcessEnded(answer["error"])
            self._running = running
        return self._running

    def close(self) -> None:
        with self._lock:
            if self._running is not None and self._pid == os.getpid():
                self._running.close()
            self._running = None


class _Running:
    """A child that was started."""

    def __init__(self) -> None:
        library, folder = libraries()
        path = os.pathsep.join(filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH"))))
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._popen = subprocess.Popen(
            child.command(__name__, str(library), str(CPU_S)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            cwd=child.FOLDER,
            env=os.environ | {"LD_LIBRARY_PATH": path, "GGML_NO_BACKTRACE": "1"},
            start_new_session=True,  # Ctrl-C is for this process, which ends the child
        )
        self.ended = False
        self.opened: dict[str, Any] = {}
        self.close = weakref.finalize(self, _end, self._popen, self._said, os.getpid())
        hello = self._answer(_WALL_S_TO_START)
        if "missing" in hello:
            self.close()
            raise ChatMissing(_missing(hello["missing"]))
        built, here = hello["release"], importlib.metadata.version("llama-cpp-python")
        if built != here:
            self.close()
            raise ChatMissing(_missing(f"it was built for llama-cpp-python {built}, not {here}"))

    def ask(self, line: bytes, wall_s: float) -> dict[str, Any]:
        assert self._popen.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # the answer will say so
                self._popen.stdin.write(line)
                self._popen.stdin.flush()
            return self._answer(wall_s)
        except BaseException:  # an interrupt too: nobody would wait for the answer
            self.ended = True
            self.close()
            raise

    def _answer(self, wall_s: float) -> dict[str, Any]:
        assert self._popen.stdout is not None
        stream, parts = self._popen.stdout.fileno(), list[bytes]()
        while not parts or not parts[-1].endswith(b"\n"):
            ready, _, _ = select.select([stream], [], [], wall_s)
            part = os.read(stream, 1 << 20) if ready else b""
            if not part:
                self._popen.kill()
                raise ProcessEnded(self._why(bool(ready)))
            parts.append(part)
        answer: dict[str, Any] = json.loads(b"".join(parts))
        return answer

    def _why(self, ended_itself: bool) -> str:
        number = -self._popen.wait()
        verdict = verdict_of(max(0, number), self._said)
        if not ended_itself or number == signal.SIGPROF:
            return "it does not come to an end"
        if number == signal.SIGSEGV:
            return "it goes too deep"
        if number == signal.SIGKILL:
            return "it takes too much memory"
        return verdict.said or "llama.cpp does not survive it"


def _end(popen: subprocess.Popen[bytes], said: IO[bytes], owner: int) -> None:
    """A child ends with its standard input; one in the middle of something, too."""
    if os.getpid() != owner:
        return
    popen.kill()
    popen.wait()
    for stream in (popen.stdin, popen.stdout, said):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _missing(why: str) -> str:
    return f"chat is not available: {why}; plain prompts work"


@functools.cache
def libraries() -> tuple[Path, Path]:
    """Ours, and the folder of llama.cpp's. ChatMissing where there is none."""
    from ..plugin.library import built_file

    pinned = [r for r in importlib.metadata.requires("moe-gguf") or [] if "llama-cpp" in r]
    mend = f"pip install --no-binary llama-cpp-python {pinned[0] if pinned else 'llama-cpp-python'}"
    site = importlib.metadata.distribution("llama-cpp-python")
    folders = [Path(str(site.locate_file(name))) for name in LLAMA_LIBRARIES]
    found = [folder for folder in folders if any(folder.glob("libllama-common.so*"))]
    if not found:
        raise ChatMissing(
            _missing(
                f"this llama-cpp-python has no libllama-common ({mend}, then reinstall moe-gguf)"
            )
        )
    library = built_file(LIBRARY)
    if library is None:
        raise ChatMissing(
            _missing(
                "moe-gguf was built without llama.cpp's headers, which pip takes from the source "
                "distribution of llama-cpp-python (reinstall moe-gguf where pip can download it)"
            )
        )
    return library, found[0]


# --- in the child -------------------------------------------------------------------------------


def main() -> None:
    child.limit({resource.RLIMIT_DATA: MEMORY_BYTES})
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what llama.cpp prints is no answer
    library, hello = None, {}
    try:
        library = Library(sys.argv[1])
        hello = {"release": library.release}
    except OSError as error:
        hello = {"missing": _unloadable(str(error))}
    answers.write(json.dumps(hello).encode() + b"\n")
    answers.flush()
    if library is None:
        return
    for question in sys.stdin.buffer:
        signal.setitimer(
            signal.ITIMER_PROF, float(sys.argv[2])
        )  # the default for SIGPROF is to end
        answers.write(library.call(question) + b"\n")
        answers.flush()
        signal.setitimer(signal.ITIMER_PROF, 0)


class Library:
    """``moe-chat.h``, on bytes."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path, mode=os.RTLD_NOW)  # a missing symbol now or never
        self._library.moe_chat_release.restype = ctypes.c_char_p
        self._library.moe_chat_call.restype = ctypes.c_void_p
        self._library.moe_chat_call.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
        self._library.moe_chat_free.argtypes = [ctypes.c_void_p]
        self.release: str = self._library.moe_chat_release().decode()

    def call(self, question: bytes) -> bytes:
        answer = self._library.moe_chat_call(question, len(question))
        try:
            return ctypes.string_at(answer)
        finally:
            self._library.moe_chat_free(answer)


def _unloadable(error: str) -> str:
    """Why a library does not load, with what to do about the commonest reasons."""
    if "libssl" in error or "libcrypto" in error:
        return f"llama.cpp's chat library needs OpenSSL 3 ({error}; install libssl3)"
    if "undefined symbol" in error:
        return f"llama-cpp-python was built by another compiler ({error}; reinstall moe-gguf)"
    return f"llama.cpp's chat library does not load ({error}; reinstall moe-gguf)"


if __name__ == "__main__":
    main()
