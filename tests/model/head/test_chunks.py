"""How the scored rows are cut into chunks, by hand."""

import random

import pytest

from orpo_dist.model.head.chunks import CHOSEN, REJECTED, Chunk, PairRows, PairStarts, pair_starts, plan_chunks

PAIRS = [PairRows(2, 3, 1), PairRows(0, 2, 2)]  # rows 0-5 and 6-9


def test_where_the_parts_begin():
    assert pair_starts(PAIRS) == [PairStarts(0, 2, 5, 6), PairStarts(6, 6, 8, 10)]


def test_pairs_that_fit_share_a_chunk():
    assert plan_chunks(PAIRS, 10) == [Chunk(0, 10, range(0, 2))]
    assert plan_chunks(PAIRS, 6) == [Chunk(0, 6, range(0, 1)), Chunk(6, 10, range(1, 2))]


def test_a_prompt_is_cut_before_its_completions():
    # 5 rows: the prompt's two alone, then the completions of both pairs, which do not fit together
    assert plan_chunks(PAIRS, 5) == [Chunk(0, 2, range(0, 0)), Chunk(2, 6, range(0, 1)), Chunk(6, 10, range(1, 2))]


def test_the_next_prompt_fills_a_chunk():
    pairs = [PairRows(0, 1, 1), PairRows(5, 1, 1)]
    assert plan_chunks(pairs, 4) == [Chunk(0, 4, range(0, 1)), Chunk(4, 7, range(1, 1)), Chunk(7, 9, range(1, 2))]


def test_completions_that_do_not_fit_are_cut_one_after_the_other():
    assert plan_chunks([PairRows(0, 5, 3)], 3) == [
        Chunk(0, 3, range(0), CHOSEN),
        Chunk(3, 5, range(0), CHOSEN),
        Chunk(5, 8, range(0, 1)),
    ]
    assert plan_chunks([PairRows(0, 2, 5)], 3)[1] == Chunk(2, 5, range(0), REJECTED)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_every_row_once_and_every_pair_closed_once(size):
    rng = random.Random(size)
    pairs = [PairRows(rng.randint(0, 9), rng.randint(1, 9), rng.randint(1, 9)) for _ in range(30)]
    chunks = plan_chunks(pairs, size)
    rows = [row for chunk in chunks for row in range(chunk.start, chunk.stop)]
    assert rows == list(range(pair_starts(pairs)[-1].end))
    assert all(0 < chunk.stop - chunk.start <= size for chunk in chunks)
    closed = [pair for chunk in chunks for pair in chunk.closes]
    assert closed == list(range(30))
