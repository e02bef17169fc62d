"""Non-finite steps: skipped, recorded with their pairs, and limited in number.

A non-finite loss makes its gradient NaN (training/step_guard.py). Every rank has the global gradient norm, so all ranks
reach the same decision without another collective.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orpo_dist.distributed.log import get_logger
from orpo_dist.errors import NonFiniteRun
from orpo_dist.packing.lengths import PairLengths

NONFINITE_NAME, SPIKES_NAME = "nonfinite_steps.jsonl", "loss_spikes.jsonl"
# A spike: above mean + 6 standard deviations of the last 100 losses and above 1.5 times their mean, once 20 are known.
WINDOW, LEAST_KNOWN, DEVIATIONS, FACTOR = 100, 20, 6.0, 1.5
logger = get_logger(__name__)


@dataclass
class LossHistory:
    """Losses of the last optimizer steps."""

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, loss: float) -> float | None:
        """Record a loss. Returns the mean of the previous ones if it is a spike."""
        known = list(self.losses)
        if not math.isfinite(loss):
            return None
        self.losses.append(loss)
        if len(known) < LEAST_KNOWN:
            return None
        mean = statistics.fmean(known)
        spike = loss > mean + DEVIATIONS * statistics.pstdev(known) and loss > FACTOR * mean
        return mean if spike else None


@dataclass(frozen=True)
class PairFacts:
    """What the files of bad steps record about a pair: its source row (if known), lengths and texts."""

    rows: Any
    lengths: Sequence[PairLengths]
    tokenizer: Any

    def __call__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        facts = {"row": row["row"]} if "row" in row else {}
        counts = {f"{name}_tokens": count for name, count in vars(self.lengths[index]).items()}
        texts = {name: self.tokenizer.decode(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")}
        return {**facts, **counts, **texts}


class NonFiniteSteps:
    """Counts consecutive steps that were not applied and records their pairs.

    Args:
        folder: the run's folder.
        limit: the run ends at this many consecutive steps.
        describe: index of a pair -> its entry in the file.
        writes: whether this rank writes the file.
    """

    def __init__(self, folder: Path, limit: int, describe: Callable[[int], dict[str, Any]], *, writes: bool):
        self._folder, self._limit, self._describe, self._writes = folder, limit, describe, writes
        self._in_a_row = 0

    def good(self) -> None:
        self._in_a_row = 0

    def bad(self, step: int, loss: float, grad_norm: float, indices: Sequence[int]) -> None:
        """Record a step that was not applied. Every rank calls it with the same arguments.

        Raises:
            NonFiniteRun: the limit is reached.
        """
        self._in_a_row += 1
        self._write(NONFINITE_NAME, {"step": step, "loss": str(loss), "grad_norm": str(grad_norm)}, indices)
        path = self._folder / NONFINITE_NAME
        logger.warning(f"Step {step} is not applied: loss {loss}, gradient norm {grad_norm}. Its pairs: {path}")
        if self._in_a_row >= self._limit:
            raise NonFiniteRun(
                f"{self._in_a_row} steps in a row had a non-finite loss or gradient norm "
                f"(max_nonfinite_steps={self._limit}). {path} lists their pairs. "
                "The usual fixes are a lower learning_rate or max_grad_norm, or bf16 instead of fp16. Also check the "
                "listed pairs for broken data."
            )

    def spike(self, step: int, loss: float, usual: float, indices: Sequence[int]) -> None:
        self._write(SPIKES_NAME, {"step": step, "loss": loss, "usual_loss": usual}, indices)
        path = self._folder / SPIKES_NAME
        logger.warning(f"Loss spike at step {step}: {loss:.4f}, usually {usual:.4f}. Its pairs: {path}")

    def _write(self, name: str, event: dict[str, Any], indices: Sequence[int]) -> None:
        if self._writes:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / name).open("a", encoding="utf-8") as file:
                pairs = [{"index": index, **self._describe(index)} for index in indices]
                file.write(json.dumps({**event, "pairs": pairs}, ensure_ascii=False) + "\n")
