"""Work of the first rank that the others wait for, in this process and in two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orpo_dist.distributed import once
from orpo_dist.distributed.once import built_on_first_rank


def test_without_process_group_it_is_the_work_itself():
    assert built_on_first_rank(lambda: Path("/here")) == Path("/here")
    assert once.is_first_rank()


@pytest.fixture(scope="module")
def two_ranks(plain_tokenizer, tmp_path_factory) -> list[dict]:
    """What two torchrun processes saw (prepare_worker.py)."""
    folder = tmp_path_factory.mktemp("ranks")
    plain_tokenizer.save_pretrained(folder / "tokenizer")
    environment = {**os.environ, "ORPO_DIST_CACHE": str(folder / "cache")}
    repository = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.distributed.prepare_worker", str(folder / "tokenizer"), str(folder)]
    result = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("8 pairs kept, 1 dropped (1 empty completion)") == 3  # once per call, by rank 0
    (line,) = (folder / "dropped_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == 8
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_one_rank_tokenises_and_the_other_waits_longer_than_a_collective_may(two_ranks):
    assert [seen["built"] for seen in two_ranks] == [1, 0]
    assert [seen["built_again"] for seen in two_ranks] == [1, 0]
    assert two_ranks[0]["rows"] == two_ranks[1]["rows"] and len(two_ranks[0]["rows"]) == 8
    assert [seen["again"] for seen in two_ranks] == [8, 8]


@pytest.mark.parametrize(
    "case, message",
    [
        ("too many bad", "UserError: train: 1 of 9 rows are bad, more than max_bad_rows=0 allows"),
        ("missing column", "UserError: No column `chosen`. The columns are `text`"),
        ("bad row", "UserError: train, row 8, column `prompt`: no value (missing value)"),
    ],
)
def test_an_error_of_the_first_rank_is_that_of_every_rank(two_ranks, case, message):
    assert two_ranks[0][case] == two_ranks[1][case]
    assert two_ranks[0][case].startswith(message)


def test_a_crash_of_the_first_rank_ends_the_others(two_ranks):
    assert two_ranks[0]["crash"] == "ZeroDivisionError: a bug"
    assert two_ranks[1]["crash"] == (
        "RuntimeError: The rank that works for the others failed: ZeroDivisionError: a bug"
    )


def test_the_first_rank_raises_as_soon_as_the_others_know(two_ranks):
    assert two_ranks[0]["crash seconds"] < once.ERROR_SECONDS


def test_a_node_with_a_cache_of_its_own_builds_its_own(two_ranks):
    for seen in two_ranks:
        assert seen["own cache"] == "ok: 8"
        assert seen["own folders"] == ["pairs"]
