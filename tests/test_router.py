"""The routing rule chooses what llama.cpp chooses, and its defaults are llama.cpp's."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from harness import ours, random_tokens, rows
from mutant import Field, Mutant
from reference_gates import Ids, confidence, gate, scores, select, top

from moe_gguf.policies.base import Guess, RouteEvent
from moe_gguf.runtime.formats.gguf_header import ValueType, read_header
from moe_gguf.runtime.plugin.abi import Call
from moe_gguf.runtime.plugin.gates import Floats, RoutingRule
from moe_gguf.runtime.routers import routing_rule


class Watcher:
    """A recorder that also copies the gate input behind every event."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.events: list[tuple[int, Floats, Ids]] = []

    def record(
        self, event: RouteEvent, ids: list[int], continuation: bool, cancelled: Sequence[int]
    ) -> None:
        call, n_tokens = self.call, event.n_tokens
        assert call is not None
        stride = call.x_stride // 4
        buffer = (ctypes.c_float * (stride * (n_tokens - 1) + call.n_embd)).from_address(call.x)
        flat = np.frombuffer(buffer, np.float32)
        x = np.stack([flat[t * stride : t * stride + call.n_embd] for t in range(n_tokens)])
        self.events.append((event.layer, x, np.array(ids).reshape(n_tokens, -1)))

    def record_guesses(self, offered: Sequence[Guess], chosen: Sequence[Guess]) -> None:
        pass


def watch(path: Path) -> tuple[gguf.GGUFReader, list[tuple[int, Floats, Ids]]]:
    watcher = Watcher()
    with ours(path, recorder=watcher) as model:
        watcher.call = model.arena.plugin.call
        context = model.context()
        context.decode(rows(random_tokens(60)))
        for i in range(4):
            context.decode(rows([65 + i], pos=60 + i))
    return gguf.GGUFReader(path), watcher.events


def tensor(reader: gguf.GGUFReader, name: str) -> Floats | None:
    for t in reader.tensors:
        if t.name == name:
            return np.array(t.data, np.float32)
    return None


def field(reader: gguf.GGUFReader, key: str) -> Any:
    found = reader.fields.get(key)
    return None if found is None else found.contents()


@pytest.mark.parametrize(
    "layout", ["qwen3moe", "gpt-oss", "deepseek2", "llama4", "mixtral", "updown"]
)
def test_the_rule_on_the_captured_input_chooses_what_llama_cpp_chose(
    layout: str, tiny_file: Callable[..., Path]
) -> None:
    reader, events = watch(tiny_file(layout))
    architecture = field(reader, "general.architecture")
    wrong = biased = 0
    for layer, x, ids in events:
        weight = tensor(reader, f"blk.{layer}.ffn_gate_inp.weight")
        assert weight is not None
        logits = x @ weight.T
        # llama4's x is already multiplied by the routing weight, which changes no order.
        if (added := tensor(reader, f"blk.{layer}.ffn_gate_inp.bias")) is not None:
            logits += added
            biased += 1
        bias = tensor(reader, f"blk.{layer}.exp_probs_b.bias")
        biased += bias is not None
        rule = routing_rule(architecture, lambda key: field(reader, key), bias)
        chosen = select(rule, logits, ids.shape[1])
        # Sums in another order may swap experts that are all but equal: 1 token in 200 at most.
        wrong += int((np.sort(chosen) != np.sort(ids)).any(axis=1).sum())
    n_tokens = sum(len(ids) for _, _, ids in events)
    assert n_tokens > 60
    assert wrong <= n_tokens // 200
    assert (biased > 0) == (layout in ("gpt-oss", "deepseek2", "updown"))


def rule_of(architecture: str, keys: Mapping[str, Any], bias: Floats | None = None) -> RoutingRule:
    return routing_rule(architecture, keys.get, bias)


def test_gating_by_key_default_and_architecture() -> None:
    bias = np.zeros(4, np.float32)
    assert rule_of("qwen3moe", {}).gating == "softmax"
    assert rule_of("olmoe", {}).gating == "softmax"
    assert rule_of("glm4moe", {}, bias).gating == "sigmoid"
    assert rule_of("glm4moe", {"glm4moe.expert_gating_func": 1}).gating == "softmax"
    assert rule_of("deepseek2", {}).gating == "softmax"
    assert rule_of("deepseek2", {"deepseek2.expert_gating_func": 2}, bias).gating == "sigmoid"
    assert rule_of("deepseek4", {"deepseek4.expert_gating_func": 4}).gating == "sqrt_softplus"
    # Fixed in llama.cpp's code, whatever the file says.
    assert rule_of("gpt-oss", {"gpt-oss.expert_gating_func": 1}).gating == "softmax_weight"
    assert rule_of("llama4", {}).gating == "sigmoid"
    assert rule_of("ernie4_5-moe", {}, bias).gating == "softmax"
    # Not heard of yet: a bias is a sign of sigmoid routing.
    assert rule_of("new", {}).gating == "softmax"
    assert rule_of("new", {}, bias).gating == "sigmoid"
    with pytest.raises(ValueError, match=r"new\.expert_gating_func is 9"):
        rule_of("new", {"new.expert_gating_func": 9})


