"""The documented import path of `merge_run`; the code is in model/loading/merge.py."""

from orpo_dist.model.loading.merge import merge_run

__all__ = ["merge_run"]
