"""The sums of a run since its last log line, saved in a checkpoint and restored from it.

They make the first log line after a resume equal to that of an uninterrupted run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orpo_dist.distributed.agree import as_on_first_rank
from orpo_dist.distributed.environment import Environment
from orpo_dist.training.metrics import MetricSums
from orpo_dist.training.step_guard import StepGuard

METRICS = "metrics_{}.pt"  # of each rank, in a checkpoint


@dataclass(frozen=True)
class Progress:
    """One rank's sums.

    Attributes:
        sums: metric sums (training/metrics.py).
        tr_loss, total_loss, last_logged: the Trainer's loss sums and the step of its last log line.
        losses: of the last steps, to detect spikes (training/step_guard.py).
    """

    sums: torch.Tensor | None
    tr_loss: torch.Tensor
    total_loss: float
    last_logged: int
    losses: list[float]


def progress_of(trainer: Any, sums: MetricSums, guard: StepGuard) -> Progress:
    """trainer: a transformers.Trainer in its loop. Its loss sums are private attributes."""
    return Progress(
        sums=sums.state(),
        tr_loss=trainer._tr_loss.detach().cpu(),
        total_loss=trainer._total_loss_scalar,
        last_logged=trainer._globalstep_last_logged,
        losses=guard.losses(),
    )


def take_over(
    saved: Sequence[Progress], trainer: Any, sums: MetricSums, guard: StepGuard, environment: Environment
) -> None:
    """Restore `saved`: the progress of this rank, or of all ranks if the world size has changed; empty for a fresh
    start. A collective: every rank must call it."""
    if not saved:
        return
    if len(saved) == 1 or environment.is_first:  # the sums are added up over the ranks
        for progress in saved:
            sums.load(progress.sums, trainer.args.device)
    # The Trainer logs the mean over the ranks.
    trainer._tr_loss += torch.stack([progress.tr_loss for progress in saved]).mean(0).to(trainer._tr_loss.device)
    trainer._total_loss_scalar, trainer._globalstep_last_logged = saved[0].total_loss, saved[0].last_logged
    # A spike is a collective, so every rank needs the same history. Checkpoints of earlier versions may hold different
    # ones: a rank with a filler alone skipped that step.
    guard.restore_losses(as_on_first_rank(saved[0].losses))
