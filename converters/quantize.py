"""Quantization by ggml itself, on all cores, through the library llama_cpp has already loaded.

Owns the calls into ggml and their threads. Decides no types: `mix` does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import UserError, option
from ..runtime.formats.ggml_types import GGML_TYPES, type_bytes
from .mix import NUMBERS
from .source import Bytes

Floats = NDArray[np.float32]

# Long enough that Python costs nothing beside ggml, short enough that many cores share a matrix.
CHUNK_ITEMS = 1 << 16

_F32 = NUMBERS["f32"]
_to_float_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _Traits(ctypes.Structure):
    """ggml_type_traits, up to what is used of it."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
    ]


@lru_cache(maxsize=1)
def _ggml() -> ctypes.CDLL:
    """ggml's symbols out of libllama's handle: opening libggml by path would load it again."""
    from llama_cpp import llama_cpp  # as long to import as a small model takes to regroup

    lib: ctypes.CDLL = llama_cpp._lib
    lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    lib.ggml_quantize_init.argtypes = [ctypes.c_int]
    lib.ggml_quantize_init.restype = None
    lib.ggml_quantize_free.argtypes = []
    lib.ggml_quantize_free.restype = None
    lib.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    lib.ggml_validate_row_data.restype = ctypes.c_bool
    return lib


def requires_imatrix(ggml_type: int) -> bool:
    """Whether ggml would abort the process without one."""
    return bool(_ggml().ggml_quantize_requires_imatrix(ggml_type))


@lru_cache(maxsize=64)
def _to_float(ggml_type: int) -> Callable[[int, int, int], None]:
    """Decodes (from, to, number of items) of whole blocks."""
    address = _ggml().ggml_get_type_traits(ggml_type).contents.to_float
    if not address:
        raise UserError(
            f"{GGML_TYPES[ggml_type].name} weights cannot be decoded; convert from a source that"
            " has another type"
        )
    return _to_float_type(address)


_NOTHING: Bytes = np.empty(0, np.uint8)

Then = Callable[[Bytes], Bytes]


class Job:
    """Rows on their way to another type, and what is to be done to them there."""

    def __init__(self, out: Bytes, parts: list[Future[None]], then: Then | None = None) -> None:
        self._out = out
        self._parts = parts
        self._then = then

    def result(self) -> Bytes:
        """The rows, once they are done; UserError for weights that cannot be quantized.

        They can be had once: a finished job holds no memory.
        """
        for part in self._parts:
            part.result()
        out, self._out, self._parts = self._out, _NOTHING, []
        return out if self._then is None else self._then(out)


class Quantizer:
    """A pool of threads that turn rows of one type into rows of another."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "quantize")
        self._used_ggml = False

    def __enter__(self) -> Quantizer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._used_ggml:
            _ggml().ggml_quantize_free()

    def submit(
        self,
        what: str,
        data: Bytes,
        source_type: int,
        target_type: int,
        row: int,
        imatrix: Floats | None = None,
        *,
        first_row: int = 0,
        matrix_rows: int = 1 << 62,
        then: Then | None = None,
    ) -> Job:
        """Start on whole rows of ``row`` items; ``what`` names them in errors.

        ``imatrix`` has ``row`` values for each matrix of ``matrix_rows`` rows; ``first_row`` is
        where these rows begin among all of them. ``then`` is applied to what comes out: in this
        thread and at once where nothing is to be quantized, else in the one that takes the result.
        """
        if source_type == target_type:
            return Job(data if then is None else then(data), [])
        source_row, target_row = type_bytes(source_type, row), type_bytes(target_type, row)
        n_rows = len(data) // source_row
        assert n_rows * source_row == len(data)
        out = np.empty(n_rows * target_row, np.uint8)
        _ggml().ggml_quantize_init(target_type)
        self._used_ggml = True
        parts: list[Future[None]] = []
        at = 0
        while at < n_rows:  # a part stays inside one matrix, whose columns weigh alike
            matrix, inside = divmod(first_row + at, matrix_rows)
            n = min(max(CHUNK_ITEMS // row, 1), n_rows - at, matrix_rows - inside)
            part = _Part(
                what,
                data[at * source_row : (at + n) * source_row],
                out[at * target_row : (at + n) * target_row],
                source_type,
                target_type,
                row,
                None if imatrix is None else imatrix[matrix * row : (matrix + 1) * row],
            )
            parts.append(self._pool.submit(part))
            at += n
        return Job(out, parts, then)


@dataclass(frozen=True)
class _Part:
    """A few rows for one thread. ggml runs without the GIL."""

    what: str
    data: Bytes
    out: Bytes
    source_type: int
    target_type: int
    row: int
    imatrix: Floats | None

    def __call__(self) -> None:
        values = self._values()
        if not np.isfinite(values).all():
            raise UserError(
                f"{self.what} holds NaN or infinity; take the model from another source"
            )
        ggml = _ggml()
        n_bytes = ggml.ggml_quantize_chunk(
            self.target_type,
            values.ctypes.data,
            self.out.ctypes.data,
            0,
            len(values) // self.row,
            self.row,
            None if self.imatrix is None else self.imatrix.ctypes.data,
        )
        assert n_bytes == len(self.out)
        if not ggml.ggml_validate_row_data(self.target_type, self.out.ctypes.data, n_bytes):
            name = GGML_TYPES[self.target_type].name
            raise UserError(
                f"{self.what} has values too large for {name}; choose another {option('quant')}"
            )

    def _values(self) -> Floats:
        if self.source_type == _F32:
            return self.data.view(np.float32)
        kind = GGML_TYPES[self.source_type]
        values = np.empty(len(self.data) // kind.block_bytes * kind.block, np.float32)
        _to_float(self.source_type)(self.data.ctypes.data, values.ctypes.data, len(values))
        return values
