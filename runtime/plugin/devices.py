"""The devices that ggml knows in this process, beside the processor."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import llama_cpp

from ..errors import UserError, option
from .library import load

_GPU, _IGPU = 1, 2  # enum ggml_backend_dev_type
CPU, AUTO = "cpu", "auto"


class Device(NamedTuple):
    """A device that computes in memory of its own; sizes in bytes, ``free`` as of now."""

    name: str
    description: str
    free: int
    total: int


@functools.cache
def _ggml() -> Any:
    """ggml with the functions that are called here."""
    load()
    host = llama_cpp.llama_cpp._lib
    handle = ctypes.c_void_p
    for name, restype, argtypes in (
        ("ggml_backend_dev_count", ctypes.c_size_t, []),
        ("ggml_backend_dev_by_name", handle, [ctypes.c_char_p]),
        ("ggml_backend_dev_get", handle, [ctypes.c_size_t]),
        ("ggml_backend_dev_type", ctypes.c_int, [handle]),
        ("ggml_backend_dev_name", ctypes.c_char_p, [handle]),
        ("ggml_backend_dev_description", ctypes.c_char_p, [handle]),
        ("ggml_backend_dev_memory", None, [handle, *[ctypes.POINTER(ctypes.c_size_t)] * 2]),
    ):
        function = getattr(host, name)
        function.restype, function.argtypes = restype, argtypes
    return host


def address(name: str) -> int | None:
    """The ggml_backend_dev_t of a device by ggml's own name."""
    found: int | None = _ggml().ggml_backend_dev_by_name(name.encode())
    return found


def devices() -> list[Device]:
    """Those of this process's ggml that are GPUs, dedicated ones first."""
    host = _ggml()
    found: list[tuple[int, Device]] = []
    for i in range(host.ggml_backend_dev_count()):
        device = host.ggml_backend_dev_get(i)
        kind = host.ggml_backend_dev_type(device)
        if kind not in (_GPU, _IGPU):
            continue
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        host.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        name = host.ggml_backend_dev_name(device).decode()
        text = host.ggml_backend_dev_description(device).decode(errors="replace")
        found.append((kind, Device(name, text, free.value, total.value)))
    return [device for _, device in sorted(found, key=lambda pair: pair[0])]


def choose(name: str) -> Device | None:
    """The device of that name, in either case; None for the processor. ``auto``: the first GPU.

    UserError names those that there are.
    """
    if name.lower() == CPU:
        return None
    known = devices()
    if name.lower() == AUTO:
        return known[0] if known else None
    for device in known:
        if device.name.lower() == name.lower():
            return device
    names = ", ".join([CPU, *(device.name.lower() for device in known)])
    raise UserError(
        f"there is no device {name!r} here: use {option('device', AUTO)} or one of {names}; a GPU "
        "needs a llama-cpp-python that was built for it"
    )
