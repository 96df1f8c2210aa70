"""Recorded routing: what every MoE layer asked for, step by step, in one small file.

Owns the format and its checks. A trace is enough to replay a run under any policy and arena size,
guesses included: it keeps what was offered to be read ahead, what of it was chosen and what was
cancelled, for that depends on time. It holds no text, no weights and no activations.

The file is an ``.npz`` of flat arrays. Per event: ``layer``, ``phase``, ``n_sequences``,
``n_tokens``, ``n_used`` and ``continuation``. After one another, those of all events: the chosen
experts in ``ids``; the keys cancelled before an event in ``cancelled``, ``n_cancelled`` each; the
guesses offered after it in ``offered``, ``n_offered`` each, with their ``chances`` and whether each
was ``chosen``. ``metadata`` is JSON in UTF-8.
"""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .base import Guess, Ids, Phase, RouteEvent

FORMAT = "moe-gguf trace"
VERSION = 2

Arrays = Mapping[str, npt.NDArray[Any]]

_PER_EVENT = ("layer", "phase", "n_sequences", "n_tokens", "n_used", "n_cancelled", "n_offered")
# Of every array the kind of its numbers: whole, boolean or real.
_KINDS = {
    **dict.fromkeys((*_PER_EVENT, "ids", "cancelled", "offered"), "i"),
    **dict.fromkeys(("continuation", "chosen"), "b"),
    "chances": "f",
}


class Offers(NamedTuple):
    """The guesses offered after one event, best first; the lists are parallel.

    ``chosen`` are those that were read ahead, as far as there was a slot.
    """

    keys: Sequence[int] = ()
    chances: Sequence[float] = ()
    chosen: Sequence[bool] = ()


class TraceEvent(NamedTuple):
    """One layer's routing in one step.

    ``ids[t, r]`` is the expert of rank r of token t. A ``continuation`` asks for further tensors
    of the same experts as the event before it; it moves slots but counts neither hits nor misses.
    ``cancelled`` are the keys of guesses that were given up before it, their slots empty again.
    """

    layer: int
    phase: Phase
    n_sequences: int
    continuation: bool
    ids: Ids
    cancelled: Sequence[int] = ()
    offers: Offers = Offers()

    @property
    def n_tokens(self) -> int:
        return len(self.ids)

    def route(self) -> RouteEvent:
        """What the native code derives from the router's ids: tokens are scanned in order and ranks
        within a token in order; an expert stands where it is seen first."""
        counts = Counter(self.ids.ravel().tolist())  # a dict: keeps first-seen order
        experts, votes = list(counts), list(counts.values())
        return RouteEvent(self.layer, self.n_tokens, experts, votes, self.phase, self.n_sequences)


@dataclass(frozen=True)
class Trace:
    """A recorded run. ``metadata`` is JSON; replay needs these keys, the others inform:

    ``n_experts``; ``layers``, the MoE layers' numbers; ``blob_bytes``, one expert's bytes in each
    of them. Usual: ``model``, ``architecture``, ``n_experts_used``, and of the recorded run
    ``policy``, ``n_slots``, ``n_sequences`` (what the policy was told; 1 if absent), ``hits``,
    ``misses``, ``guesses``.
    """

    metadata: Mapping[str, Any]
    events: Sequence[TraceEvent]

    @property
    def has_offers(self) -> bool:
        """Whether the recorded run was offered any guess."""
        return any(event.offers.keys for event in self.events)


