"""The planner concludes; nothing here is opened or timed. What a pass proves:

1. The model of a step is the measured step at what was measured, and never answers a better machine
   with a longer step: more memory, a faster disk, a faster processor.
2. Whatever was measured, what is chosen is never predicted slower than serving one by one in turns,
   for any number of sequences, and fits the budget to the byte.
3. The machine of the issue gets the schedules its table asks for: small groups in turns, large
   groups whole with memory for their cells.
4. The paper's inequalities hold by hand.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_gguf.runtime.budget import min_slots
from moe_gguf.runtime.engine import planner
from moe_gguf.runtime.engine.costs import Costs
from moe_gguf.runtime.engine.curves import Curves, Shape
from moe_gguf.runtime.engine.measurements import Measurements, Reuse, Size
from moe_gguf.runtime.engine.planner import Facts, Pipeline, Workload, plan
from moe_gguf.runtime.engine.room import Room
from moe_gguf.runtime.errors import UserError
from moe_gguf.runtime.sizes import GB, MB

GROUPS = (1, 2, 4, 8, 16, 32, 64, 128)
SHARES = (0.1, 0.2, 0.4, 0.6, 0.8)
N_LAYERS, N_EXPERTS, BLOB = 16, 64, 3_540_000
EXPERT_BYTES = N_LAYERS * BLOB
DISK = 2.4 * GB


def issue_machine() -> Measurements:
    """The table of the issue: two cores, a disk of 2.4 GB/s, 40 % of the experts resident.

    Computing is that of stock with everything resident; what one sequence hits is what was
    published, and large unions are served as a scan, from which only the fixed part is spared.
    """
    tps = (35.5, 36.0, 37.0, 38.9, 42.8, 48.2, 58.6, 60.8)
    distinct = (8.0, 18.0, 28.0, 39.0, 51.0, 59.0, 62.0, 63.0)
    alone = (0.35, 0.5, 0.76, 0.87, 0.95)
    reads = [tuple(8 * (1 - hits) for hits in alone)]
    reads += [tuple(max(0.0, d - 0.6 * N_EXPERTS * s) for s in SHARES) for d in distinct[1:]]
    sizes = []
    for group, speed, row in zip(GROUPS, tps, reads, strict=True):
        compute, n_bytes = group / speed, row[2] * EXPERT_BYTES
        read = n_bytes / (0.95 * DISK)
        stall = max(0.0, read - 0.8 * compute)
        sizes.append(
            Size(group, 0.4 * compute, 0.6 * compute, stall, read, n_bytes, distinct[len(sizes)])
        )
    prompts = tuple(
        Size(n, 0.4 * n / 46, 0.6 * n / 46, 0.0, 1.0, 38 * EXPERT_BYTES, 62) for n in (64, 128)
    )
    switch = tuple(2 * row for row in reads[0])
    reuse = Reuse(GROUPS, SHARES, distinct, tuple(reads), switch)
    return Measurements(tuple(sizes), prompts, reuse, DISK, 0.4, 7 * GB, 0.0, True, 8.0)


def facts(total: float, **more: Any) -> Facts:
    return Facts(
        Shape(N_LAYERS, N_EXPERTS, EXPERT_BYTES, 131072),
        Room(380 * MB, 131072, 0, 1e5, 2.0, 200_000),
        int(total),
        BLOB,
        N_LAYERS * N_EXPERTS,
        1024,
        DISK,
    )._replace(**more)


def costs(share: float = 0.4, **more: Any) -> Costs:
    made = Costs(Curves(issue_machine(), facts(GB).shape), share, DISK)
    return replace(made, **more)


# --- a step -------------------------------------------------------------------------------------


def test_a_measured_step_is_predicted_as_it_was_measured() -> None:
    here = costs()
    for size in here.curves.measured.decode:
        step = here.decode(size.rows)
        assert step.compute_s == pytest.approx(size.compute_s)
        assert step.read_bytes == pytest.approx(size.read_bytes)
        assert step.seconds == pytest.approx(size.seconds, rel=0.02)


def test_a_larger_step_than_was_measured_goes_on_as_the_last_ones_did() -> None:
    here = costs()
    half, most = (here.decode(n).compute_s for n in (64, 128))
    assert here.decode(256).compute_s == pytest.approx(most + 2 * (most - half))
    assert 63 < here.distinct(256) < 64
    assert here.reads(256) <= here.distinct(256)


def test_all_slots_read_nothing_and_none_read_everything() -> None:
    assert costs(1.0).decode(64).read_bytes == 0
    assert costs(1.0).decode(64).stall_s == 0
    for rows in (1, 3, 64):
        assert costs(0.0).reads(rows) == pytest.approx(costs().distinct(rows))


def test_a_limited_disk_reads_at_its_limit_and_a_faster_one_in_proportion() -> None:
    step = costs().decode(8)
    slow, fast = (
        costs(**more).decode(8) for more in ({"disk_bytes_per_s": DISK / 4}, {"disk_faster": 2.0})
    )
    assert slow.read_s == pytest.approx(step.read_bytes / (DISK / 4))
    assert fast.read_s == pytest.approx(step.read_s / 2)
    # What the page cache gives is not the disk's.
    buffered = costs(direct=False)
    assert (
        replace(buffered, disk_bytes_per_s=DISK / 4).decode(8).read_s == buffered.decode(8).read_s
    )


def test_a_longer_context_costs_what_reading_its_cells_from_memory_costs() -> None:
    here = costs()
    more = here.decode(4, 1000).compute_s - here.decode(4).compute_s
    assert more == pytest.approx(4 * 1000 * 131072 / (7 * GB))


@st.composite
def machines(draw: st.DrawFn) -> Measurements:
    """Measurements as noisy as any machine gives them."""
    n = draw(st.integers(1, len(GROUPS)))

    def some(low: float, high: float) -> float:
        return draw(st.floats(low, high))

    def size(rows: int) -> Size:
        compute = some(1e-4, 1.0) * rows
        n_bytes = draw(st.just(0.0) | st.floats(0, 1e9))
        return Size(
            rows, compute, some(1e-4, 1), some(0, 2), some(0, 2), n_bytes, some(0, N_EXPERTS)
        )

    distinct = tuple(sorted(some(1, N_EXPERTS) for _ in GROUPS[:n]))
    reads = tuple(tuple(some(0, d) for _ in SHARES) for d in distinct)
    switch = tuple(some(0, 8) for _ in SHARES)
    return Measurements(
        tuple(size(g) for g in GROUPS[: draw(st.integers(1, 8))]),
        tuple(size(g) for g in (32, 64)),
        Reuse(GROUPS[:n], SHARES, distinct, reads, switch),
        some(1e8, 1e10),
        some(0, 1),
        some(1e9, 1e11),
        some(0, 1e-9),
        True,
        1.0,
    )


@settings(max_examples=60, deadline=None)
@given(machines(), st.integers(1, 256), st.floats(0, 1), st.floats(0, 1), st.floats(1, 4))
def test_a_better_machine_is_never_predicted_slower(
    measured: Measurements, rows: int, share: float, more: float, factor: float
) -> None:
    here = Costs(Curves(measured, facts(GB).shape), share, 1e9)
    better = [
        replace(here, share=share + (1 - share) * more),
        replace(here, disk_bytes_per_s=1e9 * factor),
        replace(here, faster=factor),
    ]
    for other in better:
        for kind in ("decode", "prompt"):
            step, improved = (getattr(c, kind)(rows) for c in (here, other))
            assert improved.seconds <= step.seconds * (1 + 1e-9)
            assert 0 <= improved.stall_s <= improved.read_s + 1e-12


# --- a plan -------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    machines(),
    st.floats(0.5, 6),
    st.sampled_from(planner.GOALS),
    st.sampled_from([None, 1, 3, 16, 64]),
)
def test_a_plan_is_never_slower_than_turns_and_fits(
    measured: Measurements, gigabytes: float, goal: planner.Goal, parallel: int | None
) -> None:
    given_facts = facts(gigabytes * GB)
    workload = Workload(64, 64)
    try:
        made = plan(measured, given_facts, goal, workload, parallel)
    except UserError:
        needed = given_facts.room.bytes(parallel or 1, 1024, 32, 64)
        assert needed + min_slots(given_facts.n_all) * BLOB > 0.3 * GB
        return
    rows = made.schedule.chunk + (made.n_seq_max if made.n_seq_max > 1 else 0)
    taken = given_facts.room.bytes(made.n_seq_max, made.cells, rows, max(64, made.n_seq_max))
    assert taken + made.n_slots * BLOB <= given_facts.total_bytes
    here = Costs(Curves(measured, given_facts.shape), made.n_slots / given_facts.n_all, DISK)
    for p in made.curve:
        alone = here.decode(1, 96)
        turns = 1 / (alone.seconds + (here.switch_s(1) / 4 if p.sequences > 1 else 0.0))
        assert p.decode_tps >= turns * (1 - 1e-9)
        schedule = made.at(p.sequences)
        assert (schedule.quantum > 0) == p.serial
        assert schedule.group >= p.group
    assert made.curve[-1].sequences == made.n_seq_max == (parallel or made.n_seq_max)


@settings(max_examples=15, deadline=None)
@given(machines(), st.floats(0.8, 4), st.floats(0, 2), st.floats(1, 4))
def test_more_memory_or_disk_never_makes_a_job_longer(
    measured: Measurements, gigabytes: float, more: float, factor: float
) -> None:
    def worth(**changes: Any) -> float:
        there = facts(gigabytes * GB)._replace(**changes)
        chosen = planner._best(
            Curves(measured, there.shape), there, "throughput", Workload(64, 64, most=32), None
        )
        return chosen.worth

    tolerated = 1 - max(planner._TIE.values()) - 1e-9  # as good as the best is good enough
    assert worth(total_bytes=int((gigabytes + more) * GB)) >= worth() * tolerated
    assert worth(disk_bytes_per_s=DISK * factor) >= worth() * tolerated


def test_the_machine_of_the_issue_serves_few_in_turns_and_many_together() -> None:
    measured = issue_machine()
    few = plan(measured, facts(1.6 * GB), "latency", Workload(64, 64), 8)
    assert few.predicted.serial
    assert few.schedule.quantum > 0
    many = plan(measured, facts(2.4 * GB), "throughput", Workload(64, 64))
    assert many.n_seq_max >= 32
    assert many.schedule == replace(many.schedule, group=many.n_seq_max, quantum=0)
    # The memory went to cells: what one sequence alone would hold has room for more slots.
    alone = plan(measured, facts(2.4 * GB), "throughput", Workload(64, 64), 1)
    assert many.cells > alone.cells
    assert many.n_slots < alone.n_slots
    assert many.predicted.decode_tps > 1.5 * alone.predicted.decode_tps
    assert many.at(4).quantum > 0 or many.at(4).group == many.n_seq_max


def test_what_binds_is_what_more_of_would_help_most() -> None:
    measured = issue_machine()
    slow = facts(1.0 * GB, disk_bytes_per_s=0.2 * GB)
    assert plan(measured, slow, "latency", Workload(64, 64), 1).binds in ("disk", "memory")
    roomy = facts(6 * GB)
    assert plan(measured, roomy, "throughput", Workload(64, 64), 16).binds == "compute"


def test_a_lossy_cache_is_offered_and_never_chosen() -> None:
    measured = issue_machine()
    tight = facts(0.9 * GB, n_ctx=1024)
    made = plan(measured, tight, "throughput", Workload(256, 256))
    assert made.kv_offer_tps is None or made.kv_offer_tps > made.predicted.decode_tps
    smaller = tight._replace(room=tight.room.with_cells(planner.KV_Q8_0))
    assert plan(measured, smaller, "throughput", Workload(256, 256)).n_seq_max >= made.n_seq_max


def test_a_batch_of_few_lines_gets_no_more_sequences_than_lines() -> None:
    made = plan(issue_machine(), facts(2.4 * GB), "throughput", Workload(64, 64, most=20))
    assert made.n_seq_max <= 20


@pytest.mark.parametrize("n", [64, 72])
def test_a_job_that_fits_is_not_cut_into_a_large_part_and_a_small_one(n: int) -> None:
    """Its rest would decode as slowly as a few sequences do, beside cells that nobody uses."""
    assert plan(issue_machine(), facts(2.4 * GB), "throughput", Workload(16, 24, n)).n_seq_max == n


def test_a_step_stays_below_a_tile_where_that_would_be_paid_for() -> None:
    """One row less, and attention passes over the cells of others."""
    here, job = facts(2.4 * GB), Workload(64, 64, 64)
    assert plan(issue_machine(), here, "throughput", job).schedule.group == 64
    here = here._replace(shape=replace(here.shape, masked_s=2.4e-7, tiled_s=1.4e-6))
    made = plan(issue_machine(), here, "throughput", job)
    assert (made.n_seq_max, made.schedule.group) == (64, 63)
    assert made.schedule.quantum > 0
    assert made.at(63).group >= 63
    costs = Costs(Curves(issue_machine(), here.shape), 0.4, DISK)
    tiled = costs.decode(64, 96).compute_s - costs.decode(64).compute_s
    passed = costs.decode(63, 96, 64).compute_s - costs.decode(63).compute_s
    assert tiled > 3 * passed


def test_prompts_that_are_scored_share_reads_as_far_as_logits_fit() -> None:
    here, measured, cost = facts(2.4 * GB), issue_machine(), 2e-10  # seconds of reading a byte
    slower = [
        size._replace(expert_s=size.expert_s + cost * size.read_bytes) for size in measured.prompt
    ]
    measured = replace(measured, prompt=tuple(slower), read_cost_s=cost)
    job = Workload(512, 1, 64, scored=True)
    free = plan(measured, here, "throughput", job)
    assert free.score_rows == free.schedule.chunk >= 256
    told = plan(measured, here._replace(score_rows=64), "throughput", job)
    assert told.score_rows == told.schedule.chunk == 64
    dear = here._replace(room=here.room._replace(output=4e6))  # 1 GB for 256 rows
    assert plan(measured, dear, "throughput", job).score_rows < free.score_rows
    usual = plan(measured, here, "throughput", Workload(512, 256, 64))
    assert usual.score_rows == 64


def test_too_many_sequences_are_refused_with_what_they_need() -> None:
    with pytest.raises(UserError, match=r"64 sequences of 512 tokens: too much for .* parallel"):
        plan(issue_machine(), facts(1 * GB), "throughput", Workload(256, 256), 64)


# --- the paper's inequalities -------------------------------------------------------------------


def test_the_fewest_hot_experts_whose_computing_hides_the_rest() -> None:
    # 4 resident compute 4 s while 10 missing need 30 s: of these k are there before, and
    # 4 + k >= 3 (10 - k) holds from k = 6.5 on.
    layer = Pipeline(attention_s=25, expert_s=1, read_s=3, resident=4, missing=10)
    assert layer.hot == 7
    behind_attention, one_more, all_of_them = layer.slack_s
    assert behind_attention == 25 - 7 * 3
    assert one_more == 25 + 11 - 8 * 3
    assert all_of_them == 25 + 11 + 3 - 10 * 3
    assert layer.hides
    assert not layer._replace(attention_s=20).hides  # 7 reads do not fit behind it


def test_nothing_missing_hides_everything() -> None:
    layer = Pipeline(attention_s=1, expert_s=1, read_s=0, resident=8, missing=0)
    assert (layer.hot, layer.hides) == (0, True)


def test_a_group_that_hides_its_reads_has_no_bubbles() -> None:
    here = costs(0.4)
    hiding = [n for n in GROUPS if planner.pipeline(here, n).hides]
    assert hiding
    assert all(here.decode(n).stall_s < 0.25 * here.decode(n).seconds for n in hiding)
    assert math.isclose(
        sum(costs(1.0).decode(8)[:1]), 8 / 38.9, rel_tol=1e-6
    )  # with all of them there only computing is left
