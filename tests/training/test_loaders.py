"""Which pairs a data rank gets, in which micro-batches, by hand."""

from types import SimpleNamespace

import pytest
import torch

from orpo_dist.distributed.environment import Environment, Sharding
from orpo_dist.packing.lengths import PairLengths, pair_lengths
from orpo_dist.packing.sampler import FILLER
from orpo_dist.training.loaders import PairLoaders

ROWS = [{"prompt_ids": [5] * n, "chosen_ids": [6], "rejected_ids": [7]} for n in (1, 2, 3, 4, 5)]
CONFIG = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=8), image_token_id=5)


@pytest.fixture
def loaders():
    """`loaders(data_rank, **args)` of two data ranks on four world ranks; a batch is the indices of its pairs."""

    def make(data_rank=0, vision_cost=None, **changed):
        args = SimpleNamespace(
            **{"seed": 3, "data_seed": None, "dataloader_drop_last": False, "eval_batch_size": 2}
            | {"dataloader_num_workers": 0, "dataloader_pin_memory": False, "device": torch.device("cpu")}
            | {"dataloader_persistent_workers": False, "dataloader_prefetch_factor": None}
            | changed
        )
        environment = Environment(2 * data_rank, 4, 2 * data_rank, data_rank, 2, Sharding.REPLICATED)
        layout = SimpleNamespace(
            collator=lambda rows: [row["index"] for row in rows], vision_cost_per_token=vision_cost
        )
        return PairLoaders(args, environment, layout, CONFIG, filler_id=9)

    return make


def training(loaders, **options):
    return loaders.training(ROWS, pair_lengths(ROWS), **options)


def test_a_global_batch_is_cut_over_the_data_ranks(loaders):
    first, second = (list(training(loaders(rank), global_batch=4, micro_batch=1)) for rank in (0, 1))
    assert len(first) == len(second) == 3  # two micro-steps of 4 pairs, then one of a single pair
    seen = [batch for rank in (first, second) for batch in rank]
    assert sorted(index for batch in seen for index in batch if index != FILLER) == [0, 1, 2, 3, 4]
    assert sum(batch == [FILLER] for batch in seen) == 1  # what the other rank does meanwhile


def test_larger_micro_batches_are_fewer(loaders):
    assert len(training(loaders(), global_batch=4, micro_batch=2)) == 2
    assert len(training(loaders(dataloader_drop_last=True), global_batch=4, micro_batch=2)) == 1


def test_the_order_has_a_seed_of_its_own(loaders):
    order = list(training(loaders(), global_batch=2, micro_batch=1))
    assert order == list(training(loaders(data_seed=3, seed=99), global_batch=2, micro_batch=1))
    assert order != list(training(loaders(data_seed=4), global_batch=2, micro_batch=1))


def test_evaluation_sees_every_pair_once(loaders):
    batches = [batch for rank in (0, 1) for batch in loaders(rank).evaluation(ROWS)]
    assert sorted(index for batch in batches for index in batch if index != FILLER) == [0, 1, 2, 3, 4]
    assert max(len(batch) for batch in batches) <= 2


def test_an_image_token_costs_its_share_of_the_tower(loaders):
    lengths = pair_lengths(ROWS)
    plain, with_tower = (loaders(vision_cost=cost)._costs(ROWS, lengths) for cost in (None, 2.0))
    # Every prompt token of these rows is the image token.
    assert [b - a for a, b in zip(plain, with_tower, strict=True)] == pytest.approx([2, 4, 6, 8, 10])
    assert plain[0] == pytest.approx(3 + PairLengths(1, 1, 1).query_keys / 48)


def test_a_pass_does_not_move_the_generator_of_dropout(loaders):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(training(loaders(), global_batch=4, micro_batch=1))
    assert torch.equal(torch.rand(3), expected)
