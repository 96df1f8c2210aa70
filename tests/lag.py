"""The test device of tests/native/lag.cpp: built once, loaded into this process's ggml.

It computes with ggml-cpu's kernels, so that what comes out of it is the processor's to the last
bit, and makes everything else as hard as a GPU does.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import llama_cpp
import pytest
from conftest import missing

from moe_gguf.runtime import logs
from moe_gguf.runtime.plugin.library import load

NAME = "LAG0"
ROOT = Path(__file__).parent.parent
SOURCES = (ROOT / "tests/native/lag.cpp", ROOT / "runtime/native/ggml-iface.h")
# Kinds of waits: bits of what can be left out.
SYNCHRONIZE, COMPUTE_WAITS, COPY_WAITS, HOST_WAITS = (1 << i for i in range(4))


class Counts(NamedTuple):
    """How often each wait was asked for, and what was copied of weights and launched."""

    synchronize: int
    compute_waits: int
    copy_waits: int
    host_waits: int
    upload_bytes: int
    launches: int
    upload_calls: int


def build() -> Path:
    """The device's library, made anew when its source is newer."""
    library = ROOT / "build" / "tests" / "liblag.so"
    if library.exists() and library.stat().st_mtime > max(s.stat().st_mtime for s in SOURCES):
        return library
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        missing("no C++ compiler")
    site = Path(str(importlib.metadata.distribution("llama-cpp-python").locate_file("")))
    library.parent.mkdir(parents=True, exist_ok=True)
    partial = library.with_name(f"{library.name}.{os.getpid()}")
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread"]
    flags += ["-Wall", "-Wextra", "-Werror"]
    includes = [f"-I{ROOT / 'runtime/native'}", "-isystem", f"{site / 'include'}"]
    libraries = [str(site / "llama_cpp/lib" / f"lib{name}.so") for name in ("ggml", "ggml-base")]
    command = [str(compiler), *flags, *includes, str(SOURCES[0]), *libraries, "-o", str(partial)]
    subprocess.run(command, check=True)
    partial.replace(library)
    return library


class Lag:
    """The device, loaded: how slow it is and which waits it leaves out."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.lag_count.argtypes = [ctypes.POINTER(ctypes.c_int64)]
        library.lag_delay.argtypes = [ctypes.c_int, ctypes.c_int64]

    def count(self) -> Counts:
        """Since it was last asked."""
        counts = (ctypes.c_int64 * len(Counts._fields))()
        self._library.lag_count(counts)
        return Counts(*counts)

    def delay(self, us: int = 100, bytes_per_s: int = 0) -> None:
        """The longest delay before each thing a stream does, and the speed of copies to it."""
        self._library.lag_delay(us, bytes_per_s)

    @contextmanager
    def delayed(self, us: int = 100, bytes_per_s: int = 0) -> Iterator[None]:
        """``delay``, for a while."""
        self.delay(us, bytes_per_s)
        try:
            yield
        finally:
            self.delay()

    @contextmanager
    def ignoring(self, waits: int) -> Iterator[None]:
        self._library.lag_ignore(waits)
        try:
            yield
        finally:
            self._library.lag_ignore(0)

    @contextmanager
    def refusing_pinned_memory(self) -> Iterator[None]:
        self._library.lag_refuse_pinned(1)
        try:
            yield
        finally:
            self._library.lag_refuse_pinned(0)


@pytest.fixture(scope="module")
def lag() -> Iterator[Lag]:
    """The device, known to ggml as long as a module's tests run."""
    library = build()
    load()
    host = llama_cpp.llama_cpp._lib
    host.ggml_backend_unload.argtypes = [ctypes.c_void_p]
    with logs.capture():
        registered = host.ggml_backend_load(os.fsencode(library))
    assert registered, "ggml does not take the test device"
    yield Lag(ctypes.CDLL(os.fsdecode(library)))
    host.ggml_backend_unload(registered)
