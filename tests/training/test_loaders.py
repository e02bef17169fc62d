"""Which pairs a data rank gets from its loaders."""

from types import SimpleNamespace

import pytest

from orpo_dist.distributed.environment import Environment, Sharding
from orpo_dist.packing.lengths import pair_lengths
from orpo_dist.packing.sampler import FILLER
from orpo_dist.training.loaders import PairLoaders
from tests.trainer_runs import config, pairs

ROWS = pairs(22, 100)


class IndexCollator:
    def __call__(self, rows):
        return [row["index"] for row in rows]


def loaders(folder, data_rank=0, data_ranks=1, vision_cost=0.0, **more):
    text = SimpleNamespace(hidden_size=8)
    model_config = SimpleNamespace(get_text_config=lambda: text, image_token_id=5)
    layout = SimpleNamespace(vision_cost_per_token=vision_cost, collator=IndexCollator(), model_config=model_config)
    environment = Environment(data_rank, data_ranks, data_rank, data_rank, data_ranks, Sharding.REPLICATED)
    return PairLoaders(config(folder, **more), environment, layout, filler_id=0)


def test_every_pair_once_per_epoch_over_all_data_ranks(tmp_path):
    lengths = pair_lengths(ROWS)
    seen = [
        list(loaders(tmp_path, rank, 3).training(ROWS, lengths, global_batch=8, micro_batch=2)) for rank in range(3)
    ]
    assert len({len(batches) for batches in seen}) == 1  # as many micro-batches on each rank
    indices = [index for batches in seen for batch in batches for index in batch if index != FILLER]
    assert sorted(indices) == list(range(22))


def test_the_order_follows_data_seed_and_else_seed(tmp_path):
    def order(**more):
        return list(loaders(tmp_path, **more).training(ROWS, pair_lengths(ROWS), global_batch=4, micro_batch=4))

    assert order(seed=1) == order(seed=2, data_seed=1) != order(seed=2)


@pytest.mark.parametrize("data_ranks", [1, 2])
def test_an_evaluation_sees_every_pair_once(tmp_path, data_ranks):
    batches = [
        batch
        for rank in range(data_ranks)
        for batch in loaders(tmp_path, rank, data_ranks, per_device_eval_batch_size=3).evaluation(ROWS)
    ]
    assert sorted(index for batch in batches for index in batch if index != FILLER) == list(range(22))
    assert max(map(len, batches)) == 3


def test_image_tokens_weigh_in_the_costs(tmp_path):
    """Rows of equal length: the one whose prompt is all image tokens (id 5) comes first in an evaluation."""
    rows = [{"prompt_ids": [token] * 4, "chosen_ids": [9], "rejected_ids": [9]} for token in (7, 7, 5, 7)]
    (batch,) = loaders(tmp_path, vision_cost=2.0, per_device_eval_batch_size=4).evaluation(rows)
    assert batch == [2, 0, 1, 3]
