"""Batch norms of a vision tower (FastVLM's) keep the running statistics that they came with.

In training mode they would normalise by the images of the micro-batch, so that the features of a pair depend on its
neighbours, and change their buffers, also in a tower that is frozen. Most towers have layer norms and nothing to keep.
"""

from typing import Any

from torch import nn

from orpo_dist.model.patches import RUNNING_STATISTICS, Patched, add_forward_pre_hook


def keep_running_statistics(model: nn.Module) -> list[Patched]:
    """Run every batch norm in evaluation mode. Returns the handles."""

    def evaluate(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        module.eval()  # before each forward: the Trainer puts the whole model into training mode at every step

    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    norms = [module for module in model.modules() if isinstance(module, kinds)]
    return [add_forward_pre_hook(norm, evaluate, RUNNING_STATISTICS) for norm in norms]
