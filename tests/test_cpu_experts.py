"""Experts of a device's layers that the processor computes: logits equal stock's all the same.

The device is the one of native/lag.cpp, whose kernels are the processor's. A pass proves:

 1  all   the device has the trunk alone: as stock with experts in the processor's memory
"""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from conftest import TinyFile
from harness import Logits, Model, ours, random_tokens, rows, stock
from lag import NAME, Lag, lag

from moe_gguf import UserError
from moe_gguf.runtime.options import Options

__all__ = ["lag"]  # a fixture

DEVICE = {"device": NAME.lower()}
FEW = 12


def same(got: Logits, expected: Logits) -> None:
    assert got.shape == expected.shape
    assert np.isfinite(expected).all()
    difference = float(np.abs(got - expected).max())
    assert np.array_equal(got, expected), f"logits differ by up to {difference}"


def generation(model: Model) -> Logits:
    context = model.context()
    logits = [context.decode(rows(random_tokens(FEW)))]
    for i in range(6):
        logits.append(context.decode(rows([int(logits[-1][-1].argmax())], FEW + i)))
    return np.concatenate(logits)


@pytest.mark.parametrize("n_slots", [None, 7])
@pytest.mark.parametrize("layout", [*tiny.LAYOUTS, "scaled"])
def test_1_all(layout: str, n_slots: int | None, tiny_file: TinyFile, lag: Lag) -> None:
    path = tiny_file("qwen3moe", scales=True) if layout == "scaled" else tiny_file(layout)
    with stock(path, device=NAME, experts_on_cpu=True) as model:
        expected = generation(model)
    with ours(path, n_slots, cpu_experts="all", **DEVICE) as model:
        lag.count()
        same(generation(model), expected)
        assert lag.count().launches > 0
        assert model.stats().uploads == model.stats().generic == 0
        assert "cpu-experts all" in model.arena.mode_line()


def test_2_options() -> None:
    with pytest.raises(UserError, match="'some' names no experts: use auto, off, all"):
        Options(cpu_experts="some")
