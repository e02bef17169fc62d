"""A Trainer whose runs survive: whole checkpoints, exact resuming, stopping on request, steps that are not applied.

train()              which checkpoint, is it the same run; then the Trainer's loop
get_batch_samples    (subclass) sends `step_report` along with the one all-reduce of a step
_get_grad_norm       the one host read of a step: gradient norm, stop flag, loss of the step before
optimizer.step       left out when the norm is no number
on_step_end          asks for the last checkpoint when the ranks agreed to stop
_save_checkpoint     into RUN/_saving, sealed and renamed (run/checkpoint.py)
"""

import math
import shutil
import time
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy

from orpo_dist.config import ORPOConfig
from orpo_dist.distributed.ranks import on_first_rank
from orpo_dist.distributed.timeouts import START_SECONDS, collectives_may_take
from orpo_dist.distributed.zero import (
    load_universal,
    mend_universal,
    safe_pickles,
    weight_decays,
    zero_stage,
)
from orpo_dist.errors import NonFiniteRun, RunStopped, SaveError, UserError
from orpo_dist.options.durations import seconds_of
from orpo_dist.packing.lengths import PairLengths
from orpo_dist.packing.sampler import FILLER
from orpo_dist.run import checkpoint as checkpoints
from orpo_dist.run.fingerprint import fingerprint, topology
from orpo_dist.run.resume import check_same_run, check_topology, checkpoint_to_resume
from orpo_dist.run.stop import StopRequests, ignore_signals
from orpo_dist.training.metrics import MetricSums
from orpo_dist.training.nonfinite import LossHistory, NonFiniteSteps
from orpo_dist.training.out_of_memory import is_out_of_memory, out_of_memory

TRAINER_STATE, METRICS = "trainer_state.json", "metrics_{}.pt"


