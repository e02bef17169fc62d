import os
import time
from pathlib import Path

import pytest

from orpo_dist.data.cache import built_once, cache_root, digest
from orpo_dist.errors import UserError


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ORPO_DIST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("ORPO_DIST_CACHE", "/a")
    assert cache_root() == Path("/a")
    monkeypatch.delenv("ORPO_DIST_CACHE")
    monkeypatch.setenv("HF_HOME", "/hf")
    assert cache_root() == Path("/hf/orpo_dist")


def test_a_folder_is_built_once(root):
    built = []

    def build(folder):
        built.append(folder)
        (folder / "file").write_text("content")

    assert built_once("x", build) == built_once("x", build) == root / "x"
    assert len(built) == 1 and built[0] != root / "x"
    assert [path.name for path in root.iterdir()] == ["x"]
    assert (root / "x" / "file").read_text() == "content"


@pytest.mark.parametrize("harm", [lambda file: file.unlink(), lambda file: file.write_text("")])
def test_a_folder_that_was_purged_in_part_is_built_again(root, capsys, harm):
    def build(folder):
        (folder / "below").mkdir()
        (folder / "below" / "file").write_text("content")

    folder = built_once("x", build)
    harm(folder / "below" / "file")
    assert (built_once("x", build) / "below" / "file").read_text() == "content"
    assert f"{folder}: a part of this cached data is gone" in capsys.readouterr().out
    assert [path.name for path in root.iterdir()] == ["x"]


def test_what_a_killed_run_has_left_is_removed_after_two_days(root):
    left, young, other = (root / name for name in (f".x.{'0' * 32}", f".y.{'1' * 32}", ".kept"))
    for folder in (left, young, other):
        folder.mkdir(parents=True)
        (folder / "file").write_text("half")
    long_ago = time.time() - 3 * 24 * 60 * 60
    for path in (left / "file", left, other / "file", other, young):  # in `young` a file is still written
        os.utime(path, (long_ago, long_ago))
    built_once("z", lambda folder: (folder / "file").write_text(""))
    assert sorted(path.name for path in root.iterdir()) == [".kept", young.name, "z"]


def test_a_failed_build_leaves_nothing(root):
    def build(folder):
        (folder / "half").write_text("")
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        built_once("x", build)
    assert list(root.iterdir()) == []


def test_of_two_writers_the_first_wins(root):
    def slower(folder):
        (folder / "by").write_text("second")
        built_once("x", lambda other: (other / "by").write_text("first"))  # another run, finished meanwhile

    folder = built_once("x", slower)
    assert (folder / "by").read_text() == "first"
    assert [path.name for path in root.iterdir()] == ["x"]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ORPO_DIST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="Set ORPO_DIST_CACHE"):
        built_once("x", lambda folder: None)


def test_digest_separates_its_parts():
    assert digest([b"ab", b"c"]) != digest([b"a", b"bc"])
    assert digest([b"ab", b"c"]) == digest([b"ab", b"c"])
