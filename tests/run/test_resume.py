"""Which checkpoint is meant, and whether it is of the same run."""

import json

import pytest

from orpo_dist.errors import UserError
from orpo_dist.run.checkpoint import DELETING, SET_ASIDE, STAGING, Manifest, seal
from orpo_dist.run.resume import check_same_run, checkpoint_to_resume

FINGERPRINT = {
    "model": {"class": "Llama"},
    "data": {"pairs": 8},
    "options": {"beta": 0.1, "global batch": 8},
    "versions": {"torch": "2.11"},
}


@pytest.fixture
def run(tmp_path):
    """A run's folder with checkpoints 5 and 10, and 15 without its marker."""
    for step in (5, 10, 15):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text("w")
        if step != 15:
            seal(folder, step, 1, FINGERPRINT)
    return tmp_path


@pytest.mark.parametrize("asked", ["auto", "true", True])
def test_the_newest_complete_one(run, asked):
    said = []
    assert checkpoint_to_resume(asked, run, said.append) == str(run / "checkpoint-10")
    assert len(said) == 1 and said[0].startswith("Skipping checkpoint-15: ")


@pytest.mark.parametrize("asked", ["auto", "true", "path"])
def test_one_that_a_kill_left_between_two_names(run, asked):
    """checkpoint-10 was written again: the old one is moved away, and the new one not yet in its place."""
    (run / "checkpoint-10").rename(run / f"{DELETING}checkpoint-10")
    new = run / STAGING / "checkpoint-10"
    new.mkdir(parents=True)
    (new / "weights").write_text("new")
    seal(new, 10, 1, FINGERPRINT)
    path = str(run / "checkpoint-10")
    assert checkpoint_to_resume(path if asked == "path" else asked, run, lambda line: None) == path
    assert (run / "checkpoint-10" / "weights").read_text() == "new"


def test_a_path(run):
    assert checkpoint_to_resume(str(run / "checkpoint-5"), run) == str(run / "checkpoint-5")
    with pytest.raises(UserError, match="checkpoint-15"):
        checkpoint_to_resume(str(run / "checkpoint-15"), run)


def test_a_damaged_one_is_skipped_and_counts_no_longer(run):
    (run / "checkpoint-10" / "weights").write_text("v")
    said = []
    with pytest.raises(UserError, match=r"checkpoint-10 is not a usable checkpoint: weights is not what was written"):
        checkpoint_to_resume(str(run / "checkpoint-10"), run, said.append)
    assert (run / "checkpoint-10" / "complete.json").is_file()  # what is named may belong to another run
    assert checkpoint_to_resume("auto", run, said.append) == str(run / "checkpoint-5")
    assert [line.split(":")[0] for line in said] == ["Skipping checkpoint-15", "Skipping checkpoint-10"]
    assert "weights is not what was written" in said[1] and SET_ASIDE in said[1]
    assert not (run / "checkpoint-10" / "complete.json").exists() and (run / "checkpoint-10" / SET_ASIDE).is_file()


def test_one_without_checksums_resumes_with_one_line(run):
    marker = run / "checkpoint-10" / "complete.json"
    content = json.loads(marker.read_text())
    del content["sha256"], content["files"]["weights"]["sha256"]
    marker.write_text(json.dumps(content))
    said = []
    assert checkpoint_to_resume(str(marker.parent), run, said.append) == str(marker.parent)
    assert len(said) == 1 and "without a checksum of weights" in said[0]


def test_a_fresh_start(run, tmp_path):
    new = tmp_path / "new"
    assert checkpoint_to_resume(None, new) is None and checkpoint_to_resume("auto", new) is None
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint_to_resume("true", new)
    with pytest.raises(UserError, match="holds checkpoint-15 of an earlier run"):
        checkpoint_to_resume("no", run)


def test_only_broken_ones(run):
    for step in (5, 10):
        (run / f"checkpoint-{step}" / "weights").write_text("ww")
    with pytest.raises(UserError, match="None of the checkpoints"):
        checkpoint_to_resume("auto", run)
    assert (run / "checkpoint-10" / "complete.json").is_file()


def manifest(**changed):
    return Manifest(10, 2, {}, {**FINGERPRINT, "topology": "zero2", **changed})


def same(saved, **options):
    check_same_run(saved, FINGERPRINT, **{"allow_changed": False, "strict_versions": False, **options})


def test_what_differs_is_listed():
    same(manifest())
    with pytest.raises(UserError, match=r"step 10 belongs to another run(.|\n)*beta: 0.2 -> 0.1"):
        same(manifest(options={"beta": 0.2, "global batch": 8}))
    same(manifest(options={"beta": 0.2, "global batch": 8}), allow_changed=True)


def test_versions_differ_only_strictly():
    older = manifest(versions={"torch": "2.10"})
    same(older)
    with pytest.raises(UserError, match=r"torch: 2.10 -> 2.11"):
        same(older, strict_versions=True)
