"""Folders that are whole or not there."""

import errno
import json
import os

import pytest

from orpo_dist.errors import SaveError, UserError
from orpo_dist.run import checkpoint as checkpoints


@pytest.fixture
def staged(tmp_path):
    def make(step: int):
        folder = tmp_path / checkpoints.STAGING / f"checkpoint-{step}"
        (folder / "shards").mkdir(parents=True)
        (folder / "rng_state.pth").write_bytes(b"random" * step)
        (folder / "shards" / "optimizer.bin").write_bytes(b"x" * 1000)
        return folder

    return make


def published(staged, run, step):
    folder = staged(step)
    checkpoints.seal(folder, step, 2, {"options": {"beta": 0.1}})
    return checkpoints.publish(folder, run)


def test_a_published_checkpoint_is_whole(staged, tmp_path):
    folder = published(staged, tmp_path, 3)
    assert folder == tmp_path / "checkpoint-3"
    manifest = checkpoints.verify(folder)
    assert (manifest.step, manifest.world_size, manifest.fingerprint) == (3, 2, {"options": {"beta": 0.1}})
    assert manifest.files["shards/optimizer.bin"][0] == 1000
    assert not list((tmp_path / checkpoints.STAGING).iterdir())


def damage_size(folder):
    (folder / "shards" / "optimizer.bin").write_bytes(b"x" * 999)


def damage_content(folder):
    (folder / "shards" / "optimizer.bin").write_bytes(b"y" * 1000)


def damage_missing(folder):
    (folder / "rng_state.pth").unlink()


def damage_marker(folder):
    (folder / "complete.json").write_text('{"step": 3')


def damage_version(folder):
    content = json.loads((folder / "complete.json").read_text())
    (folder / "complete.json").write_text(json.dumps({**content, "format_version": 99}))


def damage_unsealed(folder):
    (folder / "complete.json").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_size, "999 bytes instead of 1000"),
        (damage_content, "checksum"),
        (damage_missing, "rng_state.pth is missing"),
        (damage_marker, "cannot be read"),
        (damage_version, "format version 99"),
        (damage_unsealed, "no complete.json"),
    ],
)
def test_every_damage_is_seen(staged, tmp_path, damage, reason):
    folder = published(staged, tmp_path, 3)
    damage(folder)
    with pytest.raises(ValueError, match=reason):
        checkpoints.verify(folder)


WHOLE = {"step": 3, "world_size": 2, "files": {}, "fingerprint": {}, "format_version": 1}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100000, "nested too deeply"),
        (b'{"files":' * 100000, "nested too deeply"),
        (b"\xff\xfe", "UnicodeDecodeError"),
        (b"null", "TypeError"),
        (b'["step"]', "TypeError"),
        (b"{}", "KeyError"),
        (WHOLE | {"files": ["a"]}, "AttributeError"),
        (WHOLE | {"files": {"a": 3}}, "TypeError"),
        (WHOLE | {"files": {"a": {"size": "3"}}}, "size or checksum of 'a'"),
        (WHOLE | {"files": {"a": {"size": 3, "sha256": ["x"]}}}, "size or checksum of 'a'"),
        (WHOLE | {"files": {"../../etc/passwd": {"size": 3}}}, "a file outside of the checkpoint"),
        (WHOLE | {"files": {"/etc/passwd": {"size": 3}}}, "a file outside of the checkpoint"),
        (WHOLE | {"files": {"a\0b": {"size": 3}}}, "a file outside of the checkpoint"),
        (WHOLE | {"step": "3"}, "step is '3'"),
        (WHOLE | {"step": True}, "step is True"),
        (WHOLE | {"world_size": None}, "world_size is None"),
        (WHOLE | {"fingerprint": []}, "fingerprint is not an object"),
        (WHOLE | {"format_version": {"a": 1}}, "format version {'a': 1}; this program reads 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_manifests_with_odd_content(tmp_path, content, reason):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (tmp_path / checkpoints.MARKER).write_bytes(text)
    with pytest.raises(ValueError) as refused:
        checkpoints.verify(tmp_path)
    assert reason in str(refused.value) and "\n" not in str(refused.value)


def test_rotation_keeps_two_complete_ones_and_the_best(staged, tmp_path):
    folders = [published(staged, tmp_path, step) for step in (9, 10, 11, 12)]
    (folders[2] / "complete.json").unlink()  # an incomplete one counts for nothing and is not touched
    assert checkpoints.rotate(tmp_path, None, None) == []
    assert checkpoints.rotate(tmp_path, 1, folders[0]) == []
    assert checkpoints.rotate(tmp_path, 1, None) == [folders[0]]
    assert checkpoints.checkpoint_folders(tmp_path) == folders[1:]


def test_publishing_over_an_older_one_of_the_same_step(staged, tmp_path):
    old = published(staged, tmp_path, 3)
    (old / "left_over").touch()
    new = published(staged, tmp_path, 3)
    assert not (new / "left_over").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name != checkpoints.STAGING] == ["checkpoint-3"]


