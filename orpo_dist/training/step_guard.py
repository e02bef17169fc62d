"""Decides whether to apply an optimizer step and whether to stop after it, with one host read per step.

report   what this rank adds to the all-reduce of a step: whether it wants to stop, its loss of the previous step
begin    takes the sums of those reports
count    adds the loss of a micro-batch; a non-finite one gets a NaN gradient, so that every rank sees it in the norm
judge    the host read: gradient norm, stop requests, loss of the previous step
guard    makes optimizer.step() do nothing in a refused step
"""

import math
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor

from orpo_dist.config import ORPOConfig
from orpo_dist.distributed.environment import Environment
from orpo_dist.errors import NonFiniteRun
from orpo_dist.model.patches import SKIPPED_STEP, Patched, replace_attribute
from orpo_dist.training.nonfinite import LossHistory, NonFiniteSteps


class StepGuard:
    """Judges the steps of one run.

    Args:
        folder: the run's folder, for the files that list the pairs of bad steps.
        describe_pair: index of a pair -> its entry in those files.

    Attributes:
        stops: whether the ranks have agreed to stop.
        refused: whether the current step is not applied.
    """

    def __init__(
        self,
        folder: Path,
        args: ORPOConfig,
        environment: Environment,
        accelerator: Accelerator,
        describe_pair: Callable[[int], dict[str, Any]],
    ):
        self._bad_steps = NonFiniteSteps(folder, args.max_nonfinite_steps, describe_pair, writes=environment.is_first)
        self._fp16, self._environment, self._accelerator = args.fp16, environment, accelerator
        self._history = LossHistory()
        self._step_loss = torch.zeros((), dtype=torch.float64)
        self._report = torch.zeros(2, dtype=torch.float64)
        self._indices: list[int] = []
        self._last_indices: list[int] = []
        self._has_begun = self._follows_a_step = False
        self._guarded: Patched | None = None
        self.stops = self.refused = False

    def training_begins(self, accelerator: Accelerator) -> None:
        """accelerator: of the loop that begins; each trial of a hyperparameter search has a new one."""
        self._accelerator = accelerator
        self.stops = self.refused = self._has_begun = False
        self._indices = []

    def report(self, wants_stop: bool, device: torch.device) -> torch.Tensor:
        """(2,) float64 that this rank adds to the all-reduce of a step: whether it wants to stop, and its share of the
        previous step's loss."""
        wants = torch.tensor(float(wants_stop), dtype=torch.float64).to(device)
        return torch.stack([wants, self._step_loss.to(device)])

    def begin(self, report: torch.Tensor, indices: list[int]) -> None:
        """report: (2,) sum of the reports of all ranks; stays on the device. indices: of this rank's pairs."""
        self._report, self._last_indices, self._indices = report, self._indices, indices
        self._step_loss = torch.zeros_like(report[1])
        self._follows_a_step, self._has_begun = self._has_begun, True

    def count(self, loss: torch.Tensor) -> torch.Tensor:
        """The () loss of a micro-batch, with a NaN gradient if the loss is not finite.

        An infinite NLL (a logit of -inf) has a finite gradient, which would not show in the global norm.
        """
        value = loss.detach()
        self._step_loss = self._step_loss + value.double()
        return loss * torch.where(value.isfinite(), 1.0, torch.nan).to(loss.dtype)

    def judge(self, norm: torch.Tensor | DTensor | float | None, step: int) -> Any:
        """Decide whether to apply optimizer step `step` from its global gradient norm, which is returned. Every rank
        calls it, and all ranks reach the same decision.

        Raises:
            NonFiniteRun: too many refused steps in a row, or DeepSpeed has applied one that should have been refused.
        """
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        known = torch.as_tensor(norm if norm is not None else 0.0, dtype=torch.float64).to(self._report.device)
        value, stops, last_loss = torch.cat([known.reshape(1), self._report]).tolist()
        self.stops = self.stops or stops > 0
        # Not asked of the indices: a rank that had only a filler has none, and its history must be that of the others.
        usual = self._history.add(last_loss) if self._follows_a_step else None
        if usual is not None:
            self._bad_steps.spike(step - 1, last_loss, usual, gather_object(self._last_indices))
        self.refused = not (math.isfinite(value) and value >= 0) or self._deepspeed_skipped()
        if self.refused:
            self._not_applied(step, value)
        else:
            self._bad_steps.good()
        return norm

    def _not_applied(self, step: int, norm: float) -> None:
        loss = float(self._accelerator.reduce(self._step_loss, reduction="sum"))
        if self._fp16 and math.isfinite(loss):
            return  # the loss scale was too high: the scaler or DeepSpeed halves it and skips the step
        self._bad_steps.bad(step, loss, norm, gather_object(self._indices))
        if self._environment.sharding.is_zero and not self._deepspeed_skipped():
            raise NonFiniteRun(f"DeepSpeed applied step {step} with a gradient norm of {norm}: resume from before it.")

    def _deepspeed_skipped(self) -> bool:
        """DeepSpeed steps inside backward; its flag tells whether the step was applied."""
        return self._environment.sharding.is_zero and self._accelerator.optimizer_step_was_skipped

    def guard(self, optimizer: Any) -> None:
        """Make step() of accelerate's optimizer skip refused steps. A gradient scaler and DeepSpeed already do."""
        if self._environment.sharding.is_zero or optimizer.scaler is not None:
            return
        self.release()  # a second loop within one train() (auto_find_batch_size) guards the same optimizer again
        step = optimizer.step

        @wraps(step)  # keeps the attribute that the scheduler has set on it
        def guarded(closure: Any = None) -> None:
            optimizer._is_overflow = self.refused  # then the Trainer does not step the scheduler
            if not self.refused:
                step(closure)

        self._guarded = replace_attribute(optimizer, "step", guarded, SKIPPED_STEP)

    def release(self) -> None:
        """Restore the optimizer's own step()."""
        if self._guarded is not None:
            self._guarded.undo()
            self._guarded = None

    def losses(self) -> list[float]:
        """Losses of the last steps, for a checkpoint."""
        return list(self._history.losses)

    def restore_losses(self, losses: list[float]) -> None:
        self._history = LossHistory()
        self._history.losses.extend(losses)
