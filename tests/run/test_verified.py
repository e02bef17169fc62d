"""Verification that every rank takes part in; several processes: tests/survival/test_flipped_bytes.py."""

import pytest

from orpo_dist.errors import UserError
from orpo_dist.run.checkpoint import Damaged, seal
from orpo_dist.run.verified import check_if_checkpoint, why_unusable


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "weights").write_bytes(b"abc" * 100)
    seal(tmp_path, 3, 1, {})
    return tmp_path


def test_the_reason_names_the_file(folder):
    assert why_unusable(folder) is None
    (folder / "weights").write_bytes(b"abd" + b"abc" * 99)
    reason = why_unusable(folder)
    assert isinstance(reason, Damaged) and str(reason).startswith("weights is not what was written")
    (folder / "complete.json").unlink()
    assert not isinstance(why_unusable(folder), Damaged)


def test_weights_are_not_loaded_from_a_damaged_checkpoint(folder):
    for fine in (None, "a name on the hub", str(folder.parent), str(folder)):
        check_if_checkpoint(fine)
    (folder / "weights").write_bytes(b"abd" + b"abc" * 99)
    with pytest.raises(UserError, match="is a checkpoint that is damaged: weights is not what was written"):
        check_if_checkpoint(str(folder))
