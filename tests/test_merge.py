"""A damaged checkpoint is not merged. Merging itself: tests/model/loading/test_merge.py."""

import pytest

from orpo_dist import merge_run
from orpo_dist.commands import merge
from orpo_dist.errors import UserError
from orpo_dist.run.checkpoint import seal


def test_a_damaged_checkpoint_is_refused(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"abc" * 100)
    seal(tmp_path, 3, 1, {})
    with pytest.raises(UserError, match=r"adapter_config\.json"):  # whole, but no adapter
        merge_run(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"abd" + b"abc" * 99)
    for call in (merge_run, lambda folder: merge.main([str(folder)])):
        with pytest.raises(UserError, match=r"damaged: adapter_model\.safetensors is not what was written"):
            call(tmp_path)
