"""Versions, device and peak memory."""

from orpo_dist.run.machine import versions


def test_versions_name_what_is_installed():
    found = versions()
    assert {"python", "orpo_dist", "torch", "transformers", "peft"} <= set(found)
    assert all(found.values())
