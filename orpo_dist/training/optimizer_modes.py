"""Optimizers with a training and an evaluation mode, such as schedule-free ones: the averaged weights are the model's.

In training mode such an optimizer keeps the point of the next gradient in the model, in evaluation mode the average,
which alone is worth evaluating and saving. The Trainer switches for evaluations only.
https://github.com/facebookresearch/schedule_free (README, "How to Use")
"""

from typing import Any, Protocol, runtime_checkable

from accelerate.optimizer import AcceleratedOptimizer

from orpo_dist.distributed.environment import Sharding
from orpo_dist.errors import UserError


@runtime_checkable
class _HasModes(Protocol):
    """torch.optim.Optimizer has no such methods, and the libraries' optimizers share no other base."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def use_averaged_weights(optimizer: Any) -> None:
    """Put the averaged weights into the model, if the optimizer keeps any. Its next step in training goes on from them:
    the Trainer switches back before each."""
    if isinstance(optimizer, AcceleratedOptimizer):
        optimizer.eval()  # does nothing for an optimizer without modes


def refuse_modes_under_zero(optim: str, given: Any, sharding: Sharding) -> None:
    """optim: TrainingArguments.optim. given: an optimizer made by the caller, or None.

    Raises:
        UserError: the averaged weights would stay in DeepSpeed's partitions and never reach the model.
    """
    if sharding.is_zero and (optim.startswith("schedule_free") or isinstance(given, _HasModes)):
        name = optim if given is None else type(given).__name__
        raise UserError(
            f"{name} averages weights, and under ZeRO the average would never reach the model that is evaluated and "
            "saved: use DDP or FSDP2, or another optimizer."
        )