def test_what_a_kill_left_behind_is_swept_away(staged, tmp_path):
    whole = published(staged, tmp_path, 3)
    staged(4)
    os.rename(published(staged, tmp_path, 2), tmp_path / f"{checkpoints.DELETING}checkpoint-2")
    assert sorted(path.name for path in checkpoints.sweep(tmp_path)) == ["_deleting-checkpoint-2", "checkpoint-4"]
    assert list(tmp_path.iterdir()) == [whole]


def test_disk_errors_in_every_wrapping(tmp_path):
    def why(error):
        return checkpoints.why_unwritable(error, tmp_path)

    assert "no space left" in why(OSError(errno.ENOSPC, "No space left on device"))
    assert "read-only" in why(OSError(errno.EROFS, "Read-only file system"))
    wrapped = RuntimeError("unexpected pos 64 vs 0")
    wrapped.__context__ = OSError(errno.ENOSPC, "No space left on device")
    assert "no space left" in why(wrapped)
    assert "writing failed" in why(RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed"))
    assert why(RuntimeError("shapes differ")) is None


def test_a_failed_write_after_the_last_checkpoint_is_one_line(tmp_path):
    told = "Cannot write the model into .*: no space left on the device"
    with pytest.raises(SaveError, match=told), checkpoints.writing("the model", tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    for error in (UserError("own"), SaveError("own"), ValueError("a bug")):
        with pytest.raises(type(error)), checkpoints.writing("the model", tmp_path):
            raise error


@pytest.mark.parametrize(("damaged", "content"), [(None, "new"), ("new", "old"), ("both", None)])
def test_a_kill_between_the_two_renames_of_a_replacement(staged, tmp_path, monkeypatch, damaged, content):
    rename = os.rename
    for text in ("old", "new"):
        folder = staged(5)
        (folder / "text").write_text(text)
        checkpoints.seal(folder, 5, 1, {})
        if text == "old":
            checkpoints.publish(folder, tmp_path)

    def killed(source, target):
        if checkpoints.STAGING in str(source):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "rename", killed)
        checkpoints.publish(folder, tmp_path)
    assert not (tmp_path / "checkpoint-5").exists()
    for place in {None: [], "new": [folder], "both": [folder, tmp_path / "_deleting-checkpoint-5"]}[damaged]:
        (place / "text").write_text("longer than it was")
    checkpoints.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == (["checkpoint-5"] if content else [])
    if content:
        checkpoints.verify(tmp_path / "checkpoint-5")
        assert (tmp_path / "checkpoint-5" / "text").read_text() == content


@pytest.mark.parametrize(("number", "fatal"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_that_does_not_know_fsync(staged, monkeypatch, number, fatal):
    def fsync(descriptor):
        raise OSError(number, os.strerror(number))

    folder = staged(5)
    monkeypatch.setattr(os, "fsync", fsync)
    if fatal:
        with pytest.raises(OSError, match=os.strerror(number)):
            checkpoints.flush_tree(folder)
    else:
        checkpoints.flush_tree(folder)
