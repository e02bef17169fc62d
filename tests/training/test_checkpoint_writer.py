"""One checkpoint from staging to its name, in this process."""

import errno

import pytest
import torch
from transformers import TrainerState

from orpo_dist.distributed.environment import Environment, Sharding
from orpo_dist.errors import SaveError
from orpo_dist.run.checkpoint import checkpoint_folders, verify
from orpo_dist.training.checkpoint_writer import CheckpointWriter
from orpo_dist.training.progress import Progress
from tests.trainer_runs import config

ALONE = Environment(0, 1, 0, 0, 1, Sharding.REPLICATED)
PROGRESS = Progress(torch.ones(3), torch.tensor(2.0), 1.5, 4, [0.5, 0.25])


@pytest.fixture
def writer(tmp_path):
    return CheckpointWriter(config(tmp_path, save_total_limit=2), {"model": {}}, ALONE)


def save(writer, run, step, best=None):
    state = TrainerState(global_step=step, best_global_step=best)

    def write():
        assert writer.staging == run / "_saving"
        (writer.staging / f"checkpoint-{step}" / "weights").write_text(str(step))

    return writer.save(run, state, write, PROGRESS), state


def test_a_checkpoint_is_whole_and_only_then_there(writer, tmp_path):
    published, _ = save(writer, tmp_path, 3)
    assert published == tmp_path / "checkpoint-3" and writer.staging is None
    manifest = verify(published)
    assert (manifest.step, manifest.world_size) == (3, 1) and {"weights", "metrics_0.pt"} <= manifest.files.keys()
    saved = Progress(**torch.load(published / "metrics_0.pt", weights_only=True))
    assert saved.losses == [0.5, 0.25] and saved.total_loss == 1.5 and torch.equal(saved.sums, PROGRESS.sums)


def test_older_ones_go_and_the_best_stays(writer, tmp_path):
    for step in (1, 2, 3, 4):
        _, state = save(writer, tmp_path, step, best=1)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-3",
        "checkpoint-4",
    ]
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-1")


def test_a_limit_that_is_changed_later_applies(tmp_path):
    args = config(tmp_path)
    writer = CheckpointWriter(args, {"model": {}}, ALONE)
    for step in (1, 2, 3):
        save(writer, tmp_path, step)
    args.save_total_limit = 2
    save(writer, tmp_path, 4)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_a_full_disk_is_said_and_leaves_the_earlier_one(writer, tmp_path):
    save(writer, tmp_path, 1)

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SaveError, match=r"Cannot save checkpoint-2 .* checkpoint-1 is whole"):
        writer.save(tmp_path, TrainerState(global_step=2), full, PROGRESS)
    assert writer.staging is None and not (tmp_path / "_saving").exists()
    verify(tmp_path / "checkpoint-1")


def test_another_error_goes_up_as_it_is(writer, tmp_path):
    def broken():
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        writer.save(tmp_path, TrainerState(global_step=2), broken, PROGRESS)


@pytest.mark.parametrize(("strategy", "told"), [("every_save", True), ("checkpoint", True), ("end", False)])
def test_asynchronous_saves_that_an_upload_waits_for_are_named(tmp_path, caplog, strategy, told):
    args = config(tmp_path, async_save=True, push_to_hub=True, hub_strategy=strategy, hub_model_id="me/run")
    CheckpointWriter(args, {}, ALONE)
    assert (f"hub_strategy={strategy}" in caplog.text) is told


def test_an_asynchronous_save_is_there_when_it_has_been_waited_for(tmp_path):
    writer = CheckpointWriter(config(tmp_path, async_save=True), {"model": {}}, ALONE)
    for step in (1, 2):
        published, _ = save(writer, tmp_path, step)
    writer.background.wait()
    assert published == tmp_path / "checkpoint-2"
    for folder in checkpoint_folders(tmp_path):
        assert torch.load(folder / "metrics_0.pt", weights_only=True)["total_loss"] == 1.5
        verify(folder)
