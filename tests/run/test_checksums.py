"""SHA-256 of files, divided among ranks."""

import hashlib

import pytest

from orpo_dist.run.checksums import checksums, share


def test_they_are_those_of_hashlib(tmp_path):
    for name, content in {"empty": b"", "one": b"x", "long": b"abc" * 2**21}.items():
        (tmp_path / name).write_bytes(content)
    found = checksums(tmp_path, ["long", "empty", "one"])
    assert list(found) == ["long", "empty", "one"]
    assert all(sha == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name, sha in found.items())
    assert checksums(tmp_path, []) == {}
    with pytest.raises(OSError, match="absent"):
        checksums(tmp_path, ["absent"])


@pytest.mark.parametrize("parts", [1, 2, 3, 16])
def test_the_shares_are_all_files_and_of_about_one_size(parts):
    sizes = {f"shard-{i}": 100 for i in range(16)} | {f"small-{i}": 0 for i in range(16)}
    shares = [share(sizes, part, parts) for part in range(parts)]
    assert sorted(name for names in shares for name in names) == sorted(sizes)
    loads = [sum(sizes[name] for name in names) for names in shares]
    assert max(loads) - min(loads) <= 100
    assert all(shares)
