"""Who holds which scored rows of a row that several ranks share."""

import itertools
import random

import pytest
import torch

from orpo_dist.model.head.chunks import PairRows, plan_slice
from orpo_dist.packing.collate import PackedCollator
from orpo_dist.packing.split import SequencePlace


def layouts(lengths, size, scope="sequence", sharing=True):
    rows = [
        {"prompt_ids": [5] * p, "chosen_ids": [6] * c, "rejected_ids": [7] * r, "weight": 1.0, "index": i}
        for i, (p, c, r) in enumerate(lengths)
    ]
    return [PackedCollator(sharing, scope, SequencePlace(size, place))(rows)["orpo_layout"] for place in range(size)]


def test_the_example_of_the_docstring():
    splits = [layout.split for layout in layouts([(4, 4, 4)], 5)]
    assert [(split.width, split.start) for split in splits] == [(3, 0), (3, 3), (3, 6), (3, 9), (3, 12)]
    whole = torch.arange(12)[None]
    assert [split.cut(whole, 1)[0].tolist() for split in splits[3:]] == [[9, 10, 11], [0, 0, 0]]
    # Rows 0-2 predict the prompt, 3-6 the chosen completion, 3 again and 8-10 the rejected one.
    assert [split.counts[0] for split in splits] == [(3, 0, 0), (0, 3, 1), (0, 1, 1), (0, 0, 2), (0, 0, 0)]
    assert splits[1].rows.tolist() == [0, 1, 2, 0] and splits[1].places.tolist() == [3, 4, 5, 7]
    assert splits[0].rounds == splits[4].rounds == [[0]]


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("scope", ["sequence", "completion"])
def test_every_scored_row_is_handled_once(size, scope):
    """And no rank has two pairs of one round, whose gradients would share the buffers of open chunks."""
    chance = random.Random(size)
    for _ in range(60):
        lengths = [[chance.randint(1, 30) for _ in range(3)] for _ in range(chance.randint(1, 6))]
        parts = layouts(lengths, size, scope, sharing=chance.random() < 0.7)
        handled = torch.zeros(len(parts[0].rows), dtype=torch.long)
        closed = []
        for layout in parts:
            split, whole = layout.split, [PairRows(*counts) for counts in layout.scored_counts]
            here = [PairRows(*counts) for counts in split.counts]
            opened, plan = plan_slice(here, whole, split.rounds, size=7)
            for pairs in split.rounds:
                assert sum(sum(split.counts[pair][1:]) > 0 for pair in pairs) <= 1
            rows = [place for chunk in [*itertools.chain(*opened), *plan] for place in range(chunk.start, chunk.stop)]
            assert sorted(rows) == list(range(len(split.rows)))
            assert all(chunk.stop - chunk.start <= 7 for chunk in plan)
            handled[split.places] += 1
            closed += [pair for chunk in plan for pair in chunk.closes]
        assert (handled == 1).all()
        spanning = {pair for pairs in parts[0].split.rounds for pair in pairs}
        assert sorted(closed) == [pair for pair in range(len(lengths)) if pair not in spanning]


def test_each_layout_counts_the_whole_row():
    """The trainer leaves out the counts of all places but the first."""
    one, two = layouts([(4, 2, 2), (3, 1, 1)], 2)
    assert one.counts().tolist() == two.counts().tolist() == [3 + 2 + 2 + 1, 2]
    assert one.split_over(None).split is None
