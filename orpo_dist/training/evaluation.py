"""Metrics of a whole evaluation set: each pair has the same weight, for any number of ranks and any batch size.

The Trainer's loop averages over batches, so a pair's weight depends on the size of its batch.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers.trainer_utils import EvalPrediction

from orpo_dist.loss import Objective, PairScores, pair_sums
from orpo_dist.packing.sampler import FILLER
from orpo_dist.training.metrics import MetricSums

ComputeMetrics = Callable[[EvalPrediction], dict]


class EvaluationStopped(Exception):
    """The ranks have agreed between two batches of an evaluation to stop."""


class EvaluationPass:
    """One pass over an evaluation set.

    Args:
        keeps_pairs: whether to keep mean log-probabilities per pair, for `compute_metrics` and predict().
        speaks_for_pairs: whether this rank adds its pairs, which others may have too.
    """

    def __init__(self, objective: Objective, *, keeps_pairs: bool, speaks_for_pairs: bool = True):
        self._objective = objective
        self._sums = MetricSums()
        self._speaks = speaks_for_pairs
        self._pairs: list[tuple[int, float, float]] | None = [] if keeps_pairs else None

    def add(self, scores: PairScores, indices: list[int]) -> None:
        """scores: of the B pairs of one micro-batch. indices: their (B,) positions in the set, FILLER for a pair of
        weight zero."""
        self._sums.add(pair_sums(scores, self._objective))
        if self._pairs is not None and self._speaks:
            chosen, rejected = scores.chosen_logps.tolist(), scores.rejected_logps.tolist()
            self._pairs += zip(indices, chosen, rejected, strict=True)

    def predictions(self) -> EvalPrediction | None:
        """Two (n,) arrays in the order of the set, mean log-probabilities of chosen and rejected; None unless
        `keeps_pairs`. Every rank must call it.

        The labels are zeros, as in TRL: a pair has no label beyond which completion is chosen.
        """
        if self._pairs is None:
            return None
        pairs = sorted(pair for pair in gather_object(self._pairs) if pair[0] != FILLER)
        sides = tuple(np.array([pair[side] for pair in pairs]) for side in (1, 2))
        return EvalPrediction(predictions=sides, label_ids=np.zeros(len(pairs)))  # type: ignore[arg-type]

    def metrics(self, accelerator: Accelerator) -> dict[str, float]:
        """Over the pairs of all ranks. Every rank must call it exactly once."""
        return self._sums.drain(accelerator, self._objective)


def with_prefix(metrics: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Adds `prefix_` to every name that does not start with it."""
    return {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value for name, value in metrics.items()}
