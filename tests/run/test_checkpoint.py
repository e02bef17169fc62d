"""Folders that are whole or not there."""

import errno
import json
import os
from contextlib import suppress

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


def damage_one_byte(folder):
    path = folder / "shards" / "optimizer.bin"
    path.write_bytes(b"x" * 500 + b"y" + b"x" * 499)


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
        (damage_one_byte, r"optimizer\.bin is not what was written"),
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


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "3",
        '"text"',
        "{}",
        "[" * 100_000,
        "\udcff",
        '{"format_version": 1}',
        '{"format_version": 1, "step": 3, "world_size": 2, "files": [], "fingerprint": {}}',
        '{"format_version": 1, "step": 3, "world_size": 2, "files": {"a": 3}, "fingerprint": {}}',
        '{"format_version": 1, "step": 3, "world_size": 2, "files": {"a": {"size": "3"}}, "fingerprint": {}}',
        '{"format_version": 1, "step": 3, "world_size": 2, "files": {"../a": {"size": 3}}, "fingerprint": {}}',
        '{"format_version": 1, "step": 3, "world_size": 2, "files": {"/a": {"size": 3}}, "fingerprint": {}}',
        '{"format_version": 1, "step": "3", "world_size": 2, "files": {}, "fingerprint": {}}',
        '{"format_version": 1, "step": 3, "world_size": null, "files": {}, "fingerprint": {}}',
        '{"format_version": 1, "step": 3, "world_size": 2, "files": {}, "fingerprint": {"model": 3}}',
        '{"format_version": 1, "step": 3, "world_size": 2, "files": {}, "fingerprint": null}',
    ],
)
def test_a_manifest_that_nobody_wrote_is_one_line(staged, tmp_path, text):
    folder = published(staged, tmp_path, 3)
    (folder / "complete.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"complete\.json cannot be read|format version") as told:
        checkpoints.verify(folder)
    assert "\n" not in str(told.value) and len(str(told.value)) < 300


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(staged, tmp_path):
    folder = published(staged, tmp_path, 3)
    marker, manifest = folder / "complete.json", checkpoints.verify(folder)
    content = marker.read_bytes()
    for at in range(len(content)):
        for bit in range(8):
            marker.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
            # Of white space, and of the name of the marker's own checksum, it changes nothing.
            with suppress(ValueError):
                assert checkpoints.read_manifest(folder) == manifest


def test_every_rank_reads_a_share_and_a_flipped_byte_is_in_one_of_them(staged, tmp_path):
    folder = published(staged, tmp_path, 3)
    for path in (folder / "rng_state.pth", folder / "shards" / "optimizer.bin"):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        failed = []
        for rank in range(2):
            try:
                checkpoints.verify(folder, rank, 2)
            except checkpoints.Damaged as error:
                failed.append(str(error))
        assert len(failed) == 1 and failed[0].startswith(str(path.relative_to(folder)))
        path.write_bytes(content)


def test_a_manifest_of_an_earlier_version_lacks_checksums(staged, tmp_path):
    folder = published(staged, tmp_path, 3)
    assert checkpoints.unchecked(checkpoints.verify(folder)) is None
    content = json.loads((folder / "complete.json").read_text())
    del content["sha256"], content["files"]["shards/optimizer.bin"]["sha256"]
    (folder / "complete.json").write_text(json.dumps(content))
    assert checkpoints.unchecked(checkpoints.verify(folder)) == "shards/optimizer.bin (0.00 GiB)"
    damage_size(folder)
    with pytest.raises(checkpoints.Damaged, match="999 bytes"):
        checkpoints.verify(folder)


def test_rotation_does_not_count_what_was_set_aside(staged, tmp_path):
    folders = [published(staged, tmp_path, step) for step in (1, 2, 3)]
    checkpoints.set_aside(folders[2])
    assert checkpoints.rotate(tmp_path, 2, None) == []
    with pytest.raises(ValueError, match=r"no complete\.json"):
        checkpoints.verify(folders[2])
    again = published(staged, tmp_path, 3)
    checkpoints.verify(again)
    assert not (again / checkpoints.SET_ASIDE).exists()


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
