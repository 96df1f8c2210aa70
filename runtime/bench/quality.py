"""What a lossy setting costs: perplexity, and the distance from the lossless run of the same text.

Owns the passes over the text and the figures; knows neither how experts are held nor the terminal.

The text is cut into chunks of ``n_ctx`` tokens, each read from an empty context that begins with
the model's start token, if it uses one. Scored is every token of a chunk's second half, so that
each has at least ``n_ctx / 2`` tokens before it (the rule of llama.cpp's own perplexity tool, whose
figures are therefore comparable). With P the lossless and Q the lossy distribution of the next
token at each scored position, x the token that stands there, and natural logarithms:

    perplexity     exp(mean of -log Q(x))
    kl_divergence  mean of sum over the vocabulary of P(v) (log P(v) - log Q(v)), in nats
    top1_agreement share of positions at which P and Q have the same most likely token

Between the passes P is kept on disk as log P in 16-bit floats and normalised again when read.
Identical distributions therefore score about 1e-6 nats, not 0, which is invisible beside any real
divergence.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...policies.base import Phase
from ..columns import columns
from ..errors import UserError, option
from ..options import Options
from ..progress import Report
from ..sizes import format_size

if TYPE_CHECKING:
    from ..llama import Llama

DEFAULT_CTX = 512

Floats = npt.NDArray[np.float32]
Open = Callable[..., "Llama"]  # a model path and Llama's arguments


class Position(NamedTuple):
    """One scored position: what comes next, and what the model thinks of it."""

    token: int
    log_probs: Floats  # of the whole vocabulary; valid until the next position


class Figures(NamedTuple):
    """One pass; the two comparisons are None without a lossless pass to compare with."""

    perplexity: float
    kl_divergence: float | None
    top1_agreement: float | None
    stats: dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What ``quality`` is asked for."""

    model: Path
    text: str
    options: Options = field(default_factory=Options)
    against: Path | None = None  # score against this model's lossless run
    n_ctx: int | None = None
    n_batch: int = 512
    n_threads: int | None = None

    @property
    def is_compared(self) -> bool:
        return bool(self.options.losses()) or self.against is not None


def quality(
    request: Request, *, open_model: Open, progress: Callable[[str], Any], folder: Path
) -> dict[str, Any]:
    """Score the text with the model as the options say, and against its lossless run if they are
    lossy (or against the lossless run of ``against``); returns the document.

    The passes run one after the other, each with the whole budget. ``folder`` takes the file
    between them, of 2 bytes per scored position and word of the vocabulary. ``progress(what)`` is a
    context manager that yields ``report(done, total)``.
    """
    n_ctx = request.n_ctx or DEFAULT_CTX
    options, other = request.options, request.against or request.model
    context = {
        "n_ctx": n_ctx,
        "n_batch": request.n_batch,
        "n_threads": request.n_threads,
        "logits_all": True,
    }
    reference: dict[str, Any] | None = None
    with tempfile.TemporaryFile(dir=folder) as kept:
        if request.is_compared:
            before = replace(options, **options.lossless()).arguments()
            with closing(open_model(str(other), **before, **context)) as llama:
                chunks, n_vocab = _chunks(llama, request.text), llama.n_vocab()
                _check_room(llama, chunks, folder)
                with progress("lossless pass") as report:
                    figures = _pass(llama, chunks, report, keep=kept)
            del llama  # its scores are no small part of the next pass's budget
            reference = {"model": str(other), **figures._asdict()}
        with closing(open_model(str(request.model), **options.arguments(), **context)) as llama:
            mine = _chunks(llama, request.text)
            if reference is not None and (mine, llama.n_vocab()) != (chunks, n_vocab):
                raise UserError(
                    f"{request.model} and {other} see different tokens in the text: "
                    f"{option('against')} wants a model with the same vocabulary"
                )
            kept.seek(0)
            with progress("pass" if reference is None else "pass to compare") as report:
                figures = _pass(llama, mine, report, reference=kept if reference else None)
    return {
        "model": str(request.model),
        "lossy": options.losses(),
        "n_ctx": n_ctx,
        "n_batch": request.n_batch,
        "chunks": len(mine),
        "scored_tokens": sum(_n_scored(chunk) for chunk in mine),
        **figures._asdict(),
        "reference": reference,
    }


