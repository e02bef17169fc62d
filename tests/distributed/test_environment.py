"""Which rank, how many, what is sharded: from a launcher's variables, the arguments and the accelerator."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from orpo_dist.distributed.environment import (
    Environment,
    LaunchedRank,
    Sharding,
    asked_fsdp_version,
    check_sequence_parallel,
    check_world_size,
    fsdp_hidden,
    is_launched_with_others,
    launched_rank,
    loading_sharding,
    sharding_of,
    why_not_sharded,
)
from orpo_dist.errors import UserError


def launcher(monkeypatch, **variables):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_without_a_launcher_there_is_no_launched_rank(monkeypatch):
    launcher(monkeypatch)
    assert launched_rank() is None and not is_launched_with_others()


def test_what_a_launcher_says(monkeypatch):
    launcher(monkeypatch, RANK="5", WORLD_SIZE="8", LOCAL_RANK="1")
    assert launched_rank() == LaunchedRank(5, 8, 1) and is_launched_with_others()
    assert not launched_rank().is_first and not launched_rank().speaks_for_node
    launcher(monkeypatch, RANK="4", WORLD_SIZE="8", LOCAL_RANK="0")
    assert launched_rank().speaks_for_node and not launched_rank().is_first
    launcher(monkeypatch, RANK="0", WORLD_SIZE="1")
    assert launched_rank() == LaunchedRank(0, 1, None) and launched_rank().is_first and launched_rank().speaks_for_node
    assert not is_launched_with_others()


def test_asking_for_the_launched_rank_needs_no_torch():
    code = "import sys; from orpo_dist.distributed.environment import launched_rank; launched_rank(); "
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_world_rank_is_a_data_rank():
    args = SimpleNamespace(
        process_index=3,
        world_size=4,
        local_process_index=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=5,
        sequence_parallel_size=1,
    )
    environment = Environment.of(args, Sharding.ZERO2)
    assert environment.speaks_for_pairs
    assert (environment.data_rank, environment.data_ranks) == (environment.world_rank, environment.world_size) == (3, 4)
    assert environment.global_batch(args) == 2 * 5 * 4
    assert not environment.is_first and not environment.is_first_on_node


@pytest.mark.parametrize(("rank", "data_rank", "place"), [(0, 0, 0), (1, 0, 1), (2, 0, 2), (3, 1, 0), (5, 1, 2)])
def test_neighbours_that_share_rows_are_one_data_rank(rank, data_rank, place):
    args = SimpleNamespace(
        process_index=rank,
        world_size=6,
        local_process_index=rank,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=5,
        sequence_parallel_size=3,
    )
    environment = Environment.of(args, Sharding.FSDP)
    assert (environment.data_rank, environment.data_ranks, environment.sequence_place) == (data_rank, 2, place)
    assert environment.global_batch(args) == 2 * 5 * 2
    assert environment.speaks_for_pairs == (place == 0)


@pytest.mark.parametrize(("size", "world_size"), [(3, 4), (0, 4), (-1, 1), (2, 1)])
def test_a_group_size_that_does_not_divide(size, world_size):
    with pytest.raises(UserError, match=f"sequence_parallel_size={size} does not divide"):
        check_sequence_parallel(size, world_size)


@pytest.mark.parametrize(
    ("sharding", "zero", "partitions"),
    [
        (Sharding.REPLICATED, False, False),
        (Sharding.ZERO0, True, False),
        (Sharding.ZERO1, True, False),
        (Sharding.ZERO2, True, False),
        (Sharding.ZERO3, True, True),
        (Sharding.FSDP, False, True),
    ],
)
def test_what_a_sharding_means(sharding, zero, partitions):
    assert (sharding.is_zero, sharding.partitions_weights) == (zero, partitions)


def test_the_sharding_that_models_are_loaded_for(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert loading_sharding() is Sharding.REPLICATED
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert loading_sharding() is Sharding.FSDP
    config = {"zero_optimization": {"stage": 2}}
    monkeypatch.setattr("transformers.integrations.deepspeed.deepspeed_config", lambda: config)
    assert loading_sharding() is Sharding.ZERO2


def test_fsdp_that_is_asked_for_and_not_in_force_is_told(monkeypatch):
    args = SimpleNamespace(fsdp=None)
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    ddp = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU)
    assert asked_fsdp_version(args) is None and why_not_sharded(args, ddp) is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert asked_fsdp_version(args) == 1  # accelerate's own default
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert asked_fsdp_version(args) == 2
    assert "accelerate runs MULTI_CPU here" in str(why_not_sharded(args, ddp))
    assert why_not_sharded(args, SimpleNamespace(distributed_type=DistributedType.FSDP)) is None
    args = SimpleNamespace(fsdp=True, fsdp_plugin_args={"fsdp_version": 1})
    assert asked_fsdp_version(args) == 1


def test_fsdp_can_be_hidden(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with fsdp_hidden():
        assert loading_sharding() is Sharding.REPLICATED and "ACCELERATE_USE_FSDP" not in os.environ
    assert loading_sharding() is Sharding.FSDP


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (DistributedType.NO, Sharding.REPLICATED),
        (DistributedType.MULTI_GPU, Sharding.REPLICATED),
        (DistributedType.FSDP, Sharding.FSDP),
        (DistributedType.DEEPSPEED, Sharding.ZERO1),
    ],
)
def test_the_sharding_of_an_accelerator(kind, expected):
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=1))
    assert sharding_of(SimpleNamespace(distributed_type=kind, state=state)) is expected


def test_processes_that_would_train_apart_are_refused(monkeypatch):
    launcher(monkeypatch)
    check_world_size(1)
    launcher(monkeypatch, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    check_world_size(2)
    with pytest.raises(UserError, match=r"started 2 processes .* among 1"):
        check_world_size(1)
