"""Finds the plugin's library and loads it into the llama.cpp of this process."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import llama_cpp

from .. import logs
from ..errors import UserError
from ..system import return_what_is_freed
from .abi import (
    GGML_NEWEST,
    GGML_OLDEST,
    ROUTE_FN,
    Call,
    Config,
    Event,
    GatesConfig,
    Probe,
    Stats,
    Table,
    i32,
    i32_array,
    i64,
)

LIBRARY = "libggml-moe.so"


class DirectProbe(NamedTuple):
    """Whether O_DIRECT works on a file and the alignments it asks for, in bytes."""

    direct: bool
    offset_align: int
    memory_align: int


def library_path() -> Path:
    """Where the installed plugin lies, for regular and editable installs alike."""
    if (path := built_file(LIBRARY)) is None:
        raise UserError(f"this install of moe-gguf has no {LIBRARY}: reinstall it with pip")
    return path


def built_file(name: str) -> Path | None:
    """Where the build has put something."""
    try:
        files = importlib.metadata.files("moe-gguf") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError("moe-gguf is not installed: pip install moe-gguf") from error
    return next((Path(str(f.locate())).resolve() for f in files if f.name == name), None)


@functools.cache
def load() -> ctypes.CDLL:
    """Load the plugin into this process's ggml, once, and return it with typed functions.

    Every symbol of ggml is resolved through the libllama that llama_cpp has loaded: the wheel's
    library files are copies, and opening one by path would make a second registry.
    """
    path = os.fsencode(library_path())
    return_what_is_freed()
    host = llama_cpp.llama_cpp._lib
    llama_cpp.llama_backend_init()
    host.ggml_backend_load.restype = ctypes.c_void_p
    host.ggml_backend_load.argtypes = [ctypes.c_char_p]
    with logs.capture():  # ggml announces every backend on stderr
        loaded = host.ggml_backend_load(path)
    if not loaded:
        raise UserError(_refusal(path))
    lib = ctypes.CDLL(os.fsdecode(path))
    handle = ctypes.c_void_p
    for name, restype, argtypes in (
        ("moe_ggml_version", i32, []),
        ("moe_model_new", handle, [ctypes.POINTER(Config), ctypes.c_char_p, ctypes.c_size_t]),
        ("moe_model_free", None, [handle]),
        ("moe_model_expert_buffer_type", handle, [handle]),
        ("moe_model_device_expert_buffer_type", handle, [handle]),
        ("moe_model_trunk_buffer_type", handle, [handle]),
        ("moe_model_device_buffer_type", handle, [handle]),
        ("moe_model_device", handle, [handle]),
        ("moe_model_repack_buffer_type", handle, [handle]),
        ("moe_model_table_buffer_type", handle, [handle]),
        ("moe_model_stream", handle, [handle]),
        ("fclose", ctypes.c_int, [handle]),  # the C library's, for that stream
        ("moe_model_trunk_data", handle, [handle, ctypes.c_char_p]),
        ("moe_model_work_bytes", i64, [handle, i32, i32]),
        ("moe_model_arena", i32, [handle, i32]),
        ("moe_model_is_pinned", i32, [handle]),
        ("moe_model_pools", i32, [handle, i32_array, i32]),
        ("moe_model_copy_ns", i64, [handle, i32, i32]),
        ("moe_model_join_copies", None, [handle, i32]),
        ("moe_model_compute_on_cpu", None, [handle]),
        ("moe_model_pool_keys", None, [handle, i32, i32_array]),
        ("moe_model_upload", i32, [handle, i32_array, i32_array, i32]),
        ("moe_model_tables", i32, [handle, ctypes.POINTER(Table), i32, i64]),
        ("moe_model_fetch_rows", None, [handle, i32, handle, i32]),
        ("moe_model_bind", None, [handle, ROUTE_FN, ROUTE_FN, ROUTE_FN]),
        ("moe_model_tell", i32, [handle]),
        ("moe_model_guess_with", None, [handle, handle]),
        ("moe_model_step", None, [handle, i32, i32]),
        ("moe_model_call", ctypes.POINTER(Call), [handle]),
        ("moe_model_stats", None, [handle, ctypes.POINTER(Stats)]),
        ("moe_model_error", i32, [handle, ctypes.c_char_p, ctypes.c_size_t]),
        ("moe_model_slots", None, [handle, i32_array]),
        ("moe_model_fill", i32, [handle, i32_array, i32_array, i32]),
        ("moe_model_cancel_guesses", None, [handle]),
        ("moe_model_timeline", None, [handle, i32]),
        ("moe_model_timeline_read", i32, [handle, ctypes.POINTER(Event), i32]),
        ("moe_model_inject", None, [handle, i32, i32]),
        ("moe_repack_supported", i32, [i32, i64, i64]),
        ("moe_repack", None, [i32, i64, i64, i64, handle, handle]),
        ("moe_gates_new", handle, [ctypes.POINTER(GatesConfig)]),
        ("moe_gates_free", None, [handle]),
        ("moe_gates_predict", i32, [handle, i32, handle, i64, i32, handle, handle, handle]),
        ("moe_gates_observe", None, [handle, i32, handle, i32, i32]),
        ("moe_gates_forget", None, [handle]),
        ("moe_gates_recall", ctypes.c_float, [handle, i32]),
        ("moe_probe_direct", None, [ctypes.c_char_p, ctypes.POINTER(Probe)]),
        (
            "moe_probe_speed",
            ctypes.c_double,
            [ctypes.c_char_p, ctypes.POINTER(i64), i32, i64, i32, i32],
        ),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = restype, argtypes
    return lib


def _refusal(path: bytes) -> str:
    """Why llama.cpp did not take the plugin, and what to do."""
    try:
        version = int(ctypes.CDLL(os.fsdecode(path)).moe_ggml_version())
    except OSError:  # it does not even link with this llama.cpp
        version = GGML_NEWEST
    if GGML_OLDEST <= version <= GGML_NEWEST:
        return (
            "llama.cpp refused the moe-gguf plugin: it was built for another llama-cpp-python; "
            "reinstall moe-gguf"
        )
    pinned = [r for r in importlib.metadata.requires("moe-gguf") or [] if "llama-cpp" in r]
    return (
        f"this llama-cpp-python speaks version {version} of ggml's backend interface and moe-gguf "
        f"versions {GGML_OLDEST} to {GGML_NEWEST}: pip install {pinned[0]}"
    )


def probe_direct(path: Path) -> DirectProbe:
    """Try O_DIRECT on a file; the alignments are the smallest that worked."""
    probe = Probe()
    load().moe_probe_direct(os.fsencode(path), ctypes.byref(probe))
    return DirectProbe(bool(probe.direct), probe.offset_align, probe.memory_align)


def probe_speed(
    path: Path, offsets: Sequence[int], n_bytes: int, lanes: int, direct: bool
) -> float:
    """Bytes per second of reads of ``n_bytes`` at 4096-aligned offsets with ``lanes`` threads."""
    array = (i64 * len(offsets))(*offsets)
    return float(
        load().moe_probe_speed(os.fsencode(path), array, len(offsets), n_bytes, lanes, direct)
    )
