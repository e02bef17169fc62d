"""What a run leaves behind besides the model: log.jsonl while it trains, run_summary.json at its end."""

import json
import math
import resource
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import orpo_dist

LOG_NAME = "log.jsonl"
SUMMARY_NAME = "run_summary.json"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "deepspeed", "bitsandbytes")
# What a progress line shows.
_SHOWN = {
    "loss": "loss {:.4f}",
    "nll_loss": "nll {:.4f}",
    "rewards/accuracies": "accuracy {:.3f}",
    "rewards/margins": "margin {:.4f}",
    "grad_norm": "grad norm {:.3f}",
    "learning_rate": "lr {:.2e}",
}
# What an evaluation reports about its own speed.
_SPEED_KEYS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_input_tokens_seen")


@dataclass(frozen=True)
class RunSummary:
    """One finished run, as in run_summary.json.

    Attributes:
        pairs: training pairs after the audit; `dropped` rows did not pass it. `eval_pairs`, `eval_dropped` likewise.
        epochs: passes over the training pairs, a fraction when `max_steps` ended the run.
        global_batch_size: pairs per optimizer step.
        eval_before, eval_after: metrics of the untrained and of the trained model, without the `eval_` prefix; None
            without an evaluation set.
        train_seconds: time spent in optimizer steps by this call, without evaluating and saving.
        pairs_per_second: pairs of those steps by that time, over all ranks; None when no step was left to do.
        peak_memory_gib: per rank, of the accelerator, or of the process where there is none.
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
        text = json.dumps(_finite(asdict(self)), indent=2, ensure_ascii=False)
        temporary = folder / f".{SUMMARY_NAME}"  # the file exists only after success, and then it is whole
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(folder / SUMMARY_NAME)

    def table(self) -> str:
        """The evaluations side by side, for a terminal; empty without an evaluation set."""
        if self.eval_before is None or self.eval_after is None:
            return ""
        names = [name for name in self.eval_after if name in self.eval_before and name != "epoch"]
        width = max(len(name) for name in names)
        rows = [f"{'':{width}}  {'before':>10}  {'after':>10}"]
        rows += [f"{name:{width}}  {self.eval_before[name]:>10.4f}  {self.eval_after[name]:>10.4f}" for name in names]
        return "\n".join(rows)


class RunLog(TrainerCallback):
    """Appends every logging event to `<folder>/log.jsonl` (main process) and measures the time spent in steps.

    A resumed run continues the file: events after the checkpoint it starts from are dropped, since they happen again.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOG_NAME
        self._mark = 0.0
        self.first_step = 0
        self.train_seconds = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.first_step = state.global_step
        self._mark = time.perf_counter()
        if state.is_world_process_zero:
            kept = [line for line in self._lines() if json.loads(line)["step"] <= state.global_step > 0]
            self._path.write_text("".join(kept), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            event = _finite({"step": state.global_step, "epoch": state.epoch, "time": round(time.time(), 3), **logs})
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.train_seconds += now - self._mark
        self._mark = now

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def _lines(self) -> list[str]:
        if not self._path.exists():
            return []
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n")]  # the last one is cut off when the run was killed


class FinalEvaluation(TrainerCallback):
    """Evaluates the model of the last step, inside the training loop, where every topology has it wrapped."""

    def __init__(self) -> None:
        self._evaluated_step: int | None = None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._evaluated_step = state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_training_stop and self._evaluated_step != state.global_step:
            control.should_evaluate = True


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


def evaluation_at(state: TrainerState, step: int) -> dict[str, float] | None:
    """The last evaluation of `step` in the history (a resumed run has that of the run it continues), or None."""
    for event in reversed(state.log_history):
        if event["step"] == step and "eval_loss" in event:
            return without_prefix(event)
    return None


def without_prefix(metrics: dict[str, float]) -> dict[str, float]:
    """`eval_rewards/margins` as `rewards/margins`; what an evaluation says about its own speed is left out."""
    names = {name: name.removeprefix("eval_") for name in metrics if name.startswith("eval_")}
    return {short: float(metrics[name]) for name, short in names.items() if short not in _SPEED_KEYS}


def pairs_seen(steps: int, pairs: int, global_batch_size: int, drop_last: bool) -> int:
    """Pairs in the first `steps` optimizer steps; the last global batch of an epoch may be smaller."""
    per_epoch = pairs // global_batch_size if drop_last else math.ceil(pairs / global_batch_size)
    epochs, rest = divmod(steps, max(per_epoch, 1))
    in_epoch = min(pairs, per_epoch * global_batch_size)
    return epochs * in_epoch + min(rest * global_batch_size, in_epoch)


def peak_memory_gib(device: torch.device) -> list[float]:
    """Most memory each rank has used so far, in GiB, in the order of the ranks. Every rank must call it."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, see getrusage(2)
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return gather_object([round(used / 2**30, 3)])


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of those it stands on that are installed."""
    found = {"python": sys.version.split()[0], "orpo_dist": orpo_dist.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def _finite(value: Any) -> Any:
    """`nan` and `inf` as texts: JSON has no such numbers, and other readers than Python's refuse them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
