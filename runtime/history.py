"""Routing statistics beside a model: what earlier runs asked for, for a warm start.

Owns the file, a GGUF of keys only, and how the counts of recorded runs add up in it. Decides
nothing: policies get what it tells per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..policies.trace import Trace, TraceEvent
from .errors import UserError, option
from .files import replacing
from .formats.bundle import PREFIX, ROUTING, is_bundle
from .formats.gguf_header import DEFAULT_ALIGNMENT, ValueType, read_header
from .formats.gguf_writer import encode_header, encode_pair
from .formats.keys import Keys

VERSION = 1
AT = PREFIX + "routing."
MEND = "delete it and record routing statistics again with moe-gguf trace --save-routing"
# Transitions that would take more than this are not kept: they would cost slots.
MAX_TRANSITIONS_BYTES = 64 << 20

U32s = NDArray[np.uint32]
U64s = NDArray[np.uint64]
Floats = NDArray[np.float32]

U32, U64, F32 = ValueType.UINT32, ValueType.UINT64, ValueType.FLOAT32
_DTYPES: dict[ValueType, np.dtype[Any]] = {
    U32: np.dtype("<u4"),
    U64: np.dtype("<u8"),
    F32: np.dtype("<f4"),
}


class Identity(NamedTuple):
    """The model whose statistics these are; another one of the same shape cannot be told apart."""

    architecture: str
    layers: tuple[int, ...]  # those that route
    n_experts: int
    n_used: int


@dataclass(frozen=True)
class Routing:
    """Counts of recorded tokens. Arrays run by layer, in the order of ``identity.layers``.

    - ``popularity`` [n_layers, n_experts]: tokens that used an expert, prompts included.
    - ``transitions`` [n_layers - 1, n_experts, n_experts]: tokens that used a and, one layer on, b;
      None where they would be too big.
    - ``recall`` [n_layers]: share of a token's experts among its best gate guesses, -1: unknown.
    """

    identity: Identity
    tokens: int
    popularity: U64s
    transitions: U32s | None
    recall: Floats

    def __add__(self, other: Routing) -> Routing:
        """The counts of both; they stop at what the file can hold. Recall is weighed by tokens."""
        assert self.identity == other.identity
        transitions = None
        if self.transitions is not None and other.transitions is not None:
            transitions = _sum(self.transitions, other.transitions)
        known = [r >= 0 for r in (self.recall, other.recall)]
        weights = [k * float(r.tokens) for k, r in zip(known, (self, other), strict=True)]
        total = weights[0] + weights[1]
        mean = weights[0] * self.recall + weights[1] * other.recall
        recall = np.where(total > 0, mean / np.maximum(total, 1), -1).astype(np.float32)
        tokens = min(self.tokens + other.tokens, 2**64 - 1)
        popularity = _sum(self.popularity, other.popularity)
        return Routing(self.identity, tokens, popularity, transitions, recall)

    def uses(self) -> dict[int, float]:
        """By key the uses per token, for experts that were used."""
        _, layers, n_experts, n_used = self.identity
        uses: dict[int, float] = {}
        for layer, counts in zip(layers, self.popularity.astype(np.float64), strict=True):
            # Not self.tokens: llama.cpp computes a prompt's last layer for its last token only.
            each = counts * (n_used / max(1.0, counts.sum()))
            used = np.flatnonzero(each)
            keys = (layer * n_experts + used).tolist()
            uses |= zip(keys, each[used].tolist(), strict=True)
        return uses

    def follows(self) -> Floats | None:
        """``transitions`` per token; None without them."""
        if self.transitions is None:
            return None
        counts = self.transitions.astype(np.float32)
        tokens = counts.sum(axis=(1, 2), keepdims=True) / np.float32(self.identity.n_used**2)
        counts /= np.maximum(tokens, np.float32(1))
        return counts

    def recalls(self) -> dict[int, float]:
        """Recall by layer, where known."""
        pairs = zip(self.identity.layers, self.recall.tolist(), strict=True)
        return {layer: recall for layer, recall in pairs if recall >= 0}

    def save(self, path: Path) -> None:
        """Write the file; ``path`` appears complete or not at all."""
        with replacing(path) as partial:
            partial.write_bytes(encode_header(list(self._pairs()), (), DEFAULT_ALIGNMENT))

    def _pairs(self) -> Iterable[bytes]:
        identity = self.identity
        yield encode_pair(AT + "version", U32, VERSION)
        yield encode_pair(AT + "architecture", ValueType.STRING, identity.architecture)
        yield encode_pair(AT + "layers", ValueType.ARRAY, identity.layers, U32)
        yield encode_pair(AT + "n_experts", U32, identity.n_experts)
        yield encode_pair(AT + "n_used", U32, identity.n_used)
        yield encode_pair(AT + "tokens", U64, self.tokens)
        arrays: dict[str, tuple[ValueType, NDArray[Any]]] = {
            "popularity": (U64, self.popularity),
            "recall": (F32, self.recall),
        }
        if self.transitions is not None:
            arrays["transitions"] = U32, self.transitions
        for name, (item, values) in arrays.items():
            data = values.astype(_DTYPES[item], copy=False).tobytes()
            yield encode_pair(AT + name, ValueType.ARRAY, data, item)


def routing_path(model: Path) -> Path:
    """Where the statistics of a model lie: in its bundle, or beside its GGUF."""
    if is_bundle(model):
        return model / ROUTING
    return model.with_name(f"{model.name.removesuffix('.gguf')}.{ROUTING}")


def count(trace: Trace, identity: Identity, recall: Mapping[int, float]) -> Routing:
    """The statistics of one recorded run of that model."""
    _, layers, n_experts, _ = identity
    index = {layer: i for i, layer in enumerate(layers)}
    tokens = 0
    popularity = np.zeros((len(layers), n_experts), np.uint64)
    transitions = None
    if _transitions_fit(identity):
        transitions = np.zeros((len(layers) - 1, n_experts, n_experts), np.uint32)
    before: TraceEvent | None = None
    for event in trace.events:
        if event.continuation:
            continue
        i = index[event.layer]
        tokens += event.n_tokens * (i == 0)
        np.add.at(popularity[i], event.ids.ravel(), np.uint64(1))
        if transitions is not None and before is not None and index[before.layer] + 1 == i:
            # The last layer computes a prompt's last tokens only.
            n = min(before.n_tokens, event.n_tokens)
            pairs = before.ids[-n:, :, None], event.ids[-n:, None, :]
            np.add.at(transitions[i - 1], pairs, np.uint32(1))
        before = event
    recalls = np.array([recall.get(layer, -1.0) for layer in layers], np.float32)
    return Routing(identity, tokens, popularity, transitions, recalls)


def load(path: Path, identity: Identity) -> Routing | None:
    """The statistics in a file, if it exists; UserError if it is damaged or of another model."""
    if not path.exists():
        return None
    try:
        header = read_header(path)
    except UserError as error:
        raise UserError(f"{error}, or delete {path}: it only holds routing statistics") from None
    keys = Keys(path, header.get, MEND)
    if (found := keys.value(AT + "version")) != VERSION:
        raise UserError(
            f"{path} holds no routing statistics of version {VERSION} (it says {found!r:.60}): "
            "delete it and record them again with moe-gguf trace --save-routing"
        )
    found_identity = Identity(
        keys.text(AT + "architecture"),
        keys.integers(AT + "layers"),
        keys.integer(AT + "n_experts"),
        keys.integer(AT + "n_used"),
    )
    if found_identity != identity:
        raise UserError(
            f"{path} holds the routing statistics of another model ({_outline(found_identity)}; "
            f"this one is {_outline(identity)}): delete it, or leave out {option('warm')} and "
            f"{option('save_routing')}"
        )
    tokens = keys.integer(AT + "tokens")
    n_layers, n_experts = len(identity.layers), identity.n_experts

    def array(name: str, item: ValueType, *shape: int) -> NDArray[Any]:
        pair = header.pairs.get(AT + name)
        if pair is None or pair.item is not item or pair.count != math.prod(shape):
            wanted = f"{math.prod(shape)} numbers of its type"
            raise keys.damaged(f"{AT}{name} is not a list of {wanted}")
        return np.frombuffer(header.payload(AT + name), _DTYPES[item]).reshape(shape)

    popularity = array("popularity", U64, n_layers, n_experts)
    recall = array("recall", F32, n_layers)
    transitions = None
    if AT + "transitions" in header.pairs:
        transitions = array("transitions", U32, n_layers - 1, n_experts, n_experts)
    # A token uses an expert once in a layer, and another after it once.
    for name, counts in (("popularity", popularity), ("transitions", transitions)):
        if counts is not None and counts.size and int(counts.max()) > tokens:
            raise keys.damaged(f"{AT}{name} counts more than the {tokens} tokens")
    if not ((recall == -1) | ((recall >= 0) & (recall <= 1))).all():
        raise keys.damaged(f"{AT}recall is no share")
    return Routing(identity, tokens, popularity, transitions, recall)


def _transitions_fit(identity: Identity) -> bool:
    return 4 * (len(identity.layers) - 1) * identity.n_experts**2 <= MAX_TRANSITIONS_BYTES


def _sum(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """a + b, where what overflows stays at the type's largest value."""
    total: NDArray[Any] = a + b
    total[total < a] = np.iinfo(total.dtype).max
    return total


def _outline(identity: Identity) -> str:
    architecture, layers, n_experts, n_used = identity
    return f"{architecture}, {len(layers)} layers x {n_experts} experts, top-{n_used}"