def test_glm_lite_is_told_from_deepseek_by_its_vocabulary() -> None:
    keys = {"deepseek2.block_count": 47, "tokenizer.ggml.tokens": range(154880)}
    assert rule_of("deepseek2", keys).gating == "sigmoid"
    assert rule_of("deepseek2", keys | {"deepseek2.vocab_size": 102400}).gating == "softmax"


def test_glm_lite_is_told_by_a_vocabulary_that_is_too_big_to_decode_at_once(tmp_path: Path) -> None:
    """A header keeps long lists undecoded, and once called them absent."""
    fields = {
        "deepseek2.block_count": Field(ValueType.UINT32, 47),
        "tokenizer.ggml.tokens": Field(ValueType.STRING, ["x"] * 154880),
    }
    header = read_header(Mutant(fields, {}).write(tmp_path / "m.gguf"))
    assert routing_rule("deepseek2", header.get).gating == "sigmoid"


def test_groups_come_from_the_file() -> None:
    keys = {"deepseek2.expert_group_count": 4, "deepseek2.expert_group_used_count": 2}
    rule = rule_of("deepseek2", keys)
    assert (rule.n_groups, rule.n_groups_used) == (4, 2)
    assert rule_of("deepseek2", {}).n_groups == 1


def test_groups_by_hand() -> None:
    rule = RoutingRule("sigmoid", n_groups=3, n_groups_used=1)
    # Expert 0 is the best, but its group's two best are 2 - 9 in logits: the pair 1, 1 is better.
    logits = np.array([[2, -9, 1, 1, 0, 0]], np.float32)
    assert sorted(select(rule, logits, 2)[0]) == [2, 3]
    got = scores(rule, logits)[0]
    assert np.isneginf(got[[0, 1, 4, 5]]).all()
    assert np.isfinite(got[[2, 3]]).all()


def test_bias_moves_the_choice_but_not_the_confidence() -> None:
    logits = np.array([[3, 2, 1, 0]], np.float32)
    bias = np.array([0, 0, 0, 1], np.float32)
    rule = RoutingRule("sigmoid", bias)
    assert select(rule, logits, 2).tolist() == [[3, 0]]  # 1.5, 0.953, 0.881, 0.731
    assert confidence(rule, logits).argmax() == 0


@pytest.mark.parametrize("gating", ["softmax", "sigmoid", "softmax_weight", "sqrt_softplus"])
def test_every_gating_keeps_the_order_and_bounds_of_its_logits(gating: Any) -> None:
    logits = np.sort(np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32) * 4)
    rule = RoutingRule(gating)
    for values in (gate(rule, logits), scores(rule, logits), confidence(rule, logits)):
        assert values.dtype == np.float32
        assert (np.diff(values) >= 0).all()
    assert (confidence(rule, logits) >= 0).all() and (confidence(rule, logits) <= 1).all()
    extreme = np.array([[-1e4, 0, 1e4]], np.float32)
    assert np.isfinite(gate(rule, extreme)).all()


def test_gates_by_hand() -> None:
    logits = np.log(np.array([1, 2, 5], np.float32))
    np.testing.assert_allclose(gate(RoutingRule("softmax"), logits), [1 / 8, 1 / 4, 5 / 8], 1e-6)
    np.testing.assert_allclose(gate(RoutingRule("sigmoid"), logits), [1 / 2, 2 / 3, 5 / 6], 1e-6)
    sqrt_softplus = np.sqrt(np.log([2, 3, 6]))
    np.testing.assert_allclose(gate(RoutingRule("sqrt_softplus"), logits), sqrt_softplus, 1e-6)


@pytest.mark.parametrize("n", [1, 3, 8, 31, 32])
def test_top_is_a_sort_cut_short(n: int) -> None:
    scores = np.random.default_rng(n).standard_normal((6, 32)).astype(np.float32)
    assert (top(scores, n) == np.argsort(-scores, axis=-1)[:, :n]).all()
    assert (top(scores[0], n) == top(scores, n)[0]).all()
