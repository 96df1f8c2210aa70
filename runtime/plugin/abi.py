"""The ctypes mirror of native/moe.h.

Knows struct layouts and the numbers that have names; decides nothing. ``tests/test_abi.py``
compares the mirror with the compiled plugin.
"""

from __future__ import annotations

import ctypes

ABI = 14
# Versions of ggml's backend interface that the plugin can speak.
GGML_OLDEST, GGML_NEWEST = 2, 3
MAX_GUESSES = 256
MAX_SPARES = 32
COPIES = 2
GUESS_CHUNK_BYTES = 1 << 20  # native/reads.h

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


class Table(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 64),
        ("offset", i64),
        ("row_bytes", i64),
        ("n_rows", i64),
        ("file", i32),
        ("reserved", i32),
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
        ("device", ctypes.c_char_p),
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
        ("phase", i32),
        ("n_sequences", i32),
        ("x_stride", i64),
        ("now_ns", i64),
        ("since_ns", i64),
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
        ("guess_pools", ctypes.c_void_p),
        ("n_guesses", i32),
        ("n_predicted", i32),
        ("predicted_keys", ctypes.c_void_p),
        ("predicted_chances", ctypes.c_void_p),
        ("plan_pools", ctypes.c_void_p),
        ("spares", ctypes.c_void_p),
        ("copy_chances", ctypes.c_void_p),
        ("may_pass", i32),
        ("may_copy", i32),
        ("passed", i32),
        ("n_layers", i32),
        ("settled_hits", ctypes.POINTER(i64)),
        ("settled_pairs", i64),
        ("may_compute", i32),
        ("cpu_experts", i32),
        ("cpu_pairs", i64),
        ("cpu_ns", i64),
        ("cpu_rest", i32),
        ("n_window", i32),
        ("window_keys", ctypes.c_void_p),
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


# The values of moe_phase by name.
PHASES = {"prefill": 0, "decode": 1, "mixed": 2}

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
            "tell_ns",
            "events",
            "passed",
            "whole",
            "rounds",
            "generic",
            "recycled",
            "guess_loads",
            "guess_promoted",
            "guess_cancelled",
            "table_rows",
            "table_missed",
            "table_ahead",
            "uploads",
            "uploads_ahead",
            "upload_bytes",
            "routed",
            "waits",
            "wait_ns",
            "ranges",
            "cpu_experts",
            "cpu_pairs",
            "cpu_ns",
            "scratch_bytes",
        )
    ]

    def since(self, mark: Stats) -> Stats:
        """What was counted after ``mark`` was taken; ``scratch_bytes`` is a high-water mark."""
        names = [field[0] for field in self._fields_]
        counted = {name: getattr(self, name) - getattr(mark, name) for name in names}
        return Stats(**{**counted, "scratch_bytes": self.scratch_bytes})


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


ROUTE_FN = ctypes.CFUNCTYPE(i32)

ERROR_NONE, ERROR_READ, ERROR_OTHER = 0, 1, 2

# The kinds of ``Event``: moe_event_kind in moe.h.
EVENT_LAYER, EVENT_ROUTE, EVENT_COMPUTE, EVENT_STALL = range(4)
EVENT_DEMAND, EVENT_GUESS, EVENT_PREDICT = range(4, 7)
