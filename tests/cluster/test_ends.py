"""What a training process tells the one that started it about its end."""

import pytest
import torch

from orpo_dist import cli
from orpo_dist.cluster.ends import VARIABLE, End, read_ends
from orpo_dist.errors import RankError, RunStopped


def out_of_memory_of_this_rank(argv):
    try:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    except torch.OutOfMemoryError as error:
        raise RankError("Out of memory in step 3.") from error


def stopped(argv):
    raise RunStopped("SIGTERM", 3, "run/checkpoint-3")


def loading_a_model_runs_out_of_memory(argv):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def bad_input(argv):
    raise RankError("pairs.jsonl is empty.")


@pytest.mark.parametrize(
    ("main", "code", "end"),
    [
        (out_of_memory_of_this_rank, 2, End(out_of_memory=True)),
        (loading_a_model_runs_out_of_memory, 1, End(out_of_memory=True)),
        (stopped, 75, End(False, "SIGTERM", 3, "run/checkpoint-3")),
        (bad_input, 2, End()),
    ],
)
def test_a_process_writes_how_it_ended(main, code, end, tmp_path, monkeypatch):
    monkeypatch.setattr("orpo_dist.train.main", main)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert cli.main(["train", "recipe.yaml"]) == code
    assert read_ends(tmp_path) == [end]


def test_an_end_that_cannot_be_written_hides_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr("orpo_dist.train.main", bad_input)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone"))
    assert cli.main(["train", "recipe.yaml"]) == 2
