"""The ctypes mirror of native/moe.h, and loading the plugin into the llama.cpp of this process.

Knows struct layouts and function signatures; decides nothing. ``tests/test_abi.py`` compares the
mirror with the compiled plugin.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np

from moe_gguf.runtime import logs
from moe_gguf.runtime.errors import ExpertReadError, UserError

ABI = 4
MAX_GUESSES = 256
COPIES = 2
LIBRARY = "libggml-moe.so"

i32, i64 = ctypes.c_int32, ctypes.c_int64
i32_array = ctypes.POINTER(i32)


class Tensor(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 64),
        ("slot_offset", i64 * COPIES),
        ("ne", i64 * 2),
        ("type", i32 * COPIES),
        ("layout", i32 * COPIES),
        ("transform", i32 * COPIES),
        ("layer", i32),
        ("reserved", i32),
    ]


class Part(ctypes.Structure):
    _fields_ = [
        ("offset", i64),
        ("n_bytes", i64),
        ("slot_offset", i64),
        ("key", i32),
        ("file", i32),
    ]


PART = np.dtype(Part)  # tens of thousands of them are filled at once


class Transform(ctypes.Structure):
    _fields_ = [
        ("rows", i32),
        ("block_bytes", i32),
        ("source", ctypes.c_void_p),
        ("flip", ctypes.c_void_p),
    ]


class TrunkTensor(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 64),
        ("offset", i64),
        ("n_bytes", i64),
        ("file", i32),
        ("repacked", i32),
    ]


class Config(ctypes.Structure):
    _fields_ = [
        ("abi", i32),
        ("n_experts", i32),
        ("n_files", i32),
        ("n_trunk_tensors", i32),
        ("n_tensors", i32),
        ("n_parts", i32),
        ("n_transforms", i32),
        ("lanes", i32),
        ("direct", i32),
        ("offset_align", i32),
        ("memory_align", i32),
        ("slot_bytes", i64),
        ("header_bytes", i64),
        ("stream_bytes", i64),
        ("paths", ctypes.POINTER(ctypes.c_char_p)),
        ("trunk_tensors", ctypes.POINTER(TrunkTensor)),
        ("tensors", ctypes.POINTER(Tensor)),
        ("parts", ctypes.c_void_p),
        ("transforms", ctypes.POINTER(Transform)),
        ("header", ctypes.c_char_p),
    ]


class Call(ctypes.Structure):
    """One route event and its answer; see moe_call in moe.h for who fills what."""

    _fields_ = [
        ("layer", i32),
        ("n_tokens", i32),
        ("n_used", i32),
        ("n_experts", i32),
        ("continuation", i32),
        ("n_embd", i32),
        ("x_stride", i64),
        ("now_ns", i64),
        ("disk_ns", i64),
        ("read_bytes", i64),
        ("stall_ns", i64),
        ("guess_ns", i64),
        ("x", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("experts", i32_array),
        ("counts", i32_array),
        ("cancelled", i32_array),
        ("n_cancelled", i32),
        ("n_late", i32),
        ("wants_guesses", i32),
        ("settled", i32),
        ("plan_experts", ctypes.c_void_p),
        ("plan_slots", ctypes.c_void_p),
        ("plan_loads", ctypes.c_void_p),
        ("guess_keys", ctypes.c_void_p),
        ("guess_slots", ctypes.c_void_p),
        ("n_guesses", i32),
        ("n_predicted", i32),
        ("predicted_keys", ctypes.c_void_p),
        ("predicted_chances", ctypes.c_void_p),
    ]


class Router(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("logit_bias", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("n_experts", i32),
        ("n_embd", i32),
        ("gating", i32),
        ("n_groups", i32),
        ("n_groups_used", i32),
        ("reserved", i32),
    ]


class GatesConfig(ctypes.Structure):
    _fields_ = [
        ("routers", ctypes.POINTER(Router)),
        ("layers", i32_array),
        ("n_layers", i32),
        ("n_used", i32),
        ("width", i32),
        ("variant", i32),
        ("ahead", i32),
        ("reserved", i32),
    ]


# The values of moe_gating and moe_gates_variant, by the names the policies use.
GATINGS = {"softmax": 0, "sigmoid": 1, "softmax_weight": 2, "sqrt_softplus": 3}
GATES_VARIANTS = {"raw": 0, "renorm": 1, "residual": 2}


class Stats(ctypes.Structure):
    _fields_ = [
        (name, i64)
        for name in (
            "read_bytes",
            "guess_bytes",
            "disk_ns",
            "reads",
            "bounced",
            "stall_ns",
            "compute_ns",
            "route_ns",
            "guess_ns",
            "events",
            "whole",
            "rounds",
            "generic",
            "recycled",
            "guess_loads",
            "guess_promoted",
            "guess_cancelled",
            "scratch_bytes",
        )
    ]


class Event(ctypes.Structure):
    """One event of the timeline; times are those of ``time.perf_counter_ns`` on Linux."""

    _fields_ = [
        ("kind", i32),
        ("lane", i32),
        ("key", i32),
        ("reserved", i32),
        ("start_ns", i64),
        ("end_ns", i64),
    ]


class Probe(ctypes.Structure):
    _fields_ = [("direct", i32), ("offset_align", i32), ("memory_align", i32), ("reserved", i32)]


class DirectProbe(NamedTuple):
    """Whether O_DIRECT works on a file and the alignments it asks for, in bytes."""

    direct: bool
    offset_align: int
    memory_align: int


ROUTE_FN = ctypes.CFUNCTYPE(i32)

ERROR_NONE, ERROR_READ, ERROR_OTHER = 0, 1, 2

# The kinds of ``Event``: moe_event_kind in moe.h.
EVENT_LAYER, EVENT_ROUTE, EVENT_COMPUTE, EVENT_STALL = range(4)
EVENT_DEMAND, EVENT_GUESS, EVENT_PREDICT = range(4, 7)


def library_path() -> Path:
    """Where the installed plugin lies, for regular and editable installs alike."""
    try:
        files = importlib.metadata.files("moe-gguf") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError("moe-gguf is not installed: pip install moe-gguf") from error
    for file in files:
        if file.name == LIBRARY:
            return Path(str(file.locate())).resolve()
    raise UserError(f"this install of moe-gguf has no {LIBRARY}: reinstall it with pip")


@functools.cache
def load() -> ctypes.CDLL:
    """Load the plugin into this process's ggml, once, and return it with typed functions.

    Every symbol of ggml is resolved through the libllama that llama_cpp has loaded: the wheel's
    library files are copies, and opening one by path would make a second registry.
    """
    path = str(library_path()).encode()
    host = llama_cpp.llama_cpp._lib
    llama_cpp.llama_backend_init()
    host.ggml_backend_load.restype = ctypes.c_void_p
    host.ggml_backend_load.argtypes = [ctypes.c_char_p]
    with logs.capture():  # ggml announces every backend on stderr
        loaded = host.ggml_backend_load(path)
    if not loaded:
        raise UserError(
            "llama.cpp refused the moe-gguf plugin: it was built for another llama-cpp-python; "
            "reinstall moe-gguf"
        )
    lib = ctypes.CDLL(path.decode())
    handle = ctypes.c_void_p
    for name, restype, argtypes in (
        ("moe_model_new", handle, [ctypes.POINTER(Config), ctypes.c_char_p, ctypes.c_size_t]),
        ("moe_model_free", None, [handle]),
        ("moe_model_expert_buffer_type", handle, [handle]),
        ("moe_model_trunk_buffer_type", handle, [handle]),
        ("moe_model_repack_buffer_type", handle, [handle]),
        ("moe_model_stream", handle, [handle]),
        ("fclose", ctypes.c_int, [handle]),  # the C library's, for that stream
        ("moe_model_trunk_data", handle, [handle, ctypes.c_char_p]),
        ("moe_model_arena", i32, [handle, i32]),
        ("moe_model_bind", None, [handle, ROUTE_FN, ROUTE_FN]),
        ("moe_model_guess_with", None, [handle, handle]),
        ("moe_model_call", ctypes.POINTER(Call), [handle]),
        ("moe_model_stats", None, [handle, ctypes.POINTER(Stats), i32]),
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


def probe_direct(path: Path) -> DirectProbe:
    """Try O_DIRECT on a file; the alignments are the smallest that worked."""
    probe = Probe()
    load().moe_probe_direct(str(path).encode(), ctypes.byref(probe))
    return DirectProbe(bool(probe.direct), probe.offset_align, probe.memory_align)


def probe_speed(
    path: Path, offsets: Sequence[int], n_bytes: int, lanes: int, direct: bool
) -> float:
    """Bytes per second of reads of ``n_bytes`` at 4096-aligned offsets with ``lanes`` threads."""
    array = (i64 * len(offsets))(*offsets)
    return float(
        load().moe_probe_speed(str(path).encode(), array, len(offsets), n_bytes, lanes, direct)
    )


class PluginModel:
    """Owner of one native ``moe_model``; every method is one call of moe.h."""

    def __init__(self, config: Config) -> None:
        self._lib = load()
        error = ctypes.create_string_buffer(512)
        self._handle = self._lib.moe_model_new(ctypes.byref(config), error, len(error))
        if not self._handle:
            raise UserError(error.value.decode(errors="replace"))
        self._bound: Any = None  # the ctypes thunks must outlive the binding
        self.n_slots = 0
        self.call: Call = self._lib.moe_model_call(self._handle).contents

    @property
    def _open(self) -> int:
        if not self._handle:
            raise RuntimeError("the model is closed")
        return int(self._handle)

    def expert_buffer_type(self) -> int:
        return int(self._lib.moe_model_expert_buffer_type(self._open))

    def trunk_buffer_type(self) -> int:
        return int(self._lib.moe_model_trunk_buffer_type(self._open))

    def repack_buffer_type(self) -> int:
        """Only where ``moe_repack_supported`` said yes to something."""
        return int(self._lib.moe_model_repack_buffer_type(self._open))

    @contextlib.contextmanager
    def stream(self) -> Iterator[int]:
        """A ``FILE *`` that llama.cpp takes for the model, open while it loads."""
        stream = self._lib.moe_model_stream(self._open)
        if not stream:
            raise UserError("the system has no file descriptor left for the model's stream")
        try:
            yield int(stream)
        finally:
            self._lib.fclose(stream)

    def trunk_data(self, name: str) -> int | None:
        """The address of a trunk tensor in the loaded model; None if it is not kept plainly."""
        address: int | None = self._lib.moe_model_trunk_data(self._open, name.encode())
        return address

    def allocate(self, n_slots: int) -> None:
        if self._lib.moe_model_arena(self._open, n_slots) != 0:
            raise UserError(f"the system refused the memory for {n_slots} slots: lower --memory")
        self.n_slots = n_slots

    def bind(self, route: Callable[[], int], guess: Callable[[], int]) -> None:
        self._bound = ROUTE_FN(route), ROUTE_FN(guess)
        self._lib.moe_model_bind(self._open, *self._bound)

    def guess_with(self, gates: int) -> None:
        """Guess with these native gates, which must outlive the model's last step."""
        self._lib.moe_model_guess_with(self._open, gates)

    def stats(self, reset: bool = False) -> Stats:
        stats = Stats()
        self._lib.moe_model_stats(self._open, ctypes.byref(stats), int(reset))
        return stats

    def take_error(self) -> Exception | None:
        """The reason of the last failed step, once."""
        text = ctypes.create_string_buffer(1024)
        kind = self._lib.moe_model_error(self._open, text, len(text))
        sentence = text.value.decode(errors="replace")
        if kind == ERROR_READ:
            return ExpertReadError(sentence)
        return RuntimeError(sentence) if kind == ERROR_OTHER else None

    def slot_keys(self) -> list[int]:
        """Per slot the key it holds or is reading, -1 for none."""
        keys = (i32 * self.n_slots)()
        self._lib.moe_model_slots(self._open, keys)
        return list(keys)

    def fill(self, placed: Sequence[tuple[int, int]]) -> None:
        """Read experts, as (key, slot), into empty slots; between steps only.

        After an exception each of these slots holds all of its expert or nothing.
        """
        n = len(placed)
        keys, slots = (
            (i32 * n)(*(key for key, _ in placed)),
            (i32 * n)(*(slot for _, slot in placed)),
        )
        if self._lib.moe_model_fill(self._open, keys, slots, n) != 0:
            raise self.take_error() or RuntimeError("experts could not be read")

    def cancel_guesses(self) -> None:
        self._lib.moe_model_cancel_guesses(self._open)

    def timeline(self, capacity: int) -> None:
        """Start recording events, keeping the newest ``capacity``; 0 stops and forgets."""
        self._lib.moe_model_timeline(self._open, capacity)

    def timeline_read(self, capacity: int) -> list[Event]:
        """Take the oldest recorded events, at most ``capacity``, in the order they ended in."""
        events = (Event * capacity)()
        n = self._lib.moe_model_timeline_read(self._open, events, capacity)
        return list(events[:n])

    def inject(self, skip: int, err: int) -> None:
        """Tests only: see moe.h."""
        self._lib.moe_model_inject(self._open, skip, err)

    def close(self) -> None:
        if self._handle:
            self._lib.moe_model_free(self._handle)
            self._handle = None