class TraceRecorder:
    """Collects events in memory until ``save``: 4 bytes per (token, rank), 9 per guess."""

    def __init__(self) -> None:
        self._per_event = {name: array("i") for name in _PER_EVENT}
        self._continuation, self._chosen = array("b"), array("b")
        self._ids, self._cancelled, self._offered = array("i"), array("i"), array("i")
        self._chances = array("f")

    def record(
        self,
        event: RouteEvent,
        ids_flat: Sequence[int],
        continuation: bool,
        cancelled: Sequence[int] = (),
    ) -> None:
        """Append one event; ``ids_flat`` has its tokens' experts, token by token."""
        n_used = len(ids_flat) // event.n_tokens
        row = (event.layer, event.phase, event.n_sequences, event.n_tokens, n_used)
        for column, value in zip(self._per_event.values(), (*row, len(cancelled), 0), strict=True):
            column.append(value)
        self._continuation.append(continuation)
        self._ids.extend(ids_flat)
        self._cancelled.extend(cancelled)

    def record_guesses(self, offered: Sequence[Guess], chosen: Sequence[Guess]) -> None:
        """What was offered to be read ahead after the event recorded last, and what was chosen."""
        keys = {guess.key for guess in chosen}
        self._per_event["n_offered"][-1] = len(offered)
        self._offered.extend(guess.key for guess in offered)
        self._chances.extend(guess.confidence for guess in offered)
        self._chosen.extend(guess.key in keys for guess in offered)

    def _arrays(self) -> dict[str, Any]:
        ids = np.array(self._ids, np.int32)
        if ids.size == 0 or int(ids.max()) < 1 << 15:
            ids = ids.astype(np.int16)
        return {
            **{name: np.array(column, np.int32) for name, column in self._per_event.items()},
            "continuation": np.array(self._continuation, np.bool_),
            "ids": ids,
            "cancelled": np.array(self._cancelled, np.int32),
            "offered": np.array(self._offered, np.int32),
            "chances": np.array(self._chances, np.float32),
            "chosen": np.array(self._chosen, np.bool_),
        }

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, Any]) -> Trace:
        """Write the trace, and return it; ``path`` appears complete or not at all."""
        arrays = self._arrays()
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
                "record it again with `moe-gguf trace`."
            ) from error


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _parse(arrays: Arrays, metadata: Any) -> Trace:
    """Check everything replay relies on; ValueError or KeyError tell what is wrong."""
    _check_metadata(metadata)
    _check_arrays(arrays)
    n_experts, layers = metadata["n_experts"], metadata["layers"]
    _require(np.isin(arrays["layer"], layers).all(), "an event's layer is not among its layers")
    ids = arrays["ids"]
    _require(((ids >= 0) & (ids < n_experts)).all(), "an expert is not below n_experts")
    for name in ("cancelled", "offered"):
        fits = np.isin(arrays[name] // n_experts, layers)
        _require(fits.all(), f"a key in {name} is of none of its layers")
    return Trace(metadata, _events(arrays))


def _check_metadata(metadata: Any) -> None:
    _require(isinstance(metadata, dict), "its metadata is not a JSON object")
    _require(metadata.get("format") == FORMAT, "its metadata names another format")
    version = metadata.get("version")
    _require(version == VERSION, f"its version is {version}, not {VERSION}")
    for name, default in (("n_experts", None), ("n_sequences", 1)):
        number = metadata.get(name, default)
        _require(type(number) is int and number >= 1, f"{name} is not a positive number")
    for name in ("layers", "blob_bytes"):
        values = metadata.get(name)
        _require(
            isinstance(values, list) and all(type(v) is int and v >= 0 for v in values),
            f"{name} is not a list of numbers",
        )
    same = len(metadata["layers"]) == len(metadata["blob_bytes"])
    _require(same, "layers and blob_bytes differ in length")


def _check_arrays(arrays: Arrays) -> None:
    """Types, lengths and what holds among the arrays, whatever the model."""
    for name, kind in _KINDS.items():
        _require(name in arrays, f"the array {name} is missing")
        array = arrays[name]
        _require(array.ndim == 1 and array.dtype.kind == kind, f"{name} is malformed")
    continuation = arrays["continuation"]
    lengths = {len(arrays[name]) for name in (*_PER_EVENT, "continuation")}
    _require(len(lengths) == 1, "its arrays differ in length")
    for name in ("n_tokens", "n_used"):  # bounded, so that their products cannot wrap round
        fits = (arrays[name] >= 1) & (arrays[name] <= len(arrays["ids"]))
        _require(fits.all(), "an event's size is impossible")
    _require((arrays["n_sequences"] >= 1).all(), "an event is of no sequence")
    _require(np.isin(arrays["phase"], list(Phase)).all(), "an event's phase is unknown")
    sizes = arrays["n_tokens"].astype(np.float64) * arrays["n_used"]  # a sum could still wrap
    _require(sizes.sum() == len(arrays["ids"]), "its events do not add up to its ids")
    for counts, name in (("n_cancelled", "cancelled"), ("n_offered", "offered")):
        numbers = arrays[counts]
        adds_up = (numbers >= 0).all() and numbers.sum(dtype=np.float64) == len(arrays[name])
        _require(adds_up, f"{counts} does not add up to {name}")
    chances = arrays["chances"]
    same = len(arrays["offered"]) == len(chances) == len(arrays["chosen"])
    _require(same, "offered, chances and chosen differ in length")
    _require(((chances >= 0) & (chances <= 1)).all(), "a chance is not from 0 to 1")
    layer, repeats = arrays["layer"], np.flatnonzero(continuation)
    _require(not len(repeats) or repeats[0] > 0, "it begins with a continuation")
    _require((layer[repeats] == layer[repeats - 1]).all(), "a continuation changes the layer")


def _events(arrays: Arrays) -> list[TraceEvent]:
    sizes = arrays["n_tokens"].astype(np.int64) * arrays["n_used"]
    names = ("layer", "phase", "n_sequences", "n_tokens", "continuation")
    rows = zip(*(arrays[name].tolist() for name in names), strict=True)
    lists = {name: arrays[name].tolist() for name in ("cancelled", "offered", "chances", "chosen")}
    spans = zip(*map(_spans, (sizes, arrays["n_cancelled"], arrays["n_offered"])), strict=True)
    return [
        TraceEvent(
            layer,
            Phase(phase),
            n_sequences,
            continuation,
            arrays["ids"][ids].reshape(n_tokens, -1),
            lists["cancelled"][cancelled],
            Offers(*(lists[name][offers] for name in ("offered", "chances", "chosen"))),
        )
        for (layer, phase, n_sequences, n_tokens, continuation), (ids, cancelled, offers) in zip(
            rows, spans, strict=True
        )
    ]


def _spans(lengths: npt.NDArray[Any]) -> Iterator[slice]:
    """Where each event's part lies, the parts being of these lengths and one after another."""
    ends: list[int] = np.cumsum(lengths, dtype=np.int64).tolist()
    return map(slice, [0, *ends], ends)
