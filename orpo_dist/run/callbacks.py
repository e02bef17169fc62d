"""Callbacks of a run: log.jsonl, the final evaluation, the progress bar."""

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from orpo_dist.distributed.log import get_logger
from orpo_dist.run.jsonl import keep_lines
from orpo_dist.run.step_file import StepFile

logger = get_logger(__name__)
LOG_NAME = "log.jsonl"

# What a progress line shows.
_SHOWN = {
    "loss": "loss {:.4f}",
    "nll_loss": "nll {:.4f}",
    "rewards/accuracies": "accuracy {:.3f}",
    "rewards/margins": "margin {:.4f}",
    "grad_norm": "grad norm {:.3f}",
    "learning_rate": "lr {:.2e}",
}


class RunLog(TrainerCallback):
    """Appends every logging event to `<folder>/log.jsonl` (main process) and measures the time spent in steps.

    A resumed run continues the file: events after its checkpoint are dropped, since those steps are repeated.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOG_NAME
        self._mark = 0.0
        self._warned = False
        self.first_step = 0
        self.train_seconds = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.first_step = state.global_step
        self._mark = time.perf_counter()
        if state.is_world_process_zero:
            keep_lines(self._path, lambda event: _precedes_checkpoint(event, state))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            event = finite_or_text(
                {"step": state.global_step, "epoch": state.epoch, "time": round(time.time(), 3), **logs}
            )
            self._append(json.dumps(event) + "\n")

    def _append(self, line: str) -> None:
        """A log line is no reason to end a run: a full disk is warned of, and shows at the next checkpoint."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            if not self._warned:
                logger.warning("%s: a line could not be written (%s). The run goes on.", self._path, error.strerror)
            self._warned = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.train_seconds += now - self._mark
        self._mark = now

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._mark = time.perf_counter()


def _precedes_checkpoint(event: dict[str, Any], state: TrainerState) -> bool:
    """Whether an event of log.jsonl was written before the checkpoint that `state` comes from. The end of the training
    comes after the last one; so does the last evaluation, where the checkpoint's own history lacks it."""
    if not 0 < event["step"] == state.global_step:
        return bool(event["step"] < state.global_step)
    is_evaluation = any(name.startswith("eval_") for name in event)
    return "train_loss" not in event and (not is_evaluation or was_evaluated(state))


class FinalEvaluation(TrainerCallback):
    """Evaluates the model of the last step, inside the training loop, where the model is wrapped in every topology."""

    def __init__(self) -> None:
        self._evaluated_step: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Resumed after the last step: there is no epoch left, so the trainer reads this before its loop.
        control.should_evaluate = state.global_step >= state.max_steps and not was_evaluated(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._evaluated_step = state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_training_stop and self._evaluated_step != state.global_step:
            control.should_evaluate = True


def was_evaluated(state: TrainerState) -> bool:
    """Whether the log has an evaluation of the current step."""
    return any(
        event["step"] == state.global_step and any(name.startswith("eval_") for name in event)
        for event in state.log_history
    )


class LastStep(TrainerCallback):
    """Writes the number of each step for a launcher that restarts runs, on every rank."""

    def __init__(self, file: StepFile) -> None:
        self._file = file

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._file.write(state.global_step)


class ShortProgress(ProgressCallback):
    """transformers' progress bar with one short line per logging event instead of the whole dictionary."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        prefix = "eval_" if "eval_loss" in logs else ""
        parts = [form.format(float(logs[prefix + name])) for name, form in _SHOWN.items() if prefix + name in logs]
        if prefix + "loss" in logs:
            what = "evaluation" if prefix else "step"
            self.training_bar.write(f"{what} {state.global_step}/{state.max_steps}: " + ", ".join(parts))


def finite_or_text(value: Any) -> Any:
    """`nan` and `inf` as strings: they are not valid JSON numbers, and most parsers other than Python's reject them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: finite_or_text(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite_or_text(item) for item in value]
    return value
