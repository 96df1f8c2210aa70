"""Figures of quality against a plain computation over all logits, and against themselves."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TinyFile

from moe_gguf.runtime.bench.prose import prose
from moe_gguf.runtime.bench.quality import (
    Request,
    kl_divergence,
    log_softmax,
    quality,
    quality_text,
)
from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.llama import Llama
from moe_gguf.runtime.options import Options

N_CTX = 256
TEXT = prose() * 3  # two chunks and a rest that is left out


@contextmanager
def silent(_: str) -> Iterator[Callable[[float, float], None]]:
    yield lambda done, total: None


def open_model(path: str, **options: Any) -> Llama:
    return Llama(path, **{"memory": "800MB", "reads": "buffered", "n_threads": 1, **options})


def measured(path: Path, folder: Path, **options: Any) -> dict[str, Any]:
    options = {"text": TEXT, "n_ctx": N_CTX, "n_threads": 1, **options}
    opener = options.pop("open_model", open_model)
    held = Options.taken_from({"memory": "800MB", "reads": "buffered", **options})
    rest = {name: value for name, value in options.items() if name not in Options.names()}
    return quality(
        Request(path, options=held, **rest), open_model=opener, progress=silent, folder=folder
    )


def all_log_probs(path: Path, experts_used: int | None = None) -> list[Any]:
    """Per chunk: its tokens, and log-probabilities after each, in double precision."""
    llama = open_model(str(path), n_ctx=N_CTX, logits_all=True, experts_used=experts_used)
    bos = [llama.token_bos()] if llama._model.add_bos_token() else []
    tokens = llama.tokenize(TEXT.encode(), add_bos=False)
    size = N_CTX - len(bos)
    chunks = []
    for i in range(len(tokens) // size):
        chunk = bos + tokens[i * size : (i + 1) * size]
        llama.reset()
        llama.eval(chunk)
        logits = llama.scores[:N_CTX].astype(np.float64)
        chunks.append((chunk, logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))))
    llama.close()
    return chunks


def test_figures_are_those_of_a_plain_computation(tiny_file: TinyFile, tmp_path: Path) -> None:
    path = tiny_file("qwen3moe")
    document = measured(path, tmp_path, experts_used=2)
    surprises, before_surprises, divergences, agreed = [], [], [], []
    both = zip(all_log_probs(path, 2), all_log_probs(path), strict=True)
    for (chunk, after), (_, before) in both:
        for at in range(N_CTX // 2, N_CTX - 1):
            p, q = before[at], after[at]
            surprises.append(-q[chunk[at + 1]])
            before_surprises.append(-p[chunk[at + 1]])
            divergences.append(float(np.sum(np.exp(p) * (p - q))))
            agreed.append(p.argmax() == q.argmax())
    assert document["chunks"] > 1
    assert document["scored_tokens"] == len(surprises)
    assert document["perplexity"] == pytest.approx(math.exp(np.mean(surprises)), rel=1e-4)
    lossless = document["reference"]
    assert lossless["perplexity"] == pytest.approx(math.exp(np.mean(before_surprises)), rel=1e-4)
    assert document["kl_divergence"] == pytest.approx(np.mean(divergences), rel=1e-3)
    assert document["kl_divergence"] > 1e-3
    # Rounded to 16 bits two almost equal tokens may swap.
    assert document["top1_agreement"] == pytest.approx(np.mean(agreed), abs=0.01)
    assert document["lossy"] == {"experts_used": 2}


def test_a_lossless_run_is_compared_with_nothing(tiny_file: TinyFile, tmp_path: Path) -> None:
    path = tiny_file("qwen3moe")
    document = measured(path, tmp_path)
    assert document["reference"] is None
    assert document["kl_divergence"] is None
    header, line, _ = quality_text(document).splitlines()
    assert "perplexity" in header
    assert f"{document['perplexity']:.4f}" in line
    assert "lossless" in line


def test_a_model_against_itself_differs_by_the_rounding_only(
    tiny_file: TinyFile, tmp_path: Path
) -> None:
    path = tiny_file("qwen3moe")
    document = measured(path, tmp_path, against=path)
    assert document["perplexity"] == document["reference"]["perplexity"]
    assert abs(document["kl_divergence"]) < 1e-5
    assert document["top1_agreement"] > 0.99
    assert list(tmp_path.iterdir()) == []


def test_one_token_at_a_time_gives_the_same_up_to_rounding(
    tiny_file: TinyFile, tmp_path: Path
) -> None:
    path = tiny_file("qwen3moe")
    at_once = measured(path, tmp_path, text=prose()[:100])
    one_by_one = measured(path, tmp_path, text=prose()[:100], n_batch=1)
    assert one_by_one["perplexity"] == pytest.approx(
        at_once["perplexity"], rel=0.02
    )  # other kernels
    assert one_by_one["stats"]["prefill_tokens"] == 0


def test_the_first_pass_s_model_is_gone_when_the_second_opens(
    tiny_file: TinyFile, tmp_path: Path
) -> None:
    opened: list[weakref.ref[Llama]] = []

    def watched(path: str, **options: Any) -> Llama:
        assert all(model() is None for model in opened)
        llama = open_model(path, **options)
        opened.append(weakref.ref(llama))
        return llama

    measured(tiny_file("qwen3moe"), tmp_path, experts_used=2, open_model=watched)
    assert len(opened) == 2


def test_too_short_a_text(tiny_file: TinyFile, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too short to score"):
        measured(tiny_file("qwen3moe"), tmp_path, text="a")


def test_no_room_for_the_comparison(
    tiny_file: TinyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"1\.0 KB is free: give a shorter text"):
        measured(tiny_file("qwen3moe"), tmp_path, experts_used=2)


def test_another_vocabulary(
    tiny_file: TinyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tiny_file("qwen3moe"), tiny_file("mixtral")

    def open_other(name: str, **options: Any) -> Llama:
        llama = open_model(name, **options)
        if name == str(other):  # all tiny models have the same words
            monkeypatch.setattr(llama, "tokenize", lambda *_, **__: [1, 2, 3] * 9)
        return llama

    with pytest.raises(UserError, match="against wants a model with the same vocabulary"):
        measured(path, tmp_path, against=other, open_model=open_other)


def test_log_softmax_and_divergence() -> None:
    logits = np.array([1000.0, 1001.0, 998.0], np.float32)
    log_probs = log_softmax(logits)
    assert np.exp(log_probs).sum() == pytest.approx(1.0)
    assert log_probs[1] - log_probs[0] == pytest.approx(1.0, abs=1e-4)
    assert logits[0] == 1000.0  # llama.cpp's memory is left alone
    half = np.log(np.array([0.5, 0.5], np.float32))
    skewed = np.log(np.array([0.25, 0.75], np.float32))
    assert kl_divergence(half, half) == 0.0
    assert kl_divergence(half, skewed) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_command(tiny_file: TinyFile, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT)
    command = ["quality", str(tiny_file("qwen3moe")), "-f", str(text), "--ctx", str(N_CTX)]
    done = subprocess.run(
        [sys.executable, "-m", "moe_gguf", *command, "--experts-used", "3", "--threads", "1",
         "--memory", "800MB", "--json"],
        capture_output=True,
        text=True,
        env={"MOE_GGUF_CACHE": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["kl_divergence"] > 0
    assert document["stats"]["rss_peak_bytes"] <= document["stats"]["budget_bytes"]
