"""Metric sums that stay on the device until they are logged."""

from collections import defaultdict

import torch
from accelerate import Accelerator

from orpo_dist.loss import SUM_NAMES, Objective, metrics_of


class MetricSums:
    """Running sums over pairs, in one small vector on the device.

    The host reads nothing between logging events. At each one the vectors of all ranks are reduced once.
    """

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def add(self, sums: torch.Tensor) -> None:
        """sums: (len(SUM_NAMES),) from `loss.pair_sums`."""
        self._sums = sums.clone() if self._sums is None else self._sums + sums

    def drain(self, accelerator: Accelerator, objective: Objective) -> dict[str, float]:
        """Metrics over the pairs of all ranks since the last call. Resets the sums. Every rank must call it."""
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


class StoredMetrics:
    """What a subclass stores with `store_metrics`, as in TRL: this rank's means go into the next log line."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, list[float | torch.Tensor]]] = defaultdict(lambda: defaultdict(list))

    def add(self, metrics: dict[str, float | torch.Tensor], kind: str) -> None:
        for name, value in metrics.items():
            self._values[kind][name].append(value.detach() if isinstance(value, torch.Tensor) else value)

    def drain(self, kind: str) -> dict[str, float]:
        """Means since the last call. Resets them."""
        stored = self._values.pop(kind, {})
        return {name: float(sum(map(float, values)) / len(values)) for name, values in stored.items()}
