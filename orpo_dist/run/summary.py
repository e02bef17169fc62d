"""run_summary.json, which a run writes when it has finished."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import TrainerState

from orpo_dist.run.callbacks import finite_or_text

SUMMARY_NAME = "run_summary.json"
PENDING_SUMMARY = f".{SUMMARY_NAME}"
# Speed metrics of an evaluation.
_SPEED_KEYS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_input_tokens_seen")


@dataclass(frozen=True)
class RunSummary:
    """One finished run, as in run_summary.json.

    Attributes:
        pairs: training pairs after the audit, which rejected `dropped` rows; eval_pairs and eval_dropped likewise.
        epochs: passes over the training pairs; a fraction if `max_steps` ended the run.
        global_batch_size: pairs per optimizer step.
        eval_before, eval_after: metrics of the untrained and the trained model, without the `eval_` prefix; None
            without an evaluation set.
        train_seconds: time spent in optimizer steps by this call, without evaluation and saving.
        pairs_per_second: pairs of those steps divided by that time, over all ranks; None if no steps were left.
        peak_memory_gib: per rank, of the accelerator, or of the process on a CPU.
    """

    model: str
    model_revision: str | None
    dataset: str
    output_dir: str
    adapter: bool
    merged_model: str | None
    pairs: int
    dropped: int
    eval_pairs: int
    eval_dropped: int
    steps: int
    epochs: float
    global_batch_size: int
    world_size: int
    device: str
    parameters: int
    trainable_parameters: int
    train_loss: float | None
    eval_before: dict[str, float] | None
    eval_after: dict[str, float] | None
    train_seconds: float
    pairs_per_second: float | None
    peak_memory_gib: list[float]
    versions: dict[str, str]

    def save(self, folder: Path) -> None:
        """Write the file. It appears only after success, and complete."""
        self.prepare(folder)
        (folder / PENDING_SUMMARY).replace(folder / SUMMARY_NAME)

    def prepare(self, folder: Path) -> None:
        """Write the file under another name: an upload takes it along before the run has finished."""
        text = json.dumps(finite_or_text(asdict(self)), indent=2, ensure_ascii=False)
        (folder / PENDING_SUMMARY).write_text(text + "\n", encoding="utf-8")

    def table(self) -> str:
        """The evaluations side by side, for a terminal; empty without an evaluation set."""
        if self.eval_before is None or self.eval_after is None:
            return ""
        names = [name for name in self.eval_after if name in self.eval_before and name != "epoch"]
        width = max(len(name) for name in names)
        rows = [f"{'':{width}}  {'before':>10}  {'after':>10}"]
        rows += [f"{name:{width}}  {self.eval_before[name]:>10.4f}  {self.eval_after[name]:>10.4f}" for name in names]
        return "\n".join(rows)


def evaluation_at(state: TrainerState, step: int) -> dict[str, float] | None:
    """The last evaluation at `step` in the history, which a resumed run inherits, or None."""
    for event in reversed(state.log_history):
        if event["step"] == step and "eval_loss" in event:
            return without_prefix(event)
    return None


def without_prefix(metrics: dict[str, float]) -> dict[str, float]:
    """Removes the prefix `eval_` (`eval_rewards/margins` -> `rewards/margins`) and drops the speed metrics."""
    names = {name: name.removeprefix("eval_") for name in metrics if name.startswith("eval_")}
    return {short: float(metrics[name]) for name, short in names.items() if short not in _SPEED_KEYS}


def pairs_seen(steps: int, pairs: int, global_batch_size: int, drop_last: bool) -> int:
    """Pairs in the first `steps` optimizer steps; the last global batch of an epoch may be smaller."""
    per_epoch = pairs // global_batch_size if drop_last else math.ceil(pairs / global_batch_size)
    epochs, rest = divmod(steps, max(per_epoch, 1))
    in_epoch = min(pairs, per_epoch * global_batch_size)
    return epochs * in_epoch + min(rest * global_batch_size, in_epoch)
