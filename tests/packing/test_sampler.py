import heapq
import json
import random
from pathlib import Path

import pytest

from orpo_dist.packing.lengths import PairLengths, pair_costs
from orpo_dist.packing.sampler import FILLER, EvaluationSampler, GlobalBatchSampler, balanced_bins


def sampler(costs, rank=0, **overrides):
    options = dict(global_batch=8, accumulation=2, data_ranks=2, data_rank=rank, seed=3)
    return GlobalBatchSampler(costs, **{**options, **overrides})


def costs_of(n, seed=0):
    rng = random.Random(seed)
    return [rng.lognormvariate(5, 1) for _ in range(n)]


@pytest.mark.parametrize("n", [1, 7, 8, 9, 31, 32])
@pytest.mark.parametrize("world_size, accumulation", [(1, 8), (2, 4), (4, 2), (8, 1), (3, 2)])
def test_every_pair_exactly_once_and_as_many_micro_steps_on_every_rank(n, world_size, accumulation):
    costs = costs_of(n)
    ranks = [
        sampler(costs, rank, data_ranks=world_size, accumulation=accumulation, global_batch=world_size * accumulation)
        for rank in range(world_size)
    ]
    batches = [list(rank) for rank in ranks]
    assert {len(b) for b in batches} == {len(ranks[0])}
    seen = [i for rank in batches for micro_step in rank for i in micro_step if i != FILLER]
    assert sorted(seen) == list(range(n))


def test_the_pairs_of_a_step_do_not_depend_on_the_number_of_ranks():
    costs = costs_of(40)
    one = sampler(costs, data_ranks=1, accumulation=1)
    four = [sampler(costs, rank, data_ranks=4, accumulation=2) for rank in range(4)]
    expected = [set(batch) for batch in one]
    iterators = [iter(rank) for rank in four]
    for step in expected:
        assert {i for it in iterators for _ in range(2) for i in next(it) if i != FILLER} == step


def test_the_order_is_a_function_of_seed_and_epoch():
    costs = costs_of(32)
    first, again, other = sampler(costs), sampler(costs), sampler(costs, seed=4)
    assert list(first) == list(again) != list(other)
    first.set_epoch(1)
    assert list(first) != list(again)
    again.set_epoch(1)
    assert list(first) == list(again)


def test_the_last_smaller_batch_is_kept_unless_dropped():
    costs = costs_of(19)
    kept, dropped = sampler(costs), sampler(costs, drop_last=True)
    assert [len(b) for b in kept.global_batches()] == [8, 8, 3]
    assert [len(b) for b in dropped.global_batches()] == [8, 8]
    assert len(list(kept)) == len(kept) == 6 and len(list(dropped)) == len(dropped) == 4


def test_a_batch_with_fewer_pairs_than_ranks_gives_fillers():
    ranks = [list(sampler(costs_of(1), rank, data_ranks=3, accumulation=2, global_batch=12)) for rank in range(3)]
    assert sorted(ranks) == [[[FILLER]], [[FILLER]], [[0]]]


def test_bins_are_near_equal_and_dearest_first():
    costs = costs_of(64, seed=1)
    bins = balanced_bins(range(64), costs, 8)
    loads = [sum(costs[i] for i in b) for b in bins]
    assert loads == sorted(loads, reverse=True)
    assert loads[-1] / loads[0] > 0.9


def test_bins_of_similar_cost_share_a_micro_step():
    costs = costs_of(64, seed=2)
    plan = sampler(costs, data_ranks=8, accumulation=8, global_batch=64).plan(range(64))

    def utilisation(micro_steps):
        loads = [[sum(costs[i] for i in bin_of_pairs) for bin_of_pairs in step] for step in micro_steps]
        return sum(sum(step) / 8 for step in loads) / sum(max(step) for step in loads)

    bins = [b for step in plan for b in step]
    random.Random(0).shuffle(bins)
    at_random = utilisation([bins[8 * m : 8 * m + 8] for m in range(8)])
    assert utilisation(plan) > 1.4 * at_random


REAL_LENGTHS = json.loads((Path(__file__).parents[2] / "benchmarks/lengths/real.json").read_text())


@pytest.mark.parametrize(
    "world_size, per_device, accumulation, least", [(8, 4, 1, 0.95), (64, 4, 1, 0.90), (8, 1, 8, 0.85)]
)
def test_balance_on_real_lengths(world_size, per_device, accumulation, least):
    """Sum of mean / sum of max of the ranks' cost over the micro-steps, which all ranks wait for."""
    costs = pair_costs([PairLengths(*row) for row in REAL_LENGTHS], hidden_size=576) * 10
    global_batch = world_size * per_device * accumulation
    plans = sampler(costs, data_ranks=world_size, accumulation=accumulation, global_batch=global_batch, drop_last=True)
    steps = [step for batch in plans.global_batches() for step in plans.plan(batch)]
    loads = [[sum(costs[i] for i in bin_of_pairs) for bin_of_pairs in step] for step in steps]
    assert len(steps) >= 9 * accumulation
    assert sum(sum(step) / world_size for step in loads) / sum(max(step) for step in loads) >= least


def test_planning_a_global_batch_visits_each_pair_once(monkeypatch):
    """4096 pairs for 64 ranks take a few milliseconds (benchmarks/overhead.py). Without a clock: the heap of bins is
    asked once per pair, so the plan is n log n and not quadratic."""
    asked = 0
    heappop = heapq.heappop

    def counted(heap):
        nonlocal asked
        asked += 1
        return heappop(heap)

    monkeypatch.setattr(heapq, "heappop", counted)
    plan = sampler(costs_of(4096), data_ranks=64, accumulation=16, global_batch=4096).plan(range(4096))
    assert len(plan) == 16 and all(len(step) == 64 for step in plan)
    assert asked == 4096


@pytest.mark.parametrize("n, world_size, batch_size", [(1, 2, 4), (10, 2, 3), (12, 3, 4), (7, 1, 8)])
def test_evaluation_sees_every_pair_once_in_as_many_batches_on_every_rank(n, world_size, batch_size):
    ranks = [
        list(EvaluationSampler(costs_of(n), batch_size=batch_size, data_ranks=world_size, data_rank=rank))
        for rank in range(world_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(i for rank in ranks for b in rank for i in b if i != FILLER) == list(range(n))
    assert all(len(b) <= batch_size for rank in ranks for b in rank)
