"""Recorded routing: what every MoE layer asked for, step by step, in one small file.

Owns the format and its checks. A trace is enough to replay a run under any policy and arena size;
it holds no text and no weights.

The file is an ``.npz`` of flat arrays: per event ``layer``, ``n_tokens``, ``n_used`` and
``continuation``; all chosen experts after one another in ``ids``; ``metadata`` as JSON in UTF-8.
"""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .base import RouteEvent

FORMAT = "moe-gguf trace"
VERSION = 1

Ids = npt.NDArray[np.int16] | npt.NDArray[np.int32]


class TraceEvent(NamedTuple):
    """One layer's routing in one step.

    ``ids[t, r]`` is the expert of rank r of token t. A ``continuation`` asks for further tensors
    of the same experts as the event before it; it moves slots but counts neither hits nor misses.
    """

    layer: int
    n_tokens: int
    continuation: bool
    ids: Ids


@dataclass(frozen=True)
class Trace:
    """A recorded run. ``metadata`` is JSON; replay needs these keys, the others inform:

    ``n_experts``; ``layers``, the MoE layers' numbers; ``blob_bytes``, one expert's bytes in each
    of them. Usual: ``model``, ``architecture``, ``n_experts_used``, and of the recorded run
    ``policy``, ``n_slots``, ``hits``, ``misses``.
    """

    metadata: Mapping[str, Any]
    events: Sequence[TraceEvent]


def route_event(layer: int, ids: Ids) -> RouteEvent:
    """What the native code derives from the router's ids [n_tokens, n_used]: tokens are scanned in
    order and ranks within a token in order; an expert stands where it is seen first."""
    counts = Counter(ids.ravel().tolist())  # a dict: keeps first-seen order
    return RouteEvent(layer, len(ids), list(counts), list(counts.values()))


class TraceRecorder:
    """Collects events in memory, 4 bytes per (token, rank), until ``save``."""

    def __init__(self) -> None:
        self._layer = array("i")
        self._n_tokens = array("i")
        self._n_used = array("i")
        self._continuation = array("b")
        self._ids = array("i")

    def record(
        self, layer: int, n_tokens: int, n_used: int, ids_flat: Sequence[int], continuation: bool
    ) -> None:
        """Append one event; ``ids_flat`` has ``n_tokens * n_used`` experts, token by token."""
        self._layer.append(layer)
        self._n_tokens.append(n_tokens)
        self._n_used.append(n_used)
        self._continuation.append(continuation)
        self._ids.extend(ids_flat)

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, Any]) -> Trace:
        """Write the trace, and return it; ``path`` appears complete or not at all."""
        ids = np.array(self._ids, np.int32)
        if ids.size == 0 or int(ids.max()) < 1 << 15:
            ids = ids.astype(np.int16)
        arrays: dict[str, Any] = {
            "layer": np.array(self._layer, np.int32),
            "n_tokens": np.array(self._n_tokens, np.int32),
            "n_used": np.array(self._n_used, np.int32),
            "continuation": np.array(self._continuation, np.bool_),
            "ids": ids,
        }
        text = json.dumps({**metadata, "format": FORMAT, "version": VERSION})
        trace = _parse(arrays, json.loads(text))  # what this writes, load_trace reads
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        try:
            with open(partial, "wb") as file:
                np.savez_compressed(file, metadata=np.frombuffer(text.encode(), np.uint8), **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return trace


def load_trace(path: str | os.PathLike[str]) -> Trace:
    """Read and check a trace. OSError if the file cannot be opened, ValueError if it is none."""
    with open(path, "rb") as file:
        try:
            # allow_pickle=False, the default, is what makes a stranger's trace safe to open.
            with np.load(file) as archive:
                arrays = {name: archive[name] for name in archive.files}
            metadata = json.loads(arrays.pop("metadata").tobytes())
            return _parse(arrays, metadata)
        except Exception as error:  # zipfile, zlib, numpy and json raise a dozen types on damage
            reason = str(error) or type(error).__name__
            raise ValueError(
                f"{os.fspath(path)} is not a routing trace that this version reads ({reason}): "
                "record one with `moe-gguf trace`."
            ) from error


def _parse(arrays: Mapping[str, npt.NDArray[Any]], metadata: Any) -> Trace:
    """Check everything replay relies on; ValueError or KeyError tell what is wrong."""

    def require(condition: object, message: str) -> None:
        if not condition:
            raise ValueError(message)

    require(isinstance(metadata, dict), "its metadata is not a JSON object")
    require(metadata.get("format") == FORMAT, "its metadata names another format")
    require(metadata.get("version") == VERSION, f"its version is not {VERSION}")
    n_experts = metadata.get("n_experts")
    require(type(n_experts) is int and n_experts >= 1, "n_experts is not a positive number")
    for name in ("layers", "blob_bytes"):
        values = metadata.get(name)
        require(
            isinstance(values, list) and all(type(v) is int and v >= 0 for v in values),
            f"{name} is not a list of numbers",
        )
    layers = metadata["layers"]
    require(len(layers) == len(metadata["blob_bytes"]), "layers and blob_bytes differ in length")

    kinds = {"layer": "i", "n_tokens": "i", "n_used": "i", "continuation": "b", "ids": "i"}
    for name, kind in kinds.items():
        require(name in arrays, f"the array {name} is missing")
        require(arrays[name].ndim == 1 and arrays[name].dtype.kind == kind, f"{name} is malformed")
    layer, ids = arrays["layer"], arrays["ids"]
    n_tokens, n_used = (arrays[name].astype(np.int64) for name in ("n_tokens", "n_used"))
    lengths = {len(arrays[name]) for name in kinds if name != "ids"}
    require(len(lengths) == 1, "its arrays differ in length")
    for numbers in (n_tokens, n_used):  # bounded, so that their products cannot wrap round
        require(((numbers >= 1) & (numbers <= len(ids))).all(), "an event's size is impossible")
    require(np.isin(layer, layers).all(), "an event's layer is not among its layers")
    sizes = n_tokens * n_used
    # In floats, since the sum could still wrap.
    require(sizes.sum(dtype=np.float64) == len(ids), "its events do not add up to its ids")
    require(((ids >= 0) & (ids < n_experts)).all(), "an expert is not below n_experts")
    continuation = arrays["continuation"]
    repeats = np.flatnonzero(continuation)
    require(not len(repeats) or repeats[0] > 0, "it begins with a continuation")
    require((layer[repeats] == layer[repeats - 1]).all(), "a continuation changes the layer")

    parts = np.split(ids, np.cumsum(sizes)[:-1]) if len(sizes) else []
    events = [
        TraceEvent(int(layer[i]), int(n_tokens[i]), bool(continuation[i]), part.reshape(n, -1))
        for i, (part, n) in enumerate(zip(parts, n_tokens, strict=True))
    ]
    return Trace(metadata, events)
