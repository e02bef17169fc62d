"""The demo's support set: large and varied enough, nothing held out is trained on, length tells nothing."""

import json
from collections import Counter

import pytest

from orpo_dist.demo.support_set import (
    FLAWS,
    HELD_OUT_PAIRS,
    TRAINING_PAIRS,
    make_support_set,
    write_support_set,
)


@pytest.fixture(scope="module")
def support_set():
    return make_support_set()


def text_of(messages):
    return messages[-1]["content"]


def test_sizes(support_set):
    assert len(support_set.train) == TRAINING_PAIRS >= 300
    assert len(support_set.test) == HELD_OUT_PAIRS >= 60


def test_same_seed_same_pairs_other_seed_others(support_set):
    assert make_support_set() == support_set
    assert make_support_set(seed=8).train != support_set.train


def test_held_out_combinations_and_names_are_never_trained(support_set):
    def combinations(rows):
        return {(row["product"], row["issue"]) for row in rows}

    assert not combinations(support_set.train) & combinations(support_set.test)
    assert not {row["name"] for row in support_set.train} & {row["name"] for row in support_set.test}
    # but every product and every issue by itself has been seen
    for column in ("product", "issue"):
        assert {row[column] for row in support_set.test} <= {row[column] for row in support_set.train}


def test_pairs_differ_and_prompts_are_unique(support_set):
    rows = support_set.train + support_set.test
    assert all(text_of(row["chosen"]) != text_of(row["rejected"]) for row in rows)
    assert len({json.dumps(row["prompt"]) for row in rows}) == len(rows)


def test_variety(support_set):
    flaws = Counter(row["flaw"] for row in support_set.train)
    assert set(flaws) == set(FLAWS)
    assert max(flaws.values()) <= min(flaws.values()) + 1
    for column in ("product", "issue", "name"):
        assert len({row[column] for row in support_set.train}) >= 12
    assert len({text_of(row["chosen"]) for row in support_set.train}) > 0.95 * TRAINING_PAIRS
    assert {len(row["prompt"]) for row in support_set.train} == {2, 4}  # system and customer; with an earlier turn


def test_chosen_replies_follow_the_policy(support_set):
    for row in support_set.train + support_set.test:
        reply, order = text_of(row["chosen"]), text_of(row["prompt"]).split("HP-")[1][:5]
        assert row["name"] in reply.split(",")[0]
        assert f"HP-{order}" in reply
        assert row["product"] in reply


@pytest.mark.parametrize("flaw, field", [("wrong_order", "order"), ("wrong_name", "name")])
def test_subtle_flaws_are_really_there(support_set, flaw, field):
    for row in support_set.train:
        if row["flaw"] == flaw:
            right = row["name"] if field == "name" else "HP-" + text_of(row["prompt"]).split("HP-")[1][:5]
            assert right in text_of(row["chosen"])
            assert right not in text_of(row["rejected"])


def test_length_does_not_give_the_chosen_reply_away(support_set):
    for rows in (support_set.train, support_set.test):
        chosen = [len(text_of(row["chosen"]).split()) for row in rows]
        rejected = [len(text_of(row["rejected"]).split()) for row in rows]
        assert 0.9 < sum(chosen) / sum(rejected) < 1.1
        longer = sum((c > r) + 0.5 * (c == r) for c, r in zip(chosen, rejected, strict=True)) / len(rows)
        assert 0.4 < longer < 0.6


def test_no_field_is_left_unfilled(support_set):
    for row in support_set.train + support_set.test:
        assert "{" not in "".join(
            message["content"] for key in ("prompt", "chosen", "rejected") for message in row[key]
        )


def test_written_files_hold_the_rows(tmp_path, support_set):
    write_support_set(tmp_path / "data", support_set)
    lines = (tmp_path / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == support_set.test
