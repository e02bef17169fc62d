"""Documented import path of `merge_run`, which is implemented in model/loading/merge.py."""

from orpo_dist.model.loading.merge import merge_run

__all__ = ["merge_run"]
