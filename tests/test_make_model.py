"""The benchmark models: they load, are repeatable, and their statistics are computed right.

Calibration itself is checked loosely, on a model small enough for a test; the targets are met by
the full-size presets and printed by `benchmarks/make_model.py` after every run.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import make_model
import numpy as np
import pytest

SMALL, CALIBRATION = make_model.PRESETS["small"]
TINY = dataclasses.replace(SMALL, n_layer=4, n_ff=64, n_vocab=1000)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    make_model.write_model(path, TINY, CALIBRATION)
    return path


def test_same_seed_same_bytes(tiny: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "again.gguf", tmp_path / "other.gguf"
    make_model.write_model(again, TINY, CALIBRATION, seed=0)
    make_model.write_model(other, TINY, CALIBRATION, seed=1)
    assert again.read_bytes() == tiny.read_bytes() != other.read_bytes()


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_model.Weights, "make", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_model.write_model(tmp_path / "model.gguf", TINY, CALIBRATION)
    assert list(tmp_path.iterdir()) == []


def test_quantized_noise_has_the_asked_mean_and_deviation() -> None:
    rng = np.random.default_rng(0)
    q4 = gguf.dequantize(make_model.q4_0(rng, (64, 1024), 0.02), gguf.GGMLQuantizationType.Q4_0)
    assert abs(q4.mean()) < 3e-4
    assert abs(q4.std() / 0.02 - 1) < 0.02
    rows = make_model.normal(rng, (16, 1024))
    rows[3] = 0
    q8 = gguf.dequantize(make_model.q8_0(rows), gguf.GGMLQuantizationType.Q8_0)
    assert np.abs(q8 - rows).max() < 0.02
    assert not q8[3].any()


def test_the_experts_of_the_benchmark_model_are_nine_tenths_of_it() -> None:
    def n_bytes(tensor: Any) -> int:
        return int(np.prod(gguf.quant_shape_to_byte_shape(tensor[1], tensor[2])))

    every = make_model.tensors(make_model.PRESETS["olmoe"][0])
    total = sum(map(n_bytes, every))
    experts = sum(n_bytes(t) for t in every if "_exps" in t[0])
    assert 3.8e9 < total < 4.0e9
    assert 0.89 < experts / total < 0.95


def test_any_text_survives_the_tokenizer(tiny: Path) -> None:
    import llama_cpp

    llm = llama_cpp.Llama(str(tiny), vocab_only=True, verbose=False)
    for text in ("kaneto, lighthouse 42!", "naïve 灯台 🚢\n\tØ", ""):
        ids = llm.tokenize(text.encode(), add_bos=False)
        assert llm.detokenize(ids) == text.encode()
    assert len(llm.tokenize(b" babe", add_bos=False)) == 1  # the merges are in force


def test_statistics_in_llama_cpp(tiny: Path) -> None:
    stats = make_model.measure(tiny, routed=96, greedy=192, threads=2)
    assert [stats[name] for name in ("layers", "experts", "tokens_routed")] == [4, 32, 96]
    assert stats["overlap"] > 2 * 4 / 32  # at least twice what chance gives
    assert 0.1 < stats["top10_share"] < 0.3
    assert 0.6 < stats["recall_at_k"] < stats["recall_at_1_5k"] < stats["recall_at_2k"] < 1
    assert stats["loop_period"] == 0
    assert stats["tokens_distinct"] > 96
    assert json.loads(make_model.report(stats).splitlines()[-1]) == stats


def test_greedy_text_is_printable_after_measuring(tiny: Path) -> None:
    """The log callback once died with `measure`, and the next model to load crashed."""
    import llama_cpp

    make_model.measure(tiny, routed=2, greedy=4, threads=2)

    llm = llama_cpp.Llama(str(tiny), n_ctx=128, n_threads=2, verbose=False, use_extra_bufts=False)
    text = llm("kato", max_tokens=32, temperature=0.0)["choices"][0]["text"]
    assert text
    assert text.isprintable()
    assert "\ufffd" not in text


def test_overlap_by_hand() -> None:
    # One layer, k = 2. {0,1} -> {1,2} shares one of two, {1,2} -> {2,1} both: mean 3/4.
    chosen = np.array([[[0, 1]], [[1, 2]], [[2, 1]]])
    assert make_model.overlap(chosen) == 0.75


def test_top_share_by_hand() -> None:
    # Ten experts, so the top tenth is one: expert 0 has 3 of 4 selections.
    assert make_model.top_share(np.array([[[0]], [[0]], [[0]], [[7]]]), 10) == 0.75
    # Four experts used evenly: 0.4 of one expert, whose share is 1/4.
    assert make_model.top_share(np.array([[[0, 1, 2, 3]]]), 4) == pytest.approx(0.1)


def test_recall_by_hand() -> None:
    scores = np.array([[4.0, 3.0, 2.0, 1.0]], dtype=np.float32)
    chosen = np.array([[0, 2]])
    assert make_model.recall(scores, chosen, 2) == 0.5
    assert make_model.recall(scores, chosen, 3) == 1.0


def test_period_by_hand() -> None:
    assert make_model.period([5] * 20) == 1
    assert make_model.period([9, 8, *[1, 2, 3] * 8]) == 3
    assert make_model.period([1, 2, 1, 2, 3, 4, 5, 6]) == 0  # a repeat, not a loop
    assert make_model.period(list(range(300))) == 0


def test_the_command_needs_exactly_one_thing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["out.gguf", "--stats", "in.gguf"]):
        with pytest.raises(SystemExit):
            make_model.main(arguments)
    assert "either a file to write or --stats" in capsys.readouterr().err