class ResumableTrainer(Trainer):
    """The side of `ORPOTrainer` that deals with time and failure; it sets the attributes below."""

    model: Any
    args: ORPOConfig
    train_dataset: Any
    eval_dataset: Any
    _tokenizer: PreTrainedTokenizerBase
    _lengths: list[PairLengths]
    _global_batch: int
    _train_sums: MetricSums

    def _prepare_to_survive(self) -> None:
        """The end of the constructor."""
        args = self.args
        if args.save_total_limit == 1:
            args.save_total_limit = checkpoints.LEAST_KEPT
        self._run = Path(str(args.output_dir))
        limit = seconds_of(args.max_runtime) if args.max_runtime is not None else None
        self._stop = StopRequests(self._run, limit, is_first_rank=args.process_index == 0)
        self._bad_steps = NonFiniteSteps(
            self._run, args.max_nonfinite_steps, self._pair_facts, writes=args.process_index == 0
        )
        self._losses = LossHistory()
        self._staging: Path | None = None
        self._resumed: tuple[str, int] | None = None  # checkpoint and its world size
        self._step_loss = torch.zeros((), dtype=torch.float64)
        self._first_step = 1
        self._step_indices: list[int] = []
        self._last_indices: list[int] = []
        self._report = torch.zeros(2, dtype=torch.float64)
        self._refused = self._stops = False
        self._under_zero = zero_stage(self.accelerator) is not None
        self._guarded: Any = None  # the optimizer whose steps can be left out
        self._fingerprint = {
            "topology": topology(self.accelerator.distributed_type, zero_stage(self.accelerator)),
            **fingerprint(args, self.model, self.train_dataset, self._lengths, self._global_batch),
        }
        self.add_callback(_Survival(self))

    # ------------------------------------------------------------------ starting and stopping

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the beginning or from a checkpoint: a path, `auto` or True.

        Raises:
            RunStopped: somebody asked for it; a checkpoint was saved.
            NonFiniteRun: too many steps in a row could not be applied.
            SaveError: a checkpoint could not be written.
            UserError: no such checkpoint, or one of another run.
        """
        folder = self._first_rank_resumes(resume_from_checkpoint)
        with self._stop.listening(), safe_pickles() if self._under_zero else nullcontext():
            return super().train(folder, *args, **kwargs)

    def _first_rank_resumes(self, asked: str | bool | None) -> str | None:
        self._resumed, self._universal = None, False
        if not asked:
            on_first_rank(lambda: checkpoints.sweep(self._run) and None)
            return None

        def resolve() -> tuple[str, checkpoints.Manifest] | None:
            for half in checkpoints.sweep(self._run):
                print(f"Removed {half.name}, which was not finished.")
            folder = checkpoint_to_resume(asked, self._run)
            return (folder, checkpoints.read_manifest(Path(folder))) if folder is not None else None

        found = on_first_rank(resolve)
        if found is None:
            return None
        folder, manifest = found
        check_topology(manifest, self._fingerprint["topology"], self.args.world_size, folder)
        if self._under_zero:
            self._universal = manifest.world_size != self.args.world_size
            load_universal(self.accelerator, self._universal)
        check_same_run(
            manifest,
            self._fingerprint,
            allow_changed=self.args.allow_changed,
            strict_versions=self.args.strict_versions,
        )
        self._resumed = folder, manifest.world_size
        return folder

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Also the moment between wrapping the optimizer and loading a checkpoint into it."""
        if self._under_zero and optimizer is None:
            self._weight_decays = weight_decays(self.optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    # ------------------------------------------------------------------ one step

    def step_report(self, device: torch.device) -> torch.Tensor:
        """(2,) float64 that this rank adds to the all-reduce of a step: does it want to stop, and its share of the
        loss of the step before."""
        wants = torch.tensor(float(self._stop.reason() is not None), dtype=torch.float64).to(device)
        return torch.stack([wants, self._step_loss.to(device)])

    def begin_step(self, report: torch.Tensor, indices: list[int]) -> None:
        """report: (2,) the sum of `step_report` over the ranks; stays on the device. indices: this rank's pairs."""
        self._report, self._last_indices, self._step_indices = report, self._step_indices, indices
        self._step_loss = torch.zeros_like(report[1])

    def poisoned(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss of a micro-batch, with a gradient of NaN where it is no finite number.

        An infinite NLL (a logit of -inf) has a finite gradient; like this the global norm tells every rank.
        """
        value = loss.detach()
        self._step_loss = self._step_loss + value.double()
        return loss * torch.where(value.isfinite(), 1.0, torch.nan).to(loss.dtype)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        micro_batch = [index for index in inputs["orpo_layout"].index if index != FILLER]
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        except (RuntimeError, MemoryError) as error:
            if self.args.auto_find_batch_size or not is_out_of_memory(error):
                raise
            raise out_of_memory(error, self.state.global_step + 1, micro_batch, self._lengths, self.args) from error

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The one read of a step on the host: may the step be applied, and do the ranks stop after it."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        known = torch.as_tensor(norm if norm is not None else 0.0, dtype=torch.float64).to(self._report.device)
        value, stops, last_loss = torch.cat([known.reshape(1), self._report]).tolist()
        self._stops = self._stops or stops > 0
        step = self.state.global_step + 1
        usual = self._losses.add(last_loss) if self._last_indices else None
        if usual is not None:
            self._bad_steps.spike(step - 1, last_loss, usual, gather_object(self._last_indices))
        applied = math.isfinite(value) and value >= 0 and not self._zero_left_out()
        self._refused = not applied
        if applied:
            self._bad_steps.good()
        else:
            self._not_applied(step, value)
        return norm

    def _not_applied(self, step: int, norm: float) -> None:
        loss = float(self.accelerator.reduce(self._step_loss, reduction="sum"))
        if self.args.fp16 and math.isfinite(loss):
            return  # the loss scale was too high: it is halved, and the scaler or ZeRO leaves the step out
        self._bad_steps.bad(step, loss, norm, gather_object(self._step_indices))
        if self._under_zero and not self._zero_left_out():
            raise NonFiniteRun(f"DeepSpeed applied step {step} with a gradient norm of {norm}: resume from before it.")

    def _zero_left_out(self) -> bool:
        """DeepSpeed has stepped inside backward; its own flag says whether the step was applied."""
        return self._under_zero and self.accelerator.optimizer_step_was_skipped

    def _guard_optimizer(self) -> None:
        """Leave out the steps of `_refused`. A gradient scaler and ZeRO do that themselves."""
        optimizer: Any = self.optimizer
        if self._under_zero or optimizer.scaler is not None or optimizer is self._guarded:
            return
        step, self._guarded = optimizer.step, optimizer

        @wraps(step)  # with the mark that the scheduler has left on it
        def guarded(closure: Any = None) -> None:
            optimizer._is_overflow = self._refused  # the Trainer leaves the scheduler alone then
            if not self._refused:
                step(closure)

        optimizer.step = guarded

    def _pair_facts(self, index: int) -> dict[str, Any]:
        """What nonfinite_steps.jsonl says of a pair: its source row where it is known, its lengths and its texts."""
        row, pair = self.train_dataset[index], self._lengths[index]
        facts = {"row": row["row"]} if "row" in row else {}
        texts = {name: self._tokenizer.decode(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")}
        return {**facts, **{f"{name}_tokens": count for name, count in vars(pair).items()}, **texts}

    # ------------------------------------------------------------------ what is made up for after a resume

    def _evaluation_is_due(self) -> bool:
        """Whether the step of the checkpoint ends with an evaluation that the log does not have: the run was stopped
        before it, or killed between a checkpoint and the end of the epoch."""
        args, state = self.args, self.state
        if self.eval_dataset is None or any(
            event["step"] == state.global_step and any(name.startswith("eval_") for name in event)
            for event in state.log_history
        ):
            return False
        if args.eval_strategy == IntervalStrategy.STEPS:
            return state.global_step % state.eval_steps == 0 and state.global_step >= args.eval_delay
        ends_epoch = state.epoch is not None and float(state.epoch).is_integer()
        return args.eval_strategy == IntervalStrategy.EPOCH and ends_epoch and state.epoch >= args.eval_delay

    # ------------------------------------------------------------------ checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else it is not under its own name yet
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        began, run = time.monotonic(), Path(super()._get_output_dir(trial))
        staged = run / checkpoints.STAGING / f"checkpoint-{self.state.global_step}"
        on_first_rank(lambda: self._try_to_save(lambda: _empty(staged), run))
        self._staging = staged.parent
        try:
            self._try_to_save(lambda: self._write(model, trial, staged), run)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0:  # a node can only flush what it has written itself
            self._try_to_save(lambda: checkpoints.flush_tree(staged), run)
        self.accelerator.wait_for_everyone()
        published = on_first_rank(lambda: self._try_to_save(lambda: self._publish(staged, run), run))
        best = run / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and best.exists():
            self.state.best_model_checkpoint = str(best)  # on every rank: ZeRO loads the best one from all of them
        if self.args.push_to_hub:
            self._push_from_checkpoint(published)
        self._stop.saved(time.monotonic() - began)

    def _try_to_save(self, work: Any, run: Path) -> Any:
        try:
            return work()
        except Exception as error:
            reason = checkpoints.why_unwritable(error, run)
            if reason is None:
                raise
            shutil.rmtree(run / checkpoints.STAGING, ignore_errors=True)
            whole = [folder.name for folder in checkpoints.checkpoint_folders(run)]
            left = f"{whole[-1]} is whole" if whole else "there is none from before"
            raise SaveError(
                f"Cannot save checkpoint-{self.state.global_step} in {run}: {reason}. Of the earlier checkpoints, "
                f"{left}. Make room (save_total_limit keeps fewer), then --resume_from_checkpoint auto."
            ) from error

    def _write(self, model: Any, trial: Any, staged: Path) -> None:
        super()._save_checkpoint(model, trial)
        progress = {
            "sums": self._train_sums.state(),
            "tr_loss": self._tr_loss.detach().cpu(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "losses": list(self._losses.losses),
        }
        staged.mkdir(parents=True, exist_ok=True)
        torch.save(progress, staged / METRICS.format(self.args.process_index))

    def _publish(self, staged: Path, run: Path) -> str:
        if self.args.world_size > 1:
            ranks = [rank for rank in range(self.args.world_size) if not (staged / METRICS.format(rank)).exists()]
            if ranks:
                raise UserError(
                    f"The files of rank {ranks[0]} are not in {staged}: output_dir must lie on a file system that all "
                    "nodes share."
                )
        best = run / f"checkpoint-{self.state.best_global_step}" if self.state.best_global_step else None
        if best is not None and (best.exists() or best.name == staged.name):
            # Recorded under its final name; transformers has looked for it beside the unfinished one.
            self.state.best_model_checkpoint = str(best)
            self.state.save_to_json(str(staged / TRAINER_STATE))
            checkpoints.flush(staged / TRAINER_STATE)
        checkpoints.seal(staged, self.state.global_step, self.args.world_size, self._fingerprint)
        published = checkpoints.publish(staged, run)
        checkpoints.rotate(run, self.args.save_total_limit, best)
        return str(published)

    # ------------------------------------------------------------------ resuming

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._resumed is None:
            return
        if self._resumed[1] != self.args.world_size:
            # No rank has a state of its own here. The pairs of a step are the same; dropout draws anew.
            set_seed(self.args.seed + self.state.global_step * self.args.world_size + self.args.process_index)
            return
        several = self.args.world_size > 1
        file = Path(checkpoint) / (f"rng_state_{self.args.process_index}.pth" if several else "rng_state.pth")
        if not file.is_file():
            raise UserError(
                f"{file} is missing, so the run cannot go on as it was (save_only_model leaves it out). To start from "
                "the checkpoint's weights alone: --model_name_or_path."
            )
        super()._load_rng_state(checkpoint)

    def _restore_metrics(self, folder: Path, world_size: int) -> None:
        """Sums since the last log line, so that the next one is that of the uninterrupted run."""
        ranks = [self.args.process_index] if world_size == self.args.world_size else list(range(world_size))
        saved = [torch.load(folder / METRICS.format(rank), weights_only=True) for rank in ranks]
        if len(ranks) == 1 or self.args.process_index == 0:
            for one in saved:
                self._train_sums.load(one["sums"], self.args.device)
        # The Trainer logs the mean over the ranks.
        self._tr_loss += torch.stack([one["tr_loss"] for one in saved]).mean(0).to(self._tr_loss.device)
        self._total_loss_scalar, self._globalstep_last_logged = saved[0]["total_loss"], saved[0]["last_logged"]
        self._losses = LossHistory()
        self._losses.losses.extend(saved[0]["losses"])


def _empty(staged: Path) -> None:
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)


class _Survival(TrainerCallback):
    """The moments of the loop at which `ResumableTrainer` acts."""

    def __init__(self, trainer: ResumableTrainer):
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._trainer
        trainer._stops = trainer._refused = False
        trainer._step_indices = []
        if trainer._resumed is not None:
            trainer._restore_metrics(Path(trainer._resumed[0]), trainer._resumed[1])
            if trainer._universal:
                mend_universal(trainer.optimizer, trainer._weight_decays)
            if trainer._evaluation_is_due():
                trainer._evaluate(None, None)
        trainer._guard_optimizer()
        collectives_may_take(max(trainer.args.ddp_timeout, START_SECONDS))
        trainer._first_step = state.global_step + 1
        trainer._stop.steps_begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer._stop.step_ends()
        if state.global_step == self._trainer._first_step:
            collectives_may_take(self._trainer.args.ddp_timeout)
        if self._trainer._stops and state.global_step < state.max_steps:
            control.should_save, control.should_evaluate = True, False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._trainer._stops and state.global_step < state.max_steps:
            ignore_signals()
            reasons = [reason for reason in gather_object([self._trainer._stop.reason()]) if reason is not None]
            folder = self._trainer._run / f"checkpoint-{state.global_step}"
            raise RunStopped(reasons[0] if reasons else "asked to", state.global_step, str(folder))
