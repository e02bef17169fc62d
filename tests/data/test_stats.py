import pytest
from datasets import Dataset

from orpo_dist.data.stats import Lengths, describe, histogram, pair_stats


def pairs(*lengths: tuple[int, int, int]) -> Dataset:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_list([{name: [7] * n for name, n in zip(names, row, strict=True)} for row in lengths])


def test_by_hand():
    stats = pair_stats(pairs((10, 4, 6), (2, 1, 3)), batch_size=2)
    assert stats.prefix_sharing_gain == pytest.approx((2 * 12 + 5 + 9) / (12 + 5 + 9))
    assert stats.padding_waste == pytest.approx(1 - (2 * 12 + 5 + 9) / (4 * 16))
    assert stats.padded_over_packed == pytest.approx(4 * 16 / (12 + 5 + 9))
    assert (stats.sequence.mean, stats.sequence.longest) == (10.5, 16)
    alone = pair_stats(pairs((10, 4, 6), (2, 1, 3)), batch_size=1)
    assert alone.padding_waste == pytest.approx(1 - (2 * 12 + 5 + 9) / (2 * 16 + 2 * 5))


def test_percentiles_are_lengths_that_occur():
    assert Lengths.of(range(1, 101)).percentiles == (5, 25, 50, 75, 95, 99)
    assert Lengths.of([3]) == Lengths(3.0, (3,) * 6, 3)


def test_histogram_counts_every_pair():
    lines = histogram([0, 0, 0, 5, 23])
    assert len(lines) == 12
    assert lines[0].endswith("#" * 50 + " 3") and lines[2].endswith("#" * 17 + " 1") and lines[-1].startswith("22 - 23")
    assert sum(int(line.rsplit(" ", 1)[1]) for line in lines) == 5
    assert len(histogram([7])) == 8


def test_describe():
    text = describe(pair_stats(pairs((1000, 40, 60), (2, 1, 3)), batch_size=4))
    assert "2 pairs" in text and "1 over 512, 1 over 1024" in text
    assert "Padding would waste 50.3% of the tokens of padded batches of 4 pairs." in text
    assert "Prefix sharing computes 1.91 times fewer tokens" in text
