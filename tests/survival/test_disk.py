"""A disk that is really full, and a folder that is really read-only: on a file system of their own."""

import os
import subprocess
from pathlib import Path

import pytest
from peft import LoraConfig

from orpo_dist import ORPOTrainer
from orpo_dist.errors import SaveError
from orpo_dist.run.checkpoint import checkpoint_folders, verify
from tests.trainer_runs import assert_same_weights, config, pairs, weights
from tests.training.resumed_runs import RUN, At, assert_same_history


@pytest.fixture
def disk(tmp_path):
    """`disk(mebibytes)`: a small file system, mounted."""
    mounted = []

    def mount(mebibytes: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def make(tmp_path, chat_tokenizer, tiny_llama):
    rows = pairs(22, len(chat_tokenizer))

    def trainer(folder: Path, *callbacks):
        return ORPOTrainer(
            tiny_llama(len(chat_tokenizer)),
            config(folder, **{**RUN, "save_steps": 1, "save_total_limit": None}),
            train_dataset=rows,
            processing_class=chat_tokenizer,
            callbacks=list(callbacks),
            peft_config=LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear"),
        )

    return trainer


def size_of_a_checkpoint(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_full_disk_stops_with_a_clear_error_and_leaves_whole_checkpoints(make, disk, tmp_path):
    whole = make(tmp_path / "whole")
    whole.train()
    one = size_of_a_checkpoint(tmp_path / "whole" / "checkpoint-1")
    folder = disk(max(int(one * 3.5) >> 20, 1)) / "run"
    filler = folder.parent / "filler"
    free = os.statvfs(folder.parent)
    filler.write_bytes(b"x" * max(free.f_bavail * free.f_frsize - int(one * 3.5), 0))
    with pytest.raises(SaveError, match=r"no space left on the device|writing failed") as full:
        make(folder).train()
    found = checkpoint_folders(folder)
    assert 1 <= len(found) < RUN["max_steps"]
    for checkpoint in found:
        verify(checkpoint)
    assert f"{found[-1].name} is whole" in str(full.value)
    assert not list((folder / "_saving").glob("*"))  # the room it took is free again
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(folder.parent)], check=True)
    resumed = make(folder)
    resumed.train("auto")
    assert_same_weights(weights(resumed), weights(whole), tolerance=0)
    assert_same_history(resumed, whole)


def test_a_read_only_file_system_is_named(make, disk):
    folder = disk(64) / "run"

    def read_only():
        subprocess.run(["mount", "-o", "remount,ro", str(folder.parent)], check=True)

    with pytest.raises(SaveError, match=r"Cannot save checkpoint-3.*read-only.*checkpoint-2 is whole"):
        make(folder, At(3, read_only)).train()
    verify(folder / "checkpoint-2")
