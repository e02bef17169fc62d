"""Sums of metrics that stay on the device until somebody logs them."""

import torch
from accelerate import Accelerator

from orpo_dist.loss import SUM_NAMES, Objective, metrics_of


class MetricSums:
    """Running sums over pairs, one small vector on the device.

    Nothing is read on the host between logging events, where the ranks' vectors are reduced once.
    """

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def add(self, sums: torch.Tensor) -> None:
        """sums: (len(SUM_NAMES),) from `loss.pair_sums`."""
        self._sums = sums.clone() if self._sums is None else self._sums + sums

    def drain(self, accelerator: Accelerator, objective: Objective) -> dict[str, float]:
        """Metrics over all ranks' pairs since the last call; every rank must call it. Starts again from zero."""
        sums = torch.zeros(len(SUM_NAMES), device=accelerator.device) if self._sums is None else self._sums
        self._sums = None
        total = accelerator.reduce(sums, reduction="sum").tolist()
        return metrics_of(total, objective) if total[0] > 0 else {}

    def state(self) -> torch.Tensor | None:
        """This rank's sums, for a checkpoint."""
        return None if self._sums is None else self._sums.detach().cpu()

    def load(self, state: torch.Tensor | None, device: torch.device) -> None:
        """Add the sums of a checkpoint."""
        if state is not None:
            self.add(state.to(device))