def quality_text(document: dict[str, Any]) -> str:
    """A table of one line, two with the lossless run."""
    lines = [["", "perplexity", "KL divergence", "same top token", "setting"]]
    rows = [("lossless", document["reference"], {}), ("this", document, document["lossy"])]
    for name, figures, lossy in rows:
        if figures is None:
            continue
        kl, top = figures["kl_divergence"], figures["top1_agreement"]
        setting = ", ".join(f"{k.replace('_', '-')} {v}" for k, v in lossy.items()) or "lossless"
        lines.append(
            [
                name,
                f"{figures['perplexity']:.4f}",
                "-" if kl is None else f"{kl:.6f}",
                "-" if top is None else f"{top:.2%}",
                f"{Path(figures['model']).name}, {setting}",
            ]
        )
    remark = (
        f"{document['scored_tokens']} tokens scored, in chunks of {document['n_ctx']}, "
        f"{document['n_batch']} at a time"
    )
    return "\n".join([*columns(lines, "<>>><"), remark])


def _chunks(llama: Llama, text: str) -> list[list[int]]:
    """The text's tokens in pieces that fill the context; a short one only if it is all there is."""
    tokens: list[int] = llama.tokenize(text.encode(), add_bos=False, special=False)
    start = [llama.token_bos()] if llama._model.add_bos_token() else []
    size = llama.n_ctx() - len(start)
    chunks = [start + tokens[i : i + size] for i in range(0, len(tokens), size)]
    if len(chunks) > 1 and len(chunks[-1]) < llama.n_ctx():
        chunks.pop()  # its tokens would be scored with less before them than all others
    if not chunks or _n_scored(chunks[0]) < 1:
        raise UserError("the text is too short to score: give a longer one")
    return chunks


def _n_scored(chunk: Sequence[int]) -> int:
    return len(chunk) - 1 - len(chunk) // 2


def _check_room(llama: Llama, chunks: Sequence[Sequence[int]], folder: Path) -> None:
    needed = 2 * llama.n_vocab() * sum(_n_scored(chunk) for chunk in chunks)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"comparing needs {format_size(needed)} in {folder}, where {format_size(free)} is "
            "free: give a shorter text"
        )


def _pass(
    llama: Llama,
    chunks: Sequence[Sequence[int]],
    report: Report,
    *,
    keep: IO[bytes] | None = None,
    reference: IO[bytes] | None = None,
) -> Figures:
    """Score every chunk; one position at a time, so that the vocabulary is never in memory often.

    ``keep`` receives log P of every position, ``reference`` is read back in the same order.
    """
    surprise, divergence, agreed, n = 0.0, 0.0, 0, 0
    for position in _positions(llama, chunks, report):
        n += 1
        surprise -= float(position.log_probs[position.token])
        if keep is not None:
            keep.write(position.log_probs.astype(np.float16).tobytes())
        if reference is not None:
            data = reference.read(2 * len(position.log_probs))
            before = log_softmax(np.frombuffer(data, np.float16).astype(np.float32))
            divergence += kl_divergence(before, position.log_probs)
            agreed += int(np.argmax(before) == np.argmax(position.log_probs))
    compared = reference is not None
    return Figures(
        math.exp(surprise / n),
        divergence / n if compared else None,
        agreed / n if compared else None,
        llama.stats(),
    )


def _positions(llama: Llama, chunks: Sequence[Sequence[int]], report: Report) -> Iterator[Position]:
    # One token at a time is asked for to measure what generation does.
    phase = Phase.DECODE if llama.n_batch == 1 else Phase.PREFILL
    for done, chunk in enumerate(chunks):
        report(done, len(chunks))
        llama.reset()
        llama._ctx.kv_cache_clear()
        for at in range(0, len(chunk), llama.n_batch):
            llama.eval(chunk[at : at + llama.n_batch], phase)
            report(done + (at / len(chunk)), len(chunks))
        for at in range(len(chunk) // 2, len(chunk) - 1):
            yield Position(chunk[at + 1], log_softmax(llama.scores[at]))
    report(len(chunks), len(chunks))


def log_softmax(logits: Floats) -> Floats:
    """Log-probabilities of one position; the sum is taken in double precision."""
    log_probs: Floats = logits - logits.max()
    log_probs -= np.float32(math.log(float(np.exp(log_probs).sum(dtype=np.float64))))
    return log_probs


def kl_divergence(before: Floats, after: Floats) -> float:
    """Of one position, in nats, from two vectors of log-probabilities."""
    return float(np.dot(np.exp(before), before - after))
